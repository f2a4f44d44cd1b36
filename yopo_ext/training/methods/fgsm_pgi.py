"""FGSM-PGI with momentum, as its authors define it (Jia et al., ECCV 2022): one step from a start kept of each sample.

Kept across epochs, in the frame of the network's input: the start s, first at -eps or +eps per value, and the momentum mu,
first zero; both start afresh every `reset_every` epochs. With g = dL/d eta at s for the whole batch and L the cross-entropy
against labels of weight 0.6 on the true class, the rest spread evenly over the others,

    mu  <- g / ||g||_1 + decay * mu     eta = project(s + step_size * sign(g))     s <- project(s + step_size * sign(mu))

The weights minimise L(f(x + eta)) + regularisation * mean (f(x + eta) - f(x + s))^2. The start s meets the images of another
epoch's crop unprojected, as in the authors' code. `fgsm-mep` is a variant with the momentum of signs and the run's own loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from yopo_ext import validation
from yopo_ext.training.data.batches import Batch
from yopo_ext.training.methods.base import Learner, Outcome, Start, default_step, option
from yopo_ext.training.methods.fgsm_mep import FgsmMep


@dataclass(frozen=True)
class FgsmPgi(FgsmMep):
    """The options and the cost of `fgsm-mep`, and more options: the labels' smoothing, the reset, the frame."""

    name: ClassVar[str] = "fgsm-pgi"

    label_weight: float = option(0.6, "weight of the true class in the labels of attack and training loss")
    reset_every: int | None = option(40, "epochs after which what is kept starts afresh")
    frame: Literal["image", "input"] = option(
        "input", "kept perturbations move with the image's crop and flip, or stay where the network's input has them"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.label_weight <= 1.0:
            raise ValueError(f"label_weight must be in (0, 1]; got {self.label_weight}")
        if self.reset_every is not None:
            validation.integer("reset_every", self.reset_every, 1)

    @property
    def keeps(self) -> dict[str, Start]:
        return {"perturbation": "corners", "momentum": "zero"}

    def train(self, learner: Learner, batch: Batch) -> Outcome:
        x, threat = batch.x, learner.threat
        ball = threat.around(x)
        step_size = torch.tensor(default_step(self.step_size, threat, 1.0), dtype=x.dtype, device=x.device)
        start = learner.kept["perturbation"].get(batch).requires_grad_()
        before = learner.forward(x + start)
        (gradient,) = torch.autograd.grad(self._loss(before, batch.y), start, retain_graph=True)
        start, gradient = start.detach(), torch.nan_to_num(gradient, nan=0.0)

        share = gradient / gradient.abs().sum().clamp(min=torch.finfo(gradient.dtype).tiny)
        momentum = share + self.decay * learner.kept["momentum"].get(batch)
        learner.kept["momentum"].put(batch, momentum)
        learner.kept["perturbation"].put(batch, ball.ascend(start, momentum, step_size))

        logits = learner.forward(x + ball.ascend(start, gradient, step_size))
        loss = self._loss(logits, batch.y) + self.regularisation * F.mse_loss(logits, before)
        learner.backward(loss)
        learner.update()
        return Outcome(loss.detach(), logits.detach())

    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        # PyTorch's smoothing spreads its share over all classes, the true one included.
        classes = logits.shape[1]
        return F.cross_entropy(logits, y, label_smoothing=(1.0 - self.label_weight) * classes / (classes - 1))
