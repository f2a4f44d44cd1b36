"""Inputs for the first-layer operation: random geometries (hypothesis) and random tensors (seeded)."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from yopo_ext.kernels.constants import ACTIVATIONS, NORMS


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def make_arguments(
    *, batch=2, channels=3, kernels=5, size=(7, 9), kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1),
    groups=1, activation="identity", negative_slope=0.1, bias=False, scale=False, shift=False, normalise=False,
    norm="linf", mask_start=False, steps=1, step_size=0.02, eps=0.05, bounds=(0.0, 1.0), per_channel=False,
    dtype=torch.float32, costate_dtype=None,
    x_layout=torch.contiguous_format, costate_layout=torch.contiguous_format, saturated=0.2, costate_scale=1.0,
    need_output=True, need_weight_grad=True, seed=0, device="cpu",
) -> tuple:  # fmt: skip
    """The operator's positional arguments; pixels are in [0, 1], some at its ends, some starts outside ball and bounds."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def values(value: float) -> list[float]:
        spread = per_channel and norm == "linf"
        return [value * (0.5 + float(rand(1))) for _ in range(channels)] if spread else [value]

    height, width = (
        output_size(s, k, t, p, d) for s, k, t, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    x = rand(batch, channels, *size)
    edge = rand(*x.shape)
    x = torch.where(edge < saturated / 2, 0.0, torch.where(edge > 1 - saturated / 2, 1.0, x))
    eta = (2 * rand(*x.shape) - 1) * eps * 1.2
    weight = randn(kernels, channels // groups, *kernel) / (channels // groups * kernel[0] * kernel[1]) ** 0.5
    costate = randn(batch, kernels, height, width) * costate_scale

    def on(t: torch.Tensor, layout: torch.memory_format = torch.contiguous_format, to: Any = dtype) -> torch.Tensor:
        return t.to(device=device, dtype=to).contiguous(memory_format=layout)

    def parameter(wanted: bool, centre: float) -> torch.Tensor | None:
        return on(randn(kernels) * 0.3 + centre) if wanted else None

    return (
        on(x, x_layout), on(eta, x_layout), on(costate, costate_layout, costate_dtype or dtype), on(weight),
        parameter(bias, 0.0), parameter(scale, 1.0), parameter(shift, 0.0),
        [0.4 + 0.1 * float(rand(1)) for _ in range(channels)] if normalise else [],
        [0.2 + 0.1 * float(rand(1)) for _ in range(channels)] if normalise else [],
        list(stride), list(padding), list(dilation), groups, ACTIVATIONS[activation], negative_slope, steps,
        values(step_size), values(eps), [bounds[0]], [bounds[1]], NORMS[norm], mask_start, need_output, need_weight_grad, False,
    )  # fmt: skip


LAYOUTS = (torch.contiguous_format, torch.channels_last)


@st.composite
def cases(draw: st.DrawFn, max_size: int = 20, dtypes=(torch.float32, torch.float64)) -> dict[str, Any]:
    """Keyword arguments for `make_arguments` of any geometry that has an output."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    kernel = tuple(draw(st.integers(1, 5)) for _ in range(2))
    stride = tuple(draw(st.integers(1, 4)) for _ in range(2))
    padding = tuple(draw(st.integers(0, 3)) for _ in range(2))
    dilation = tuple(draw(st.integers(1, 3)) for _ in range(2))
    smallest = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = tuple(draw(st.integers(s, max(s, max_size))) for s in smallest)
    dtype = draw(st.sampled_from(dtypes))
    costate_dtypes = [dtype, torch.float32, torch.bfloat16, torch.float16]
    lo = draw(st.just(0.0) | st.floats(-0.5, 0.5, width=32))
    hi = 1.0 if lo == 0.0 else lo + draw(st.floats(0.0, 1.0, width=32))
    return {
        "batch": draw(st.integers(1, 5)),
        "channels": groups * draw(st.integers(1, 5)),
        "kernels": groups * draw(st.integers(1, 9)),
        "size": size, "kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups,
        "activation": draw(st.sampled_from(list(ACTIVATIONS))),
        "bias": draw(st.booleans()), "scale": draw(st.booleans()), "shift": draw(st.booleans()),
        "normalise": draw(st.booleans()), "per_channel": draw(st.booleans()),
        "norm": draw(st.sampled_from(list(NORMS))), "mask_start": draw(st.booleans()), "steps": draw(st.integers(0, 3)),
        "bounds": (lo, hi),
        "dtype": dtype, "costate_dtype": draw(st.sampled_from(costate_dtypes)),
        "x_layout": draw(st.sampled_from(LAYOUTS)), "costate_layout": draw(st.sampled_from(LAYOUTS)),
        "need_output": draw(st.booleans()), "need_weight_grad": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }  # fmt: skip
