"""The course of a run: how much of its schedule is done, what that means for eps, and how a finished run gets a longer one."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import torch

from yopo_ext.training.config.schema import TrainConfig
from yopo_ext.training.loop.position import Position
from yopo_ext.training.loop.rehearsal import Mode
from yopo_ext.training.methods import ThreatModel


class Course:
    """Follows a position through `config.epochs` epochs of so many batches, or through `config.time_budget` seconds."""

    def __init__(self, config: TrainConfig, at: Position, batches: int) -> None:
        self.config, self.at, self.batches = config, at, batches

    def progress(self, ahead: float = 0.0) -> float:
        """How much of the schedule is done, 0..1, `ahead` batches from here."""
        if self.config.time_budget is not None:
            begun = self.at.origin_seconds
            return min(1.0, (self.at.seconds - begun) / (self.config.time_budget - begun))
        return self._share(self.at.batches + ahead)

    def _share(self, batches: float) -> float:
        assert self.config.epochs is not None
        return (batches - self.at.origin) / (self.config.epochs * self.batches - self.at.origin)

    def progress_after_epoch(self) -> float:
        if self.config.time_budget is not None:
            return self.progress()
        return self._share((self.at.epoch + 1) * self.batches)

    def is_over(self) -> bool:
        return self.progress() >= 1.0 or self.at.diverged is not None

    def threat_now(self, threat: ThreatModel) -> ThreatModel:
        """The threat model of the batch to come: its eps rises over the eps warm-up, and not again when a run is trained on."""
        if not self.config.eps_warmup or self.at.origin or self.at.origin_seconds:
            return threat
        share = min(1.0, self.progress(ahead=0.5) / self.config.eps_warmup)
        return dataclasses.replace(threat, eps=share * threat.eps)


def train_on(config: TrainConfig, saved: Mapping[str, Any], at: Position, batches: int, *, shown: bool) -> None:
    """Begin another schedule where the saved run stands, if it is to be longer than the run was."""
    name, there = ("epochs", at.batches / batches)
    if config.time_budget is not None:
        name, there = ("time_budget", at.seconds)
    wanted = getattr(config, name)
    if wanted == saved[name]:
        return
    if wanted <= there:
        trained = f"the {there:g} that the run in {config.out} has been trained for"
        raise ValueError(f"{name} must be more than {trained}; got {wanted}")
    at.origin, at.origin_seconds = at.batches, at.seconds
    if shown:
        new = f"over epochs {at.epoch + 1} to {wanted}" if name == "epochs" else f"over {wanted - there:.0f} s"
        print(
            f"the run in {config.out} was of {saved[name]:g} {'epochs' if name == 'epochs' else 's'}: a new schedule {new} "
            f"starts from the weights of epoch {at.epoch}",
            file=sys.stderr,
            flush=True,
        )


def description(config: TrainConfig, at: Position, batches: int, device: torch.device) -> str:
    """What a run is about to do, in one line."""
    c = config
    length = f"{c.epochs} epochs" if c.time_budget is None else f"{c.time_budget:g} s, in epochs"
    mode = Mode(c.precision, bool(c.channels_last), bool(c.compile))  # type: ignore[arg-type]
    cpu = f"{torch.get_num_threads()} CPU thread{'s' if torch.get_num_threads() > 1 else ''}"
    where = cpu if device.type == "cpu" else torch.cuda.get_device_name(device)
    begun = f", from batch {at.batches + 1}" if at.batches else ""
    processes = f" in each of {c.devices} processes" if c.devices > 1 else ""
    return (
        f"{length} of {batches} batches of {c.batch_size} from {c.dataset}{processes}{begun}; {c.model}, {c.norm} eps "
        f"{c.eps:.4g}; {mode} on {where}"
    )


def divergence(at: Position) -> str:
    """The alarm of a run that has diverged."""
    return (
        f"training diverged in epoch {at.diverged}: weights or gradients are not finite; try a lower learning rate, a "
        "warm-up or gradient clipping"
    )
