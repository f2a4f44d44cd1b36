"""Several methods, the same seeds, the same data, the same evaluation: what robustness costs with each."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from yopo_ext import validation
from yopo_ext.training.attacks.registry import parse_attacks
from yopo_ext.training.comparison.plot import save_plot
from yopo_ext.training.comparison.report import Row, finding, table
from yopo_ext.training.config.resolve import check_channels, dataset_of, device_for, require_same, resolve
from yopo_ext.training.config.schema import CompareConfig, TrainConfig
from yopo_ext.training.data.batches import SplitSource
from yopo_ext.training.data.splits import Dataset
from yopo_ext.training.evaluation.evaluate import Evaluation, evaluate_in_parts
from yopo_ext.training.loop.position import DivergedError
from yopo_ext.training.loop.rehearsal import Mode
from yopo_ext.training.loop.speed import choose_mode, is_open, with_mode
from yopo_ext.training.loop.trainer import Trainer
from yopo_ext.training.models import build_model
from yopo_ext.training.numbers import parse_number
from yopo_ext.training.run.checkpoint import require_empty
from yopo_ext.training.run.deadline import Deadline
from yopo_ext.training.run.environment import environment
from yopo_ext.training.run.files import read_json, write_atomically, write_json
from yopo_ext.training.run.metrics import MetricsFile
from yopo_ext.training.torchvision_import import import_torchvision

# What a method of a list may set for itself, beside its own options.
OWN_OPTIONS: dict[str, type[int] | type[float]] = {
    "epochs": int,
    "batch_size": int,
    "lr": float,
    "weight_decay": float,
    "time_budget": float,
    "ema": float,
    "average": float,
    "label_smoothing": float,
}


def plan(config: CompareConfig) -> list[tuple[str, TrainConfig]]:
    """Every run of the comparison, resolved, with its method as written, in the order it is made.

    Seeds are the outer loop, and each seed starts with another method: a machine that slows down or heats up in the
    course of the comparison slows every method alike.

    Raises:
        ValueError, TypeError: naming the field, what it was and what is allowed.
    """
    for name in ("methods", "seeds", "test_attacks"):
        values = getattr(config, name)
        if len(values) == 0 or len(set(values)) != len(values):
            raise ValueError(f"{name} must be a list without repetitions, at least one long; got {list(values)}")
    parse_attacks(config.test_attacks)
    if config.test_samples is not None:
        validation.integer("test_samples", config.test_samples, 1)
    if config.train.devices != 1:
        raise ValueError(
            f"devices must be 1 to compare; got {config.train.devices}: train each method by `train`, test it by `evaluate`"
        )
    runs = []
    for turn, seed in enumerate(config.seeds):
        shift = turn % len(config.methods)
        for text in (*config.methods[shift:], *config.methods[:shift]):
            out = str(Path(config.train.out) / folder_name(text) / f"seed-{seed}") if config.train.out else None
            train = dataclasses.replace(config.train, seed=seed, out=out)
            runs.append((text, resolve(with_own_options(train, text))[0]))
    same: dict[str, str] = {}
    for text, run in runs[: len(config.methods)]:
        other = same.setdefault(repr(dataclasses.replace(run, out=None)), text)
        if other != text:
            raise ValueError(f"methods must be a list without repetitions; {other!r} and {text!r} are the same")
    return runs


def with_own_options(train: TrainConfig, text: str) -> TrainConfig:
    """The configuration of one method of a list: "yopo-5-3:epochs=9:lr=0.1:persist" has its own epochs and rate."""
    method, *settings = text.split(":")
    own: dict[str, Any] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        key = key.strip().replace("-", "_")
        if key in OWN_OPTIONS:
            number = parse_number(value, key)
            if OWN_OPTIONS[key] is int and number != int(number):
                raise ValueError(f"{key} must be an integer; got {value!r}")
            own[key] = OWN_OPTIONS[key](number)
        else:
            method += f":{setting}"
    if "epochs" in own:
        own.setdefault("time_budget", None)  # a global time budget must not override epochs set for this method
    elif "time_budget" in own:
        own["epochs"] = None
    return dataclasses.replace(train, method=method, **own)


class Comparison:
    """Trains and tests every method with every seed.

    Under `config.train.out` it leaves metrics.jsonl (one line per run), comparison.json (the table with its
    environment), comparison.txt, accuracy-time.png, and one folder per run.
    """

    def __init__(self, config: CompareConfig, *, shown: bool = True) -> None:
        """
        Raises:
            ValueError, TypeError: for what cannot be run, before anything is.
        """
        self.config, self.shown = config, shown
        self.runs = plan(config)
        self.out = Path(config.train.out) if config.train.out else None
        if self.out is not None and config.train.resume == "never":
            require_empty(self.out)
        self.metrics = None if self.out is None else MetricsFile(self.out / "metrics.jsonl")
        records = [] if self.metrics is None else self.metrics.read()
        if any("method" not in record for record in records):
            raise ValueError(f"out must not be the folder of a single run; got {self.out}")
        # A run tested otherwise is tested again; training it again is not needed.
        self.done = {(r["method"], r["seed"]): r for r in records if r.get("test") == config.test()}
        for _, run in self.runs:
            if run.out is not None and (facts := Path(run.out) / "run.json").exists():
                require_same(json.loads(facts.read_text())["config"], run)
        self.dataset = dataset_of(config.train)
        for _, run in self.runs:
            assert run.batch_size is not None
            # Their checks, before anything is trained.
            SplitSource(self.dataset.train, run.batch_size, seed=run.seed)
            check_channels(run, self.dataset.shape[0])
        build_model(str(self.runs[0][1].model), self.dataset.shape, self.dataset.classes)

    def run(self, deadline: Deadline | None = None) -> list[Row] | None:
        """The table's rows; None if the `deadline` passed before (`resume="auto"` goes on from there)."""
        self._choose_mode()
        records: list[dict[str, Any]] = []
        for number, (text, run) in enumerate(self.runs, 1):
            record = self.done.get((text, run.seed))
            if record is None:
                if self.shown:
                    print(f"run {number} of {len(self.runs)}: {text}, seed {run.seed}", file=sys.stderr, flush=True)
                record = run_and_test(text, run, self.config, self.dataset, deadline, shown=self.shown)
                if record is None:
                    return None
                if self.metrics is not None:
                    self.metrics.append(record)
            records.append(record)
        rows = [Row.of([r for r in records if r["method"] == text]) for text in self.config.methods]
        if self.out is not None:
            self._write(rows, self.out)
        return rows

    def _choose_mode(self) -> None:
        """Precision, layout and compilation, chosen once, with the dearest method, for all runs that are to be compared."""
        first = self.runs[0][1]
        if not is_open(first) or len(self.done) == len(self.runs):
            return
        recorded = (read_json(Path(run.out) / "run.json").get("config") for _, run in self.runs if run.out is not None)
        before = next((facts for facts in recorded if facts), None)
        if before is not None:
            mode = Mode(before["precision"], before["channels_last"], before["compile"])
        else:
            run, method = max((resolve(run) for _, run in self.runs), key=lambda pair: pair[1].cost().total)
            if run.threads is not None:
                torch.set_num_threads(run.threads)
            import_torchvision(required=False)  # Fabric may import it
            device = device_for(run.accelerator)
            found = choose_mode(run, method, self.dataset.to(device), device, shown=self.shown)
            mode = Mode(found.precision, bool(found.channels_last), bool(found.compile))  # type: ignore[arg-type]
        self.runs = [(text, with_mode(run, mode)) for text, run in self.runs]

    def _write(self, rows: list[Row], out: Path) -> None:
        first = self.runs[0][1]
        facts = {
            name: getattr(first, name)
            for name in (
                "dataset",
                "model",
                "eps",
                "norm",
                "epochs",
                "time_budget",
                "precision",
                "channels_last",
                "compile",
            )
        }
        facts |= {
            "test": self.config.test(),
            "seeds": list(self.config.seeds),
            "environment": environment(device_for(first.accelerator)),
        }
        write_json(out / "comparison.json", {**facts, "rows": [row.as_dict(rows) for row in rows]})
        text = f"{table(rows)}\n\n{finding(rows)}\n"
        write_atomically(out / "comparison.txt", lambda file: file.write(text.encode()))
        save_plot(rows, out / "accuracy-time.png", title=f"{first.dataset}, {first.norm} {first.eps:.4g}")


def run_and_test(
    text: str,
    run: TrainConfig,
    config: CompareConfig,
    dataset: Dataset,
    deadline: Deadline | None,
    *,
    shown: bool = True,
) -> dict[str, Any] | None:
    """Train once and attack the selected weights on the test split; None if the deadline passed before.

    Each attack is tried on the images that those before it have left, so the last accuracy is the worst case of all.
    """
    trainer = Trainer(run, dataset=dataset, shown=shown)
    attacks = parse_attacks(config.test_attacks)
    images = trainer.dataset.test.first(config.test_samples)
    try:
        result = trainer.fit(deadline)
    except DivergedError as error:  # NaN is right about no image; the other methods are still to be compared
        if shown:
            print(f"{text} seed {run.seed}: ALARM: {error}", file=sys.stderr, flush=True)
        least = min(attack.count(len(images)) for attack in attacks)
        lost = Evaluation(len(images), 0.0, {a.name: 0.0 for a in attacks}, 0.0, least, not_finite=len(images))
        return _record(text, run, config, lost, trainer) | {"alarm": str(error)}
    if result is None:
        return None
    found = evaluate_in_parts(
        result.network,
        images,
        trainer.threat,
        attacks,
        seed=run.seed,
        survivors_only=True,
        journal=None if run.out is None else Path(run.out) / "evaluation.jsonl",
        deadline=deadline,
        title=f"{text} seed {run.seed} test" if shown else None,
    )
    if found is None:
        return None
    return _record(text, run, config, found, trainer)


def _record(text: str, run: TrainConfig, config: CompareConfig, found: Evaluation, trainer: Trainer) -> dict[str, Any]:
    at = trainer.at
    images = at.batches * trainer.source.batch_size * trainer.fabric.world_size
    return {
        "method": text,
        "seed": run.seed,
        "test": config.test(),
        **found.as_dict(),
        "seconds": at.seconds,
        "updates": trainer.learner.updates,
        "images_per_second": images / at.seconds,
        "compile_seconds": at.compile_seconds,
        "peak_memory_mib": at.peak_memory,
        "cost": trainer.method.cost().as_dict(),
        "selected": dict(at.selected or {}),
        "curve": at.curve,
        "diverged": at.diverged,
    }


def folder_name(method: str) -> str:
    """A method's text as a folder name."""
    return method.replace(":", "_").replace("=", "-")
