"""What an inspection's verdict depends on, in a form that is quickly compared: a model may change between steps."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = frozenset((int, float, bool, str, type(None), torch.dtype, torch.Size))
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_SMALL = 16  # elements: constants of a normalisation, one per channel


class Structure:
    """The modules of a model, held weakly, and how they hang together."""

    def __init__(self, base: nn.Module) -> None:
        modules = list(base.modules())
        place = {id(m): i for i, m in enumerate(modules)}
        self._modules = [weakref.ref(m) for m in modules]
        self._children = [-1 if c is None else place[id(c)] for m in modules for c in m._modules.values()]

    def modules(self) -> list[nn.Module] | None:
        """Every module of the model, or None if the model is made of others now."""
        found = [reference() for reference in self._modules]
        if None in found:
            return None
        children = [c for m in found for c in m._modules.values()]  # type: ignore[union-attr]
        if len(children) != len(self._children):
            return None
        expected = [None if i < 0 else found[i] for i in self._children]
        return found if all(map(_is, children, expected)) else None  # type: ignore[return-value]


def _is(a: object, b: object) -> bool:
    return a is b


class Fingerprint:
    """The settings of the modules that run before a first layer, or are part of it, as they were when it was inspected."""

    def __init__(self, modules: list[nn.Module], near: list[nn.Module]) -> None:
        place = {id(m): i for i, m in enumerate(modules)}
        self._near = [place[id(m)] for m in near]
        self._ignored: set[Any] = set()
        self._settings = self._read(modules)

    def holds(self, modules: list[nn.Module]) -> bool:
        """Whether the settings are still the same."""
        now = self._read(modules)
        return now == self._settings or not (self._changes(now) - self._ignored)

    def ignore_changes_since(self, other: Fingerprint) -> None:
        """Settings that differ from an earlier fingerprint changed nothing (a counter, say): do not look at them again."""
        self._ignored = other._ignored | other._changes(self._settings)

    def _changes(self, now: list[Any]) -> set[Any]:
        """(module, name) of the settings that are not what they were."""
        absent = object()
        before, after = _by_name(self._settings), _by_name(now)
        return {key for key in before.keys() | after.keys() if before.get(key, absent) != after.get(key, absent)}

    def _read(self, modules: list[nn.Module]) -> list[Any]:
        """Names and values in turn, those of a module after its type."""
        found: list[Any] = []
        add = found.append
        for i in self._near:
            module = modules[i]
            own = vars(module)
            add(type)
            add(type(module))
            for name, value in own.items():
                if name not in _INTERNAL:
                    add(name)
                    add(value if type(value) in _PLAIN else _setting(value))
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
            ):
                add("hooks")
                add([tuple(own[f"_{kind}_hooks"]) for kind in ("forward", "forward_pre", "backward", "backward_pre")])
            for name, parameter in own["_parameters"].items():
                add(name)
                add(parameter is None or parameter.requires_grad or _setting(parameter))
            if own["_buffers"] and not isinstance(module, nn.modules.batchnorm._BatchNorm):
                for name, buffer in own["_buffers"].items():
                    add(name)
                    add(_setting(buffer))
        return found


def _by_name(settings: list[Any]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    module = -1
    for name, value in zip(settings[::2], settings[1::2], strict=True):
        module += name is type
        found[module, name] = value
    return found


def _setting(value: Any) -> Any:
    """A value in a form that can be compared: itself if it is plain, else what is quickly seen of it."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor):
        if value.numel() > _SMALL:
            return value.shape
        if value.device.type == "cpu":
            return value.tolist()
        return value.data_ptr(), value._version  # to read it would wait
    if isinstance(value, list | tuple):
        return len(value), tuple(v for v in value[:_SMALL] if type(v) in _PLAIN)
    if isinstance(value, dict | set):
        return len(value)
    return id(value)
