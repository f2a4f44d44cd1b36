"""Argument checks: every message names the argument, what it was and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from .constants import ACTIVATIONS, NORMS

Constants = float | Sequence[float] | Tensor

X_DTYPES = (torch.float32, torch.float64)
COSTATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choice(name: str, value: object, allowed: Sequence[str] | dict[str, int]) -> str:
    """`value` if it is one of the allowed strings."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(repr(a) for a in allowed)}; got {value!r}")
    return value


def integer(name: str, value: object, minimum: int) -> int:
    """`value` as an int that is at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer >= {minimum}; got {value!r} ({type(value).__name__})")
    if value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}; got {value}")
    return value


def pair(name: str, value: int | Sequence[int], minimum: int) -> list[int]:
    """An int or a pair of ints, as a list of two (height, width)."""
    values = [value, value] if isinstance(value, int) else list(value)
    if len(values) != 2:
        raise ValueError(f"{name} must be an integer or a pair (height, width); got {value!r}")
    return [integer(name, v, minimum) for v in values]


def constants(name: str, value: Constants, channels: int, *, allow_infinite: bool = False) -> list[float]:
    """A scalar or one value per input channel, as a list of 1 or `channels` finite floats.

    A CUDA tensor is read back here, which synchronises: pass numbers or a list in a hot loop.
    """
    if isinstance(value, Tensor):
        if value.dim() > 1:
            raise ValueError(
                f"{name} must be a number or one value per channel [{channels}]; got a tensor of shape {tuple(value.shape)}"
            )
        value = value.tolist()
    values = [value] if isinstance(value, Real) else list(value)  # type: ignore[arg-type]
    if any(isinstance(v, bool) or not isinstance(v, Real) for v in values):
        raise TypeError(f"{name} must be a number or a sequence of numbers; got {value!r}")
    if len(values) not in (1, channels):
        raise ValueError(f"{name} must be a number or have one value per input channel ({channels}); got {len(values)} values")
    floats = [float(v) for v in values]
    if any(math.isnan(v) or (math.isinf(v) and not allow_infinite) for v in floats):
        raise ValueError(f"{name} must be finite; got {value!r}")
    return floats


def threat_model(
    eps: Constants, step_size: Constants, bounds: tuple[Constants, Constants] | None, norm: str, channels: int
) -> tuple[list[float], list[float], list[float], list[float]]:
    """(eps, step_size, lo, hi) as lists of 1 or `channels` floats, checked against each other."""
    choice("norm", norm, NORMS)
    eps_values = constants("eps", eps, channels)
    step_values = constants("step_size", step_size, channels)
    if bounds is None:
        bounds = (-math.inf, math.inf)
    if not isinstance(bounds, Sequence) or len(bounds) != 2:
        raise TypeError(f"bounds must be a pair (lo, hi) or None; got {bounds!r}")
    lo = constants("bounds[0]", bounds[0], channels, allow_infinite=True)
    hi = constants("bounds[1]", bounds[1], channels, allow_infinite=True)
    for name, values in (("eps", eps_values), ("step_size", step_values)):
        if min(values) < 0:
            raise ValueError(f"{name} must be >= 0; got {min(values)}")
        if norm == "l2" and len(values) > 1:
            raise ValueError(f"{name} must be a single number with norm='l2'; got {len(values)} values")
    width = max(len(lo), len(hi))
    for low, high in zip(lo * (width // len(lo)), hi * (width // len(hi)), strict=True):
        if not low < high:
            raise ValueError(f"bounds must be (lo, hi) with lo < hi; got lo={low}, hi={high}")
    if norm == "linf" and min(lo) >= 0.0 and max(hi) <= 1.0 and max(eps_values) >= 1.0:
        raise ValueError(
            f"eps must be in the units of x, which bounds={bounds!r} puts in [0, 1]; got {max(eps_values)}, which looks like "
            f"0..255 units: use {max(eps_values):g}/255"
        )
    return eps_values, step_values, lo, hi


def tensor(name: str, value: object, shape: tuple[int | None, ...], *, like: Tensor | None = None) -> Tensor:
    """A tensor of this shape (None: any size), on `like`'s device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
    if value.dim() != len(shape) or any(want not in (None, have) for want, have in zip(shape, value.shape, strict=True)):
        wanted = "[" + ", ".join("any" if s is None else str(s) for s in shape) + "]"
        raise ValueError(f"{name} must have shape {wanted}; got {list(value.shape)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on x's device ({like.device}); got {value.device}")
    return value


def floating(name: str, value: Tensor, allowed: Sequence[torch.dtype]) -> Tensor:
    """A tensor of one of the allowed dtypes."""
    if value.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        hint = ": scale integer images to floats in [0, 1] first" if not value.dtype.is_floating_point else ""
        raise TypeError(f"{name} must be one of {names}; got {str(value.dtype).removeprefix('torch.')}{hint}")
    return value


def activation(name: str) -> int:
    """The code of an activation."""
    return ACTIVATIONS[choice("activation", name, ACTIVATIONS)]
