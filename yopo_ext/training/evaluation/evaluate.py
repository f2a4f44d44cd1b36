"""Clean and robust accuracy of a trained model."""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from yopo_ext.model_state import evaluating
from yopo_ext.training.attacks.base import Attack, passes_on, verdicts
from yopo_ext.training.attacks.image_wise import FixedBatches, Starts
from yopo_ext.training.attacks.pgd import PgdAttack
from yopo_ext.training.data.splits import Split
from yopo_ext.training.evaluation.journal import Journal, fingerprint
from yopo_ext.training.evaluation.saved_images import SavedImages
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
    not_finite: int = 0  # images for which a logit was NaN or infinite, clean or attacked
    # By attack and for the clean images ("clean"), one character per image that it was tried on: "1" correct, "0" wrong, and
    # with logits that are not finite "i" and "n" for the same; "-" not tried, because an attack before it had succeeded.
    outcomes: dict[str, str] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The accuracies, JSON-ready, without the outcomes of single images."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "outcomes"}

    def by_class(self, labels: Tensor, classes: int) -> dict[str, list[float | None]]:
        """Of every class, the accuracy in percent on its clean images ("clean") and under each attack.

        None for a class of which there is no image. Images that were not tried count as wrong, as in `robust`.
        """
        found: dict[str, list[float | None]] = {}
        for name, text in self.outcomes.items():
            correct = torch.tensor([digit in "1i" for digit in text], dtype=torch.float64)
            total = torch.bincount(labels[: len(text)], minlength=classes)
            right = torch.bincount(labels[: len(text)], weights=correct, minlength=classes)
            found[name] = [100.0 * r / t if t else None for r, t in zip(right.tolist(), total.tolist(), strict=True)]
        return found


def lowest_class(by_class: dict[str, list[float | None]]) -> str:
    """The class with the lowest accuracy, clean and under each attack: "clean 3 (91.1 %), pgd-20 8 (60.0 %)"."""
    parts = []
    for name, accuracies in by_class.items():
        known = {c: value for c, value in enumerate(accuracies) if value is not None}
        lowest = min(known, key=lambda c: known[c])
        parts.append(f"{name} {lowest} ({known[lowest]:.1f} %)")
    return ", ".join(parts)


def evaluate(
    model: nn.Module,
    split: Split,
    threat: ThreatModel,
    attack_list: Sequence[Attack],
    *,
    seed: int = 0,
    batch_size: int | None = None,
    title: str | None = None,
) -> Evaluation:
    """Attack every sample of `split` (on the model's device) with every attack, in evaluation mode and true fp32.

    The random starts depend on `seed`, the attack and the image's place in the split alone. With a `title` it says how far it
    is, but no results.
    """
    found = evaluate_in_parts(
        model, split, threat, attack_list, seed=seed, batch_size=batch_size, title=title, announced=False
    )
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
    announced: bool = True,
    images: SavedImages | None = None,
) -> Evaluation | None:
    """`evaluate`, with finished batches kept in the file `journal`; None once the `deadline` passes.

    A call attacks at least one batch, however short its time. With `survivors_only` an attack is spared the images that
    are classified wrongly already, clean or under an attack before it: `worst` is the same, because an attack's result on
    an image depends on no other image, and `robust` gives what is left after each attack.
    With a `title` it says how far it is and, if `announced`, what each attack leaves. `images` keeps the attacked images.
    """
    device = split.labels.device
    size = BATCH_SIZES[device.type] if batch_size is None else batch_size
    notes = None if journal is None else Journal(journal, fingerprint(model, split, threat, seed, size))
    counts = {attack: len(split) if attack is None else attack.count(len(split)) for attack in (None, *attack_list)}
    accuracy: dict[str, float] = {}
    outcomes: dict[str, str] = {}
    odd: set[int] = set()  # images with logits that are not finite
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
            if images is not None and attack is not None:  # an image that is not written is attacked again
                known = {image: value for image, value in known.items() if images.has(label, image)}
            target = model if whole else FixedBatches(model, size)
            tried = range(count) if whole or not survivors_only else alive[:count].nonzero().squeeze(1).tolist()
            correct = torch.tensor([known.get(image, False) for image in range(count)], dtype=torch.bool)
            finite = torch.ones(count, dtype=torch.bool)
            finite[[image for image in (notes.not_finite.get(label, ()) if notes else ()) if image < count]] = False
            correct &= torch.zeros(count, dtype=torch.bool).index_fill(0, torch.tensor(tried, dtype=torch.int64), True)
            parts = torch.tensor([image for image in tried if image not in known], dtype=torch.int64).split(size)
            parts = tuple(part for part in parts if len(part))
            progress.advance(-(-count // size) - len(parts))
            for part, x in zip(parts, split.stream([part.to(device) for part in parts]), strict=True):
                if worked and deadline is not None and deadline.passed():
                    return None
                y = split.labels[part.to(device)]
                if attack is not None:
                    ball = threat.around(x)
                    starts = Starts(ball, part.to(device), mix_seed(seed, zlib.crc32(kind.encode())))
                    clean, x = x, x + attack(target, x, y, threat, starts)
                    if images is not None:
                        images.put(label, part, clean, x, y)
                right, known_logits = verdicts(target, x, y, threat)
                correct[part], finite[part] = right.cpu(), known_logits.cpu()
                if notes is not None:
                    notes.put(label, part, correct[part], finite[part])
                worked = True
                progress.advance()
            outcomes[name] = _digits(correct, finite, tried)
            odd.update((~finite).nonzero().squeeze(1).tolist())
            alive[:count] &= correct
            accuracy[name] = 100.0 * (alive[:count] if survivors_only else correct).double().mean().item()
            if announced:
                progress.say(f"{name} {accuracy[name]:.2f} %")
    shared = min(counts.values())
    worst = 100.0 * alive[:shared].double().mean().item()
    return Evaluation(len(split), accuracy.pop("clean"), accuracy, worst, shared, len(odd), outcomes)


def _digits(correct: Tensor, finite: Tensor, tried: Iterable[int]) -> str:
    digits = ["-"] * len(correct)
    for image in tried:
        digits[image] = ("n0", "i1")[bool(correct[image])][bool(finite[image])]
    return "".join(digits)


def seconds_per_pass(model: nn.Module, split: Split, threat: ThreatModel) -> float:
    """Seconds that one forward or input gradient of one image takes."""
    few, attack = split.first(PROBED_SAMPLES), PgdAttack(2)
    evaluate(model, few, threat, [attack])  # warms up
    started = time.perf_counter()
    evaluate(model, few, threat, [attack])
    return (time.perf_counter() - started) / passes_on([attack], len(few))
