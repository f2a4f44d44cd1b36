"""Projected gradient ascent on the input, for training baselines and for evaluation.

All quantities are in the units of `x` (pixels), also when the model wants normalised inputs (`mean`, `std`). An attack
computes no weight gradient and leaves no changed mode, flag or `.grad` behind.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import validation
from .kernels import reference
from .model_state import evaluating, frozen_parameters
from .validation import Constants

__all__ = ["AdmissibleSet", "AttackResult", "margin", "pgd"]

Norm = Literal["linf", "l2"]
SampleLoss = Callable[[Tensor, Tensor], Tensor]  # (logits [B, classes], y) -> [B]


@dataclass(frozen=True)
class AttackResult:
    """What an attack found, all detached.

    Attributes:
        perturbation: [B, C, H, W], admissible: the L-inf ball exactly, the L2 ball and the bounds to rounding.
        loss: [B], the attack's loss at `perturbation`; None where no forward was spent on it.
        misclassified: [B] bool, whether the prediction at `perturbation` differs from `y`; None where no forward was
            spent on it.
    """

    perturbation: Tensor
    loss: Tensor | None = None
    misclassified: Tensor | None = None


class AdmissibleSet:
    """The perturbations allowed around x [B, C, H, W]: a ball of radius eps cut with the pixel bounds.

    L-inf: one interval per element, so projecting is one clamp. L2: the ball first, then the clamp to the box, which
    only shortens. `eps` and `bounds` as in `pgd`.
    """

    def __init__(self, x: Tensor, eps: Constants, norm: str, bounds: tuple[Constants, Constants] | None) -> None:
        self.norm = norm
        self.eps = broadcast(eps, x)
        lo, hi = (-math.inf, math.inf) if bounds is None else bounds
        radius = self.eps if norm == "linf" else torch.full_like(self.eps, math.inf)
        self.interval = reference.admissible_interval(x, radius, broadcast(lo, x), broadcast(hi, x))

    def subset(self, index: Tensor) -> AdmissibleSet:
        """The set of some samples only."""
        part = copy.copy(self)
        part.interval = reference.Interval(*(bound[index] for bound in self.interval))
        return part

    def project(self, eta: Tensor) -> Tensor:
        """The admissible perturbation next to eta."""
        if self.norm == "linf":
            return reference.project_linf(eta, self.interval)
        return reference.project_l2(eta, self.eps, self.interval)

    def uniform(self, generator: torch.Generator | None = None) -> Tensor:
        """A uniform draw from the ball (L2: uniform direction, radius u^(1/d) * eps), projected."""
        like = self.interval.a
        if self.norm == "linf":
            noise = torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator)
            return self.project(noise.mul_(2.0).sub_(1.0).mul_(self.eps))
        noise = torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)
        radius = torch.rand(like.shape[0], dtype=like.dtype, device=like.device, generator=generator)
        radius = self.eps * radius.pow_(1.0 / max(math.prod(like.shape[1:]), 1))
        return self.project(reference.l2_direction(noise) * radius[:, None, None, None])

    def ascend(self, eta: Tensor, gradient: Tensor, step_size: Tensor) -> Tensor:
        """One projected step of steepest ascent; where the gradient is NaN or zero eta stays admissible and unmoved."""
        if self.norm == "linf":
            return self.project(eta + step_size * torch.nan_to_num(gradient, nan=0.0).sign_())
        return self.project(eta + step_size * reference.l2_direction(gradient))


def broadcast(value: Constants, x: Tensor) -> Tensor:
    """`value` in x's dtype, on its device: one number as a scalar, one per channel as [C, 1, 1]."""
    constant = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    return constant.squeeze() if constant.numel() == 1 else constant[:, None, None]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy per sample, [B]."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """The best other logit minus the true one, [B] (Carlini and Wagner); positive where misclassified."""
    true = logits.gather(1, y[:, None]).squeeze(1)
    return logits.scatter(1, y[:, None], -math.inf).amax(1) - true


LOSSES: dict[str, SampleLoss] = {"ce": cross_entropy, "margin": margin}


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: Constants,
    step_size: Constants,
    steps: int,
    restarts: int = 1,
    loss: Literal["ce", "margin"] | SampleLoss = "ce",
    norm: Norm = "linf",
    bounds: tuple[Constants, Constants] | None = (0.0, 1.0),
    init: Literal["uniform", "zero"] | Tensor = "uniform",
    bn_mode: Literal["eval", "train"] = "eval",
    keep: Literal["last", "best"] = "last",
    mean: Constants | None = None,
    std: Constants | None = None,
    generator: torch.Generator | None = None,
    validate: bool | None = None,
) -> AttackResult:
    """Raise the loss of `model` by projected gradient steps on a perturbation of `x`.

    One restart that keeps its last iterate costs `steps` forwards and `steps` input gradients and nothing else; each
    restart costs one forward more when `restarts` > 1 or `keep="best"`. With `bn_mode="eval"` a restart attacks only
    the samples that are still classified correctly.

    Args:
        model: called as model(u), or model((u - mean) / std); returns logits [B, classes].
        x: inputs [B, C, H, W], float32 or float64, inside `bounds`.
        y: class labels [B], int64. With a callable `loss`: whatever that takes, first dimension B.
        eps: radius of the ball, >= 0, in x's units; a number, or one per channel with norm="linf".
        step_size: length of one step, >= 0, likewise.
        steps: gradient steps per restart, >= 0.
        restarts: random starts, >= 1. Per sample a misclassified perturbation wins, among equals the larger loss.
        loss: "ce", "margin" (see `margin`), or a callable (logits, y) -> [B], to be raised.
        norm: "linf" or "l2".
        bounds: lowest and highest pixel value; None: unbounded.
        init: "uniform" in the ball, "zero", or a perturbation [B, C, H, W] taken as it is.
        bn_mode: "eval": the whole model is in evaluation mode; "train": every submodule stays in the mode it is in.
        keep: the "last" iterate of each restart, or the "best" of all its iterates.
        mean, std: the model's input normalisation, in x's units; numbers or one per channel.
        generator: source of the random starts, on x's device.
        validate: whether to check the values of x and y; None: on CPU.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what is allowed.
    """
    check_labels = _check(
        model, x, y, eps, step_size, bounds, norm, loss, init, mean, std, generator, validate
    )  # fmt: skip
    validation.integer("steps", steps, 0)
    validation.integer("restarts", restarts, 1)
    validation.choice("bn_mode", bn_mode, ("eval", "train"))
    validation.choice("keep", keep, ("last", "best"))
    if restarts > 1 and not (isinstance(init, str) and init == "uniform"):
        raise ValueError(f"restarts must be 1 unless init='uniform', other starts are all alike; got {restarts}")
    x = x.detach()
    ball = AdmissibleSet(x, eps, norm, bounds)
    # Drawn first, and for every sample: the draws do not depend on how the attack goes.
    starts = [_start(init, x, ball, generator) for _ in range(restarts)]
    ascent = _Ascent(
        model=model,
        step_size=broadcast(step_size, x),
        steps=steps,
        loss=LOSSES[loss] if isinstance(loss, str) else loss,
        keep=keep,
        check_labels=check_labels,
        normalisation=None if mean is None or std is None else (broadcast(mean, x), broadcast(std, x)),
    )
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(frozen_parameters(model))
        if bn_mode == "eval":
            stack.enter_context(evaluating(model))
        best = ascent.run(x, y, ball, starts[0], judge=restarts > 1 or keep == "best")
        for start in starts[1:]:
            assert best.misclassified is not None
            # In training mode a sample's neighbours matter (batch statistics): there the batch stays whole.
            left = ~best.misclassified if bn_mode == "eval" else torch.ones_like(best.misclassified)
            i = left.nonzero().squeeze(1)
            if len(i) == 0:
                break
            best = _worse_of(best, ascent.run(x[i], y[i], ball.subset(i), start[i], judge=True), i)
    return best


@dataclass(frozen=True)
class _Ascent:
    model: nn.Module
    step_size: Tensor
    steps: int
    loss: SampleLoss
    keep: str
    check_labels: bool
    normalisation: tuple[Tensor, Tensor] | None

    def logits(self, u: Tensor) -> Tensor:
        if self.normalisation is not None:
            u = (u - self.normalisation[0]) / self.normalisation[1]
        logits = self.model(u)
        return logits if logits.dtype == torch.float64 else logits.float()

    def run(self, x: Tensor, y: Tensor, ball: AdmissibleSet, eta: Tensor, *, judge: bool) -> AttackResult:
        """Ascend from eta; with `judge` the result says what the perturbation does to the model."""
        best: AttackResult | None = None
        for _ in range(self.steps):
            eta = eta.detach().requires_grad_()
            logits = self.logits(x + eta)
            if self.check_labels:
                validation.label_values(y, logits.shape[1], ignore_index=0)  # 0 is a class: none is ignored
            losses = self.loss(logits, y)
            # Summed, not averaged: a sample's gradient must not shrink as the batch grows.
            (gradient,) = torch.autograd.grad(losses.sum(), eta)
            if self.keep == "best":
                best = _best_of(best, eta, y, logits, losses)
            eta = ball.ascend(eta.detach(), gradient, self.step_size)
        if not judge:
            return AttackResult(eta)
        with torch.no_grad():
            logits = self.logits(x + eta)
            return _best_of(best, eta, y, logits, self.loss(logits, y))


def _best_of(best: AttackResult | None, eta: Tensor, y: Tensor, logits: Tensor, losses: Tensor) -> AttackResult:
    predicted = logits.detach().argmax(1)
    # A callable loss may take targets that are not labels: then only the loss decides.
    labels = y.shape == predicted.shape and not y.is_floating_point()
    wrong = predicted != y if labels else torch.zeros_like(predicted, dtype=torch.bool)
    new = AttackResult(eta.detach(), losses.detach(), wrong)
    return new if best is None else _worse_of(best, new, torch.arange(len(eta), device=eta.device))


def _worse_of(best: AttackResult, new: AttackResult, index: Tensor) -> AttackResult:
    """`best`, with its samples at `index` taken from `new` where those are worse for the model."""
    assert best.loss is not None
    assert best.misclassified is not None
    assert new.loss is not None
    assert new.misclassified is not None
    loss, wrong = best.loss[index], best.misclassified[index]
    larger = (new.loss > loss) | (loss.isnan() & ~new.loss.isnan())
    take = (new.misclassified & ~wrong) | ((new.misclassified == wrong) & larger)
    index = index[take]
    return AttackResult(
        best.perturbation.index_copy(0, index, new.perturbation[take]),
        best.loss.index_copy(0, index, new.loss[take]),
        best.misclassified.index_copy(0, index, new.misclassified[take]),
    )


def _start(init: str | Tensor, x: Tensor, ball: AdmissibleSet, generator: torch.Generator | None) -> Tensor:
    if isinstance(init, Tensor):
        return init.detach()
    return torch.zeros_like(x) if init == "zero" else ball.uniform(generator)


def _check(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: Constants,
    step_size: Constants,
    bounds: tuple[Constants, Constants] | None,
    norm: str,
    loss: str | SampleLoss,
    init: str | Tensor,
    mean: Constants | None,
    std: Constants | None,
    generator: torch.Generator | None,
    validate: bool | None,
) -> bool:
    """Raise for a bad argument; returns whether labels are still to be compared with the number of classes."""
    validation.model(model)
    validation.images(x)
    validation.same_device("x", x, model)
    channels = x.shape[1]
    _, _, lo, hi = validation.threat_model(eps, step_size, bounds, norm, channels)
    validation.normalisation(mean, std, channels)
    validation.perturbation(init, x, ("uniform", "zero"))
    validation.generator(generator, x)
    labels = not callable(loss)
    if labels:
        validation.choice("loss", loss, tuple(LOSSES))
        if validation.tensor("y", y, (len(x),), like=x).dtype != torch.int64:
            raise TypeError(f"y must be int64 class labels; got {str(y.dtype).removeprefix('torch.')}")
    elif len(y) != len(x):
        raise ValueError(f"y must have one entry per image of x ({len(x)}); got {len(y)}")
    # An attack has no first call to tell apart: on an accelerator values are looked at only when asked for.
    wanted = validation.values_wanted(validate, x, first_call=False)
    if wanted:
        validation.image_values(x, lo, hi)
        if labels and y.numel() and int(y.min()) < 0:
            raise ValueError(f"y must hold labels >= 0; got {int(y.min())}")
    return wanted and labels
