"""Testing a checkpoint: which attacks, on what, and the report."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from yopo_ext import validation
from yopo_ext.training.attacks.base import passes_on
from yopo_ext.training.attacks.registry import SUITES, parse_attacks
from yopo_ext.training.config.resolve import dataset_of, device_for, threat_model
from yopo_ext.training.config.schema import EvaluateConfig, TrainConfig
from yopo_ext.training.evaluation.evaluate import evaluate_in_parts, lowest_class, seconds_per_pass
from yopo_ext.training.evaluation.masking_alarm import alarms, not_finite_alarm
from yopo_ext.training.evaluation.saved_images import SavedImages
from yopo_ext.training.models import build_model
from yopo_ext.training.run.checkpoint import WRITTEN, load_checkpoint, tested_weights
from yopo_ext.training.run.deadline import Deadline
from yopo_ext.training.run.environment import environment
from yopo_ext.training.run.files import write_json
from yopo_ext.training.run.progress import duration


def require_report(path: Path) -> None:
    """Raise ValueError if the path is one that a report must not replace."""
    if path.is_dir():
        raise ValueError(f"out must name a file for the report, such as {path / 'evaluation.json'}; got a folder")
    if path.suffix != ".json":
        raise ValueError(f"out must name a .json file for the report; got {str(path)!r}")
    if path.name in WRITTEN:
        raise ValueError(f"out must not name a file of the run; got {str(path)!r}")


class CheckpointTest:
    """The model of a checkpoint, the split and the attacks to run on it."""

    def __init__(self, config: EvaluateConfig) -> None:
        """
        Raises:
            FileNotFoundError, ValueError, TypeError: there is no such checkpoint, split or attack.
        """
        self.config = config
        validation.choice("suite", config.suite, tuple(SUITES))
        names = SUITES[config.suite] if config.attacks is None else config.attacks
        self.attacks = parse_attacks(names)
        if config.out is not None:
            require_report(Path(config.out))
        if config.save_images is not None and Path(config.save_images).is_file():
            raise ValueError(f"save_images must name a folder; got {config.save_images!r}")
        validation.choice("split", config.split, ("test", "validation"))
        validation.integer("seed", config.seed, 0)
        if config.samples is not None:
            validation.integer("samples", config.samples, 1)
        self.device = device_for(config.accelerator)
        state = load_checkpoint(Path(config.checkpoint))
        self.trained = TrainConfig(**state["config"])
        self.threat = threat_model(self.trained)
        self.trained.data_dir = config.data_dir or self.trained.data_dir
        dataset = dataset_of(self.trained)
        split = dataset.test if config.split == "test" else dataset.validation
        self.split, self.classes = split.first(config.samples).to(self.device), dataset.classes
        assert self.trained.model is not None
        self.model, _ = build_model(self.trained.model, dataset.shape, dataset.classes)
        if (list(dataset.shape), dataset.classes) != (state["shape"], state["classes"]):
            raise ValueError(
                f"data_dir must hold images {state['shape']} of {state['classes']} classes, as in training; got "
                f"{list(dataset.shape)} of {dataset.classes}"
            )
        self.model.load_state_dict(tested_weights(state))
        layout = torch.channels_last if self.trained.channels_last else torch.contiguous_format
        self.model.to(self.device, memory_format=layout).eval()  # type: ignore[call-overload]

    def describe(self) -> str:
        """What would be run, and for how long."""
        seconds = seconds_per_pass(self.model, self.split, self.threat) * passes_on(self.attacks, len(self.split))
        names = ", ".join(("clean", *(a.name for a in self.attacks)))
        return f"{self._what()}: {names}; about {duration(seconds)}"

    def run(self, deadline: Deadline | None = None) -> str | None:
        """Attack; returns the report as text and writes it as JSON if the configuration names a file.

        None once the deadline passes.

        Beside that file, FILE.journal keeps what is finished: run again after an interruption, it goes on from there.
        """
        started = time.perf_counter()
        folder = self.config.save_images
        found = evaluate_in_parts(
            self.model,
            self.split,
            self.threat,
            self.attacks,
            seed=self.config.seed,
            survivors_only=self.config.survivors_only,
            journal=None if self.config.out is None else Path(f"{self.config.out}.journal"),
            deadline=deadline,
            images=None if folder is None else SavedImages(Path(folder), self.threat),
            title="evaluate",
        )
        if found is None:
            return None
        if folder is not None:
            print(f"images written to {folder}", file=sys.stderr)
        seconds = time.perf_counter() - started
        labels = self.split.labels.cpu()
        by_class = found.by_class(labels, self.classes)
        report: dict[str, Any] = {
            "checkpoint": self.config.checkpoint,
            "method": self.trained.method,
            "dataset": self.trained.dataset,
            "model": self.trained.model,
            "eps": self.trained.eps,
            "norm": self.trained.norm,
            "split": self.config.split,
            "precision": "fp32, no TF32",
            "seed": self.config.seed,
            "survivors_only": self.config.survivors_only,
            **found.as_dict(),
            "alarms": not_finite_alarm(found.not_finite, found.samples)
            # The alarms of masked gradients compare what attacks leave on their own.
            + ([] if self.config.survivors_only else alarms(found.robust)),
            "by_class": by_class,
            "labels": labels.tolist(),
            "outcomes": found.outcomes,
            "seconds": seconds,
            "environment": environment(self.device),
        }
        if self.config.out is not None:
            write_json(Path(self.config.out), report)
        few = f"@{found.worst_samples}" if found.worst_samples < found.samples else ""
        accuracies = {"clean": found.clean, **found.robust, f"worst case{few}": found.worst}
        lines = [f"  {name:<12} {value:6.2f} %" for name, value in accuracies.items()]
        lines.append(f"  lowest class: {lowest_class(by_class)}")
        return "\n".join([self._what(), *lines, *(f"  ALARM: {text}" for text in report["alarms"])])

    def _what(self) -> str:
        t = self.trained
        return (
            f"{t.method} on {t.dataset}, {t.model}, {t.norm} {t.eps:.4g}, {len(self.split)} {self.config.split} samples"
        )
