"""Training without an adversary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from yopo_ext.training.data.batches import Batch
from yopo_ext.training.methods.base import Cost, Learner, Method, Outcome, train_on


@dataclass(frozen=True)
class Natural(Method):
    name: ClassVar[str] = "natural"
    # Robust accuracy is near zero throughout: choosing by it would choose the first, untrained epochs.
    selects_by: ClassVar[Literal["robust", "clean"]] = "clean"

    def cost(self) -> Cost:
        return Cost(1, 1, 1)

    def train(self, learner: Learner, batch: Batch) -> Outcome:
        return train_on(learner, batch.x, batch.y)
