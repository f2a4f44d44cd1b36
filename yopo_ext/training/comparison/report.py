"""The comparison's table, and what is seen in it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

REFERENCE = "pgd-10"  # times and costs are also given relative to this method, where it is in the table


@dataclass(frozen=True)
class Row:
    """One method over all seeds; accuracies in percent."""

    method: str
    clean: list[float]
    robust: dict[str, list[float]]  # by attack: correct under it and those before it
    worst: list[float]  # correct under all of them
    images: int  # that met all of them
    seconds: list[float]
    images_per_second: list[float]
    updates: list[int]
    peak_memory: float | None  # MiB on the GPU, the highest of all seeds; None on a CPU
    cost: dict[str, int]
    seeds: list[int]

    @classmethod
    def of(cls, records: Sequence[dict[str, Any]]) -> Row:
        """From the records of one method's runs."""
        return cls(
            method=records[0]["method"],
            clean=[r["clean"] for r in records],
            robust={attack: [r["robust"][attack] for r in records] for attack in records[0]["robust"]},
            worst=[r["worst"] for r in records],
            images=records[0]["worst_samples"],
            seconds=[r["seconds"] for r in records],
            images_per_second=[r["images_per_second"] for r in records],
            updates=[r["updates"] for r in records],
            peak_memory=max(
                (r["peak_memory_mib"] for r in records if r.get("peak_memory_mib") is not None), default=None
            ),
            cost=records[0]["cost"],
            seeds=[r["seed"] for r in records],
        )

    def as_dict(self, rows: Sequence[Row]) -> dict[str, Any]:
        """JSON-ready, with the means the table shows."""
        reference = _reference(rows)
        return {
            "method": self.method,
            "seeds": self.seeds,
            "clean": {"mean": statistics.fmean(self.clean), "per_seed": self.clean},
            "robust": {a: {"mean": statistics.fmean(v), "per_seed": v} for a, v in self.robust.items()},
            "worst": {"mean": statistics.fmean(self.worst), "per_seed": self.worst},
            "images": self.images,
            "seconds": {"mean": statistics.fmean(self.seconds), "per_seed": self.seconds},
            "images_per_second": statistics.fmean(self.images_per_second),
            "updates": {"mean": statistics.fmean(self.updates), "per_seed": self.updates},
            "peak_memory_mib": self.peak_memory,
            "cost": self.cost,
            "time_ratio": None if reference is None else _ratio(self.seconds, reference.seconds),
            "cost_ratio": None if reference is None else self.cost["total"] / reference.cost["total"],
        }


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text: accuracies (mean and standard deviation over seeds), training time, cost in units, GPU memory."""
    reference = _reference(rows)
    attacks = list(rows[0].robust)
    head = ["method", "clean %", *attack_columns(attacks), "seconds", "images/s", "units = f + i + w"]
    measured = any(row.peak_memory is not None for row in rows)
    if measured:
        head.append("peak MiB")
    if reference is not None:
        head += [f"time / {REFERENCE}", f"units / {REFERENCE}"]
    lines = [head]
    for row in rows:
        cost = row.cost
        line = [
            row.method,
            _mean_and_spread(row.clean),
            *(_mean_and_spread(row.robust[a]) for a in attacks),
            f"{statistics.fmean(row.seconds):.1f}",
            f"{statistics.fmean(row.images_per_second):.0f}",
            f"{cost['total']} = {cost['forwards']} + {cost['input_grads']} + {cost['weight_grads']}",
        ]
        if measured:
            line.append("" if row.peak_memory is None else f"{row.peak_memory:.0f}")
        if reference is not None:
            line.append(f"{_ratio(row.seconds, reference.seconds):.2f}")
            line.append(f"{cost['total'] / reference.cost['total']:.2f}")
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    text.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(text)


def attack_columns(attacks: Sequence[str]) -> list[str]:
    """The heads of the columns of accuracies: each holds what its attack and those before it leave."""
    return [f"{'+ ' if number else ''}{attack.upper()} %" for number, attack in enumerate(attacks)]


def finding(rows: Sequence[Row]) -> str:
    """One sentence: the most robust method, and the fastest of those within one standard error of it."""

    def what(row: Row) -> str:
        return f"{row.method} ({statistics.fmean(row.worst):.1f} % after {statistics.fmean(row.seconds):.1f} s of training)"

    top = max(rows, key=lambda row: statistics.fmean(row.worst))
    share = statistics.fmean(top.worst) / 100.0
    error = 100.0 * math.sqrt(share * (1.0 - share) / top.images)  # of one model on so many images
    near = [row for row in rows if statistics.fmean(row.worst) >= statistics.fmean(top.worst) - error]
    fast = min(near, key=lambda row: statistics.fmean(row.seconds))
    within = f"one standard error of {top.images} images ({error:.1f} points)"
    if fast is top:
        return f"The most robust under all attacks is {what(top)}, and none that is faster comes within {within} of it."
    return (
        f"The most robust under all attacks is {what(top)}; within {within} of it the fastest is {what(fast)}, "
        f"in {_ratio(fast.seconds, top.seconds):.2f} of its time."
    )


def _reference(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if row.method == REFERENCE), None)


def _ratio(values: Sequence[float], reference: Sequence[float]) -> float:
    return statistics.fmean(values) / statistics.fmean(reference)


def _mean_and_spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.1f}"
