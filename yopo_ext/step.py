"""One training step of YOPO (`yopo_step`) and of TRADES with a YOPO adversary (`trades_yopo_step`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import validation
from .attacks import AdmissibleSet
from .constants import NORMS
from .first_layer import Normalisation
from .guard import NonFiniteGuard
from .modes import frozen_parameters
from .passes import Passes, PassResult
from .validation import Constants


class StepResult(NamedTuple):
    """What a step computed; everything detached, nothing read back from the device.

    Attributes:
        loss: scalar, of the last pass (`trades_yopo_step`: of the update), not divided by the number of passes.
        losses: [outer_steps], the loss that each pass met, in order.
        logits: the model's output in the last pass (`trades_yopo_step`: at the perturbed input of the update).
        perturbation: [B, C, H, W], eta after the last inner step, in the units of x.
    """

    loss: Tensor
    losses: Tensor
    logits: Any
    perturbation: Tensor


LossFunction = Callable[[Any, Any], Tensor]


class _Step:
    """The checked arguments that `yopo_step` and `trades_yopo_step` share, and what follows from them."""

    def __init__(
        self, model, x, y, *, first_layer, loss_fn, outer_steps, inner_steps, eps, step_size, norm, bounds, mean, std,
        backward, after_pass, generator, on_nonfinite, validate,
    ) -> None:  # fmt: skip
        validation.model(model)
        x = validation.images(x)
        for name, value in (("outer_steps", outer_steps), ("inner_steps", inner_steps)):
            validation.integer(name, value, 1)
        for name, value in (("loss_fn", loss_fn), ("backward", backward), ("after_pass", after_pass)):
            if not callable(value) and (name == "loss_fn" or value is not None):
                raise TypeError(f"{name} must be callable; got {value!r}")
        validation.choice("on_nonfinite", on_nonfinite, ("ignore", "skip", "raise"))
        validation.generator(generator, x)
        self.threat = validation.threat_model(eps, step_size, bounds, norm, x.shape[1])
        normalisation = Normalisation(*validation.normalisation(mean, std, x.shape[1]))
        eps_values, step_values, lo, hi = self.threat
        dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        self.x = x if dense else x.contiguous()
        self.y, self.norm, self.loss_fn = y, norm, loss_fn
        self.generator = generator
        self.classifies = loss_fn is F.cross_entropy or isinstance(loss_fn, nn.CrossEntropyLoss)
        if self.classifies:
            validation.class_labels(y, x)
        validation.same_device("x", x, model)
        self.passes = Passes(
            model, first_layer, self.x, steps=inner_steps, threat=(step_values, eps_values, lo, hi, NORMS[norm]),
            normalisation=normalisation, backward=backward,
        )  # fmt: skip
        self.look_at_values = validation.values_wanted(validate, x, self.passes.is_new)
        if self.look_at_values:
            validation.image_values(x, lo, hi)
            self._check_labels(self.passes.classes)
        self.guard = NonFiniteGuard(model, on_nonfinite)

    def start(self, init: str | Tensor, project: bool) -> Tensor:
        """eta_0, laid out as x."""
        init = validation.perturbation(init, self.x)
        if isinstance(init, Tensor):
            eta = init
        elif init == "zero":
            return torch.zeros_like(self.x)
        else:
            eps, _, lo, hi = (v[0] if len(v) == 1 else v for v in self.threat)
            bounds = (lo, hi) if project else (-math.inf, math.inf)
            eta = AdmissibleSet(self.x, eps, self.norm, bounds).uniform(self.generator)  # type: ignore[arg-type]
        return eta if eta.stride() == self.x.stride() else torch.empty_like(self.x).copy_(eta)

    def objective(self, output: Any) -> Tensor:
        """loss_fn of a model output; the first output shows how many classes there are."""
        if self.classifies and isinstance(output, Tensor) and output.dim() >= 2 and self.passes.classes is None:
            if self.look_at_values:
                self._check_labels(output.shape[1])
            self.passes.classes = output.shape[1]
        return self.loss_fn(output, self.y)

    def _check_labels(self, classes: int | None) -> None:
        if self.classifies and classes is not None:
            validation.label_values(self.y, classes, getattr(self.loss_fn, "ignore_index", -100))


def yopo_step(
    model: nn.Module,
    x: Tensor,
    y: Any,
    *,
    first_layer: nn.Module | str | None = None,
    loss_fn: LossFunction = F.cross_entropy,
    outer_steps: int = 5,
    inner_steps: int = 3,
    eps: Constants = 8 / 255,
    step_size: Constants = 2 / 255,
    norm: Literal["linf", "l2"] = "linf",
    bounds: tuple[Constants, Constants] | None = (0.0, 1.0),
    mean: Constants | None = None,
    std: Constants | None = None,
    gradient: Literal["paper", "released", "full"] = "paper",
    reduction: Literal["mean", "sum"] | None = None,
    train_on: Literal["all", "last"] = "all",
    init: Literal["uniform", "zero"] | Tensor = "uniform",
    backward: Callable[[Tensor], Any] | None = None,
    after_pass: Callable[[int], Any] | None = None,
    generator: torch.Generator | None = None,
    on_nonfinite: Literal["ignore", "skip", "raise"] = "ignore",
    validate: bool | None = None,
) -> StepResult:
    """Accumulate into `.grad` the gradients of one YOPO-m-n step (Zhang et al., NeurIPS 2019).

    Each of the m = `outer_steps` full passes, at the perturbed input x + eta, gives the gradients of the layers above
    the first and the costate p = dL/d(first-layer output); with p fixed, n = `inner_steps` projected gradient steps on
    <p, first_layer(x + eta)> move eta. The model runs in the modes it is in, once per pass (BatchNorm statistics move m
    times). Nothing is zeroed and no optimizer is stepped; the cost is 3m units (forward = input gradient = weight
    gradient = 1), 2m + 1 with `train_on="last"`.

    Args:
        model: called as `model(u)`, u = x + eta, or (u - mean) / std if those are given. May be wrapped in torch.compile,
            DistributedDataParallel or Lightning Fabric (then give `backward=fabric.backward`). Its output must depend on the
            input through the first layer only.
        x: images [B, C, H, W], float32 or float64, within `bounds`.
        y: passed on to `loss_fn`; for cross-entropy int64 labels [B].
        first_layer: a submodule or its dotted name: a convolution, a Sequential of [normalisation,] convolution
            [, BatchNorm2d] [, activation], or any other module (through autograd, slower, said once). None: the one that a
            timm model declares, or else the first Conv2d or Linear that is executed on the input.
        loss_fn: `loss_fn(model output, y)` -> scalar, to be lowered by the weights and raised by eta.
        outer_steps, inner_steps: m >= 1, n >= 1.
        eps, step_size: radius of the ball and length of an inner step, >= 0, in the units of x; numbers or [C] (L2: numbers).
        norm: "linf" or "l2".
        bounds: (lo, hi) of a pixel, numbers or [C]; None: unbounded.
        mean, std: input normalisation, numbers or [C], std > 0.
        gradient: what the weights get from pass j. "paper": dL(x + eta_j), the first layer instead that of
            <p_j, first_layer(x + eta_{j+1})>. "full": dL(x + eta_j) everywhere. "released": "paper" and, in the first layer,
            the sum of both, as the authors' code; also starts without projecting on the bounds.
        reduction: "mean" or "sum" over the passes that train; None: "mean", for "released" "sum". Losses are reported undivided.
        train_on: "last" computes no weight gradient in the passes before the last.
        init: eta_0: "uniform" in the ball, projected; "zero"; or a tensor like x, taken as it is.
        backward: called instead of `loss.backward()`, for instance `lambda loss: scaler.scale(loss).backward()`.
        after_pass: called with j when the gradients of pass j, if it trains, are complete, reduced over processes; it may
            step and zero an optimizer (gradients are divided by m all the same: `reduction="sum"` for full ones).
        generator: for the random start, on x's device.
        on_nonfinite: a loss that is not finite: "ignore" (never looks), "skip" (`.grad` and buffers as before the
            step, or the last `after_pass`), "raise" (the same, then FloatingPointError). The latter two read one flag back.
        validate: whether to check values of x and y; None: on CPU always, on CUDA in the first call for a model.

    Returns:
        StepResult.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what is allowed; before any `.grad` or buffer changes.
        FloatingPointError: see `on_nonfinite`.
    """
    validation.choice("gradient", gradient, ("paper", "released", "full"))
    validation.choice("train_on", train_on, ("all", "last"))
    if reduction is not None:
        validation.choice("reduction", reduction, ("mean", "sum"))
    mean_over_passes = reduction == "mean" or (reduction is None and gradient != "released")
    step = _Step(
        model, x, y, first_layer=first_layer, loss_fn=loss_fn, outer_steps=outer_steps, inner_steps=inner_steps, eps=eps,
        step_size=step_size, norm=norm, bounds=bounds, mean=mean, std=std, backward=backward, after_pass=after_pass,
        generator=generator, on_nonfinite=on_nonfinite, validate=validate,
    )  # fmt: skip
    eta = step.start(init, project=gradient != "released")
    scale = 1.0 / outer_steps if mean_over_passes and train_on == "all" else 1.0
    where = {"gradient_before": gradient != "paper", "gradient_after": gradient != "full"}
    losses: list[Tensor] = []
    with torch.enable_grad():
        for j in range(outer_steps):
            last = j == outer_steps - 1
            if train_on == "all" or last:
                result = step.passes.run(
                    eta, step.objective, scale=scale, synchronise=last or after_pass is not None, **where
                )
            else:
                with frozen_parameters(model):
                    result = step.passes.run(
                        eta, step.objective, gradient_before=False, gradient_after=False, synchronise=False
                    )
            eta = result.eta
            losses.append(result.loss)
            if last or (after_pass is not None and train_on == "all"):
                if not step.guard.accepts(losses):
                    break
                if after_pass is not None:
                    after_pass(j)
                    if not last:
                        step.guard.remember()
    losses += [torch.full_like(losses[0], math.nan)] * (outer_steps - len(losses))
    return StepResult(result.loss, torch.stack(losses), result.output, eta)
