"""Clean and robust accuracy of a trained model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from yopo_ext.modes import evaluating
from yopo_ext.training.adversaries import Attack, pixel_model
from yopo_ext.training.data import Split, mix_seed
from yopo_ext.training.methods.base import ThreatModel


@contextmanager
def true_fp32() -> Iterator[None]:
    """fp32 means fp32: no TF32 in convolutions and matrix products inside the block."""
    backends: tuple[Any, ...] = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    saved = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, saved, strict=True):
            backend.fp32_precision = precision


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in percent over `samples` images."""

    samples: int
    clean: float
    robust: dict[str, float]  # by attack
    worst: float  # correct under every attack tried and on the clean image

    def as_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "clean": self.clean, **self.robust, "worst": self.worst}


def evaluate(
    model: nn.Module,
    split: Split,
    threat: ThreatModel,
    attack_list: Sequence[Attack],
    *,
    seed: int = 0,
    batch_size: int = 256,
) -> Evaluation:
    """Attack every sample of `split` (on the model's device) with every attack, in evaluation mode and true fp32.

    The random starts depend on `seed`, the attack and the batch alone.
    """
    device = split.labels.device
    generator = torch.Generator(device)
    correct: dict[str, list[Tensor]] = {name: [] for name in ("clean", *(a.name for a in attack_list), "worst")}
    with evaluating(model), true_fp32():
        for number, start in enumerate(range(0, len(split), batch_size)):
            part = slice(start, start + batch_size)
            x, y = split.x(part), split.labels[part]
            worst = is_correct(model, x, y, threat)
            correct["clean"].append(worst)
            for kind, attack in enumerate(attack_list):
                generator.manual_seed(mix_seed(seed, kind, number))
                survived = is_correct(model, x + attack(model, x, y, threat, generator), y, threat)
                correct[attack.name].append(survived)
                worst = worst & survived
            correct["worst"].append(worst)
    accuracy = {name: 100.0 * torch.cat(parts).double().mean().item() for name, parts in correct.items()}
    return Evaluation(len(split), accuracy.pop("clean"), worst=accuracy.pop("worst"), robust=accuracy)


@torch.no_grad()
def is_correct(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    """Whether the model predicts y, [B] bool."""
    return pixel_model(model, threat)(x).argmax(1) == y


def alarms(robust: dict[str, float]) -> list[str]:
    """Signs, in robust accuracies in percent by attack, that gradients are masked and the accuracies too high."""
    found = []
    white_box = {name: value for name, value in robust.items() if name not in ("square", "autoattack")}
    if "square" in robust and white_box and robust["square"] < min(white_box.values()):
        found.append("Square, which needs no gradients, beats every attack that uses them")
    weak, strong = (min((v for n, v in robust.items() if n.startswith(p)), default=None) for p in ("pgd-20", "pgd-50"))
    if weak is not None and strong is not None and weak - strong > 5.0:
        found.append(f"PGD-50 leaves {weak - strong:.1f} points less than PGD-20: short attacks do not converge")
    return found
