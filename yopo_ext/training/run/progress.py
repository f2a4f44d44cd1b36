"""What a run says while it runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

# Seconds until the first plain line and between the others: few at first, then a tenth of the time so far, so that a long log
# stays short.
FIRST_QUIET, SHORTEST_QUIET, LONGEST_QUIET = 1.0, 5.0, 30.0


class Progress:
    """Reports the batches and epochs of one run; silent unless `shown` (rank 0)."""

    def __init__(
        self, title: str, total: int | None, done: int = 0, *, shown: bool = True, unit: str = "batch"
    ) -> None:
        self.title, self.total, self.done, self.shown = title, total, done, shown
        self.started = self.said = time.monotonic()
        self.unit = unit
        self.counted = False  # whether a line has said how far it is
        terminal = shown and sys.stderr.isatty()
        self.bar = (
            tqdm(total=total, initial=done, desc=title, unit=unit, leave=False, dynamic_ncols=True)
            if terminal
            else None
        )

    def advance(self, batches: int = 1) -> None:
        self.done += batches
        if self.bar is not None:
            self.bar.update(batches)
        elif self.shown and self._is_due():
            self.counted = True
            self.say(f"{self.unit} {self.done}" + ("" if self.total is None else f" of {self.total}"))

    def say(self, text: str) -> None:
        """One line, above the bar if there is one."""
        self.said = time.monotonic()
        if self.shown:
            line = f"{self.title}: {text}"
            tqdm.write(line, file=sys.stderr) if self.bar is not None else print(line, file=sys.stderr, flush=True)

    def epoch(self, record: dict[str, Any], last: bool) -> None:
        """An epoch's record: on the bar, or as a line now and then."""
        names = ("epoch", "seconds", "train_loss", "validation_clean", "validation_pgd")
        text = "  ".join(f"{n} {record[n]:.4g}" for n in names if n in record)
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        elif last or self._is_due():
            self.say(text)

    def _is_due(self) -> bool:
        quiet = (
            min(max(SHORTEST_QUIET, 0.1 * (self.said - self.started)), LONGEST_QUIET) if self.counted else FIRST_QUIET
        )
        return time.monotonic() - self.said >= quiet

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
