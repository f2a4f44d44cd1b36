"""Projected gradient ascent on the input, for training baselines and for evaluation.

All quantities are in the units of `x` (pixels), also when the model wants normalised inputs (`mean`, `std`). An attack
computes no weight gradient and leaves no changed mode, flag or `.grad` behind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import validation
from .first_layer.normalisation import Normalisation
from .model_state import evaluating, frozen_parameters
from .threat import Ball, ThreatModel
from .validation import Constants

__all__ = ["AttackResult", "margin", "pgd"]

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
    targeted: bool = False,
    norm: Norm = "linf",
    bounds: tuple[Constants, Constants] | None = (0.0, 1.0),
    init: Literal["uniform", "zero"] | Tensor = "uniform",
    bn_mode: Literal["eval", "train"] = "eval",
    keep: Literal["last", "best"] = "last",
    mean: Constants | None = None,
    std: Constants | None = None,
    forward: Callable[[nn.Module, Tensor], Any] | None = None,
    generator: torch.Generator | None = None,
    validate: bool | None = None,
) -> AttackResult:
    """Raise the loss of `model` by projected gradient steps on a perturbation of `x`.

    One restart that keeps its last iterate costs `steps` forwards and `steps` input gradients and nothing else; each
    restart costs one forward more when `restarts` > 1 or `keep="best"`. With `bn_mode="eval"` and labels a restart attacks
    only the samples on which the attack has not succeeded yet.

    Args:
        model: called as model(u), or model((u - mean) / std); returns logits [B, classes] (or [B, classes, ...] with
            loss="ce" or a callable loss).
        x: inputs [B, C, H, W], float32 or float64, inside `bounds`.
        y: class labels [B], int64 ([B, ...] for logits [B, classes, ...]). With a callable `loss`: whatever that takes, first
            dimension B.
        eps: radius of the ball, >= 0, in x's units; a number, or with norm="linf" one per channel or a tensor that
            broadcasts to x.
        step_size: length of one step, >= 0, likewise.
        steps: gradient steps per restart, >= 0.
        restarts: random starts, >= 1. Per sample a perturbation that succeeds wins, among equals the larger loss; with a
            callable loss the larger loss.
        loss: "ce", "margin" (see `margin`), or a callable (logits, y) -> [B], to be raised. A callable loss is judged by its
            values alone, whatever its targets are.
        targeted: y are labels to be predicted: the loss is lowered, and a prediction of y is a success.
        norm: "linf" or "l2".
        bounds: lowest and highest pixel value; None: unbounded.
        init: "uniform" in the ball, "zero", or a perturbation [B, C, H, W] taken as it is.
        bn_mode: "eval": the whole model is in evaluation mode; "train": every submodule stays in the mode it is in.
        keep: the "last" iterate of each restart, or the "best" of all its iterates.
        mean, std: the model's input normalisation, in x's units; numbers or one per channel.
        forward: called as forward(model, u) instead of model(u), for other signatures and for outputs that hold the logits.
        generator: source of the random starts, on x's device.
        validate: whether to check the values of x and y; None: on CPU.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what is allowed.
    """
    validation.integer("steps", steps, 0)
    validation.integer("restarts", restarts, 1)
    validation.choice("bn_mode", bn_mode, ("eval", "train"))
    validation.choice("keep", keep, ("last", "best"))
    validation.optional_callable("forward", forward)
    if not isinstance(targeted, bool):
        raise TypeError(f"targeted must be True or False; got {targeted!r}")
    if targeted and callable(loss):
        raise ValueError("targeted must be False with a callable loss, which is raised whatever its targets are")
    if restarts > 1 and not (isinstance(init, str) and init == "uniform"):
        raise ValueError(f"restarts must be 1 unless init='uniform', other starts are all alike; got {restarts}")
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        model = validation.model(model)
        x, y = validation.images(x), validation.no_inference(y)
        ball = ThreatModel(eps, step_size, norm, bounds).around(x)
        check_labels = _check(model, x, y, ball, loss, init, generator, validate)
        parameters = list(model.parameters())
        if any(p.is_inference() for p in parameters):
            raise ValueError("model must not hold inference tensors: make it outside of torch.inference_mode")
        ascent = _Ascent(
            model=model,
            forward=forward,
            steps=steps,
            loss=loss if callable(loss) else None,
            kind=loss if isinstance(loss, str) else "",
            sign=-1.0 if targeted else 1.0,
            keep=keep,
            check_labels=check_labels,
            normalisation=Normalisation.given(mean, std, x.shape[1]),
            input_dtype=validation.input_dtype(x, {p.dtype for p in parameters}),
        )
        # Drawn first, and for every sample: the draws do not depend on how the attack goes.
        starts = [_start(init, x, ball, generator) for _ in range(restarts)]
        stack.enter_context(frozen_parameters(model))
        if bn_mode == "eval":
            stack.enter_context(evaluating(model))
        best = ascent.run(x, y, ball, starts[0], judge=restarts > 1 or keep == "best")
        for start in starts[1:]:
            # In training mode a sample's neighbours matter (batch statistics): there the batch stays whole.
            left = torch.ones(len(x), dtype=torch.bool, device=x.device)
            if bn_mode == "eval" and best.succeeded is not None:
                left = ~best.succeeded
            i = left.nonzero().squeeze(1)
            if len(i) == 0:
                break
            best = _worse_of(best, ascent.run(x[i], y[i], ball.subset(i), start[i], judge=True), i)
        return best.result()


@dataclass(frozen=True)
class _Found:
    """Perturbations so far, with their losses; `succeeded` is None where only the loss tells (a callable loss)."""

    perturbation: Tensor
    loss: Tensor | None = None
    predicted_wrong: Tensor | None = None
    succeeded: Tensor | None = None

    def result(self) -> AttackResult:
        return AttackResult(self.perturbation, self.loss, self.predicted_wrong)


@dataclass(frozen=True)
class _Ascent:
    model: nn.Module
    forward: Callable[[nn.Module, Tensor], Any] | None
    steps: int
    loss: SampleLoss | None
    kind: str
    sign: float
    keep: str
    check_labels: bool
    normalisation: Normalisation
    input_dtype: torch.dtype

    def logits(self, u: Tensor, labels: bool) -> Tensor:
        u = self.normalisation(u).to(self.input_dtype)
        logits = self.model(u) if self.forward is None else self.forward(self.model, u)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"model must return logits, a tensor; got {type(logits).__name__}: give forward=lambda model, u: ... that takes "
                f"them out of it"
            )
        if labels and (logits.dim() < 2 or len(logits) != len(u)):
            raise ValueError(f"model must return logits [{len(u)}, classes]; got shape {list(logits.shape)}")
        return logits if logits.dtype == torch.float64 else logits.float()

    def losses(self, logits: Tensor, y: Tensor) -> Tensor:
        """The loss per sample, to be raised."""
        if self.loss is None:
            if y.dim() != logits.dim() - 1:
                rest = "" if logits.dim() == 2 else ", ..."
                raise ValueError(
                    f"y must have shape [{len(logits)}{rest}], a label for every prediction; got {list(y.shape)}"
                )
            if self.kind == "margin" and logits.dim() > 2:
                raise ValueError("loss must be 'ce' or a callable for logits [B, classes, ...]; got 'margin'")
            losses = LOSSES[self.kind](logits, y)
            return self.sign * (losses if losses.dim() == 1 else losses.flatten(1).mean(1))
        losses = self.loss(logits, y)
        if not isinstance(losses, Tensor) or losses.shape != (len(logits),):
            got = f"shape {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"loss must return one value per sample [{len(logits)}] (reduction='none'); got {got}")
        return losses

    def run(self, x: Tensor, y: Tensor, ball: Ball, eta: Tensor, *, judge: bool) -> _Found:
        """Ascend from eta; with `judge` the result says what the perturbation does to the model."""
        best: _Found | None = None
        for _ in range(self.steps):
            eta = eta.detach().requires_grad_()
            logits = self.logits(x + eta, self.loss is None)
            if self.check_labels:
                validation.label_values(y, logits.shape[1], ignore_index=0)  # 0 is a class: none is ignored
            losses = self.losses(logits, y)
            # Summed, not averaged: a sample's gradient must not shrink as the batch grows.
            (gradient,) = torch.autograd.grad(losses.sum(), eta)
            if self.keep == "best":
                best = self._best_of(best, eta, y, logits, losses)
            eta = ball.ascend(eta.detach(), gradient)
        if not judge:
            return _Found(eta)
        with torch.no_grad():
            logits = self.logits(x + eta, self.loss is None)
            return self._best_of(best, eta, y, logits, self.losses(logits, y))

    def _best_of(self, best: _Found | None, eta: Tensor, y: Tensor, logits: Tensor, losses: Tensor) -> _Found:
        wrong = succeeded = None
        if isinstance(y, Tensor) and logits.dim() > 1 and y.shape == logits.shape[:1] and not y.is_floating_point():
            wrong = logits.detach().argmax(1) != y
            if self.loss is None:
                succeeded = wrong if self.sign > 0 else ~wrong
        new = _Found(eta.detach(), losses.detach(), wrong, succeeded)
        return new if best is None else _worse_of(best, new, torch.arange(len(eta), device=eta.device))


def _worse_of(best: _Found, new: _Found, index: Tensor) -> _Found:
    """`best`, with its samples at `index` taken from `new` where those are worse for the model."""
    assert best.loss is not None
    assert new.loss is not None
    loss = best.loss[index]
    take = (new.loss > loss) | (loss.isnan() & ~new.loss.isnan())
    if best.succeeded is not None and new.succeeded is not None:
        already = best.succeeded[index]
        take = (new.succeeded & ~already) | ((new.succeeded == already) & take)
    index = index[take]

    def merged(old: Tensor | None, other: Tensor | None) -> Tensor | None:
        return None if old is None or other is None else old.index_copy(0, index, other[take])

    perturbation = best.perturbation.index_copy(0, index, new.perturbation[take])
    return _Found(
        perturbation, merged(best.loss, new.loss), merged(best.predicted_wrong, new.predicted_wrong),
        merged(best.succeeded, new.succeeded),
    )  # fmt: skip


def _start(init: str | Tensor, x: Tensor, ball: Ball, generator: torch.Generator | None) -> Tensor:
    if isinstance(init, Tensor):
        return validation.no_inference(init).detach()
    return torch.zeros_like(x) if init == "zero" else ball.uniform(generator)


def _check(
    model: nn.Module, x: Tensor, y: Tensor, ball: Ball, loss: str | SampleLoss, init: str | Tensor,
    generator: torch.Generator | None, validate: bool | None,
) -> bool:  # fmt: skip
    """Raise for a bad argument; returns whether labels are still to be compared with the number of classes."""
    validation.same_device("x", x, model.parameters())
    validation.perturbation(init, x, ("uniform", "zero"))
    validation.generator(generator, x)
    labels = not callable(loss)
    if labels:
        validation.choice("loss", loss, tuple(LOSSES))
        if not isinstance(y, Tensor) or y.dim() == 0 or len(y) != len(x) or y.device != x.device:
            validation.tensor("y", y, (len(x),), like=x)
        if y.dtype != torch.int64:
            raise TypeError(f"y must be int64 class labels; got {str(y.dtype).removeprefix('torch.')}")
    elif len(y) != len(x):
        raise ValueError(f"y must have one entry per image of x ({len(x)}); got {len(y)}")
    # An attack has no first call to tell apart: on an accelerator values are looked at only when asked for.
    wanted = validation.values_wanted(validate, x, first_call=False)
    if wanted:
        validation.image_values(x, *ball.bounds_as_given)
        if labels and y.numel() and int(y.min()) < 0:
            raise ValueError(f"y must hold labels >= 0; got {int(y.min())}")
    return wanted and labels
