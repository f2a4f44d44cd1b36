"""YOPO-m-n (Zhang et al., 2019): m full passes, each followed by n adversary steps inside the first layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from yopo_ext import validation, yopo_step
from yopo_ext.training.data import Batch
from yopo_ext.training.methods.base import Cost, Learner, Method, Outcome, default_step, option


@dataclass(frozen=True)
class Yopo(Method):
    name: ClassVar[str] = "yopo"
    numbers: ClassVar[tuple[str, ...]] = ("outer_steps", "inner_steps")

    outer_steps: int = option(5, "m: full passes per batch")
    inner_steps: int = option(3, "n: adversary steps in the first layer after each pass")
    step_size: float | None = option(None, "length of one step, in pixel units (default: eps / 4)")
    gradient: Literal["paper", "released", "full"] = option("paper", "which gradient the weights get")
    update_every: Literal["batch", "pass"] = option("batch", "update the weights once per batch or after every pass")
    train_on: Literal["all", "last"] = option("all", "passes that yield weight gradients")
    persist: bool = option(False, "keep each sample's perturbation across epochs")

    def __post_init__(self) -> None:
        validation.integer("outer_steps", self.outer_steps, 1)
        validation.integer("inner_steps", self.inner_steps, 1)
        if self.update_every == "pass" and self.train_on == "last":
            raise ValueError(
                "train_on must be 'all' with update_every='pass': the other passes yield no weight gradient"
            )

    @property
    def lr_scale(self) -> float:
        # As for Free training, which also updates after every pass: at the full rate few-pass YOPO collapses.
        return 0.2 if self.update_every == "pass" else 1.0

    def cost(self) -> Cost:
        m = self.outer_steps
        return Cost(m, m, m if self.train_on == "all" else 1)

    @property
    def keeps(self) -> tuple[str, ...]:
        return ("perturbation",) if self.persist else ()

    def train(self, learner: Learner, batch: Batch) -> Outcome:
        threat = learner.threat
        kept = learner.kept["perturbation"] if self.persist else None
        every_pass = self.update_every == "pass"
        with learner.autocast():
            result = yopo_step(
                learner.replica,
                batch.x,
                batch.y,
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
                gradient=self.gradient,
                train_on=self.train_on,
                init="uniform" if kept is None else kept.get(batch),
                backward=learner.backward,
                after_pass=(lambda j: learner.update()) if every_pass else None,
                generator=learner.generator,
            )
        if not every_pass:
            learner.update()
        if kept is not None:
            kept.put(batch, result.perturbation)
        return Outcome(result.loss, result.logits)
