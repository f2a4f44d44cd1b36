"""The training methods, one file each, behind one interface; `METHODS` is the one list of them."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from typing import Any

from yopo_ext.training.methods.base import Cost, Learner, Method, Outcome, Start, ThreatModel
from yopo_ext.training.methods.fgsm_mep import FgsmMep
from yopo_ext.training.methods.fgsm_pgi import FgsmPgi
from yopo_ext.training.methods.fgsm_rs import FgsmRs
from yopo_ext.training.methods.fgsm_rs_cs import FgsmRsCs
from yopo_ext.training.methods.free import Free
from yopo_ext.training.methods.liet import Liet
from yopo_ext.training.methods.n_fgsm import NFgsm
from yopo_ext.training.methods.natural import Natural
from yopo_ext.training.methods.pgd import Pgd
from yopo_ext.training.methods.trades import Trades
from yopo_ext.training.methods.trades_yopo import TradesYopo
from yopo_ext.training.methods.yopo import Yopo
from yopo_ext.training.nearest import nearest
from yopo_ext.training.numbers import parse_number

__all__ = ["METHODS", "Cost", "Learner", "Method", "Outcome", "Start", "ThreatModel", "make", "option_fields", "parse"]

METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (
        Natural,  # what robustness costs in clean accuracy; the floor of training time
        Pgd,  # the standard that every faster method is measured against
        Free,  # every pass updates weights and perturbation: the nearest relative of YOPO-m-1
        FgsmRs,  # one attack step: the cheapest that works, until it overfits
        NFgsm,  # one attack step that does not overfit, for the same price
        FgsmRsCs,  # one attack step, and a loss that may not jump from epoch to epoch
        FgsmPgi,  # one attack step with memory, as its authors define it: among the strongest of the cheap ones
        FgsmMep,  # a variant of it: momentum of signs, perturbations that move with the image, the run's own labels
        Liet,  # one attack step from the label's own pattern
        Trades,  # trades clean accuracy for robustness by a weight; the strongest of the dear ones
        Yopo,  # this package: adversary steps in the first layer only
        TradesYopo,  # the same adversary under the TRADES loss
    )
}


def option_fields() -> dict[str, dataclasses.Field[Any]]:
    """Every option of any method, by name (a name means the same in every method that has it)."""
    return {f.name: f for cls in METHODS.values() for f in dataclasses.fields(cls)}


def make(name: str, **options: Any) -> Method:
    """The method called `name` with these options, checked.

    Raises:
        ValueError: unknown method or option, or a value the option does not take.
    """
    if name not in METHODS:
        word = re.sub(r"(-\d+)+$", "", name)
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {name!r}{nearest(word, METHODS)}")
    cls = METHODS[name]
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    for option in options:
        if option not in known:
            allowed = ", ".join(sorted(known)) or "no options"
            close = nearest(option, known)
            raise ValueError(f"{option} is no option of method {name!r}, which takes {allowed}{close}")
    return cls(**{option: _convert(option, value, hints[option]) for option, value in options.items()})


def parse(text: str, **options: Any) -> Method:
    """The method written as "name", "name-5-3" (its numbers) or "name-5-3:option=value:flag".

    `options` are further options; a value given in both places must agree.
    """
    head, *settings = text.strip().split(":")
    name = next((n for n in sorted(METHODS, key=len, reverse=True) if head == n or head.startswith(n + "-")), head)
    found: dict[str, Any] = {}
    if name in METHODS and head != name:
        numbers, given = METHODS[name].numbers, head[len(name) + 1 :].split("-")
        if len(given) > len(numbers) or not all(part.isdigit() for part in given):
            pattern = "-".join([name, *(n.upper() for n in numbers)])
            raise ValueError(f"method must look like {pattern}; got {text!r}")
        found = dict(zip(numbers, map(int, given), strict=False))
    for setting in settings:
        key, separator, value = setting.partition("=")
        found[key.strip().replace("-", "_")] = value.strip() if separator else True
    if name in METHODS:
        hints = typing.get_type_hints(METHODS[name])
        found = {key: _convert(key, value, hints[key]) if key in hints else value for key, value in found.items()}
    for key, value in options.items():
        if key in found and found[key] != value:
            raise ValueError(f"{key} is {value!r} but method={text!r} says {found[key]!r}")
        found[key] = value
    return make(name, **found)


def _convert(name: str, value: Any, hint: Any) -> Any:
    """`value` (possibly text) as the option's declared type."""
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
        return value
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None or str(value).lower() == "none":
            return None
        (hint,) = (h for h in typing.get_args(hint) if h is not type(None))
    if hint is bool:
        words = {"true": True, "false": False}
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false; got {value!r}")
        return value
    if hint is int:
        number = parse_number(value, name)
        if number != int(number):
            raise ValueError(f"{name} must be an integer; got {value!r}")
        return int(number)
    return parse_number(value, name)
