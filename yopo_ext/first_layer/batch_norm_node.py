"""The first-layer node for a convolution followed by a BatchNorm that uses batch statistics.

As `fused_node.first_layer_node`; the inner steps keep the statistics of the forward pass, the parameter gradients
are taken through the statistics of their own input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.reference import activate, activation_slope
from .fused_node import (
    add_up,
    as_parameter,
    convolve,
    costate_for,
    in_full_precision,
    normalised,
    update,
    update_operator,
)


def _forward(
    eta: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    threat: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
    negative_slope: float,
    steps: int,
    norm: int,
    mask_start: bool,
    gradient_before: bool,
    gradient_after: bool,
    allow_tf32: bool,
    dtype: torch.dtype,
    batch_norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y0, batch mean [K], batch variance [K] (unbiased), 1/sqrt(biased variance + batch_norm_eps) [K])."""
    z = convolve(x, eta, weight, bias, mean, std, (stride, padding, dilation, groups), dtype)
    batch_mean, batch_variance = (torch.zeros(z.shape[1], dtype=x.dtype, device=x.device) for _ in range(2))
    # With momentum 1 the "running" statistics become exactly those of this batch.
    gamma, beta = (None if t is None else t.to(x.dtype) for t in (gamma, beta))
    y, _, inverse_std = torch.ops.aten._native_batch_norm_legit.default(
        z, gamma, beta, batch_mean, batch_variance, True, 1.0, batch_norm_eps
    )
    return activate(y, activation, negative_slope), batch_mean, batch_variance, inverse_std.to(x.dtype)


first_layer_batch_norm_node = torch.library.custom_op(
    "yopo_ext::first_layer_batch_norm_node", _forward, mutates_args=()
)


@first_layer_batch_norm_node.register_fake
def _(eta, x, weight, bias, gamma, beta, threat, mean, std, stride, padding, dilation, groups, *rest):
    dtype = rest[-2]
    y = torch.nn.functional.conv2d(x.to(dtype), weight.to(dtype), None, stride, padding, dilation, groups)
    return y, *(x.new_empty(y.shape[1]) for _ in range(3))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, batch_mean, _, inverse_std = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:7], batch_mean, inverse_std)
    ctx.settings = inputs[7:]
    ctx.update = update_operator


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
        q, z, gamma, None, None, batch_mean, inverse_std, True, batch_norm_eps,
        [True, gamma is not None, beta is not None],
    )  # fmt: skip
    _, grad_weight, grad_bias = aten.convolution_backward(
        gz, u, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups,
        [False, True, bias is not None],
    )  # fmt: skip
    return [grad_weight, grad_bias, grad_gamma, grad_beta]


@in_full_precision
def _backward(ctx: Any, p: Tensor, *_: Tensor) -> tuple[Any, ...]:
    eta, x, weight, bias, gamma, beta, threat, batch_mean, inverse_std = ctx.saved_tensors
    *geometry, steps, norm, mask_start, before, after, allow_tf32, _, batch_norm_eps = ctx.settings
    mean, std, *conv_geometry, activation, negative_slope = geometry
    p = costate_for(p, x)
    parameters = (weight, bias, gamma, beta)
    weight_, bias_, gamma_, beta_ = (None if t is None else t.to(x.dtype) for t in parameters)
    scale = inverse_std if gamma_ is None else gamma_ * inverse_std
    shift = -batch_mean * scale if beta_ is None else beta_ - batch_mean * scale
    new_eta = ctx.update(
        threat, x, eta, p, weight_, bias_, scale, shift, *geometry, steps, norm, mask_start, False, False, allow_tf32
    )[0]
    total: list[Tensor | None] = [None] * 4
    if any(ctx.needs_input_grad[2:6]):
        for asked, at in ((before, eta), (after, new_eta)):
            if asked:
                u = normalised(x + at, mean, std)
                total = add_up(total, _weight_gradients_through_statistics(
                    u, p, weight_, bias_, gamma_, beta_, conv_geometry, activation, negative_slope, batch_norm_eps
                ))  # fmt: skip
    return new_eta, None, *map(as_parameter, parameters, total), None, *[None] * len(ctx.settings)


first_layer_batch_norm_node.register_autograd(_backward, setup_context=_setup)


class FirstLayerBatchNormNode(torch.autograd.Function):
    """`first_layer_batch_norm_node` for eager mode."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output = _forward(*inputs)
        _setup(ctx, inputs, output)
        ctx.update = update
        return output

    backward = staticmethod(_backward)
