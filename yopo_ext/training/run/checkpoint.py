"""Checkpoints: what a run writes into its folder, and how it is read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from yopo_ext.training.run.files import write_atomically

# What a run or a comparison leaves in its folder.
WRITTEN = ("run.json", "last.pt", "model.pt", "metrics.jsonl", "result.json", "comparison.json")


def require_empty(folder: Path) -> None:
    """Raise ValueError if the folder holds a run or a comparison, or what is left of one."""
    found = [name for name in WRITTEN if (folder / name).exists()]
    if found:
        raise ValueError(
            f"out must be a folder without a run or comparison unless resume is 'auto'; {folder} holds {', '.join(found)}"
        )


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
