"""Outputs of models, whatever holds their tensors: which tensors, where autograd leads from them, the same without graph."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def leaves(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The leaves that autograd leads to."""
    seen: set[Any] = set()
    found: dict[int, Tensor] = {}
    stack = [t.grad_fn for t in outputs]
    found.update({id(t): t for t in outputs if t.grad_fn is None and t.requires_grad})
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        stack += [following for following, _ in node.next_functions]
    return list(found.values())


def tensors_of(output: Any, depth: int = 4) -> list[Tensor]:
    """The tensors of a model's output, whatever holds them."""
    if isinstance(output, Tensor):
        return [output]
    if depth == 0 or output is None or isinstance(output, str | int | float | nn.Module | type):
        return []
    if isinstance(output, dict):
        inside = [*output.values(), *vars(output).values()] if hasattr(output, "__dict__") else list(output.values())
    elif isinstance(output, list | tuple):
        inside = list(output)
    else:
        inside = list(attributes_of(output).values())
    return [t for value in inside for t in tensors_of(value, depth - 1)]


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes of an object, those in slots too."""
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    return {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in slots if hasattr(value, name)}}


def detached(output: Any) -> Any:
    """A model's output without its graph, of the same type: tensors, containers, dataclasses and plain objects of them."""
    if isinstance(output, Tensor):
        return output.detach()
    if not any(t.requires_grad for t in tensors_of(output)):
        return output
    if isinstance(output, tuple):
        parts = [detached(value) for value in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    if isinstance(output, list):
        return type(output)(detached(value) for value in output)
    result = copy.copy(output)
    if isinstance(output, dict):
        for name, value in output.items():
            result[name] = detached(value)
    for name, value in attributes_of(output).items():
        if tensors_of(value):
            object.__setattr__(result, name, detached(value))  # also of a frozen dataclass
    return result
