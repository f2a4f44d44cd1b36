"""Argument checks: every message names the argument, what it was and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

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
    """A scalar or one value per input channel ([C], [C, 1, 1] or [1, C, 1, 1]), as a list of 1 or `channels` finite floats.

    A CUDA tensor is read back here, which synchronises: pass numbers or a list in a hot loop.
    """
    if isinstance(value, float):
        if math.isnan(value) or (math.isinf(value) and not allow_infinite):
            raise ValueError(f"{name} must be finite; got {value!r}")
        return [value]
    if isinstance(value, Tensor):
        if value.dim() > 1 and value.shape not in ((channels, 1, 1), (1, channels, 1, 1)) and value.numel() != 1:
            raise ValueError(
                f"{name} must be a number or one value per channel [{channels}]; got a tensor of shape "
                f"{tuple(value.shape)}"
            )
        value = value.detach().flatten().tolist()
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


def images(x: object) -> Tensor:
    """x as a batch of float images [B, C, H, W], detached."""
    return no_inference(floating("x", tensor("x", x, (None,) * 4), X_DTYPES)).detach()


def no_inference(value: Any) -> Any:
    """A tensor that was made in inference mode as a copy that autograd takes; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


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


def image_values(x: Tensor, lo: list[float] | Tensor, hi: list[float] | Tensor) -> None:
    """Every pixel is finite and inside the bounds, with a tolerance of 1e-6 for rounding.

    lo, hi: 1 or C numbers, or tensors that broadcast to x.
    """
    if x.numel() == 0:
        return
    lowest, highest = (float(v) for v in torch.aminmax(x))
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise ValueError("x must be finite; got NaN or infinite values")
    if isinstance(lo, list) and isinstance(hi, list) and len(lo) == len(hi) == 1:
        inside = lowest >= lo[0] - 1e-6 and highest <= hi[0] + 1e-6
    else:
        low, high = (torch.as_tensor(b, dtype=x.dtype, device=x.device) for b in (lo, hi))
        low, high = (b.reshape(-1, 1, 1) if b.dim() == 1 else b for b in (low, high))
        inside = not bool(((x < low - 1e-6) | (x > high + 1e-6)).any())
        lo, hi = [float(low.min())], [float(high.max())]
    if not inside:
        raise ValueError(
            f"x must lie in bounds, ({min(lo):g}, {max(hi):g}); got values from {lowest:g} to {highest:g}: scale the images, "
            f"or give the bounds they have"
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
    lowest, highest = (int(v) for v in torch.aminmax(y))
    if lowest >= 0 and highest < classes:
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
    """The module that a step runs: `value`, or what a DataParallel over at most one device holds."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(value).__name__}")
    if isinstance(value, torch.jit.ScriptModule):
        raise TypeError(
            "model must not be a ScriptModule: its forward cannot be replaced; give the module it was made from"
        )
    if isinstance(value, nn.DataParallel):
        if len(value.device_ids) > 1:
            raise TypeError(
                f"model must not be a DataParallel over {len(value.device_ids)} devices: give model.module, or use "
                f"DistributedDataParallel"
            )
        return model(value.module)
    if isinstance(value, nn.parallel.DistributedDataParallel) and value.static_graph:
        raise ValueError("model must not be DistributedDataParallel(static_graph=True): the passes of a step differ")
    return value


def input_dtype(x: Tensor, dtypes: set[torch.dtype]) -> torch.dtype:
    """The dtype of the model's input, given the dtypes of its parameters: x's, or that of a model in half precision."""
    floating = {dtype for dtype in dtypes if dtype.is_floating_point}
    if len(floating) != 1 or x.dtype in floating:
        return x.dtype
    (dtype,) = floating
    if dtype in (torch.bfloat16, torch.float16) and x.dtype == torch.float32:
        return dtype
    names = [str(d).removeprefix("torch.") for d in (x.dtype, dtype)]
    raise TypeError(f"x must be of the model's dtype, {names[1]}; got {names[0]}")


def optional_callable(name: str, value: object) -> None:
    """None or something that can be called."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be callable or None; got {value!r}")


def same_device(name: str, x: Tensor, parameters: Iterable[Tensor]) -> None:
    """x on the device of a model's first parameter."""
    parameter = next(iter(parameters), None)
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
