"""Configurations as command-line options and as keys of a YAML file, read alike; and the help that lists them.

Nothing here imports PyTorch: `--help` and a misspelt option are answered at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NoReturn

from yopo_ext.training.config.method_options import declared_methods
from yopo_ext.training.config.schema import GROUPS, PRESETS, Preset
from yopo_ext.training.nearest import nearest
from yopo_ext.training.numbers import parse_number

BY_DATA_SET = {field.name for field in dataclasses.fields(Preset)}


@dataclass(frozen=True)
class Option:
    """One option: `name` is its key in a configuration and in YAML; its flag has hyphens for underscores."""

    name: str
    hint: Any  # type, as `typing.get_type_hints` gives it
    help: str
    group: str
    metavar: str | None = None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def wanted(self) -> Any:
        """The type without None."""
        if typing.get_origin(self.hint) in (typing.Union, types.UnionType):
            (kind,) = (h for h in typing.get_args(self.hint) if h is not type(None))
            return kind
        return self.hint

    def read(self, value: Any) -> Any:
        """The value that a text of the command line, or a value of a YAML file, stands for.

        Raises:
            ValueError: saying what it must be.
        """
        return _reader(self.wanted)(value)


def _reader(kind: Any) -> Callable[[Any], Any]:
    if typing.get_origin(kind) is Literal:
        return lambda value: _word(value, typing.get_args(kind))
    readers: dict[Any, Callable[[Any], Any]] = {
        bool: _truth,
        int: _integer,
        float: _number,
        str: str,
        tuple[str, ...]: lambda value: tuple(map(str, _parts(value))),
        tuple[float, ...]: lambda value: tuple(map(_number, _parts(value))),
        tuple[int, ...]: lambda value: tuple(map(_integer, _parts(value))),
    }
    return readers[kind]


def _word(value: Any, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"must be one of {', '.join(allowed)}; got {value!r}{nearest(value, allowed)}")
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false; got {value!r}")
    return value


def _integer(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+\s*", value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"must be an integer; got {value!r}")
    return value


def _number(value: Any) -> float:
    try:
        return parse_number(value)
    except ValueError:
        raise ValueError(f"must be a number or a fraction such as 8/255; got {value!r}") from None


def _parts(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [value]
    raise ValueError(f"must be a list, or values separated by commas; got {value!r}")


METAVARS: dict[Any, str] = {
    int: "N",
    float: "NUMBER",
    str: "NAME",
    tuple[str, ...]: "NAME,...",
    tuple[float, ...]: "NUMBER,...",
    tuple[int, ...]: "N,...",
}


def options_of(config: type[Any], skip: Sequence[str] = ()) -> list[Option]:
    """The fields of a configuration as options, their defaults said in words."""
    hints = typing.get_type_hints(config)
    return [
        Option(
            field.name,
            hints[field.name],
            field.metadata["help"] + _default(field),
            field.metadata["group"],
            field.metadata["metavar"],
        )
        for field in dataclasses.fields(config)
        if field.name not in skip
    ]


def method_options() -> list[Option]:
    """Every option of any method, once: a name means the same in every method that has it."""
    found: dict[str, list[tuple[str, Any]]] = {}
    hints = {}
    for method, declared in declared_methods().items():
        for name, declaration in declared.items():
            shown = "" if declaration.default is None else f" {_text(declaration.default)}"
            found.setdefault(name, []).append((declaration.help, f"{method}{shown}"))
            hints[name] = declaration.type
    options = []
    for name, users in found.items():
        texts = dict.fromkeys(text for text, _ in users)
        by_text = (f"{text} [{', '.join(user for other, user in users if other == text)}]" for text in texts)
        options.append(Option(name, hints[name], "; ".join(by_text), "method options"))
    return options


def _default(field: dataclasses.Field[Any]) -> str:
    if "(default" in field.metadata["help"]:
        return ""
    if field.default is None and field.name in BY_DATA_SET:
        return f" (default: {by_data_set(field.name)})"
    return "" if field.default in (None, "", (), False) else f" (default: {_text(field.default)})"


def by_data_set(name: str) -> str:
    """The default that every data set has for an option: "8/255 for svhn, cifar10; 0.3 for mnist"."""
    users: dict[str, list[str]] = {}
    for data_set, preset in PRESETS.items():
        users.setdefault(_text(getattr(preset, name)), []).append(data_set)
    if len(users) == 1:
        return next(iter(users))
    most = max(users, key=lambda value: len(users[value]))
    rest = [f"{value} for {', '.join(names)}" for value, names in users.items() if value != most]
    return "; ".join([*rest, f"{most} for {', '.join(users[most]) if len(users[most]) < 4 else 'the others'}"])


def _text(value: Any) -> str:
    if value is None:
        return "PyTorch's choice"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    if isinstance(value, float):
        levels = Fraction(value * 255).limit_denominator(1)
        return f"{levels}/255" if levels and value < 0.1 and abs(levels / 255 - value) < 1e-12 else f"{value:g}"
    return str(value)


class Parser(argparse.ArgumentParser):
    """Errors in one line, with the nearest right word."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+): ", r"\1 ", message).replace("expected one argument", "needs a value")
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Everything that was given; what was not is not in it."""
        given, rest = self.parse_known_args(arguments)
        if rest:
            word = rest[0].partition("=")[0]
            known = [flag for action in self._actions for flag in action.option_strings]
            if word.startswith("-"):
                self.error(f"there is no option {word}{nearest(word, known)}")
            self.error(f"there is no argument {word!r}: options begin with --")
        return given


class Layout(argparse.HelpFormatter):
    """Descriptions and examples as they are written; help beside the options."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(max(shutil.get_terminal_size().columns, 80) - 2, 118))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


def add_options(parser: Parser, options: Sequence[Option]) -> None:
    """Under the headings of `GROUPS`; nothing is in the parsed namespace but what was given."""
    titles = {**GROUPS, "method options": "for single methods, named in brackets with their defaults"}
    for group, about in titles.items():
        members = [option for option in options if option.group == group]
        section = parser.add_argument_group(f"{group}: {about}") if members else None
        for option in members:
            assert section is not None
            text = option.help.replace("%", "%%")
            if option.wanted is bool:
                section.add_argument(
                    option.flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
                )
                continue
            words = typing.get_args(option.wanted) if typing.get_origin(option.wanted) is Literal else ()
            section.add_argument(
                option.flag,
                type=_argument(option),
                default=argparse.SUPPRESS,
                metavar=option.metavar or ("{" + ",".join(words) + "}" if words else METAVARS[option.wanted]),
                help=text,
            )


def _argument(option: Option) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return option.read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def read_yaml(path: Path, options: Sequence[Option]) -> dict[str, Any]:
    """The options that a YAML file sets, by name.

    Raises:
        OSError, ValueError: naming the file and what is wrong in it.
    """
    import yaml

    try:
        found = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, Mapping):
        raise ValueError(f"config {path} must hold lines such as `epochs: 30`")
    known = {option.name: option for option in options}
    values = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ValueError(f"config {path} sets {key!r}, which is no option{nearest(name, known)}")
        if value is not None:
            try:
                values[name] = known[name].read(value)
            except ValueError as error:
                raise ValueError(f"config {path}: {key} {error}") from None
    return values


def build(config: type[Any], given: Mapping[str, Any], **more: Any) -> Any:
    """A configuration from what was given; the rest has its defaults."""
    names = {field.name for field in dataclasses.fields(config)} - set(more)
    return config(**{name: value for name, value in given.items() if name in names}, **more)
