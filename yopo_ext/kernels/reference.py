"""The first-layer operation in plain PyTorch: the definition, the fallback on every device, and (in fp64) the oracle.

Notation (all shapes as the operator takes them):

    x, eta   [B, C, H, W]    input and perturbation, fp32 or fp64
    p        [B, K, OH, OW]  costate, dL/d(first-layer output), any floating dtype
    f0(u)  = act(scale * conv2d((u - mean) / std, weight, bias) + shift)

Every constant is rounded to x's dtype before it is used, and p, u and the projection are never below fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .constants import ACTIVATIONS, NORMS

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

_SQRT_HALF = math.sqrt(0.5)
_INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
_TANH_CUBIC = 0.044715


def activate(z: Tensor, activation: int, negative_slope: float) -> Tensor:
    """act(z), element by element."""
    if activation == ACTIVATIONS["identity"]:
        return z
    if activation == ACTIVATIONS["relu"]:
        return torch.relu(z)
    if activation == ACTIVATIONS["leaky_relu"]:
        return torch.nn.functional.leaky_relu(z, negative_slope)
    if activation == ACTIVATIONS["gelu"]:
        return torch.nn.functional.gelu(z)
    if activation == ACTIVATIONS["gelu_tanh"]:
        return torch.nn.functional.gelu(z, approximate="tanh")
    return torch.nn.functional.silu(z)


def activation_slope(z: Tensor, activation: int, negative_slope: float) -> Tensor:
    """act'(z), element by element; at the kink relu' = 0 and leaky_relu' = negative_slope."""
    if activation == ACTIVATIONS["identity"]:
        return torch.ones_like(z)
    if activation == ACTIVATIONS["relu"]:
        return (z > 0).to(z.dtype)
    if activation == ACTIVATIONS["leaky_relu"]:
        return torch.where(z > 0, torch.ones_like(z), negative_slope)  # two scalars would make it fp32
    if activation == ACTIVATIONS["gelu"]:
        return 0.5 * (1.0 + torch.erf(z * _SQRT_HALF)) + z * torch.exp(-0.5 * z * z) * _INV_SQRT_2PI
    if activation == ACTIVATIONS["gelu_tanh"]:
        t = torch.tanh(_SQRT_2_OVER_PI * (z + _TANH_CUBIC * z * z * z))
        return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * _SQRT_2_OVER_PI * (1.0 + 3.0 * _TANH_CUBIC * z * z)
    s = torch.sigmoid(z)
    return s * (1.0 + z * (1.0 - s))


def _sign(g: Tensor) -> Tensor:
    """sign with sign(NaN) = 0 (`torch.sign` leaves that open)."""
    return (g > 0).to(g.dtype) - (g < 0).to(g.dtype)


class Interval(NamedTuple):
    """The admissible interval of every element: [lower, upper] inside the box, [a, b] also inside the L-inf ball."""

    lower: Tensor  # min(lo - x, 0)
    upper: Tensor  # max(hi - x, 0)
    a: Tensor
    b: Tensor


def constant(values: list[float] | Tensor, x: Tensor) -> Tensor:
    """One number as a scalar, one per channel as [C, 1, 1], in x's dtype and made on its device (a copy would wait for it)."""
    if isinstance(values, Tensor):
        return values
    if len(values) == 1:
        return x.new_full((), values[0])
    return torch.stack([x.new_full((), value) for value in values])[:, None, None]


def admissible_interval(x: Tensor, eps: Tensor, lo: Tensor, hi: Tensor) -> Interval:
    """Per element, the perturbations allowed by the box [lo, hi] and, in L-inf, by the ball; see `csrc/core/projection.h`.

    eps, lo, hi broadcast against x [B, C, H, W]. L2 passes an infinite eps: its ball is no interval.
    fmin/fmax: a NaN pixel gets the interval [0, 0], so that no NaN can widen the ball.
    """
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    lower, upper = torch.fmin(lo - x, zero), torch.fmax(hi - x, zero)
    return Interval(lower, upper, torch.fmax(-eps, lower), torch.fmin(eps, upper))


def project_linf(eta: Tensor, interval: Interval) -> Tensor:
    """Clamp eta to [a, b]; a NaN lands on a."""
    return torch.fmin(torch.fmax(eta, interval.a), interval.b)


def l2_norm(v: Tensor) -> Tensor:
    """Per-sample L2 norm [B, 1, 1, 1] that neither overflows nor underflows (scaled by the largest magnitude)."""
    flat = v.flatten(1)
    if flat.shape[1] == 0:
        return torch.zeros((v.shape[0], 1, 1, 1), dtype=v.dtype, device=v.device)
    largest = flat.abs().amax(1, keepdim=True)
    safe = torch.where(largest > 0, largest, torch.ones_like(largest))
    norm = largest * (flat / safe).square().sum(1, keepdim=True).sqrt()
    return norm[:, :, None, None]


def l2_direction(g: Tensor) -> Tensor:
    """g / ||g||_2 per sample; all zeros where the norm is zero or g is not finite."""
    flat = g.flatten(1)
    if flat.shape[1] == 0:
        return torch.zeros_like(g)
    largest = flat.abs().amax(1, keepdim=True)
    usable = (largest > 0) & torch.isfinite(largest)  # amax propagates NaN
    scaled = torch.where(usable, flat / torch.where(usable, largest, torch.ones_like(largest)), 0.0)
    norm = scaled.square().sum(1, keepdim=True).sqrt()
    return (scaled / torch.where(usable, norm, torch.ones_like(norm))).reshape(g.shape)


def project_l2(eta: Tensor, eps: Tensor, interval: Interval) -> Tensor:
    """Onto the L2 ball of radius eps, then into the box; NaN elements become 0."""
    eta = torch.where(torch.isnan(eta), torch.zeros_like(eta), eta)
    norm = l2_norm(eta)
    factor = torch.where(norm > eps, eps / norm, torch.ones_like(norm))
    return torch.fmin(torch.fmax(eta * factor, interval.lower), interval.upper)


class _FirstLayer:
    """f0, its input gradient and its weight gradients, at x's dtype."""

    def __init__(self, weight, bias, scale, shift, mean, std, stride, padding, dilation, groups, activation, slope):
        self.weight, self.bias, self.scale, self.shift = weight, bias, scale, shift
        self.mean, self.std = mean, std
        self.geometry = (list(stride), list(padding), list(dilation), False, [0, 0], groups)
        self.activation, self.negative_slope = activation, slope
        self.affine = activation == ACTIVATIONS["identity"]

    def normalise(self, u: Tensor) -> Tensor:
        return u if self.mean is None else (u - self.mean) / self.std

    def convolve(self, u: Tensor) -> Tensor:
        stride, padding, dilation, _, _, groups = self.geometry
        return torch.nn.functional.conv2d(self.normalise(u), self.weight, self.bias, stride, padding, dilation, groups)

    def products_backward(self, u: Tensor, gz: Tensor, mask: list[bool]):
        """Gradients of the convolution with respect to its (normalised) input u, weight and bias, where `mask` asks."""
        return torch.ops.aten.convolution_backward(gz, u, self.weight, [self.weight.shape[0]], *self.geometry, mask)

    def affine_part(self, z: Tensor) -> Tensor:
        if self.scale is not None:
            z = z * self.scale[:, None, None]
        return z if self.shift is None else z + self.shift[:, None, None]

    def output_gradient(self, u: Tensor, p: Tensor) -> tuple[Tensor, Tensor | None]:
        """(p * act'(pre-activation), conv output or None if it was not needed)."""
        if self.affine:
            return p, None
        z = self.convolve(u)
        return p * activation_slope(self.affine_part(z), self.activation, self.negative_slope), z

    def convolution_backward(self, u: Tensor, q: Tensor, mask: list[bool]):
        gz = q if self.scale is None else q * self.scale[:, None, None]
        return self.products_backward(self.normalise(u), gz, mask)

    def input_gradient(self, u: Tensor, p: Tensor) -> Tensor:
        q, _ = self.output_gradient(u, p)
        g = self.convolution_backward(u, q, [True, False, False])[0]
        return g if self.std is None else g / self.std

    def output(self, u: Tensor) -> Tensor:
        return activate(self.affine_part(self.convolve(u)), self.activation, self.negative_slope)

    def weight_gradients(self, u: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of <p, f0(u)> with respect to weight, bias, scale, shift (empty where the part is absent)."""
        q, z = self.output_gradient(u, p)
        empty = q.new_empty(0)
        _, grad_weight, grad_bias = self.convolution_backward(u, q, [False, True, self.bias is not None])
        grad_scale = grad_shift = empty
        if self.scale is not None:
            z = self.convolve(u) if z is None else z
            grad_scale = (q * z).sum((0, 2, 3))
        if self.shift is not None:
            grad_shift = q.sum((0, 2, 3))
        return grad_weight, grad_bias if self.bias is not None else empty, grad_scale, grad_shift


def _laid_out_as(model: Tensor, value: Tensor, copy: bool = False) -> Tensor:
    """`value` with the dtype and the strides of `torch.empty_like(model)`: what the fake kernel promises."""
    like = torch.empty_like(model)
    return value if not copy and value.dtype == like.dtype and value.stride() == like.stride() else like.copy_(value)


def _inner_steps(f0, x, eta, p, steps, step_size, direction, project, interval: Interval, box) -> Tensor:
    """`steps` times eta = project(eta + step_size * direction(g)); box: (lo, hi) with `mask_start`, else None."""
    g = d = None
    for i in range(steps):
        if g is None or not f0.affine:  # the collapse: an affine f0 has one gradient for every eta
            g, d = f0.input_gradient(x + eta if box is None else torch.clamp(x + eta, *box), p), None
        if box is not None and i == 0:
            first = direction(torch.where((eta < interval.lower) | (eta > interval.upper), 0.0, g))
            eta = project(eta + step_size * first)
            continue
        d = direction(g) if d is None else d
        eta = project(eta + step_size * d)
    return eta


def first_layer_update(
    x: Tensor,
    eta: Tensor,
    costate: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: list[float],
    std: list[float],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: int,
    negative_slope: float,
    steps: int,
    step_size: list[float],
    eps: list[float],
    lo: list[float],
    hi: list[float],
    norm: int,
    mask_start: bool,
    need_output: bool,
    need_weight_grad: bool,
    allow_tf32: bool,
    *,
    layer: type[_FirstLayer] = _FirstLayer,
    inner_steps: Callable[..., Tensor] | None = None,
) -> Outputs:
    """The operator's reference kernel; see `yopo_ext.first_layer_update` for the meaning of every argument.

    Float lists hold one value or one per input channel (mean, std: empty when absent). Returns (eta', output,
    grad_weight, grad_bias, grad_scale, grad_shift) with empty tensors where a result was not asked for or does not exist.
    `layer` and `inner_steps` take the place of products and steps: see `yopo_ext.kernels.library`.
    """

    f0 = layer(
        weight, bias, scale, shift, constant(mean, x) if mean else None, constant(std, x) if std else None,
        stride, padding, dilation, groups, activation, negative_slope,
    )  # fmt: skip
    p = costate.to(x.dtype)
    lo_t, hi_t, eps_t, sigma = (constant(values, x) for values in (lo, hi, eps, step_size))
    box = (lo_t, hi_t) if mask_start else None
    with torch.no_grad():
        if inner_steps is not None:
            new_eta = inner_steps(f0, x, eta, p, steps, (step_size, eps, lo, hi, norm), box)
        else:
            linf = norm == NORMS["linf"]
            interval = admissible_interval(x, eps_t if linf else torch.full_like(eps_t, math.inf), lo_t, hi_t)

            def project(moved: Tensor) -> Tensor:
                return project_linf(moved, interval) if linf else project_l2(moved, eps_t, interval)

            direction = _sign if linf else l2_direction
            new_eta = _inner_steps(f0, x, eta, p, steps, sigma, direction, project, interval, box)
        output = costate.new_empty(0)
        grad_weight, grad_bias, grad_scale, grad_shift = (x.new_empty(0) for _ in range(4))
        u = x + new_eta if need_output or need_weight_grad else x
        if need_output:
            output = _laid_out_as(costate, f0.output(u))
        if need_weight_grad:
            grad_weight, grad_bias, grad_scale, grad_shift = f0.weight_gradients(u, p)
            grad_weight = _laid_out_as(weight, grad_weight)
    return _laid_out_as(x, new_eta, copy=new_eta is eta), output, grad_weight, grad_bias, grad_scale, grad_shift
