"""How far a run has come, and the time that took."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import torch


class DivergedError(FloatingPointError):
    """Training has led to weights that are not finite, and there are no others to return."""


@dataclass
class Position:
    """How far a run has come: what a checkpoint holds beside the learner's state."""

    epoch: int = 0  # finished
    batch: int = 0  # of the epoch under way, per process
    batches: int = 0  # in all
    seconds: float = 0.0
    compile_seconds: float = 0.0
    peak_memory: float | None = None
    totals: list[float] = dataclasses.field(default_factory=lambda: [0.0] * 4)  # loss, correct, samples, alignment
    selected: dict[str, float] | None = None  # validation of the weights that are the result so far
    highest: dict[str, float] = dataclasses.field(default_factory=dict)  # validation accuracies, by name
    fallen: int = 0  # validations in a row, up to the last one, that `has_fallen` says of
    diverged: int | None = None  # the epoch that ended with weights that are not finite; it is the last one
    # Where the schedule began: not at 0 in a run that was given more epochs, or more seconds, after it had ended.
    origin: int = 0  # in batches
    origin_seconds: float = 0.0
    curve: list[tuple[float, float]] = dataclasses.field(default_factory=list)  # (seconds, validation PGD accuracy)


class Clock:
    """Seconds of training, across pauses; waits for the device when it is paused, not when it is read."""

    def __init__(self, device: torch.device, before: float) -> None:
        self.device, self.before = device, before
        self._wait()
        self.started = time.perf_counter()

    def read(self) -> float:
        return self.before + time.perf_counter() - self.started

    def pause(self) -> float:
        self._wait()
        return self.read()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
