"""LIET (Pan et al., ICCV 2025): one step from a start that carries the label's own pattern, and a consistency term.

Every `pattern_every` batches, in evaluation mode, the pattern of class c is eps * sign of the gradient of L at a grey image
(0.5) labelled c. A sample starts at the pattern of its class, with a share q ~ U(low, high) of its values replaced by noise
U(-eps, eps), added or subtracted by a coin's toss per batch: a network that reads labels off perturbations is misled. Then

    u = clamp(x +- start)     v = project(u + eps * sign dL/du)     minimise L(f(v)) + t * consistency * JS(f(u), f(v))

with t the share of the run done when the epoch ends, JS the Jensen-Shannon divergence of the predictions, and L the
cross-entropy against labels of weight 1 - smoothing on the true class, the rest spread at random, anew for every call.
Beyond eps = 8/255 the noise is twice as strong and v is clipped to the pixel bounds alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from yopo_ext import validation
from yopo_ext.model_state import evaluating
from yopo_ext.training.data.batches import Batch
from yopo_ext.training.methods.base import Cost, Learner, Method, Outcome, option

WIDE = 8 / 255  # beyond this eps: stronger noise, and no clipping to the ball


@dataclass(frozen=True)
class Liet(Method):
    name: ClassVar[str] = "liet"
    norms: ClassVar[tuple[str, ...]] = ("linf",)

    smoothing: float = option(0.6, "weight of the wrong classes in the labels, spread at random")
    consistency: float = option(100.0, "weight that the divergence of the two predictions has at the end of the run")
    low: float = option(0.1, "smallest share of the start's values that noise replaces")
    high: float = option(0.5, "largest share of the start's values that noise replaces")
    pattern_every: int = option(10, "batches between two computations of the classes' patterns")

    def __post_init__(self) -> None:
        if not 0.0 <= self.smoothing < 1.0:
            raise ValueError(f"smoothing must be in [0, 1); got {self.smoothing}")
        if self.consistency < 0.0:
            raise ValueError(f"consistency must be >= 0; got {self.consistency}")
        if not 0.0 <= self.low <= self.high <= 1.0:
            raise ValueError(f"low and high must be increasing shares in [0, 1]; got {self.low} and {self.high}")
        validation.integer("pattern_every", self.pattern_every, 1)

    def cost(self) -> Cost:
        """Of a batch without new patterns: they take one image per class, 0.02 units per batch of 128 for ten classes."""
        return Cost(2, 3, 2)

    def train(self, learner: Learner, batch: Batch) -> Outcome:
        x, y, threat, generator = batch.x, batch.y, learner.threat, learner.generator
        lowest, highest = threat.bounds
        wide = threat.eps > WIDE
        if batch.number % self.pattern_every == 0:
            learner.carried["patterns"] = self._patterns(learner, x)
        replaced, noise = (torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator) for _ in range(2))
        share, coin = torch.rand(2, dtype=x.dtype, device=x.device, generator=generator)
        noise = (2.0 * noise - 1.0) * threat.eps * (2.0 if wide else 1.0)
        share = self.low + (self.high - self.low) * share
        start = torch.where(replaced < share, noise, learner.carried["patterns"][y])
        u = (x + torch.where(coin < 0.5, -start, start)).clamp(lowest, highest).requires_grad_()

        before = learner.forward(u)
        (gradient,) = torch.autograd.grad(self._loss(learner, before, y), u, retain_graph=True)
        u = u.detach() + threat.eps * torch.nan_to_num(gradient, nan=0.0).sign()
        ball = threat.around(x)
        v = u.clamp(lowest, highest) if wide else x + ball.project(u - x)
        logits = learner.forward(v)
        divergence = jensen_shannon(before, logits)
        loss = self._loss(learner, logits, y) + learner.progress * self.consistency * divergence
        learner.backward(loss)
        learner.update()
        return Outcome(loss.detach(), logits.detach())

    def _patterns(self, learner: Learner, x: Tensor) -> Tensor:
        """The pattern of every class, [classes, C, H, W]."""
        with evaluating(learner.network):
            grey = torch.full((learner.classes, *x.shape[1:]), 0.5, dtype=x.dtype, device=x.device, requires_grad=True)
            labels = torch.arange(learner.classes, device=x.device)
            loss = self._loss(learner, learner.predict(grey), labels)
            (gradient,) = torch.autograd.grad(loss, grey)
        return learner.threat.eps * torch.nan_to_num(gradient, nan=0.0).sign()

    def _loss(self, learner: Learner, logits: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy against randomly smoothed labels."""
        drawn = torch.rand(logits.shape, dtype=logits.dtype, device=logits.device, generator=learner.generator)
        wrong = drawn.scatter(1, y[:, None], 0.0)
        labels = self.smoothing * wrong / wrong.sum(1, keepdim=True)
        labels = labels.scatter(1, y[:, None], 1.0 - self.smoothing)
        return F.cross_entropy(logits, labels)


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """Mean over samples of the Jensen-Shannon divergence (nats) of two predictions given as logits [B, classes]."""
    log_p, log_q = first.log_softmax(1), second.log_softmax(1)
    log_middle = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, device=log_p.device))
    parts = [F.kl_div(log_middle, log_part, reduction="batchmean", log_target=True) for log_part in (log_p, log_q)]
    return 0.5 * (parts[0] + parts[1])
