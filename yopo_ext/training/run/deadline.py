"""When a run saves what it has and leaves, to be gone on with later."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Deadline:
    """Passes after so many seconds (None: never), or as soon as somebody asks: Ctrl-C, or a scheduler's SIGTERM."""

    def __init__(self, seconds: float | None = None) -> None:
        self.ends = math.inf if seconds is None else time.monotonic() + seconds
        self.asked = False

    def passed(self) -> bool:
        return self.asked or time.monotonic() >= self.ends

    @contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """Inside the block (in the main thread) the signals ask for an end instead of making one; a second one makes it."""
        before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, frame: Any) -> None:
            self.asked = True
            signal.signal(number, before[number])

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
