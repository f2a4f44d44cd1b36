"""The first layer as one autograd node, so that a model's own backward pass updates the perturbation.

`first_layer_node` computes y0 = f0(x + eta). In its backward it receives the costate p = dL/dy0 and returns, as the
"gradient" of the leaf `eta`, the perturbation after n inner steps; the gradients of the first layer's parameters come
out as ordinary gradients: at the perturbation the pass ran at (`gradient_before`), at the one its costate led to
(`gradient_after`), the sum of both, or none. The node is a pure function of its arguments: what `torch.compile`,
DistributedDataParallel or a gradient scaler do around a layer they can do around it.

`first_layer_batch_norm_node` is the same for a convolution followed by a BatchNorm that uses batch statistics: the
inner steps keep the statistics of the forward pass, parameter gradients are taken through those of their own input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .eligibility import choose
from .reference import activate, activation_slope
from .validation import COSTATE_DTYPES


def per_channel(values: Sequence[float], like: Tensor) -> Tensor | float:
    """One value as a number, several as a tensor [C, 1, 1] made on the device (a copy from the host would wait)."""
    if len(values) == 1:
        return values[0]
    return torch.stack([like.new_full((), value) for value in values])[:, None, None]


def normalised(u: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(u - mean) / std, scalars or per channel; u itself where they are empty."""
    return (u - per_channel(mean, u)) / per_channel(std, u) if mean else u


def _costate(p: Tensor, x: Tensor) -> Tensor:
    """p as the operator takes it: dense, and of a dtype that goes with x."""
    if p.dtype not in COSTATE_DTYPES and p.dtype != x.dtype:
        p = p.to(x.dtype)
    dense = p.is_contiguous() or p.is_contiguous(memory_format=torch.channels_last)
    return p if dense else p.contiguous()


def update(*arguments: Any) -> tuple[Tensor, ...]:
    op = ops.first_layer_update if choose(*arguments).native else ops.first_layer_update_reference
    return op(*arguments)


def _in_full_precision(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Without autocast, whose casts a compiler would otherwise carry from the forward pass into the backward pass."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, p: Tensor, *rest: Any) -> Any:
        with torch.autocast(p.device.type, enabled=False):
            return backward(ctx, p, *rest)

    return wrapped


def _as(parameter: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    return None if parameter is None or gradient is None else gradient.to(parameter.dtype)


def _convolve(x, eta, weight, bias, mean, std, geometry, dtype) -> Tensor:
    u = normalised(x + eta, mean, std).to(dtype)
    return torch.nn.functional.conv2d(u, weight.to(dtype), None if bias is None else bias.to(dtype), *geometry)


def _add(total: list[Tensor | None], terms: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [t if s is None else s if t is None else s + t for s, t in zip(total, terms, strict=True)]


# --- convolution [+ constant per-channel affine] [+ activation] ---


def _forward(
    eta: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
    negative_slope: float,
    steps: int,
    step_size: Sequence[float],
    eps: Sequence[float],
    lo: Sequence[float],
    hi: Sequence[float],
    norm: int,
    gradient_before: bool,
    gradient_after: bool,
    allow_tf32: bool,
    dtype: torch.dtype,
) -> Tensor:
    """y0 = act(scale * conv2d((x + eta - mean) / std, weight, bias) + shift) in `dtype` [B, K, OH, OW]."""
    z = _convolve(x, eta, weight, bias, mean, std, (stride, padding, dilation, groups), dtype)
    if scale is not None:
        z = z * scale[:, None, None]
    if shift is not None:
        z = z + shift[:, None, None]
    return activate(z, activation, negative_slope).to(dtype)


first_layer_node = torch.library.custom_op("yopo_ext::first_layer_node", _forward, mutates_args=())


@first_layer_node.register_fake
def _(eta, x, weight, bias, scale, shift, mean, std, stride, padding, dilation, groups, *rest) -> Tensor:
    dtype = rest[-1]
    geometry = (stride, padding, dilation, groups)
    return torch.nn.functional.conv2d(x.to(dtype), weight.to(dtype), None, *geometry)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = inputs[6:]


@_in_full_precision
def _backward(ctx: Any, p: Tensor) -> tuple[Any, ...]:
    eta, x, weight, bias, scale, shift = ctx.saved_tensors
    geometry, (steps, *threat), (before, after, allow_tf32, _) = ctx.settings[:8], ctx.settings[8:14], ctx.settings[14:]
    p = _costate(p, x)
    parameters = (weight, bias, scale, shift)
    # The operator works in x's dtype; the parameters of a half-precision model are widened for it.
    wide = [None if t is None else t.to(x.dtype) for t in parameters]
    wanted = any(ctx.needs_input_grad[2:6])
    new_eta, _, *gradients = update(x, eta, p, *wide, *geometry, steps, *threat, False, wanted and after, allow_tf32)
    total: list[Tensor | None] = list(gradients) if wanted and after else [None] * 4
    if wanted and before:
        total = _add(total, update(x, eta, p, *wide, *geometry, 0, *threat, False, True, allow_tf32)[2:])
    return new_eta, None, *map(_as, parameters, total), *[None] * len(ctx.settings)


first_layer_node.register_autograd(_backward, setup_context=_setup)


# --- convolution + BatchNorm on batch statistics [+ activation] ---


def _forward_batch_norm(
    eta: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
    negative_slope: float,
    steps: int,
    step_size: Sequence[float],
    eps: Sequence[float],
    lo: Sequence[float],
    hi: Sequence[float],
    norm: int,
    gradient_before: bool,
    gradient_after: bool,
    allow_tf32: bool,
    dtype: torch.dtype,
    batch_norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y0, batch mean [K], batch variance [K] (unbiased), 1/sqrt(biased variance + batch_norm_eps) [K])."""
    z = _convolve(x, eta, weight, bias, mean, std, (stride, padding, dilation, groups), dtype)
    batch_mean, batch_variance = (torch.zeros(z.shape[1], dtype=x.dtype, device=x.device) for _ in range(2))
    # With momentum 1 the "running" statistics become exactly those of this batch.
    gamma, beta = (None if t is None else t.to(x.dtype) for t in (gamma, beta))
    y, _, inverse_std = torch.ops.aten._native_batch_norm_legit.default(
        z, gamma, beta, batch_mean, batch_variance, True, 1.0, batch_norm_eps
    )
    return activate(y, activation, negative_slope), batch_mean, batch_variance, inverse_std.to(x.dtype)


first_layer_batch_norm_node = torch.library.custom_op(
    "yopo_ext::first_layer_batch_norm_node", _forward_batch_norm, mutates_args=()
)


@first_layer_batch_norm_node.register_fake
def _(eta, x, weight, bias, gamma, beta, mean, std, stride, padding, dilation, groups, *rest):
    dtype = rest[-2]
    y = torch.nn.functional.conv2d(x.to(dtype), weight.to(dtype), None, stride, padding, dilation, groups)
    return y, *(x.new_empty(y.shape[1]) for _ in range(3))


def _setup_batch_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, batch_mean, _, inverse_std = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:6], batch_mean, inverse_std)
    ctx.settings = inputs[6:]


def _weight_gradients_through_statistics(
    u: Tensor, p: Tensor, weight, bias, gamma, beta, geometry, activation, negative_slope, batch_norm_eps
) -> list[Tensor | None]:
    """Gradients of <p, act(batch_norm(conv2d(u)))> with respect to weight, bias, gamma, beta; u already normalised."""
    stride, padding, dilation, groups = geometry
    aten = torch.ops.aten
    z = torch.nn.functional.conv2d(u, weight, bias, stride, padding, dilation, groups)
    y, batch_mean, inverse_std = aten._native_batch_norm_legit.no_stats(z, gamma, beta, True, 0.0, batch_norm_eps)
    q = p.to(u.dtype) * activation_slope(y, activation, negative_slope)
    gz, grad_gamma, grad_beta = aten.native_batch_norm_backward(
        q,
        z,
        gamma,
        None,
        None,
        batch_mean,
        inverse_std,
        True,
        batch_norm_eps,
        [True, gamma is not None, beta is not None],
    )
    _, grad_weight, grad_bias = aten.convolution_backward(
        gz,
        u,
        weight,
        [weight.shape[0]],
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [False, True, bias is not None],
    )
    return [grad_weight, grad_bias, grad_gamma, grad_beta]


@_in_full_precision
def _backward_batch_norm(ctx: Any, p: Tensor, *_: Tensor) -> tuple[Any, ...]:
    eta, x, weight, bias, gamma, beta, batch_mean, inverse_std = ctx.saved_tensors
    geometry, (steps, *threat) = ctx.settings[:8], ctx.settings[8:14]
    before, after, allow_tf32, _, batch_norm_eps = ctx.settings[14:]
    mean, std, *conv_geometry, activation, negative_slope = geometry
    p = _costate(p, x)
    parameters = (weight, bias, gamma, beta)
    weight_, bias_, gamma_, beta_ = (None if t is None else t.to(x.dtype) for t in parameters)
    scale = inverse_std if gamma_ is None else gamma_ * inverse_std
    shift = -batch_mean * scale if beta_ is None else beta_ - batch_mean * scale
    new_eta = update(
        x, eta, p, weight_, bias_, scale, shift, *geometry, steps, *threat, False, False, allow_tf32
    )[0]  # fmt: skip
    total: list[Tensor | None] = [None] * 4
    if any(ctx.needs_input_grad[2:6]):
        for asked, at in ((before, eta), (after, new_eta)):
            if asked:
                u = normalised(x + at, mean, std)
                total = _add(total, _weight_gradients_through_statistics(
                    u, p, weight_, bias_, gamma_, beta_, conv_geometry, activation, negative_slope, batch_norm_eps
                ))  # fmt: skip
    return new_eta, None, *map(_as, parameters, total), *[None] * len(ctx.settings)


first_layer_batch_norm_node.register_autograd(_backward_batch_norm, setup_context=_setup_batch_norm)


# In eager mode the same nodes without the operator dispatch, whose Python side (and that of a separate `setup_context`)
# costs more than a small first layer.


class FirstLayerNode(torch.autograd.Function):
    """`first_layer_node` for eager mode."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _forward(*inputs)
        _setup(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


class FirstLayerBatchNormNode(torch.autograd.Function):
    """`first_layer_batch_norm_node` for eager mode."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output = _forward_batch_norm(*inputs)
        _setup_batch_norm(ctx, inputs, output)
        return output

    backward = staticmethod(_backward_batch_norm)
