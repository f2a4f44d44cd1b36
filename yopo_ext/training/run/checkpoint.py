"""Files that survive a kill at any moment: checkpoints and JSON."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace `path` by what `write` writes: after a kill or a power cut it is either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line, on a line of its own even if a kill cut the last one short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write((json.dumps(record) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


# What a run or a comparison leaves in its folder.
WRITTEN = ("run.json", "last.pt", "model.pt", "metrics.jsonl", "result.json", "comparison.json")


def require_empty(folder: Path) -> None:
    """Raise ValueError if the folder holds a run or a comparison, or what is left of one."""
    found = [name for name in WRITTEN if (folder / name).exists()]
    if found:
        raise ValueError(
            f"out must be a folder without a run or comparison unless resume is 'auto'; {folder} holds {', '.join(found)}"
        )


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files that killed writers left in a folder nobody else writes to."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, text, containers of them) atomically."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint; only tensors and plain values are accepted, never code.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is not a checkpoint of this package.
    """
    if path.is_dir():
        raise ValueError(f"checkpoint must be a file such as {path / 'model.pt'}; got a folder")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} is not a readable checkpoint: cut short, or holding more than weights and values"
        ) from error
    if not isinstance(state, dict) or "config" not in state or "model" not in state:
        raise ValueError(f"{path} is not a checkpoint of this package: it has no 'config' and 'model'")
    return state


def tested_weights(state: dict[str, Any]) -> dict[str, Any]:
    """The weights in a checkpoint that are to be tested: the averaged ones where there are any."""
    average = state.get("average")
    if average is None:
        return state["model"]
    return {name.removeprefix("module."): value for name, value in average.items() if name.startswith("module.")}
