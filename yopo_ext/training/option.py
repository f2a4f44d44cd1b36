"""Fields of a configuration or of a method that are options on the command line."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str, *, group: str = "run", metavar: str | None = None) -> Any:
    """A dataclass field that becomes a command-line option.

    Args:
        default: its value where nothing is given. None with a default that depends on the data set: see `schema.Preset`.
        help: what it sets, in a few words; its default is added to them.
        group: the heading under which `--help` lists it, one of `schema.GROUPS`. An option of a method has no other.
        metavar: what `--help` calls its value; None: by its type.
    """
    return field(default=default, metadata={"help": help, "group": group, "metavar": metavar})
