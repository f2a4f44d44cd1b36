"""The operator on the GPU with the CPU's tensors: what `policy.check_update` calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from yopo_ext.kernels import ops


def to_device(arguments: tuple, device: str = "cuda") -> tuple[Any, ...]:
    """Strides survive: a channels_last tensor stays channels_last."""
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in arguments)


def update(*arguments) -> tuple[Tensor, ...]:
    return tuple(t.cpu() for t in ops.first_layer_update(*to_device(arguments)))


def assert_bitwise_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: str = "") -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if not torch.equal(a, e):
            at = tuple(int(v) for v in torch.nonzero(a != e)[0])
            raise AssertionError(f"{what} result {i} differs first at {at}: {a[at].item()!r}, {e[at].item()!r}")
