"""Writes the README's tables from the committed JSON files; `--check` fails if they differ."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def markdown(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def machine(environment: dict[str, Any]) -> str:
    return f"{environment['cpu']} ({environment['cores']} cores), torch {environment['torch']}, {environment['date']}"


def demo(data: dict[str, Any]) -> str:
    def spread(cell: dict[str, Any]) -> str:
        values = cell["per_seed"]
        return f"{cell['mean']:.1f} ({min(values):.1f} .. {max(values):.1f})"

    def relative(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    attacks = list(data["rows"][0]["robust"])
    head = ["method", "clean %", *(f"{a.upper()} %" for a in attacks), "seconds", "time / PGD-10",
            "units = forwards + input gradients + weight gradients", "units / PGD-10"]  # fmt: skip
    lines = []
    for row in data["rows"]:
        c = row["cost"]
        lines.append([
            row["method"], spread(row["clean"]), *(spread(row["robust"][a]) for a in attacks), f"{row['seconds']['mean']:.1f}",
            relative(row["time_ratio"]), f"{c['total']} = {c['forwards']} + {c['input_grads']} + {c['weight_grads']}",
            relative(row["cost_ratio"]),
        ])  # fmt: skip
    return markdown(head, lines) + f"\n\nMean (lowest .. highest seed). {machine(data['environment'])}."


def first_layer_cpu(data: dict[str, Any]) -> str:
    def times(case: dict[str, Any], name: str) -> str:
        return f"{case['ratios'][name]['ratio']:.1f}x"

    head = ["case", "ms", "GFLOP/s", "of the core's FMA peak", "eager", "collapsed", "compiled"]
    lines = [
        [f"{c['case']}, B={c['batch']}", f"{c['variants']['yopo_ext']['ms']:.2f}", f"{c['gflops']:.0f}",
         f"{c['fraction_of_peak']:.0%}", *(times(c, name) for name in ("eager", "collapsed", "compiled"))]
        for c in data["cases"]
    ]  # fmt: skip
    return markdown(head, lines) + f"\n\n{machine(data['environment'])}, {data['environment']['isa']}."


def training_step_cpu(data: dict[str, Any]) -> str:
    baselines = list(data["cases"][0]["ratios"])
    head = ["step", "ms", *baselines]
    lines = [
        [
            f"{c['case']}, B={c['batch']} (PGD-{c['pgd_steps']})",
            f"{c['variants']['yopo_step']['ms']:.0f}",
            *(f"{c['ratios'][name]['ratio']:.2f}x" for name in baselines),
        ]
        for c in data["cases"]
    ]
    return markdown(head, lines) + f"\n\n{machine(data['environment'])}, {data['environment']['threads']} threads."


def first_layer_gpu(data: dict[str, Any]) -> str:
    baselines = ("eager", "collapsed", "compiled", "graph")
    head = ["case", "us", *baselines, "time / copy"]
    lines = [
        [
            f"{c['case']}, B={c['batch']}",
            f"{c['us']['yopo_ext, graph']:.0f}",
            *(f"{c['ratios'][name]:.1f}x" if name in c["ratios"] else "" for name in baselines),
            f"{c['ratios']['copy']:.2f}",
        ]
        for c in data["cases"]
    ]
    where = data["environment"]
    return markdown(head, lines) + f"\n\n{where['gpu']}, torch {where['torch']}, {where['date']}."


# marker in the README -> (JSON file, renderer)
TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "demo": ("digits_comparison", demo),
    "first_layer_cpu": ("first_layer_cpu", first_layer_cpu),
    "training_step_cpu": ("training_step_cpu", training_step_cpu),
    "first_layer_gpu": ("first_layer_gpu", first_layer_gpu),
}


def render(readme: str) -> str:
    def table(match: re.Match[str]) -> str:
        file, renderer = TABLES[match[1]]
        path = RESULTS / f"{file}.json"
        body = renderer(json.loads(path.read_text())) if path.exists() else "Not yet measured."
        return f"<!-- table:{match[1]} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- table:(\w+) -->\n.*?<!-- end -->", table, readme, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    options = parser.parse_args()
    path = ROOT / "README.md"
    written = path.read_text()
    rendered = render(written)
    if options.check:
        if written != rendered:
            print("README.md differs from the JSON files: run scripts/readme.py", file=sys.stderr)
        return int(written != rendered)
    path.write_text(rendered)
    return 0


if __name__ == "__main__":
    sys.exit(main())
