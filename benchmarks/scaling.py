"""How the first-layer update grows: with the inner steps, the batch, the threads and the image size."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import measure
import torch
from first_layer import Case, Inputs, ours

AFFINE = Case("affine 3->64", batch=64, channels=3, kernels=64, size=32)
RELU = dataclasses.replace(AFFINE, name="conv+ReLU 3->64", activation="relu")
CORES = os.cpu_count() or 1

# what is varied, its values, and the unit in which the cost should stay flat
SWEEPS: dict[str, tuple[Iterable[int], str]] = {
    "steps": ((1, 2, 3, 5, 10, 20), "ms"),
    "batch": ((1, 2, 4, 8, 16, 32, 64, 128, 256, 512), "ms per image"),
    "size": ((8, 16, 32, 64, 128, 224), "ns per pixel"),
    "threads": (sorted({1, 2, CORES // 2 or 1, CORES}), "ms x threads"),
}


def measured(sweep: str, case: Case, value: int, seconds: float) -> dict[str, Any]:
    if sweep == "threads":
        torch.set_num_threads(value)
    else:
        case = dataclasses.replace(case, **{sweep: value})
        if sweep == "size":  # the same number of pixels at every size
            case = dataclasses.replace(case, batch=max(1, 64 * 32 * 32 // value**2))
    inputs = Inputs.of(case, case.layout)
    times = measure.interleaved({"yopo_ext": lambda: ours(case, inputs)}, seconds)["yopo_ext"]
    torch.set_num_threads(1)
    result = measure.summary(times)
    pixels = case.batch * case.size**2
    unit = {"steps": 1.0, "batch": case.batch, "size": pixels / 1e6, "threads": 1 / value}[sweep]
    return {"sweep": sweep, "case": case.name, "value": value, **result, "per_unit": result["ms"] / unit}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    for axes, (sweep, (_, unit)) in zip(figure.subplots(2, 2).flat, SWEEPS.items(), strict=True):
        for name in dict.fromkeys(r["case"] for r in rows):
            points = [(r["value"], r["per_unit"]) for r in rows if r["sweep"] == sweep and r["case"] == name]
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(sweep)
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle("first-layer update (eta', output, weight gradient), fp32")
    figure.savefig(path, dpi=110)


def main() -> None:
    options = measure.arguments(__doc__.splitlines()[0], seconds=0.7)
    torch.set_num_threads(1)
    rows = []
    for sweep, (values, unit) in SWEEPS.items():
        for case in (AFFINE, RELU):
            for value in values:
                rows.append(measured(sweep, case, value, options.seconds))
            line = "  ".join(
                f"{r['value']}: {r['per_unit']:.3g}" for r in rows if (r["sweep"], r["case"]) == (sweep, case.name)
            )
            print(f"{case.name}, {unit} by {sweep}:  {line}", flush=True)
    measure.save("scaling_cpu", {"environment": measure.environment(), "rows": rows}, options.out)
    plot(rows, options.out / "scaling_cpu.png")


if __name__ == "__main__":
    main()
