"""The run that a folder holds already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from yopo_ext.training.config.resolve import changed_options, require_same
from yopo_ext.training.config.schema import TrainConfig
from yopo_ext.training.run.checkpoint import load_checkpoint, require_empty


def saved_run(config: TrainConfig) -> dict[str, Any] | None:
    """The state of the run in the resolved configuration's folder, if it is to be gone on with. Writes nothing.

    Raises:
        ValueError: the folder holds something else, or a run with other options than a longer one of this kind may have.
    """
    if config.out is None:
        return None
    folder = Path(config.out)
    if config.resume == "never":
        require_empty(folder)
    if (folder / "metrics.jsonl").exists() and not (folder / "run.json").exists():
        raise ValueError(f"out must not be the folder of a comparison, or of what is no run; got {folder}")
    if not (folder / "last.pt").exists():
        return None
    state = load_checkpoint(folder / "last.pt")
    length = "epochs" if config.time_budget is None else "time_budget"
    if set(changed_options(state["config"], config)) != {length}:
        require_same(state["config"], config)
    return state
