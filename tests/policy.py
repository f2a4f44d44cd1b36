"""The one tolerance policy: what a first-layer update may differ from the fp64 oracle by, on every backend.

A contraction of N rounded products may be off by ROUNDING * sqrt(N) * eps * (the same contraction of absolute values),
plus what two extra roundings of its inputs cost. A sign may only differ where |g| is below that bound, or where a
pre-activation in the pixel's receptive field is within its bound of a kink (there the true slope is ambiguous). The ball
and the box are exact.

What is computed in low precision as a whole (a step, under autocast or in fp32) follows one rule, `assert_as_exact_as_plain`:
no number for it is guessed on one machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from yopo_ext.kernels import reference
from yopo_ext.kernels.constants import ACTIVATIONS, NORMS

ROUNDING = 4.0
KINKED = (ACTIVATIONS["relu"], ACTIVATIONS["leaky_relu"])
NAMES = ("eta", "output", "grad_weight", "grad_bias", "grad_scale", "grad_shift")
ARGUMENTS = (
    "x", "eta", "costate", "weight", "bias", "scale", "shift", "mean", "std", "stride", "padding", "dilation", "groups",
    "activation", "negative_slope", "steps", "step_size", "eps", "lo", "hi", "norm", "mask_start", "need_output",
    "need_weight_grad", "allow_tf32",
)  # fmt: skip


@dataclass
class Bounds:
    """fp64 values of g and of the results at a given eta, each with its error bound."""

    g: Tensor
    g_bound: Tensor
    kink: Tensor  # [B, C, H, W] bool: an ambiguous slope reaches this pixel
    results: list[Tensor]
    result_bounds: list[Tensor]


def as_dict(arguments: tuple) -> dict:
    return dict(zip(ARGUMENTS, arguments, strict=True))


def _double(arguments: tuple) -> dict:
    a = as_dict(arguments)
    return {k: v.detach().double() if isinstance(v, Tensor) else v for k, v in a.items()}


def _first_layer(a: dict, *, absolute: bool = False) -> reference._FirstLayer:
    def constant(values: list[float]) -> Tensor | None:
        return torch.tensor(values, dtype=torch.float64)[:, None, None] if values else None

    def part(t: Tensor | None) -> Tensor | None:
        return t.abs() if absolute and t is not None else t

    return reference._FirstLayer(
        part(a["weight"]), part(a["bias"]), part(a["scale"]), part(a["shift"]),
        None if absolute else constant(a["mean"]), constant(a["std"]),
        a["stride"], a["padding"], a["dilation"], a["groups"],
        ACTIVATIONS["identity"] if absolute else a["activation"], a["negative_slope"],
    )  # fmt: skip


def _column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1)


def bounds_at(arguments: tuple, u: Tensor, eps: float) -> Bounds:
    """Oracle values at the point u (fp64), with bounds for arithmetic of machine epsilon `eps`."""
    a = _double(arguments)
    f0, absolute = _first_layer(a), _first_layer(a, absolute=True)
    p = a["costate"]
    products = a["weight"][0].numel()
    # |u - mean| + |mean|: (u - mean) may cancel, so its inputs' magnitudes count
    size = u.abs() + (_column(a["mean"]).abs() if a["mean"] else 0.0)
    absolute.mean = torch.zeros(1, 1, 1, dtype=torch.float64) if a["mean"] else None
    z_bound = (ROUNDING * math.sqrt(products) + 4) * eps * absolute.output(size)
    z = f0.affine_part(f0.convolve(u))
    slope = reference.activation_slope(z, a["activation"], a["negative_slope"])
    if a["activation"] in KINKED:
        near = (z.abs() <= z_bound).double()
        slope_bound = near + 4 * eps
        slope_reach = torch.maximum(slope.abs(), near)
    else:
        near = torch.zeros_like(z)
        smooth = 0.0 if f0.affine else 2.0  # |act''| < 1.2 for gelu and silu
        slope_bound = smooth * z_bound + 16 * eps
        slope_reach = slope.abs() + slope_bound
    reach = p.abs() * slope_reach
    fan_in = a["weight"].numel() // a["weight"].shape[1]
    g_bound = (ROUNDING * math.sqrt(fan_in) + 8) * eps * absolute.input_gradient(size, reach)
    kink = absolute.input_gradient(size, p.abs() * near) > 0
    if not f0.affine and a["activation"] not in KINKED:
        g_bound = g_bound + absolute.input_gradient(size, p.abs() * slope_bound)
    pixels = p.numel() // max(p.shape[1], 1)
    wide = (ROUNDING * math.sqrt(max(pixels, 1)) + 8) * eps
    absolute_grads = absolute.weight_gradients(size, reach)
    ambiguous = absolute.weight_gradients(size, p.abs() * slope_bound)
    grads = f0.weight_gradients(u, p)
    out = f0.output(u)
    narrow = torch.finfo(as_dict(arguments)["costate"].dtype).eps
    out_bound = 1.2 * z_bound + (narrow + 8 * eps) * out.abs() + torch.finfo(as_dict(arguments)["costate"].dtype).tiny
    grad_bounds = [wide * b + m for b, m in zip(absolute_grads, ambiguous, strict=True)]
    return Bounds(f0.input_gradient(u, p), g_bound, kink, [out, *grads], [out_bound, *grad_bounds])


def assert_within(name: str, actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    """|actual - expected| <= bound, naming the worst element."""
    error = (actual.double() - expected).abs()
    excess = torch.where(torch.isfinite(error), error - bound, torch.full_like(error, math.inf))
    if excess.numel() and excess.max() > 0:
        at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(
            f"{name}{list(at)}: got {actual[at].item()!r}, oracle {expected[at].item()!r}, bound {bound[at].item():.3g} "
            f"({int((excess > 0).sum())} of {excess.numel()} elements outside)"
        )


def assert_as_exact_as_plain(name: str, ours: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """|ours - exact| <= 2 |plain - exact| + ROUNDING eps(dtype) |exact| in the Euclidean norm.

    Args:
        ours, plain: the same computation by the package and in plain PyTorch, both of precision `dtype`.
        exact: the computation in fp64, on the same (rounded) inputs.
    """
    error, unavoidable = ((t.double() - exact).norm().item() for t in (ours, plain))
    allowed = 2 * unavoidable + ROUNDING * torch.finfo(dtype).eps * exact.norm().item()
    assert error <= allowed, (
        f"{name}: off by {error:.3g}; plain PyTorch is off by {unavoidable:.3g}, allowed {allowed:.3g}"
    )


def assert_in_ball_and_box(arguments: tuple, eta: Tensor) -> None:
    """The L-inf ball exactly in the compute dtype (L2: to rounding), the box to one rounding of x + eta."""
    a = as_dict(arguments)
    x, dtype = a["x"], a["x"].dtype
    lo, hi = (torch.tensor(a[k], dtype=dtype).reshape(-1, 1, 1) for k in ("lo", "hi"))
    eps = torch.tensor(a["eps"], dtype=dtype).reshape(-1, 1, 1)
    assert not torch.isnan(eta).any(), "eta holds a NaN"
    if a["norm"] == NORMS["linf"]:
        assert (eta.abs() <= eps).all(), f"eta leaves the L-inf ball by {(eta.abs() - eps).max().item()}"
    else:
        norms = eta.double().flatten(1).norm(dim=1)
        assert (norms <= eps.double().item() * (1 + 8 * torch.finfo(dtype).eps)).all(), (
            f"eta leaves the L2 ball: {norms}"
        )
    lower, upper = torch.fmin(lo - x, torch.zeros((), dtype=dtype)), torch.fmax(hi - x, torch.zeros((), dtype=dtype))
    assert ((eta >= lower) & (eta <= upper)).all(), "eta leaves the box"


def check_update(update, arguments: tuple, eps: float | None = None) -> tuple[Tensor, ...]:
    """Run `update` (the operator on some backend) on these arguments and hold all its results against the oracle.

    One step is compared with the oracle's step; n steps are compared with n one-step calls of the same backend, bit by bit.
    `eps` is the machine epsilon of the products' operands: by default x's, larger where they may be rounded (TF32).
    """
    a = as_dict(arguments)
    results = update(*arguments)
    x, eta, costate = a["x"], a["eta"], a["costate"]
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    assert results[0].shape == x.shape
    assert results[0].dtype == x.dtype
    if a["steps"] == 0:
        assert torch.equal(results[0], eta), "steps=0 must return eta unchanged"
    elif x.numel():
        assert_in_ball_and_box(arguments, results[0])
    one = {**a, "steps": 1, "need_output": False, "need_weight_grad": False}
    chained = eta
    for _ in range(a["steps"]):
        previous, chained = chained, update(*{**one, "eta": chained}.values())[0]
        if x.numel():
            _check_step(arguments, previous, chained, eps)
    assert torch.equal(results[0], chained), "n steps must equal n one-step calls bit by bit"
    # outputs and gradients at the eta this backend arrived at
    if x.numel():
        at = bounds_at(arguments, x.double() + results[0].double(), eps)
        expected = [
            a["need_output"],
            *(a["need_weight_grad"] and a[k] is not None for k in ("weight", "bias", "scale", "shift")),
        ]
        for name, wanted, actual, value, bound in zip(
            NAMES[1:], expected, results[1:], at.results, at.result_bounds, strict=True
        ):
            if wanted:
                assert_within(name, actual, value, bound)
            else:
                assert actual.numel() == 0, f"{name} was not asked for"
        if a["need_output"]:
            assert results[1].dtype == costate.dtype
            assert results[1].stride() == torch.empty_like(costate).stride()
    return results


def _check_step(arguments: tuple, eta: Tensor, new_eta: Tensor, eps: float) -> None:
    a = as_dict(arguments)
    x = a["x"]
    lo, hi, radius, sigma = (
        torch.tensor(a[k], dtype=x.dtype).reshape(-1, 1, 1) for k in ("lo", "hi", "eps", "step_size")
    )
    u = torch.clamp(x + eta, lo, hi) if a["mask_start"] else x + eta
    at = bounds_at(arguments, u.double(), eps)
    lower, upper = (
        torch.fmin(lo - x, torch.zeros((), dtype=x.dtype)),
        torch.fmax(hi - x, torch.zeros((), dtype=x.dtype)),
    )
    outside = ((eta < lower) | (eta > upper)) & a["mask_start"]
    g = torch.where(outside, 0.0, at.g)
    if a["norm"] == NORMS["linf"]:
        step = eta + sigma * (torch.sign(g).to(x.dtype))
        expected = torch.clamp(step, torch.maximum(-radius, lower), torch.minimum(radius, upper))
        certain = ((at.g.abs() > at.g_bound) | outside) & ~(at.kink & ~outside)
        assert_within(
            "eta (certain signs)", torch.where(certain, new_eta, expected), expected.double(), torch.zeros_like(g)
        )
        return
    flat = g.flatten(1)
    norm = flat.norm(dim=1).reshape(-1, 1, 1, 1)
    error = torch.where(at.kink, math.inf, at.g_bound).flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    sure = (norm > 4 * error) & torch.isfinite(error)
    if not sure.any():
        return
    direction = g / torch.where(norm > 0, norm, 1.0)
    stepped = eta.double() + sigma.double() * direction
    length = stepped.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    expected = stepped * torch.clamp(radius.double() / length.clamp_min(1e-300), max=1.0)
    expected = torch.clamp(expected, lower.double(), upper.double())
    slack = 2 * sigma.double() * error / torch.where(norm > 0, norm, 1.0) + 16 * eps * (radius + sigma).double()
    assert_within("eta (L2)", torch.where(sure, new_eta.double(), expected), expected, slack.expand_as(expected))
