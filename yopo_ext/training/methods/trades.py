"""TRADES (Zhang et al., 2019): clean cross-entropy plus beta times the divergence of attacked predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from yopo_ext import validation
from yopo_ext.training.data.batches import Batch
from yopo_ext.training.methods.base import Cost, Learner, Method, Outcome, default_step, logits_before, option

START = 1e-3  # standard deviation of the attack's start: at zero the divergence has no gradient


@dataclass(frozen=True)
class Trades(Method):
    name: ClassVar[str] = "trades"
    numbers: ClassVar[tuple[str, ...]] = ("steps",)

    steps: int = option(10, "gradient steps of the attack")
    step_size: float | None = option(None, "length of one step, in pixel units (default: eps / 4)")
    beta: float = option(6.0, "weight of the divergence")
    bn_mode: Literal["eval", "train"] = option("eval", "mode of the model during the attack")

    def __post_init__(self) -> None:
        validation.integer("steps", self.steps, 1)
        if self.beta < 0:
            raise ValueError(f"beta must be >= 0; got {self.beta}")

    @property
    def lr_scale(self) -> float:
        return 0.5

    def cost(self) -> Cost:
        # Clean logits once for the attack; then one update through a clean and an attacked forward.
        return Cost(self.steps + 3, self.steps + 2, 2)

    def train(self, learner: Learner, batch: Batch) -> Outcome:
        x, threat = batch.x, learner.threat
        clean = logits_before(learner, x, self.bn_mode).log_softmax(1)
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=learner.generator)
        eta = learner.attack(
            x,
            clean,
            loss=divergence,
            steps=self.steps,
            step_size=default_step(self.step_size, threat, 0.25),
            init=threat.around(x).project(START * noise),
            bn_mode=self.bn_mode,
        )
        logits, attacked = learner.forward(x), learner.forward(x + eta)
        loss = learner.loss(logits, batch.y) + self.beta * divergence(attacked, logits.log_softmax(1)).mean()
        learner.backward(loss)
        learner.update()
        return Outcome(loss.detach(), attacked.detach())


def divergence(logits: Tensor, log_reference: Tensor) -> Tensor:
    """KL(reference || softmax(logits)) per sample, [B]; with log targets, which have no NaN gradient at zero."""
    return F.kl_div(logits.log_softmax(1), log_reference, reduction="none", log_target=True).sum(1)
