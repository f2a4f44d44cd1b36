"""The tables and the plot of CIFAR-10 on one CPU core, from `benchmarks/results/cifar10_small.json`.

python scripts/cifar10.py    draws docs/cifar10.png
"""

from __future__ import annotations

import json
import re
import statistics
from typing import Any

from paired import Outcomes, difference, unpacked
from tables import RESULTS, ROOT, machine, markdown

TIMES = RESULTS / "training_methods_cpu.json"
STRONGEST, WEAKER = "apgd-t", "apgd-ce"  # of the attacks that every run met


def written(method: str) -> str:
    """A method as a person writes it: steps as fractions of 255, `persist` for `persist=True`."""

    def fraction(match: re.Match[str]) -> str:
        levels = 255.0 * float(match[1])
        return f"={levels:.10g}/255" if abs(levels - round(levels, 6)) < 1e-6 else match[0]

    return re.sub(r"=(0\.\d+)", fraction, method).replace("=True", "")


class Runs:
    """All seeds of one method at one number of epochs and one learning rate."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, first = rows, rows[0]
        self.method, self.epochs, self.lr = first["method"], first["config"]["epochs"], first["config"]["lr"]
        self.units = first["cost"]["total"] * self.epochs

    @property
    def budget(self) -> int:
        """Unit-epochs, to the nearest hundred: runs of one budget are compared."""
        return 100 * round(self.units / 100)

    @property
    def images(self) -> int:
        """How many images the strongest attack was tried on."""
        return min(row["survivors"][_name(row, STRONGEST)]["images"] for row in self.rows)

    def outcomes(self, images: int) -> Outcomes:
        """By seed: which of the first images survive the strongest attack and those before it."""
        found = [row["survivors"][_name(row, STRONGEST)] for row in self.rows]
        return [unpacked(one["left"], one["images"])[:images] for one in found]

    def accuracy(self, attack: str, images: int) -> float:
        """Percent that the attack and those before it left of the first images, the mean over seeds."""
        found = [row["survivors"][_name(row, attack)] for row in self.rows]
        return statistics.fmean(
            100.0 * statistics.fmean(unpacked(one["left"], one["images"])[:images]) for one in found
        )

    def clean(self) -> float:
        return statistics.fmean(row["clean"] for row in self.rows)

    def seconds(self) -> float | None:
        """Of training: updates by the time of one, measured on a quiet machine; None if it was not measured."""
        if not TIMES.exists():
            return None
        times = {case["method"]: case["ms"] for case in json.loads(TIMES.read_text())["cases"]}
        name = self.method if self.method in times else _timed_alike(self.method, list(times))
        return None if name is None else self.rows[0]["updates"] * times[name] / 1e3


def _timed_alike(method: str, timed: list[str]) -> str | None:
    """A method that differs in the length of its step alone takes as long."""
    bare = re.sub(r":step-size=[^:]+", "", method)
    return next((name for name in timed if re.sub(r":step-size=[^:]+", "", name) == bare), None)


def _name(row: dict[str, Any], attack: str) -> str:
    return next(name for name in row["survivors"] if name.partition("@")[0] == attack)


def grouped(rows: list[dict[str, Any]]) -> tuple[list[Runs], int]:
    """By budget, the most robust first; and the number of images that the strongest attack was tried on in every run."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["config"]["epochs"], row["config"]["lr"]), []).append(row)
    found = [Runs(group) for group in groups.values()]
    images = min(one.images for one in found)
    return sorted(found, key=lambda one: (one.budget, -one.accuracy(STRONGEST, images))), images


def runs(data: dict[str, Any]) -> str:
    found, images = grouped(data["rows"])
    lines = []
    for one in found:
        best = max((o for o in found if o.budget == one.budget), key=lambda o: o.accuracy(STRONGEST, images))
        seconds = one.seconds()
        lines.append([
            f"`{written(one.method)}`", f"{one.epochs}", f"{one.units}", "not measured" if seconds is None else f"{seconds:,.0f}",
            f"{one.clean():.1f}", f"{one.accuracy(WEAKER, images):.1f}", f"{one.accuracy(STRONGEST, images):.1f}",
            "the best" if one is best else behind(best.outcomes(images), one.outcomes(images)),
        ])  # fmt: skip
    head = [
        "method",
        "epochs",
        "unit-epochs",
        "seconds",
        "clean %",
        "APGD-CE %",
        "+ APGD-T %",
        "behind the best of its budget",
    ]
    seeds = {len(one.rows) for one in found}
    many = "one seed of each" if seeds == {1} else f"{min(seeds)} to {max(seeds)} seeds of each"
    where = f"Clean on 10,000 test images, attacks on the first {images:,}; {many}; points with paired 95 % intervals"
    if TIMES.exists():
        where += f". Seconds of training on one thread: {machine(json.loads(TIMES.read_text())['environment'])}"
    return markdown(head, lines) + f"\n\n{where}."


def behind(best: Outcomes, other: Outcomes) -> str:
    distance, half = difference(best, other)
    return f"{distance:.1f} ± {half:.1f}" + (", tied" if distance <= half else "")


def trials(data: dict[str, Any]) -> str:
    """Short runs on the training split, judged on the validation split."""
    ordered = sorted(
        data["trials"], key=lambda trial: (trial["method"].partition(":")[0], trial["method"], trial["lr"])
    )
    lines = [
        [
            f"`{written(trial['method'])}`", f"{trial['lr']:g}", f"{trial['cost']['total']} x {trial['epochs']}",
            f"{trial['validation_clean']:.1f}", f"{trial['validation_pgd']:.1f}",
            "" if trial["alignment"] is None else f"{trial['alignment']:.2f}",
        ]
        for trial in ordered
    ]  # fmt: skip
    return markdown(["method", "rate", "units x epochs", "clean %", "PGD-10 %", "alignment"], lines)


def plot(data: dict[str, Any]) -> None:
    """Robust accuracy against seconds, every run a point."""
    from yopo_ext.training.comparison.plot import save_plot
    from yopo_ext.training.comparison.report import Row

    found, images = grouped(data["rows"])
    points = []
    for one in found:
        for number, row in enumerate(one.rows):
            left = 100.0 * statistics.fmean(one.outcomes(images)[number])
            seconds = one.seconds()
            if seconds is None:
                raise SystemExit(
                    f"no time of {written(one.method)} in {TIMES.name}: run benchmarks/training_methods.py"
                )
            points.append(Row(
                method=f"{short(one.method)}, {one.epochs} epochs", seeds=[row["config"]["seed"]], cost=row["cost"],
                clean=[row["clean"]], robust={WEAKER: [], STRONGEST: []}, worst=[left], images=images,
                seconds=[seconds], images_per_second=[], updates=[row["updates"]], peak_memory=None,
            ))  # fmt: skip
    save_plot(points, ROOT / "docs" / "cifar10.png", "CIFAR-10, 174,000 weights, one CPU thread")


def short(method: str) -> str:
    """The method's name and the options that tell YOPO's runs apart."""
    return written(method).replace(":train-on=last", "").replace(":persist", "").replace(":step-size=8/255", "")


if __name__ == "__main__":
    plot(json.loads((RESULTS / "cifar10_small.json").read_text()))
