"""What an attack of an evaluation is, and the model as attacks call it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from yopo_ext.threat import broadcast
from yopo_ext.training.attacks.image_wise import Starts
from yopo_ext.training.methods.base import ThreatModel


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """What is tried on a model; `samples`: only on the first so many images of the split (None: on all)."""

    whole_batches: ClassVar[bool] = False  # whether an image's result depends on the others of its batch

    samples: int | None = None

    @property
    def name(self) -> str:
        """How it is written on the command line: "pgd-20", "autoattack@1000"."""
        return self.kind if self.samples is None else f"{self.kind}@{self.samples}"

    @property
    @abstractmethod
    def kind(self) -> str:
        """The name, without the number of images."""

    @property
    @abstractmethod
    def passes(self) -> int:
        """Forwards and input gradients per image."""

    @abstractmethod
    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, starts: Starts) -> Tensor:
        """The perturbation found, [B, C, H, W]."""

    def require(self) -> None:  # noqa: B027  (most need nothing)
        """Raise ModuleNotFoundError if a package that it needs is not installed."""

    def count(self, images: int) -> int:
        """How many of a split's `images` it is tried on."""
        return images if self.samples is None else min(images, self.samples)


def passes_on(attack_list: Sequence[Attack], images: int) -> int:
    """Forwards and input gradients that `evaluate` spends on a split of so many images, all of them attacked."""
    return images + sum(attack.count(images) * (1 + attack.passes) for attack in attack_list)


def pixel_model(model: nn.Module, threat: ThreatModel) -> nn.Module:
    """The model as a function of pixels."""
    return model if threat.mean is None else _Normalised(model, threat)


@torch.no_grad()
def is_correct(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    """Whether the model predicts y, [B] bool. A prediction with NaN among its logits is wrong, whatever y is."""
    return verdicts(model, x, y, threat)[0]


@torch.no_grad()
def verdicts(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> tuple[Tensor, Tensor]:
    """(`is_correct`, whether all logits are finite), each [B] bool.

    `argmax` takes NaN for the largest value: a network of NaN alone would be right about every image of class 0.
    """
    logits = pixel_model(model, threat)(x)
    return (logits.argmax(1) == y) & ~logits.isnan().any(1), logits.isfinite().all(1)


class _Normalised(nn.Module):
    def __init__(self, model: nn.Module, threat: ThreatModel) -> None:
        super().__init__()
        assert threat.mean is not None
        assert threat.std is not None
        self.model, self.mean, self.std = model, threat.mean, threat.std

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x - broadcast(self.mean, x)) / broadcast(self.std, x))
