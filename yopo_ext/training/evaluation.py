"""Clean and robust accuracy of a trained model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from yopo_ext import attacks
from yopo_ext.modes import evaluating
from yopo_ext.training.data import Split, mix_seed
from yopo_ext.training.methods.base import ThreatModel


@dataclass(frozen=True)
class PgdAttack:
    """PGD as an evaluation runs it: uniform start, step eps / 4 unless given, last iterate, worst of the restarts."""

    steps: int = 20
    restarts: int = 1
    loss: Literal["ce", "margin"] = "ce"
    step_size: float | None = None

    @property
    def name(self) -> str:
        name = {"ce": "pgd", "margin": "cw"}[self.loss]
        return f"{name}-{self.steps}" + (f"-{self.restarts}" if self.restarts > 1 else "")

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator
    ) -> Tensor:
        """The perturbation found, [B, C, H, W]."""
        return attacks.pgd(
            model,
            x,
            y,
            eps=threat.eps,
            step_size=threat.eps / 4 if self.step_size is None else self.step_size,
            steps=self.steps,
            restarts=self.restarts,
            loss=self.loss,
            norm=threat.norm,
            bounds=threat.bounds,
            mean=threat.mean,
            std=threat.std,
            generator=generator,
        ).perturbation


def parse_attack(text: str) -> PgdAttack:
    """The attack written as "pgd-STEPS", "pgd-STEPS-RESTARTS", or "cw-..." for the margin loss.

    Raises:
        ValueError: for anything else.
    """
    kind, *numbers = text.strip().split("-")
    if kind not in ("pgd", "cw") or not 1 <= len(numbers) <= 2 or not all(n.isdigit() and int(n) > 0 for n in numbers):
        raise ValueError(f"attack must look like pgd-20, pgd-50-10 (steps, restarts) or cw-50-10; got {text!r}")
    restarts = int(numbers[1]) if len(numbers) == 2 else 1
    return PgdAttack(int(numbers[0]), restarts, loss="ce" if kind == "pgd" else "margin")


def passes(attack_list: Sequence[PgdAttack]) -> int:
    """Forwards and input gradients per image that `evaluate` spends with these attacks."""
    return 1 + sum(1 + 2 * a.steps * a.restarts + (a.restarts if a.restarts > 1 else 0) for a in attack_list)


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
    attack_list: Sequence[PgdAttack],
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
    if threat.mean is not None and threat.std is not None:
        x = (x - attacks.broadcast(threat.mean, x)) / attacks.broadcast(threat.std, x)
    return model(x).argmax(1) == y
