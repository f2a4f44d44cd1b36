"""FGSM-MEP, a variant of `fgsm-pgi`: one step from the momentum of the sample's past perturbations, with a regulariser.

Per sample, across epochs: the momentum mu of gradient signs, and the start s. With g = sign(dL/d eta) at s,

    mu  <- decay * mu + g              eta = project(s + step_size * g)          s <- project(s + step_size * sign(mu))

The weights minimise CE(f(x + eta), y) + regularisation * mean (f(x + eta) - f(x + s))^2.
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
    Start,
    default_step,
    option,
)


@dataclass(frozen=True)
class FgsmMep(Method):
    """The forward at the start serves attack and regulariser alike: 2 forwards, 3 input and 2 weight gradients."""

    name: ClassVar[str] = "fgsm-mep"
    norms: ClassVar[tuple[str, ...]] = ("linf",)

    step_size: float | None = option(None, "length of the step, in pixel units (default: eps)")
    decay: float = option(0.3, "momentum kept from epoch to epoch")
    regularisation: float = option(10.0, "weight of the squared change of the logits")

    def __post_init__(self) -> None:
        for name in ("decay", "regularisation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0; got {getattr(self, name)}")

    @property
    def lr_scale(self) -> float:
        return 0.5

    def cost(self) -> Cost:
        return Cost(2, 3, 2)

    @property
    def keeps(self) -> dict[str, Start]:
        return {"perturbation": "uniform", "momentum": "zero"}

    def train(self, learner: Learner, batch: Batch) -> Outcome:
        x, threat = batch.x, learner.threat
        ball = threat.around(x)
        step_size = torch.tensor(default_step(self.step_size, threat, 1.0), dtype=x.dtype, device=x.device)
        start = ball.project(learner.kept["perturbation"].get(batch)).requires_grad_()
        before = learner.forward(x + start)
        attacked = F.cross_entropy(before, batch.y, reduction="sum")
        (gradient,) = torch.autograd.grad(attacked, start, retain_graph=True)
        start = start.detach()
        eta = ball.ascend(start, gradient, step_size)

        momentum = self.decay * learner.kept["momentum"].get(batch) + torch.nan_to_num(gradient, nan=0.0).sign()
        learner.kept["momentum"].put(batch, momentum)
        learner.kept["perturbation"].put(batch, ball.ascend(start, momentum, step_size))

        logits = learner.forward(x + eta)
        loss = learner.loss(logits, batch.y) + self.regularisation * F.mse_loss(logits, before)
        learner.backward(loss)
        learner.update()
        return Outcome(loss.detach(), logits.detach())
