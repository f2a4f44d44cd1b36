"""What a run measures as it goes on: one line of JSON per record, and TensorBoard curves where they are asked for."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from yopo_ext.training.run.files import append_line, write_atomically


class EpochLog:
    """The records of a training run, one per epoch: in `metrics.jsonl`, and with `tensorboard` as its event files too."""

    def __init__(self, folder: Path, *, tensorboard: bool, epoch: int, updates: int) -> None:
        """Goes on after `epoch` epochs and `updates` updates: what an interrupted run wrote later is dropped."""
        self.file = MetricsFile(folder / "metrics.jsonl")
        self.file.keep_through(epoch)
        self.board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=updates + 1)

    def append(self, record: dict[str, Any]) -> None:
        self.file.append(record)
        if self.board is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "updates":
                    self.board.add_scalar(name, value, record["updates"])
            if "alarm" in record:
                self.board.add_text("alarm", record["alarm"], record["updates"])
            self.board.flush()

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def require_tensorboard() -> None:
    """Raise ModuleNotFoundError if TensorBoard's event files cannot be written."""
    if find_spec("tensorboard") is None:
        raise ModuleNotFoundError("tensorboard needs a package: pip install tensorboard")


class MetricsFile:
    """`metrics.jsonl`: one JSON object per line, appended as a run goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        append_line(self.path, record)

    def read(self) -> list[dict[str, Any]]:
        """Every whole record."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [json.loads(line) for line in lines if _epoch_of(line) < math.inf]

    def keep_through(self, epoch: int) -> None:
        """Drop the records of epochs after `epoch`: a resumed run writes them again."""
        if not self.path.exists():
            return
        lines = self.path.read_text().splitlines()
        kept = [line for line in lines if _epoch_of(line) <= epoch]
        write_atomically(self.path, lambda file: file.write("".join(line + "\n" for line in kept).encode()))


def _epoch_of(line: str) -> float:
    try:
        return float(json.loads(line).get("epoch", 0))
    except ValueError:  # the line that a kill cut short
        return math.inf
