"""Adversarial training with k steps of projected gradient descent (Madry et al., 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from yopo_ext import validation
from yopo_ext.training.data.batches import Batch
from yopo_ext.training.methods.base import Cost, Learner, Method, Outcome, default_step, option, train_on


@dataclass(frozen=True)
class Pgd(Method):
    name: ClassVar[str] = "pgd"
    numbers: ClassVar[tuple[str, ...]] = ("steps",)

    steps: int = option(10, "gradient steps of the attack")
    step_size: float | None = option(None, "length of one step, in pixel units (default: eps / 4)")
    init: Literal["uniform", "zero"] = option("uniform", "where the attack starts")
    bn_mode: Literal["eval", "train"] = option("eval", "mode of the model during the attack")

    def __post_init__(self) -> None:
        validation.integer("steps", self.steps, 1)

    def cost(self) -> Cost:
        return Cost(self.steps + 1, self.steps + 1, 1)

    def train(self, learner: Learner, batch: Batch) -> Outcome:
        eta = learner.attack(
            batch.x,
            batch.y,
            steps=self.steps,
            step_size=default_step(self.step_size, learner.threat, 0.25),
            init=self.init,
            bn_mode=self.bn_mode,
        )
        return train_on(learner, batch.x + eta, batch.y)
