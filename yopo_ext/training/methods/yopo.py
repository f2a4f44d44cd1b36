"""YOPO-m-n (Zhang et al., 2019): m full passes, each followed by n adversary steps inside the first layer.

Perturbations kept across epochs (`persist`) are moved by the costate of every pass, that of the last one included: what
the training pass yields anyway moves the start of the next epoch, and no pass is spent on it.

`smooth` adds ConvergeSmooth's term (Zhao et al., 2023) to the loss L_m of the last pass. With the mean L of the losses of the
passes before, and its mean P over the last epoch, the weights minimise

    L_m + w L        w = 1 if L - P > smooth,  -1 if P - L > smooth,  0 otherwise; 0 in the first two epochs and the last.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from yopo_ext import validation, yopo_step
from yopo_ext.threat import broadcast
from yopo_ext.training.data.batches import Batch
from yopo_ext.training.methods.base import Cost, Learner, Method, Outcome, Start, ThreatModel, default_step, option
from yopo_ext.training.methods.converge_smooth import ConvergeSmooth


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
    frame: Literal["image", "input"] = option(
        "image", "kept perturbations move with the image's crop and flip, or stay where the network's input has them"
    )
    reset_every: int | None = option(None, "epochs after which what is kept starts afresh")
    smooth: float | None = option(
        None, "threshold of ConvergeSmooth's term on the losses of the passes before the last"
    )

    def __post_init__(self) -> None:
        validation.integer("outer_steps", self.outer_steps, 1)
        validation.integer("inner_steps", self.inner_steps, 1)
        if self.update_every == "pass" and self.train_on == "last":
            raise ValueError(
                "train_on must be 'all' with update_every='pass': the other passes yield no weight gradient"
            )
        if self.reset_every is not None:
            validation.integer("reset_every", self.reset_every, 1)
            if not self.persist:
                raise ValueError(f"persist must be true with reset_every; got {self.persist}")
        if self.smooth is not None:
            if not self.smooth > 0.0:
                raise ValueError(f"smooth must be > 0; got {self.smooth}")
            if self.train_on == "last" or self.update_every == "pass" or self.outer_steps < 2:
                raise ValueError(
                    "smooth needs train_on='all', update_every='batch' and outer_steps >= 2: its term is on the losses of "
                    "the passes before the last"
                )

    def check(self, threat: ThreatModel) -> None:
        super().check(threat)
        if self.persist and self.outer_steps == 1:
            warnings.warn(
                "one pass per batch with kept perturbations trains on perturbations that were found against the last epoch's "
                "weights, never on ones found against these; set outer_steps to 2",
                stacklevel=2,
            )

    @property
    def lr_scale(self) -> float:
        # As for Free training, which also updates after every pass: at the full rate few-pass YOPO collapses.
        return 0.2 if self.update_every == "pass" else 1.0

    def cost(self) -> Cost:
        m = self.outer_steps
        return Cost(m, m, m if self.train_on == "all" else 1)

    @property
    def keeps(self) -> dict[str, Start]:
        return {"perturbation": "uniform"} if self.persist else {}

    @property
    def watches_inputs(self) -> bool:
        return self.train_on == "last" and self.outer_steps > 1

    def train(self, learner: Learner, batch: Batch) -> Outcome:
        threat = learner.threat
        kept = learner.kept["perturbation"] if self.persist else None
        every_pass = self.update_every == "pass"
        step_size = default_step(self.step_size, threat, 0.25)
        term = None if self.smooth is None else ConvergeSmooth(learner, batch, self.smooth)
        early: list[Tensor] = []  # losses of the passes before the last

        def loss_of(logits: Tensor, y: Tensor) -> Tensor:
            loss = learner.loss(logits, y)
            early.append(loss.detach())
            return loss

        def after_pass(j: int) -> None:
            if every_pass:
                learner.update()
            elif term is not None and j == self.outer_steps - 2:
                weight = term.weight(torch.stack(early).mean()) / (self.outer_steps - 1)
                for parameter in learner.network.parameters():
                    if parameter.grad is not None:
                        parameter.grad.mul_(weight)

        with learner.autocast():
            result = yopo_step(
                learner.replica,
                batch.x,
                batch.y,
                first_layer=learner.first_layer,
                loss_fn=learner.loss if term is None else loss_of,
                outer_steps=self.outer_steps,
                inner_steps=self.inner_steps,
                eps=threat.eps,
                step_size=step_size,
                norm=threat.norm,
                bounds=threat.bounds,
                mean=threat.mean,
                std=threat.std,
                gradient=self.gradient,
                train_on=self.train_on,
                init="uniform" if kept is None else kept.get(batch),
                backward=learner.backward,
                after_pass=after_pass if every_pass or term is not None else None,
                generator=learner.generator,
            )
        if not every_pass:
            learner.update()
        if kept is not None:
            kept.put(batch, result.perturbation)
        alignment = self._alignment(learner, batch, result.perturbation, step_size) if self.watches_inputs else None
        return Outcome(result.loss, result.logits, alignment)

    def _alignment(self, learner: Learner, batch: Batch, last: Tensor, step_size: float) -> Tensor | None:
        """Mean product of the signs of the gradients that the last two passes moved the perturbation by, -1..1.

        A sign is read from the move; where an end of the admissible interval stopped it, the gradient points outward.
        """
        if learner.threat.norm != "linf" or len(learner.inputs) < self.outer_steps:
            return None
        threat, x = learner.threat, batch.x
        before, attack = (self._perturbation(u, x, threat) for u in learner.inputs[-2:])
        interval = threat.around(x).interval
        middle = 0.5 * (interval.a + interval.b)

        def sign(start: Tensor, end: Tensor) -> Tensor:
            moved = (end - start).abs() > 1e-3 * step_size
            return torch.where(moved, end - start, start - middle).sign()

        return (sign(before, attack) * sign(attack, last)).mean()

    @staticmethod
    def _perturbation(u: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
        if threat.mean is not None and threat.std is not None:
            u = u * broadcast(threat.std, x) + broadcast(threat.mean, x)
        return u - x
