"""Free adversarial training (Shafahi et al., 2019): each batch m times, each pass updating weights and perturbation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from yopo_ext import validation
from yopo_ext.training.data.batches import Batch
from yopo_ext.training.methods.base import Cost, Learner, Method, Outcome, default_step, option


@dataclass(frozen=True)
class Free(Method):
    """The perturbation carries over from batch to batch, whatever the images; it is zero once, when the run starts."""

    name: ClassVar[str] = "free"
    numbers: ClassVar[tuple[str, ...]] = ("replays",)
    replays: int = option(8, "m: passes, and weight updates, per batch")
    step_size: float | None = option(None, "length of one step, in pixel units (default: eps)")

    def __post_init__(self) -> None:
        validation.integer("replays", self.replays, 1)

    @property
    def lr_scale(self) -> float:
        return 0.2

    def cost(self) -> Cost:
        return Cost(self.replays, self.replays, self.replays)

    def train(self, learner: Learner, batch: Batch) -> Outcome:
        x, threat = batch.x, learner.threat
        ball = threat.around(x)
        step_size = torch.tensor(default_step(self.step_size, threat, 1.0), dtype=x.dtype, device=x.device)
        carried = learner.carried.get("perturbation")
        eta = torch.zeros_like(x) if carried is None else ball.project(carried)
        for _ in range(self.replays):
            eta = eta.detach().requires_grad_()
            logits = learner.forward(x + eta)
            loss = learner.loss(logits, batch.y)
            learner.backward(loss)
            assert eta.grad is not None
            eta = ball.ascend(eta.detach(), eta.grad, step_size)
            learner.update()
        learner.carried["perturbation"] = eta
        return Outcome(loss.detach(), logits.detach())
