"""Argument checks: every message names the argument, what it was and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor, nn

from .kernels.constants import ACTIVATIONS, NORMS

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
                f"{name} must be a number or one value per channel [{channels}]; got a tensor of shape "
                f"{tuple(value.shape)}"
            )
        value = value.tolist()
    values = list(value) if isinstance(value, Iterable) else [value]
    if any(isinstance(v, bool) or not isinstance(v, Real) for v in values):
        raise TypeError(f"{name} must be a number or a sequence of numbers; got {value!r}")
    if len(values) not in (1, channels):
        raise ValueError(
            f"{name} must be a number or have one value per input channel ({channels}); got {len(values)} values"
        )
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
            f"eps must be in the units of x, which bounds={bounds!r} puts in [0, 1]; got {max(eps_values)}, which "
            f"looks like 0..255 units: use {max(eps_values):g}/255"
        )
    return eps_values, step_values, lo, hi


def tensor(name: str, value: object, shape: tuple[int | None, ...], *, like: Tensor | None = None) -> Tensor:
    """A tensor of this shape (None: any size), on `like`'s device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
    if value.dim() != len(shape) or any(
        want not in (None, have) for want, have in zip(shape, value.shape, strict=True)
    ):
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


def images(x: object) -> Tensor:
    """x as a batch of float images [B, C, H, W], detached."""
    return floating("x", tensor("x", x, (None,) * 4), X_DTYPES).detach()


def values_wanted(validate: bool | None, x: Tensor, first_call: bool) -> bool:
    """Whether to look at values, which waits for a GPU: by default on CPU always, elsewhere on the first call only."""
    if validate is not None:
        if not isinstance(validate, bool):
            raise TypeError(f"validate must be True, False or None; got {validate!r}")
        return validate
    if x.device.type == "cpu":
        return True
    if torch.compiler.is_compiling() or (x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return False
    return first_call


def image_values(x: Tensor, lo: list[float], hi: list[float]) -> None:
    """Every pixel is finite and inside the bounds, with a tolerance of 1e-6 for rounding."""
    if x.numel() == 0:
        return
    dims = (0, 2, 3)
    lowest, highest = x.amin(dims).tolist(), x.amax(dims).tolist()
    if not all(map(math.isfinite, lowest + highest)):
        raise ValueError("x must be finite; got NaN or infinite values")
    channels = len(lowest)
    low, high = lo * (channels // len(lo)), hi * (channels // len(hi))
    if any(v < b - 1e-6 for v, b in zip(lowest, low, strict=True)) or any(
        v > b + 1e-6 for v, b in zip(highest, high, strict=True)
    ):
        raise ValueError(
            f"x must lie in bounds, ({min(low):g}, {max(high):g}); got values from {min(lowest):g} to "
            f"{max(highest):g}: scale the images, or give the bounds they have"
        )


def class_labels(y: object, x: Tensor) -> None:
    """y as cross-entropy takes it: int64 classes [B, ...], or probabilities [B, classes, ...]; reads no values."""
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a torch.Tensor; got {type(y).__name__}")
    if y.device != x.device:
        raise ValueError(f"y must be on x's device ({x.device}); got {y.device}")
    if y.dtype.is_floating_point:
        if y.dim() < 2 or len(y) != len(x):
            raise ValueError(f"y must have shape [{len(x)}, classes] when it holds probabilities; got {list(y.shape)}")
    elif y.dtype != torch.int64:
        raise TypeError(
            f"y must be int64 class labels (or float probabilities); got {str(y.dtype).removeprefix('torch.')}"
        )
    elif y.dim() < 1 or len(y) != len(x):
        raise ValueError(f"y must have shape [{len(x)}], one label per image of x; got {list(y.shape)}")


def label_shape(y: Tensor, classes: int, dimensions: int) -> None:
    """y fits logits of so many classes [B, classes, ...] and dimensions."""
    rest = ["..."] if dimensions > 2 else []
    if y.dtype == torch.int64 and y.dim() != dimensions - 1:
        wanted = ", ".join([str(len(y)), *rest])
    elif y.dtype != torch.int64 and (y.dim() != dimensions or y.shape[1] != classes):
        wanted = ", ".join([str(len(y)), str(classes), *rest])
    else:
        return
    raise ValueError(f"y must have shape [{wanted}] for this model's {classes} classes; got {list(y.shape)}")


def label_values(y: Tensor, classes: int, ignore_index: int) -> None:
    """Every label is a class of the model, or the one that cross-entropy ignores."""
    if y.dtype != torch.int64 or y.numel() == 0:
        return
    wrong = ((y < 0) | (y >= classes)) & (y != ignore_index)
    if bool(wrong.any()):
        raise ValueError(f"y must hold labels in [0, {classes - 1}]; got {int(y[wrong][0])}")


def perturbation(init: object, x: Tensor, allowed: Sequence[str], why: str = "") -> str | Tensor:
    """`init` as one of the allowed words or a perturbation of x's shape, dtype and device."""
    if isinstance(init, Tensor):
        return floating("init", tensor("init", init, tuple(x.shape), like=x), (x.dtype,)).detach()
    if not isinstance(init, str) or init not in allowed:
        words = ", ".join(map(repr, allowed))
        raise ValueError(f"init must be {words} or a tensor like x; got {init!r}" + (f" ({why})" if why else ""))
    return init


def normalisation(
    mean: Constants | None, std: Constants | None, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of the same length, 1 or `channels`; empty where both are None."""
    if (mean is None) != (std is None):
        raise ValueError("mean and std must be given together; got only one of them")
    if mean is None or std is None:
        return (), ()
    means, stds = constants("mean", mean, channels), constants("std", std, channels)
    if min(stds) <= 0:
        raise ValueError(f"std must be > 0; got {min(stds)}")
    width = max(len(means), len(stds))
    return tuple(means * (width // len(means))), tuple(stds * (width // len(stds)))


def model(value: object) -> nn.Module:
    """A module that a step can run."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(value).__name__}")
    if isinstance(value, nn.DataParallel):
        raise TypeError("model must not be a DataParallel; use DistributedDataParallel")
    return value


def same_device(name: str, x: Tensor, module: nn.Module) -> None:
    """x on the device of the module's first parameter."""
    parameter = next(module.parameters(), None)
    if parameter is not None and parameter.device != x.device:
        raise ValueError(f"{name} must be on the model's device ({parameter.device}); got {x.device}")


def generator(value: object, x: Tensor) -> None:
    """None or a torch.Generator of x's device."""
    if value is None:
        return
    if not isinstance(value, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None; got {value!r}")
    if value.device.type != x.device.type:
        raise ValueError(f"generator must be on x's device ({x.device}); got {value.device}")


def number(name: str, value: object, minimum: float) -> float:
    """`value` as a finite float that is at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number >= {minimum:g}; got {value!r} ({type(value).__name__})")
    number = float(value)
    if not (math.isfinite(number) and number >= minimum):
        raise ValueError(f"{name} must be a finite number >= {minimum:g}; got {value}")
    return number
