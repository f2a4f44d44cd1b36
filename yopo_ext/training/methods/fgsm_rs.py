"""FGSM with a random start (Wong et al., 2020): one step, a little longer than eps, from inside the ball."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from yopo_ext.training.data.batches import Batch
from yopo_ext.training.methods.base import Cost, Learner, Method, Outcome, default_step, option, train_on


@dataclass(frozen=True)
class FgsmRs(Method):
    name: ClassVar[str] = "fgsm-rs"

    step_size: float | None = option(None, "length of the step, in pixel units (default: 1.25 eps)")
    bn_mode: Literal["eval", "train"] = option("train", "mode of the model during the attack")

    def cost(self) -> Cost:
        return Cost(2, 2, 1)

    def train(self, learner: Learner, batch: Batch) -> Outcome:
        step_size = default_step(self.step_size, learner.threat, 1.25)
        eta = learner.attack(batch.x, batch.y, steps=1, step_size=step_size, bn_mode=self.bn_mode)
        return train_on(learner, batch.x + eta, batch.y)
