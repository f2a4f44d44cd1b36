"""The first-layer node for a convolution followed by a BatchNorm that uses batch statistics.

As the nodes of `fused_node`; the inner steps keep the statistics of the forward pass, the parameter gradients are taken
through the statistics of their own input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.reference import activate, activation_slope
from .fused_node import (
    Settings,
    Update,
    add_up,
    as_parameter,
    convolve,
    costate_for,
    in_full_precision,
    update_in_graph,
    update_of,
    verdict,
)
from .normalisation import normalised


def _output(
    x: Tensor, eta: Tensor, parameters: Sequence[Any], settings: Settings, batch_norm_eps: float
) -> tuple[Tensor, ...]:
    """(y0, batch mean [K], batch variance [K] (unbiased), 1/sqrt(biased variance + batch_norm_eps) [K])."""
    weight, bias, gamma, beta = parameters
    z = convolve(normalised(x + eta, settings.mean, settings.std), weight, bias, settings)
    batch_mean, batch_variance = (torch.zeros(z.shape[1], dtype=x.dtype, device=x.device) for _ in range(2))
    # With momentum 1 the "running" statistics become exactly those of this batch.
    gamma, beta = (None if t is None else t.to(x.dtype) for t in (gamma, beta))
    y, _, inverse_std = torch.ops.aten._native_batch_norm_legit.default(
        z, gamma, beta, batch_mean, batch_variance, True, 1.0, batch_norm_eps
    )
    y = activate(y, settings.activation, settings.negative_slope)
    return y, batch_mean, batch_variance, inverse_std.to(x.dtype)


def _weight_gradients_through_statistics(
    u: Tensor, p: Tensor, parameters: Sequence[Any], settings: Settings, batch_norm_eps: float
) -> list[Tensor | None]:
    """Gradients of <p, act(batch_norm(conv2d(u)))> with respect to weight, bias, gamma, beta; u already normalised."""
    weight, bias, gamma, beta = parameters
    stride, padding, dilation, groups = settings.geometry
    aten = torch.ops.aten
    z = torch.nn.functional.conv2d(u, weight, bias, stride, padding, dilation, groups)
    y, batch_mean, inverse_std = aten._native_batch_norm_legit.no_stats(z, gamma, beta, True, 0.0, batch_norm_eps)
    q = p.to(u.dtype) * activation_slope(y, settings.activation, settings.negative_slope)
    gz, grad_gamma, grad_beta = aten.native_batch_norm_backward(
        q, z, gamma, None, None, batch_mean, inverse_std, True, batch_norm_eps,
        [True, gamma is not None, beta is not None],
    )  # fmt: skip
    _, grad_weight, grad_bias = aten.convolution_backward(
        gz, u, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups,
        [False, True, bias is not None],
    )  # fmt: skip
    return [grad_weight, grad_bias, grad_gamma, grad_beta]


def _results(
    update: Update, x: Tensor, eta: Tensor, p: Tensor, parameters: Sequence[Any], statistics: tuple[Tensor, Tensor],
    settings: Settings, batch_norm_eps: float, wanted: bool,
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """The perturbation after the inner steps, and the gradients of the parameters (None where they are not wanted)."""
    p = costate_for(p, x)
    wide = [None if t is None else t.to(x.dtype) for t in parameters]
    weight, bias, gamma, beta = wide
    batch_mean, inverse_std = statistics
    scale = inverse_std if gamma is None else gamma * inverse_std
    shift = -batch_mean * scale if beta is None else beta - batch_mean * scale
    new_eta = update(x, eta, p, weight, bias, scale, shift, settings, settings.steps, False)[0]
    total: list[Tensor | None] = [None] * 4
    for asked, at in ((settings.gradient_before, eta), (settings.gradient_after, new_eta)):
        if wanted and asked:
            u = normalised(x + at, settings.mean, settings.std)
            total = add_up(total, _weight_gradients_through_statistics(u, p, wide, settings, batch_norm_eps))
    return new_eta, [as_parameter(*pair) for pair in zip(parameters, total, strict=True)]


class BatchNormNode(torch.autograd.Function):
    """The node in eager mode."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Any,
        settings: Settings,
        batch_norm_eps: float,
        eta: Tensor,
        x: Tensor,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        y, batch_mean, variance, inverse_std = _output(x, eta, parameters, settings, batch_norm_eps)
        ctx.run, ctx.settings, ctx.batch_norm_eps = run, settings, batch_norm_eps
        ctx.mark_non_differentiable(batch_mean, variance)
        copies = tuple(None if t is None else t.detach().clone() for t in parameters)
        ctx.save_for_backward(eta, x, *copies, batch_mean, inverse_std)
        return y, batch_mean, variance

    @staticmethod
    def backward(ctx: Any, p: Tensor, *_: Tensor) -> tuple[Any, ...]:
        eta, x, *parameters, batch_mean, inverse_std = ctx.saved_tensors
        ctx.run.backwards += 1
        wanted = any(ctx.needs_input_grad[5:])
        new_eta, gradients = _results(
            update_of(ctx.run.ball),
            x,
            eta,
            p,
            parameters,
            (batch_mean, inverse_std),
            ctx.settings,
            ctx.batch_norm_eps,
            wanted,
        )
        return None, None, None, new_eta, None, *gradients


# --- the operator of compiled graphs ---


def _forward(
    eta: Tensor,
    check: Tensor,
    seen: Tensor,
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
    settings = Settings(
        list(mean), list(std), list(stride), list(padding), list(dilation), groups, activation, negative_slope, steps, norm,
        mask_start, gradient_before, gradient_after, allow_tf32, dtype,
    )  # fmt: skip
    return _output(x, eta, (weight, bias, gamma, beta), settings, batch_norm_eps)  # type: ignore[return-value]


batch_norm_node = torch.library.custom_op("yopo_ext::first_layer_batch_norm_node", _forward, mutates_args=())


@batch_norm_node.register_fake
def _(eta, check, seen, x, weight, bias, gamma, beta, threat, *rest):
    s = Settings(*rest[:-1])
    y = torch.nn.functional.conv2d(x.to(s.dtype), weight.to(s.dtype), None, *s.geometry)
    return y, *(x.new_empty(y.shape[1]) for _ in range(3))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, batch_mean, _, inverse_std = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:9], batch_mean, inverse_std)
    ctx.settings, ctx.batch_norm_eps = Settings(*inputs[9:-1]), inputs[-1]


@in_full_precision
def _backward(ctx: Any, p: Tensor, *_: Tensor) -> tuple[Any, ...]:
    eta, _, seen, x, *parameters, threat, batch_mean, inverse_std = ctx.saved_tensors
    new_eta, gradients = _results(
        update_in_graph(threat), x, eta, p, parameters, (batch_mean, inverse_std), ctx.settings, ctx.batch_norm_eps,
        any(ctx.needs_input_grad[4:8]),
    )  # fmt: skip
    checked = verdict(seen, x, eta, ctx.settings)
    return new_eta, checked, None, None, *gradients, None, *[None] * (len(ctx.settings) + 1)


batch_norm_node.register_autograd(_backward, setup_context=_setup)
