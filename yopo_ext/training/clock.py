"""Time spent training."""

from __future__ import annotations

import time

import torch


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
