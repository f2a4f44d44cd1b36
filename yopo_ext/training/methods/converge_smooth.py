"""ConvergeSmooth (Zhao et al., 2023): the loss at the attack's start must not leave its mean of the epoch before.

With that loss L, its mean P over the last epoch and a threshold c, the training loss gets the term w L,

    w = 1 if L - P > c,  -1 if P - L > c,  0 otherwise; 0 in the first two epochs and the last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from yopo_ext.training.data.batches import Batch
from yopo_ext.training.methods.base import Learner


class ConvergeSmooth:
    """The weight w of one batch. Sum and number of the epoch's losses, and P, are carried from batch to batch."""

    def __init__(self, learner: Learner, batch: Batch, threshold: float) -> None:
        self.threshold = threshold
        # [sum over the epoch, number of batches, mean of the epoch before]
        self.carried = learner.carried.setdefault("losses", torch.zeros(3, dtype=torch.float64, device=batch.x.device))
        if batch.number == 0:
            mean = self.carried[0] / self.carried[1].clamp(min=1.0)
            self.carried.copy_(torch.stack([torch.zeros_like(mean), torch.zeros_like(mean), mean]))
        self.active = batch.epoch >= 2 and learner.progress < 1.0

    def weight(self, loss: Tensor) -> Tensor:
        """w for this loss (a scalar without graph), which is counted in the epoch's mean."""
        self.carried[0] += loss
        self.carried[1] += 1.0
        change = loss - self.carried[2].to(loss.dtype)
        return change.sign() * (change.abs() > self.threshold) * float(self.active)
