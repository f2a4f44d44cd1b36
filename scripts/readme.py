"""Writes the documents' tables from the committed JSON files; `--check` fails if they differ."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from typing import Any

import cifar10
from tables import RESULTS, ROOT, machine, markdown, rows_of


def attack_columns(attacks: list[str]) -> list[str]:
    """The headings of `yopo-ext compare`, whose module needs the packages of training: each attack tries what is left."""
    return [f"{'+ ' if number else ''}{attack.upper()} %" for number, attack in enumerate(attacks)]


def comparison(data: dict[str, Any]) -> str:
    """What `yopo-ext compare` found."""

    def spread(cell: dict[str, Any]) -> str:
        values = cell["per_seed"]
        return f"{cell['mean']:.1f} ({min(values):.1f} .. {max(values):.1f})"

    def relative(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    attacks = list(data["rows"][0]["robust"])
    head = ["method", "clean %", *attack_columns(attacks), "seconds", "time / PGD-10",
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


def digits_methods(data: dict[str, Any]) -> str:
    """Accuracies and costs of every method; no seconds: the runs shared their machine with other work."""
    rows = [*data["rows"], *rows_of("digits_yopo_variants")]
    lines = [
        [
            row["method"],
            *(f"{statistics.fmean(v):.1f} ± {statistics.stdev(v):.1f}" for v in _accuracies(row)),
            str(row["cost"]["total"]),
        ]
        for row in rows
    ]
    head = ["method", "clean %", "PGD-20 %", "units per batch"]
    return markdown(head, lines) + f"\n\n{machine(data['environment'])}."


def _accuracies(row: dict[str, Any]) -> list[list[float]]:
    return [row["clean"]["per_seed"], row["robust"]["pgd-20"]["per_seed"]]


def choosing(data: dict[str, Any]) -> str:
    """The methods on digits that no cheaper one beats, each with the best of the others at no higher cost."""
    recorded = [*rows_of("digits_yopo_variants"), *rows_of("digits_methods"), *data["rows"]]
    rows = list({row["method"]: row for row in recorded}.values())  # one row a method: that of the comparison counts

    def units(row: dict[str, Any]) -> float:  # per batch of the common number of epochs
        own = re.search(r"epochs=(\d+)", row["method"])
        return row["cost"]["total"] * (int(own[1]) / data["epochs"] if own else 1.0)

    def robust(row: dict[str, Any]) -> float:
        return row["robust"]["pgd-20"]["mean"]

    lines = []
    for row in sorted(rows, key=lambda r: (units(r), -robust(r))):
        cheaper = [other for other in rows if units(other) <= units(row) and other is not row]
        if all(robust(other) < robust(row) for other in cheaper) and row["method"] != "natural":
            second = max(cheaper, key=robust)
            clean = row["clean"]["mean"]
            lines.append([f"`{row['method']}`", f"{units(row):.0f}", f"{clean:.1f} / {robust(row):.1f}",
                          f"`{second['method']}` {robust(second):.1f}"])  # fmt: skip
    return markdown(["pick", "from units per batch", "clean / PGD-20 %", "next best at that cost, PGD-20 %"], lines)


def mnist(data: dict[str, Any]) -> str:
    def accuracy(row: dict[str, Any], attack: str) -> str:
        """Of the images it was run on: all of them, or the first so many."""
        found = {
            name.partition("@")[2]: value for name, value in row["robust"].items() if name.partition("@")[0] == attack
        }
        return (
            ", ".join(f"{value:.1f}" + (f" ({images})" if images else "") for images, value in found.items())
            or "not run"
        )

    def given(config: dict[str, Any]) -> str:
        return f"{config['epochs']} epochs" if config["time_budget"] is None else f"{config['time_budget']:,.0f} s"

    tests = {"pgd-40:0.01": "PGD-40 %", "cw-40-10": "CW-40, 10 restarts %", "autoattack": "AutoAttack %"}
    head = ["method", "given", "updates", "seconds", "units per batch", "clean %", *tests.values()]
    lines = [
        [
            f"`{row['method']}`", given(row["config"]), f"{row['updates']:,}", f"{row['seconds']:,.0f}", str(row["cost"]["total"]),
            f"{row['clean']:.1f}", *(accuracy(row, attack) for attack in tests),
        ]
        for row in data["rows"]
    ]  # fmt: skip
    where = data["rows"][0]["environment"]
    return markdown(head, lines) + f"\n\n{machine(where)}, {where['threads']} thread per run, one seed."


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
    cases = [c for c in data["cases"] if "ratios" in c]
    baselines = list(cases[0]["ratios"])
    head = ["step", "ms", *baselines]
    lines = [
        [
            f"{c['case']}, B={c['batch']} (PGD-{c['pgd_steps']})",
            f"{c['variants']['yopo_step']['ms']:.0f}",
            *(f"{c['ratios'][name]['ratio']:.2f}x" for name in baselines),
        ]
        for c in cases
    ]
    cost = "".join(
        f" {c['case'].capitalize()}: {c['microseconds']['per step']:.0f} us per step and "
        f"{c['microseconds']['per pass']:.0f} us per pass above plain passes."
        for c in data["cases"]
        if "microseconds" in c
    )
    return (
        markdown(head, lines) + f"\n\n{machine(data['environment'])}, {data['environment']['threads']} threads.{cost}"
    )


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


def warp_instructions(data: dict[str, Any]) -> str:
    """Instructions of the CUDA kernels: counted in their machine code, not timed."""

    def thousands(number: float | None) -> str:
        return "" if number is None else f"{number / 1000:,.1f}"

    head = ["case", "before", "with `mask_start`", "now", "floor / copy, us", "registers, KB, blocks per SM"]
    lines = []
    for name, case in data["cases"].items():
        counts = case["warp_instructions_per_image"]
        floor = "" if case["issue_floor_us"] is None else f"{case['issue_floor_us']:.0f} / {case['copy_us']:.0f}"
        spilled = f", {case['spill_bytes']} B spilled" if case["spill_bytes"] else ""
        lines.append([
            f"{name}, B={case['batch']}", *(thousands(counts[c]) for c in ("81982b0", "with mask_start", "now")), floor,
            f"{case['registers']}, {case['shared_bytes'] / 1024:.1f}, {case['blocks_per_sm']}{spilled}",
        ])  # fmt: skip
    rate = data["processors"] * data["issues_per_clock"] * data["clock_hz"]
    return (
        markdown(head, lines)
        + f"\n\nThousands of warp instructions per image in {data['architecture']} machine code ({data['compiler']}), counted, not "
        f"timed. Floor: instructions x B / {rate / 1e9:.0f} G issues a second, which no H200 can beat; copy: the bytes that "
        f"must move at {data['copy_bytes_per_s'] / 1e12:.1f} TB/s."
    )


# marker in a document -> (JSON file, renderer)
TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "demo": ("digits_comparison", comparison),
    "choosing": ("digits_comparison", choosing),
    "mnist": ("mnist", mnist),
    "cifar10": ("cifar10_comparison", comparison),
    "cifar10_small": ("cifar10_small", cifar10.runs),
    "cifar10_trials": ("cifar10_small", cifar10.trials),
    "digits_methods": ("digits_methods", digits_methods),
    "first_layer_cpu": ("first_layer_cpu", first_layer_cpu),
    "training_step_cpu": ("training_step_cpu", training_step_cpu),
    "first_layer_gpu": ("first_layer_gpu", first_layer_gpu),
    "warp_instructions": ("warp_instructions", warp_instructions),
}


def render(readme: str) -> str:
    def table(match: re.Match[str]) -> str:
        file, renderer = TABLES[match[1]]
        path = RESULTS / f"{file}.json"
        body = renderer(json.loads(path.read_text())) if path.exists() else "Not yet measured."
        return f"<!-- table:{match[1]} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- table:(\w+) -->\n.*?<!-- end -->", table, readme, flags=re.DOTALL)


DOCUMENTS = ("README.md", "docs/kernels.md", "recipes/README.md")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    options = parser.parse_args()
    different = [d for d in DOCUMENTS if (ROOT / d).read_text() != render((ROOT / d).read_text())]
    for document in different:
        if options.check:
            print(f"{document} differs from the JSON files: run scripts/readme.py", file=sys.stderr)
        else:
            (ROOT / document).write_text(render((ROOT / document).read_text()))
    return int(options.check and bool(different))


if __name__ == "__main__":
    sys.exit(main())
