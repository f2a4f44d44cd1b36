"""TRADES with a YOPO-m-n adversary: m passes without weight gradients raise the divergence, then one update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from yopo_ext import trades_yopo_step, validation
from yopo_ext.training.data.batches import Batch
from yopo_ext.training.methods.base import Cost, Learner, Method, Outcome, default_step, option


@dataclass(frozen=True)
class TradesYopo(Method):
    name: ClassVar[str] = "trades-yopo"
    numbers: ClassVar[tuple[str, ...]] = ("outer_steps", "inner_steps")

    outer_steps: int = option(3, "m: full passes of the attack")
    inner_steps: int = option(4, "n: adversary steps in the first layer after each pass")
    step_size: float | None = option(None, "length of one step, in pixel units (default: eps / 4)")
    beta: float = option(6.0, "weight of the divergence")
    bn_mode: Literal["eval", "train"] = option("eval", "mode of the model during the attack")

    def __post_init__(self) -> None:
        validation.integer("outer_steps", self.outer_steps, 1)
        validation.integer("inner_steps", self.inner_steps, 1)
        if self.beta < 0:
            raise ValueError(f"beta must be >= 0; got {self.beta}")

    @property
    def lr_scale(self) -> float:
        return 0.5

    def cost(self) -> Cost:
        # Clean logits once for the attack, m passes, then one update through a clean and an attacked forward.
        return Cost(self.outer_steps + 3, self.outer_steps + 2, 2)

    def train(self, learner: Learner, batch: Batch) -> Outcome:
        threat = learner.threat
        with learner.autocast():
            result = trades_yopo_step(
                learner.replica,
                batch.x,
                batch.y,
                beta=self.beta,
                first_layer=learner.first_layer,
                loss_fn=learner.loss,
                outer_steps=self.outer_steps,
                inner_steps=self.inner_steps,
                eps=threat.eps,
                step_size=default_step(self.step_size, threat, 0.25),
                norm=threat.norm,
                bounds=threat.bounds,
                mean=threat.mean,
                std=threat.std,
                bn_mode=self.bn_mode,
                backward=learner.backward,
                generator=learner.generator,
            )
        learner.update()
        return Outcome(result.loss, result.logits)
