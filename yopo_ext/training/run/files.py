"""Files that survive a kill at any moment."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


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


def finite(value: Any) -> Any:
    """The value with None for every number that is not finite: JSON has no NaN and no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; numbers that are not finite become null."""
    text = json.dumps(finite(value), indent=2, allow_nan=False)
    write_atomically(path, lambda file: file.write((text + "\n").encode()))


def read_json(path: Path) -> dict[str, Any]:
    """The object that the file holds; an empty one if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else {}


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line, on a line of its own even if a kill cut the last one short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write((json.dumps(finite(record), allow_nan=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files that killed writers left in a folder nobody else writes to."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
