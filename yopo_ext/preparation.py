"""What every step does before its first pass: check the arguments, start the perturbation, watch the labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import validation
from .attacks import AdmissibleSet
from .first_layer.full_pass import Passes
from .first_layer.fused_node import normalised, threat_tensor
from .first_layer.normalisation import Normalisation
from .guard import NonFiniteGuard
from .kernels.constants import NORMS

LossFunction = Callable[[Any, Any], Tensor]


class Preparation:
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
        self.trained_loss = loss_fn if isinstance(loss_fn, nn.Module) else nn.Identity()  # it may have parameters
        self.classifies = loss_fn is F.cross_entropy or isinstance(loss_fn, nn.CrossEntropyLoss)
        if self.classifies:
            validation.class_labels(y, x)
        validation.same_device("x", x, model)
        self.passes = Passes(
            model, first_layer, self.x, steps=inner_steps, threat=threat_tensor(step_values, eps_values, lo, hi),
            norm=NORMS[norm], normalisation=normalisation, backward=backward,
        )  # fmt: skip
        self.look_at_values = validation.values_wanted(validate, x, self.passes.is_new)
        if self.look_at_values:
            validation.image_values(x, lo, hi)
        self._check_labels(self.passes.logits)
        self.guard = NonFiniteGuard(model, self.trained_loss, on_nonfinite)

    def start(self, init: str | Tensor, project: bool) -> Tensor:
        """eta_0, laid out as x."""
        init = validation.perturbation(init, self.x, ("uniform", "zero"))
        if isinstance(init, Tensor):
            return self._laid_out(init)
        return (
            torch.zeros_like(self.x) if init == "zero" else self._laid_out(self._ball(project).uniform(self.generator))
        )

    def small_start(self, init: str | Tensor, deviation: float) -> Tensor:
        """eta_0 where zero has no gradient: "normal" of this standard deviation, projected, or a tensor."""
        init = validation.perturbation(init, self.x, ("normal",), why="the divergence has no gradient at a zero start")
        if isinstance(init, Tensor):
            if self.look_at_values and init.numel() > 0 and not bool(init.any()):
                raise ValueError("init must not be all zero: the divergence has no gradient there")
            return self._laid_out(init)
        noise = torch.randn(self.x.shape, dtype=self.x.dtype, device=self.x.device, generator=self.generator)
        return self._laid_out(self._ball(True).project(deviation * noise))

    def _ball(self, bounded: bool) -> AdmissibleSet:
        # Filled in on the device: copies from the host would wait for it.
        eps, _, lo, hi = (
            self.x.new_full((), v[0]) if len(v) == 1 else torch.stack([self.x.new_full((), c) for c in v])
            for v in self.threat
        )
        return AdmissibleSet(self.x, eps, self.norm, (lo, hi) if bounded else None)

    def _laid_out(self, eta: Tensor) -> Tensor:
        return eta if eta.stride() == self.x.stride() else torch.empty_like(self.x).copy_(eta)

    def normalised(self, u: Tensor) -> Tensor:
        """u as the model takes it."""
        return normalised(u, self.passes.normalisation.mean, self.passes.normalisation.std)

    def objective(self, output: Any) -> Tensor:
        """loss_fn of a model output."""
        self.learn_classes(output)
        return self.loss_fn(output, self.y)

    def learn_classes(self, output: Any) -> None:
        """The model's first output shows how many classes there are: check the labels against them."""
        if self.classifies and isinstance(output, Tensor) and output.dim() >= 2 and self.passes.logits is None:
            logits = (output.shape[1], output.dim())
            self._check_labels(logits)
            self.passes.logits = logits

    def _check_labels(self, logits: tuple[int, int] | None) -> None:
        if not self.classifies or logits is None:
            return
        validation.label_shape(self.y, *logits)
        if self.look_at_values:
            validation.label_values(self.y, logits[0], getattr(self.loss_fn, "ignore_index", -100))
