"""FGSM-RS with ConvergeSmooth (Zhao et al., ICCV 2023): FGSM-RS whose loss may not jump from epoch to epoch.

The attack is one step of eps from u = clamp(x + U(-eps, eps)), clipped to the pixel bounds alone. The weights minimise
L(f(u + step)) + w L(f(u)) with the weight w of `converge_smooth` for the loss L(f(u)).

The authors' code computes f(u) once for the attack and again for the term; in training mode both are the same function of the
same batch, so the first one serves for both here, and BatchNorm's running statistics see it once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from yopo_ext.training.data.batches import Batch
from yopo_ext.training.methods.base import (
    Cost,
    Learner,
    Method,
    Outcome,
    default_step,
    option,
)
from yopo_ext.training.methods.converge_smooth import ConvergeSmooth


@dataclass(frozen=True)
class FgsmRsCs(Method):
    name: ClassVar[str] = "fgsm-rs-cs"
    norms: ClassVar[tuple[str, ...]] = ("linf",)

    step_size: float | None = option(None, "length of the step, in pixel units (default: eps)")
    smooth: float | None = option(0.03, "threshold of ConvergeSmooth's term on the loss at the attack's start")

    def __post_init__(self) -> None:
        if self.smooth is None or not self.smooth > 0.0:
            raise ValueError(f"smooth must be > 0; got {self.smooth}")

    def cost(self) -> Cost:
        """Of every batch, whether or not w is 0: to look at w would make a GPU wait."""
        return Cost(2, 3, 2)

    def train(self, learner: Learner, batch: Batch) -> Outcome:
        assert self.smooth is not None
        x, threat, (lowest, highest) = batch.x, learner.threat, learner.threat.bounds
        term = ConvergeSmooth(learner, batch, self.smooth)
        draw = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=learner.generator)
        u = (x + (2.0 * draw - 1.0) * threat.eps).clamp(lowest, highest).requires_grad_()
        before = learner.forward(u)
        (gradient,) = torch.autograd.grad(F.cross_entropy(before, batch.y), u, retain_graph=True)
        step = default_step(self.step_size, threat, 1.0) * torch.nan_to_num(gradient, nan=0.0).sign()
        logits = learner.forward((u.detach() + step).clamp(lowest, highest))
        at_start = learner.loss(before, batch.y)
        loss = learner.loss(logits, batch.y) + term.weight(at_start.detach()) * at_start
        learner.backward(loss)
        learner.update()
        return Outcome(loss.detach(), logits.detach())
