"""Configurations as command-line options, and back."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ActionYesNo, ArgumentParser, Namespace
from jsonargparse.typing import register_type

from yopo_ext.training import methods
from yopo_ext.training.numbers import parse_number


class Number(float):
    """A number or a fraction."""


class Texts(tuple[str, ...]):
    """Texts, comma separated."""


class Numbers(tuple[float, ...]):
    """Numbers or fractions, comma separated."""


class Integers(tuple[int, ...]):
    """Integers, comma separated."""


def _separated(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, int | float):
        return [value]
    if not isinstance(value, Sequence):
        raise ValueError(f"must be a list or comma separated; got {value!r}")
    return list(value)


# (type in a configuration, type on the command line, text -> value)
OPTION_TYPES: tuple[tuple[Any, type[Any], Callable[[Any], Any]], ...] = (
    (float, Number, lambda value: Number(parse_number(value))),
    (tuple[str, ...], Texts, lambda value: Texts(map(str, _separated(value)))),
    (tuple[float, ...], Numbers, lambda value: Numbers(map(parse_number, _separated(value)))),
    (tuple[int, ...], Integers, lambda value: Integers(map(int, _separated(value)))),
)
for _, _kind, _read in OPTION_TYPES:
    register_type(_kind, serializer=float if _kind is Number else list, deserializer=_read)


def add_options(parser: ArgumentParser, config: type[Any], skip: Sequence[str] = ()) -> None:
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if field.name not in skip:
            add_option(parser, field, hints[field.name], field.default)


def add_option(parser: ArgumentParser, field: dataclasses.Field[Any], hint: Any, default: Any, note: str = "") -> None:
    flag, help_text = "--" + field.name.replace("_", "-"), field.metadata["help"] + note
    if hint is bool or hint == bool | None:
        parser.add_argument(flag, action=ActionYesNo(no_prefix="no-"), default=default, help=help_text)
        return
    optional = default is None or _is_optional(hint)
    wanted = _without_none(hint)
    for plain, kind, read in OPTION_TYPES:
        if wanted == plain:
            wanted, default = kind, default if default is None else read(default)
    parser.add_argument(flag, type=wanted | None if optional else wanted, default=default, help=help_text)


def hint_of(field: dataclasses.Field[Any]) -> Any:
    owner = next(cls for cls in methods.METHODS.values() if field in dataclasses.fields(cls))
    return typing.get_type_hints(owner)[field.name]


def _is_optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType) and type(None) in typing.get_args(hint)


def _without_none(hint: Any) -> Any:
    if not _is_optional(hint):
        return hint
    (kind,) = (h for h in typing.get_args(hint) if h is not type(None))
    return kind


def build(config: type[Any], given: Namespace, skip: Sequence[str] = ()) -> Any:
    """A configuration from parsed options, its values of the plain types."""
    names = [field.name for field in dataclasses.fields(config) if field.name not in skip]
    return config(**{name: plain(given[name]) for name in names})


def plain(value: Any) -> Any:
    if isinstance(value, Number):
        return float(value)
    return tuple(value) if isinstance(value, Texts | Numbers | Integers) else value
