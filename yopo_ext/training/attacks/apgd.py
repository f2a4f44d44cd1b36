"""APGD (Croce and Hein, 2020): gradient ascent with momentum that halves its step wherever it stops making progress."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from yopo_ext.attacks import cross_entropy
from yopo_ext.model_state import evaluating, frozen_parameters
from yopo_ext.threat import Ball
from yopo_ext.training.attacks.base import Attack, pixel_model
from yopo_ext.training.attacks.image_wise import Starts
from yopo_ext.training.methods.base import ThreatModel

MOMENTUM = 0.75
PROGRESS = 0.75  # share of steps that must have raised the loss for the step size to stay
# Steps between checks, as shares of all steps: at first, less by, at least.
FIRST_CHECK, SHORTER, SHORTEST = 0.22, 0.03, 0.06


@dataclass(frozen=True)
class Apgd(Attack):
    """APGD with 100 steps: on cross-entropy, or on the targeted DLR loss against the nine most likely other classes."""

    targeted: bool = False
    steps: int = 100
    targets: int = 9

    @property
    def kind(self) -> str:
        return "apgd-t" if self.targeted else "apgd-ce"

    @property
    def passes(self) -> int:
        return (self.targets if self.targeted else 1) * 2 * (self.steps + 1)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, starts: Starts) -> Tensor:
        targets = self.targets if self.targeted else None
        return apgd(pixel_model(model, threat), x, y, starts.ball, starts.draw, steps=self.steps, targets=targets)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Difference of logits ratio towards `target`, [B]: (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2).

    z_(i) is the i-th largest logit. With three classes z_(3) stands in for the mean; with two nothing is scaled.
    """
    ordered = logits.sort(1, descending=True).values
    rows = torch.arange(len(y), device=y.device)
    difference = logits[rows, target] - logits[rows, y]
    if logits.shape[1] < 3:
        return difference
    low = ordered[:, 2] if logits.shape[1] == 3 else 0.5 * (ordered[:, 2] + ordered[:, 3])
    return difference / (ordered[:, 0] - low + 1e-12)


def apgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    draw: Callable[[], Tensor],
    *,
    steps: int = 100,
    targets: int | None = None,
) -> Tensor:
    """A perturbation [B, C, H, W] in `ball` that changes the prediction where one was found, else the best one.

    Args:
        model: called as model(pixels), in evaluation mode here; returns logits.
        draw: the next random start of all samples, [B, C, H, W]; called once per run.
        steps: gradient steps per run.
        targets: None raises the cross-entropy; a number runs the targeted DLR loss against that many of the most likely
            other classes, one after the other, each on the samples that are still classified correctly.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(evaluating(model))
        stack.enter_context(frozen_parameters(model))
        if targets is None:
            return _climb(model, x, y, ball, cross_entropy, steps, draw())
        with torch.no_grad():
            order = model(x).scatter(1, y[:, None], -math.inf).argsort(1, descending=True)
        eta = torch.zeros_like(x)
        for rank in range(min(targets, order.shape[1] - 1)):
            start = draw()
            with torch.no_grad():
                left = (model(x + eta).argmax(1) == y).nonzero().squeeze(1)
            if len(left) == 0:
                break
            target, labels = order[left, rank], y[left]

            def loss(logits: Tensor, y: Tensor, target: Tensor = target) -> Tensor:
                return dlr_targeted(logits, y, target)

            eta[left] = _climb(model, x[left], labels, ball.subset(left), loss, steps, start[left])
        return eta


def _climb(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    loss: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    eta: Tensor,
) -> Tensor:
    def look(eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        eta = eta.detach().requires_grad_()
        logits = model(x + eta).float()
        losses = loss(logits, y)
        (gradient,) = torch.autograd.grad(losses.sum(), eta)
        return losses.detach(), gradient, logits.detach().argmax(1) != y

    losses, gradient, wrong = look(eta)
    best, best_loss, best_gradient = eta.clone(), losses.clone(), gradient.clone()
    found, fooled = eta.clone(), wrong.clone()
    step = (2.0 * ball.eps).expand(len(x)).clone()
    before, last_loss = eta.clone(), losses
    raised = torch.zeros(len(x), device=x.device)
    kept_step = torch.zeros(len(x), dtype=torch.bool, device=x.device)  # at the last check
    best_at_check = best_loss.clone()
    interval = max(math.ceil(FIRST_CHECK * steps), 1)
    since = 0
    for number in range(steps):
        aim = ball.ascend(eta, gradient, step[:, None, None, None])
        ahead = MOMENTUM if number > 0 else 1.0
        new = ball.project(eta + ahead * (aim - eta) + (1.0 - ahead) * (eta - before))
        before, eta = eta, new
        losses, gradient, wrong = look(eta)
        raised += losses > last_loss
        last_loss = losses
        better = losses > best_loss
        best = _where(better, eta, best)
        best_gradient = _where(better, gradient, best_gradient)
        best_loss = torch.where(better, losses, best_loss)
        found, fooled = _where(wrong & ~fooled, eta, found), fooled | wrong
        since += 1
        if since == interval:
            stuck = raised < PROGRESS * interval
            stuck |= kept_step & (best_loss <= best_at_check)
            step = torch.where(stuck, 0.5 * step, step)
            eta, gradient = _where(stuck, best, eta), _where(stuck, best_gradient, gradient)
            last_loss = torch.where(stuck, best_loss, last_loss)
            before = _where(stuck, best, before)
            kept_step, best_at_check = ~stuck, best_loss.clone()
            raised.zero_()
            since, interval = 0, max(interval - math.ceil(SHORTER * steps), math.ceil(SHORTEST * steps), 1)
    return _where(fooled, found, best)


def _where(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(mask[:, None, None, None], new, old)
