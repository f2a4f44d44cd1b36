"""Clean and robust accuracy of a trained model."""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from yopo_ext.attacks import AdmissibleSet
from yopo_ext.model_state import evaluating
from yopo_ext.training.attacks.base import Attack, is_correct, passes_on
from yopo_ext.training.attacks.image_wise import FixedBatches, Starts
from yopo_ext.training.attacks.pgd import PgdAttack
from yopo_ext.training.data.splits import Split
from yopo_ext.training.evaluation.journal import Journal, fingerprint
from yopo_ext.training.methods.base import ThreatModel
from yopo_ext.training.run.deadline import Deadline
from yopo_ext.training.run.progress import Progress
from yopo_ext.training.run.seeds import mix_seed


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


# Images attacked at a time. A CPU gains nothing from more, and a last batch that is filled up costs less.
BATCH_SIZES = {"cpu": 32, "cuda": 256}
PROBED_SAMPLES = 64  # that are attacked to time a pass


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in percent over `samples` images, or the first so many where an attack's name says so."""

    samples: int
    clean: float
    robust: dict[str, float]  # by attack; of an evaluation of survivors: under this attack and all before it
    worst: float  # correct under every attack tried and on the clean image
    worst_samples: int  # of the images that met all of them: the first so many

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def evaluate(
    model: nn.Module,
    split: Split,
    threat: ThreatModel,
    attack_list: Sequence[Attack],
    *,
    seed: int = 0,
    batch_size: int | None = None,
) -> Evaluation:
    """Attack every sample of `split` (on the model's device) with every attack, in evaluation mode and true fp32.

    The random starts depend on `seed`, the attack and the image's place in the split alone.
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
    batch_size: int | None = None,
    survivors_only: bool = False,
    journal: Path | None = None,
    deadline: Deadline | None = None,
    title: str | None = None,
) -> Evaluation | None:
    """`evaluate`, with finished batches kept in the file `journal`; None once the `deadline` passes.

    A call attacks at least one batch, however short its time. With `survivors_only` an attack is spared the images that
    are classified wrongly already, clean or under an attack before it: `worst` is the same, because an attack's result on
    an image depends on no other image, and `robust` gives what is left after each attack. With a `title` it says how far it is.
    """
    device = split.labels.device
    size = BATCH_SIZES[device.type] if batch_size is None else batch_size
    notes = None if journal is None else Journal(journal, fingerprint(model, split, threat, seed, size))
    counts = {attack: len(split) if attack is None else attack.count(len(split)) for attack in (None, *attack_list)}
    accuracy: dict[str, float] = {}
    alive = torch.ones(len(split), dtype=torch.bool)  # classified correctly so far
    worked = False
    progress = Progress(title or "", sum(-(-count // size) for count in counts.values()), shown=title is not None)
    with evaluating(model), true_fp32(), closing(progress):
        for attack, count in counts.items():
            # Seeds and notes go by the kind: an attack on the first images does what it does to them among all.
            name, kind = ("clean", "clean") if attack is None else (attack.name, attack.kind)
            whole = attack is not None and attack.whole_batches
            label = name if whole else kind
            known = {} if notes is None else notes.known.get(label, {})
            target = model if whole else FixedBatches(model, size)
            tried = range(count) if whole or not survivors_only else alive[:count].nonzero().squeeze(1).tolist()
            correct = torch.tensor([known.get(image, False) for image in range(count)])
            correct &= torch.zeros(count, dtype=torch.bool).index_fill(0, torch.tensor(tried, dtype=torch.int64), True)
            parts = torch.tensor([image for image in tried if image not in known], dtype=torch.int64).split(size)
            parts = tuple(part for part in parts if len(part))
            progress.advance(-(-count // size) - len(parts))
            for part, x in zip(parts, split.stream([part.to(device) for part in parts]), strict=True):
                if worked and deadline is not None and deadline.passed():
                    return None
                y = split.labels[part.to(device)]
                if attack is not None:
                    ball = AdmissibleSet(x, threat.eps, threat.norm, threat.bounds)
                    starts = Starts(ball, part.to(device), mix_seed(seed, zlib.crc32(kind.encode())))
                    x = x + attack(target, x, y, threat, starts)
                correct[part] = is_correct(target, x, y, threat).cpu()
                if notes is not None:
                    notes.put(label, part, correct[part])
                worked = True
                progress.advance()
            alive[:count] &= correct
            accuracy[name] = 100.0 * (alive[:count] if survivors_only else correct).double().mean().item()
            progress.say(f"{name} {accuracy[name]:.2f} %")
    shared = min(counts.values())
    worst = 100.0 * alive[:shared].double().mean().item()
    return Evaluation(len(split), accuracy.pop("clean"), accuracy, worst, shared)


def seconds_per_pass(model: nn.Module, split: Split, threat: ThreatModel) -> float:
    """Seconds that one forward or input gradient of one image takes."""
    few, attack = split.first(PROBED_SAMPLES), PgdAttack(2)
    evaluate(model, few, threat, [attack])  # warms up
    started = time.perf_counter()
    evaluate(model, few, threat, [attack])
    return (time.perf_counter() - started) / passes_on([attack], len(few))
