"""N-FGSM (de Jorge et al., 2022): one step from stronger noise, and the sum is not clipped to the ball."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from yopo_ext.training.data.batches import Batch
from yopo_ext.training.methods.base import (
    Cost,
    Learner,
    Method,
    Outcome,
    default_step,
    option,
    train_on,
)


@dataclass(frozen=True)
class NFgsm(Method):
    name: ClassVar[str] = "n-fgsm"
    norms: ClassVar[tuple[str, ...]] = ("linf",)

    step_size: float | None = option(None, "length of the step, in pixel units (default: eps)")
    noise: float = option(2.0, "half width of the uniform noise, in units of eps")
    bn_mode: Literal["eval", "train"] = option("train", "mode of the model during the attack")

    def __post_init__(self) -> None:
        if self.noise < 0:
            raise ValueError(f"noise must be >= 0; got {self.noise}")

    def cost(self) -> Cost:
        return Cost(2, 2, 1)

    def train(self, learner: Learner, batch: Batch) -> Outcome:
        eps, x = learner.threat.eps, batch.x
        step_size = default_step(self.step_size, learner.threat, 1.0)
        draw = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=learner.generator)
        lowest, highest = learner.threat.bounds
        noisy = (x + (2.0 * draw - 1.0) * (self.noise * eps)).clamp(lowest, highest)
        # A ball around the noisy image just large enough for the step: only the pixel bounds clip.
        step = learner.attack(
            noisy, batch.y, steps=1, step_size=step_size, eps=step_size, init="zero", bn_mode=self.bn_mode
        )
        return train_on(learner, noisy + step, batch.y)
