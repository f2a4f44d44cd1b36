"""What one call of `yopo_step` or `trades_yopo_step` is given, checked: model, images, labels, loss and threat model."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import validation
from .first_layer.full_pass import FullPass
from .first_layer.inspect import Inspection
from .first_layer.normalisation import Normalisation
from .first_layer.watch import FirstLayer
from .kernels.dispatch import resolve_allow_tf32
from .model_state import NonFiniteGuard, unwrapped
from .threat import ThreatModel
from .validation import Constants

LossFunction = Callable[[Any, Any], Tensor]
Forward = Callable[[nn.Module, Tensor], Any]
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(kw_only=True)
class Problem:
    """The arguments that both steps share, as `yopo_step` documents them, and what follows from them."""

    model: nn.Module
    x: Tensor
    y: Any
    first_layer: Any
    loss_fn: LossFunction
    outer_steps: int
    inner_steps: int
    threat: ThreatModel
    mean: Constants | None
    std: Constants | None
    forward: Forward | None
    backward: Callable[[Tensor], Any] | None
    after_pass: Callable[[int], Any] | None
    generator: torch.Generator | None
    on_nonfinite: str
    validate: bool | None
    mask_start: bool = False

    def __post_init__(self) -> None:
        self.wrappers = list(unwrapped(self.model)) if isinstance(self.model, nn.Module) else []
        self.model = validation.model(self.model)
        x = validation.images(self.x)
        for name, value in (("outer_steps", self.outer_steps), ("inner_steps", self.inner_steps)):
            validation.integer(name, value, 1)
        if not callable(self.loss_fn):
            raise TypeError(f"loss_fn must be callable; got {self.loss_fn!r}")
        for name in ("forward", "backward", "after_pass"):
            validation.optional_callable(name, getattr(self, name))
        validation.choice("on_nonfinite", self.on_nonfinite, ("ignore", "skip", "raise"))
        validation.generator(self.generator, x)
        dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        self.x = x if dense else x.contiguous()
        self.ball = self.threat.around(self.x)
        self.classifies = self.loss_fn is F.cross_entropy or isinstance(self.loss_fn, nn.CrossEntropyLoss)
        if self.classifies:
            validation.class_labels(self.y, x)
        self.y = validation.no_inference(self.y)
        self.trained_loss = self.loss_fn if isinstance(self.loss_fn, nn.Module) else None  # it may have parameters
        self.outer = Normalisation.given(self.mean, self.std, x.shape[1])

    def begin(self) -> None:
        """Find the first layer, look at the values of x and y, and take note of what to put back: last of all checks."""
        inspection = Inspection(
            self.model, self.wrappers, self.forward or _call, self.first_layer, self.x, self.ball, self.outer
        )
        found = inspection.verdict()
        self.look_at_values = validation.values_wanted(self.validate, self.x, inspection.new)
        if self.look_at_values:
            validation.image_values(self.x, *self.ball.bounds_as_given)
        self._check_labels(found)
        self.full_pass = FullPass(
            self.model, self.forward or _call, self.x, self.ball, self.inner_steps, self.mask_start, self.outer,
            self.backward, resolve_allow_tf32(None), inspection, found,
        )  # fmt: skip
        self.guard = NonFiniteGuard(self.model, self.trained_loss, self.on_nonfinite)

    def warn_of_optimizers_in_hooks(self) -> None:
        """Several passes accumulate into `.grad`: an optimizer that steps as soon as a gradient is there steps m times."""
        base = self.wrappers[-1]
        if self.outer_steps == 1 or self.after_pass is not None or base in _warned:
            return
        if any(p._post_accumulate_grad_hooks for p in self.full_pass.inspection.parameters):
            _warned.add(base)
            warnings.warn(
                f"post-accumulate-grad hooks of the model run in each of the {self.outer_steps} passes, with gradients of one "
                f"pass: an optimizer in such a hook takes {self.outer_steps} small steps; use after_pass for updates after "
                f"every pass",
                UserWarning,
                stacklevel=4,
            )

    def start(self, init: str | Tensor, project: bool) -> Tensor:
        """eta_0, laid out as x; not projected on the bounds if `project` is off."""
        init = validation.perturbation(init, self.x, ("uniform", "zero"))
        if isinstance(init, Tensor):
            return self._laid_out(init)
        if init == "zero":
            return torch.zeros_like(self.x)
        ball = self.ball if project else self.ball.without_bounds()
        return self._laid_out(ball.uniform(self.generator))

    def small_start(self, init: str | Tensor, deviation: float) -> Tensor:
        """The start for TRADES, whose divergence has zero gradient at eta = 0: projected Gaussian noise, or a tensor."""
        init = validation.perturbation(init, self.x, ("normal",), why="the divergence has no gradient at a zero start")
        if isinstance(init, Tensor):
            if self.look_at_values and init.numel() > 0 and not bool(init.any()):
                raise ValueError("init must not be all zero: the divergence has no gradient there")
            return self._laid_out(init)
        noise = torch.randn(self.x.shape, dtype=self.x.dtype, device=self.x.device, generator=self.generator)
        return self._laid_out(self.ball.project(deviation * noise))

    def _laid_out(self, eta: Tensor) -> Tensor:
        return eta if eta.stride() == self.x.stride() else torch.empty_like(self.x).copy_(eta)

    def objective(self, output: Any) -> Tensor:
        """loss_fn of a model output."""
        return self.loss_fn(output, self.y)

    def _check_labels(self, found: FirstLayer) -> None:
        """The inspection showed how many classes there are."""
        if not self.classifies or found.logits is None:
            return
        validation.label_shape(self.y, *found.logits)
        if self.look_at_values:
            validation.label_values(self.y, found.logits[0], getattr(self.loss_fn, "ignore_index", -100))


def _call(model: nn.Module, u: Tensor) -> Any:
    return model(u)
