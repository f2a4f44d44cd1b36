"""PGD on the cross-entropy or the margin loss, with restarts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from yopo_ext import attacks
from yopo_ext.training.attacks.base import Attack, is_correct
from yopo_ext.training.attacks.image_wise import Starts
from yopo_ext.training.methods.base import ThreatModel


@dataclass(frozen=True)
class PgdAttack(Attack):
    """PGD as an evaluation runs it: uniform start, step eps / 4 unless given, last iterate, worst of the restarts."""

    steps: int = 20
    restarts: int = 1
    loss: Literal["ce", "margin"] = "ce"
    step_size: float | None = None

    @property
    def kind(self) -> str:
        name = {"ce": "pgd", "margin": "cw"}[self.loss]
        restarts = f"-{self.restarts}" if self.restarts > 1 else ""
        return f"{name}-{self.steps}{restarts}" + (f":{self.step_size:.10g}" if self.step_size is not None else "")

    @property
    def passes(self) -> int:
        return 2 * self.steps * self.restarts + (self.restarts if self.restarts > 1 else 0)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, starts: Starts) -> Tensor:
        eta, left = torch.zeros_like(x), torch.arange(len(x), device=x.device)
        for _ in range(self.restarts):
            eta[left] = attacks.pgd(
                model,
                x[left],
                y[left],
                eps=threat.eps,
                step_size=threat.eps / 4 if self.step_size is None else self.step_size,
                steps=self.steps,
                loss=self.loss,
                norm=threat.norm,
                bounds=threat.bounds,
                init=starts.draw()[left],
                mean=threat.mean,
                std=threat.std,
            ).perturbation
            if self.restarts > 1:
                left = left[is_correct(model, (x + eta)[left], y[left], threat)]
            if len(left) == 0:
                break
        return eta
