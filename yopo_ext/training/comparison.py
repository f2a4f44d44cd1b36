"""Several methods, the same seeds, the same data, the same evaluation: what robustness costs with each."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from yopo_ext.training.checkpoint import MetricsFile, write_json
from yopo_ext.training.config import CompareConfig, TrainConfig, resolve
from yopo_ext.training.data import Dataset
from yopo_ext.training.datasets import dataset_of
from yopo_ext.training.environment import environment
from yopo_ext.training.evaluation import evaluate, parse_attack
from yopo_ext.training.report import Row, save_plot, table
from yopo_ext.training.trainer import Trainer


def plan(config: CompareConfig) -> list[TrainConfig]:
    """Every run of the comparison, resolved, in the order it is made.

    Seeds are the outer loop, and each seed starts with another method: a machine that slows down or heats up in the
    course of the comparison slows every method alike.

    Raises:
        ValueError, TypeError: naming the field, what it was and what is allowed.
    """
    for name in ("methods", "seeds", "test_attacks"):
        values = getattr(config, name)
        if len(values) == 0 or len(set(values)) != len(values):
            raise ValueError(f"{name} must be a list without repetitions, at least one long; got {list(values)}")
    for attack in config.test_attacks:
        parse_attack(attack)
    runs = []
    for turn, seed in enumerate(config.seeds):
        shift = turn % len(config.methods)
        for method in (*config.methods[shift:], *config.methods[:shift]):
            out = str(Path(config.train.out) / folder_name(method) / f"seed-{seed}") if config.train.out else None
            runs.append(resolve(dataclasses.replace(config.train, method=method, seed=seed, out=out))[0])
    return runs


def compare(config: CompareConfig, *, shown: bool = True) -> list[Row] | None:
    """Train and test every method with every seed; write results, table and plot under `config.train.out`.

    Returns None if `config.train.stop_after` ended it early; with `resume="auto"` the same call goes on from there.

    Writes metrics.jsonl (one line per run), comparison.json (the table with its environment), comparison.txt,
    accuracy-time.png, and one folder per run.
    """
    runs = plan(config)
    deadline = None if config.train.stop_after is None else time.monotonic() + config.train.stop_after
    out = Path(config.train.out) if config.train.out else None
    metrics = None if out is None else MetricsFile(out / "metrics.jsonl")
    done = {} if metrics is None else {(r["method"], r["seed"]): r for r in metrics.read()}
    if done and config.train.resume == "never":
        raise ValueError(f"out must be a folder without a comparison unless resume is 'auto'; {out} holds one")
    dataset = dataset_of(config.train)
    records: list[dict[str, Any]] = []
    for run in runs:
        record = done.get((run.method, run.seed))
        if record is None:
            record = run_and_test(run, dataset, config.test_attacks, deadline, shown=shown)
            if record is None:
                return None
            if metrics is not None:
                metrics.append(record)
        records.append(record)
    rows = [Row.of([r for r in records if r["method"] == m]) for m in dict.fromkeys(r["method"] for r in records)]
    order = [resolve(dataclasses.replace(config.train, method=m))[0].method for m in config.methods]
    rows.sort(key=lambda row: order.index(row.method))
    if out is not None:
        where = environment()
        write_json(
            out / "comparison.json",
            {
                "dataset": runs[0].dataset,
                "eps": runs[0].eps,
                "norm": runs[0].norm,
                "epochs": runs[0].epochs,
                "seeds": list(config.seeds),
                "environment": where,
                "rows": [row.as_dict(rows) for row in rows],
            },
        )
        (out / "comparison.txt").write_text(table(rows) + "\n")
        save_plot(rows, out / "accuracy-time.png", title=f"{runs[0].dataset}, {runs[0].norm} {runs[0].eps:.4g}")
    return rows


def run_and_test(
    run: TrainConfig, dataset: Dataset, test_attacks: Sequence[str], deadline: float | None, *, shown: bool = True
) -> dict[str, Any] | None:
    """Train once and attack the selected weights on the test split; None if the deadline passed before."""
    trainer = Trainer(run, dataset=dataset, shown=shown)
    result = trainer.fit(deadline)
    if result is None:
        return None
    attacks = [parse_attack(a) for a in test_attacks]
    found = evaluate(result.network, result.dataset.test, trainer.learner.threat, attacks, seed=run.seed)
    cost = result.method.cost()
    samples = trainer.at.batches * trainer.source.batch_size * trainer.fabric.world_size
    cuda = trainer.device.type == "cuda"
    return {
        "method": run.method,
        "seed": run.seed,
        "clean": found.clean,
        "robust": found.robust,
        "test_samples": found.samples,
        "seconds": result.seconds,
        "updates": result.updates,
        "images_per_second": samples / result.seconds,
        "peak_memory_mib": torch.cuda.max_memory_allocated(trainer.device) / 2**20 if cuda else None,
        "cost": {**dataclasses.asdict(cost), "total": cost.total},
        "selected": result.validation,
        "curve": trainer.at.curve,
    }


def folder_name(method: str) -> str:
    """A method's text as a folder name."""
    return method.replace(":", "_").replace("=", "-")
