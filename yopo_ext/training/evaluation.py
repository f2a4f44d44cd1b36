"""Clean and robust accuracy of a trained model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from yopo_ext.modes import evaluating
from yopo_ext.training.adversaries import Attack, PgdAttack, parse_attack, pixel_model
from yopo_ext.training.checkpoint import append_line
from yopo_ext.training.data import Split, bytes_of, mix_seed
from yopo_ext.training.deadline import Deadline
from yopo_ext.training.methods.base import ThreatModel
from yopo_ext.training.progress import Progress


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
    """Accuracies in percent over `samples` images, or the first so many where an attack's name says so."""

    samples: int
    clean: float
    robust: dict[str, float]  # by attack
    worst: float  # correct under every attack tried and on the clean image
    worst_samples: int  # of the images that met all of them: the first so many

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Journal:
    """Which samples survived which attack, one line per batch in a file, so that a long evaluation can be gone on with.

    Lines count only for the same weights, samples, attacks and seed, which `fingerprint` stands for.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self.known: dict[tuple[str, int], str] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            with suppress(ValueError):  # a line that a kill cut short
                record = json.loads(line)
                if record["fingerprint"] == fingerprint:
                    self.known[record["attack"], record["batch"]] = record["correct"]

    def get(self, attack: str, batch: int, size: int) -> Tensor | None:
        found = self.known.get((attack, batch))
        return None if found is None or len(found) != size else torch.tensor([digit == "1" for digit in found])

    def put(self, attack: str, batch: int, correct: Tensor) -> None:
        text = "".join("1" if value else "0" for value in correct.tolist())
        record = {"fingerprint": self.fingerprint, "attack": attack, "batch": batch, "correct": text}
        append_line(self.path, record)


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
    found = evaluate_in_parts(model, split, threat, attack_list, seed=seed, batch_size=batch_size)
    assert found is not None
    return found


def evaluate_in_parts(
    model: nn.Module,
    split: Split,
    threat: ThreatModel,
    attack_list: Sequence[Attack],
    *,
    seed: int = 0,
    batch_size: int = 256,
    journal: Path | None = None,
    deadline: Deadline | None = None,
    title: str | None = None,
) -> Evaluation | None:
    """`evaluate`, with finished batches kept in the file `journal`; None once the `deadline` passes.

    With a `title` it says how far it is.
    """
    notes = None if journal is None else Journal(journal, fingerprint(model, split, threat, seed, batch_size))
    device = split.labels.device
    generator = torch.Generator(device)
    starts = {a: range(0, len(split) if a is None else a.count(len(split)), batch_size) for a in (None, *attack_list)}
    correct: dict[str, Tensor] = {}
    progress = Progress(title or "", sum(map(len, starts.values())), shown=title is not None)
    with evaluating(model), true_fp32(), closing(progress):
        for attack, batches in starts.items():
            # Seeds and notes go by the kind: an attack on the first images does what it does to them among all.
            name, kind = ("clean", "clean") if attack is None else (attack.name, attack.kind)
            parts = [torch.arange(s, min(s + batch_size, batches.stop), device=device) for s in batches]
            known = [None if notes is None else notes.get(kind, n, len(part)) for n, part in enumerate(parts)]
            images = split.stream([part for part, found in zip(parts, known, strict=True) if found is None])
            survivors = []
            for number, (part, survived) in enumerate(zip(parts, known, strict=True)):
                if survived is None:
                    if deadline is not None and deadline.passed():
                        return None
                    x, y = next(images), split.labels[part]
                    if attack is not None:
                        generator.manual_seed(mix_seed(seed, zlib.crc32(kind.encode()), number))
                        x = x + attack(model, x, y, threat, generator)
                    survived = is_correct(model, x, y, threat).cpu()
                    if notes is not None:
                        notes.put(kind, number, survived)
                survivors.append(survived)
                progress.advance()
            correct[name] = torch.cat(survivors).double()
            progress.say(f"{name} {100.0 * correct[name].mean().item():.2f} %")
    accuracy = {name: 100.0 * values.mean().item() for name, values in correct.items()}
    shared = min(map(len, correct.values()))
    worst = 100.0 * torch.stack([values[:shared] for values in correct.values()]).amin(0).mean().item()
    return Evaluation(len(split), accuracy.pop("clean"), accuracy, worst, shared)


def fingerprint(model: nn.Module, split: Split, threat: ThreatModel, seed: int, batch_size: int) -> str:
    """A short text that changes with anything an accuracy depends on, the attack aside."""
    digest = hashlib.sha256(repr((threat, seed, batch_size)).encode())
    for values in model.state_dict().values():
        digest.update(bytes_of(values))
    digest.update(split.identity())
    return digest.hexdigest()[:16]


@torch.no_grad()
def is_correct(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    """Whether the model predicts y, [B] bool."""
    return pixel_model(model, threat)(x).argmax(1) == y


def alarms(robust: dict[str, float]) -> list[str]:
    """Signs, in robust accuracies in percent by attack, that gradients are masked and the accuracies too high."""
    found = []
    for images in {name.partition("@")[2] for name in robust}:  # attacks on the same images
        found += _alarms({n.partition("@")[0]: value for n, value in robust.items() if n.partition("@")[2] == images})
    return found


def _alarms(robust: dict[str, float]) -> list[str]:
    found = []
    white_box = {name: value for name, value in robust.items() if name not in ("square", "autoattack")}
    if "square" in robust and white_box and robust["square"] < min(white_box.values()):
        found.append("Square, which needs no gradients, beats every attack that uses them")
    plain = {name: attack for name in robust if isinstance(attack := parse_attack(name), PgdAttack)}
    weak, strong = (
        min((robust[n] for n, a in plain.items() if a == PgdAttack(steps, a.restarts, samples=a.samples)), default=None)
        for steps in (20, 50)
    )
    if weak is not None and strong is not None and weak - strong > 5.0:
        found.append(f"PGD-50 leaves {weak - strong:.1f} points less than PGD-20: short attacks do not converge")
    return found
