"""The oracle itself: against autograd on the definition and against finite differences, in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import cases, make_arguments
from hypothesis import given, settings
from policy import as_dict

from yopo_ext.kernels import ops
from yopo_ext.kernels.constants import ACTIVATIONS, NORMS

TORCH_ACTIVATIONS = {
    "identity": lambda z, slope: z,
    "relu": lambda z, slope: F.relu(z),
    "leaky_relu": lambda z, slope: F.leaky_relu(z, slope),
    "gelu": lambda z, slope: F.gelu(z),
    "gelu_tanh": lambda z, slope: F.gelu(z, approximate="tanh"),
    "silu": lambda z, slope: F.silu(z),
}


def first_layer(a: dict, u: torch.Tensor) -> torch.Tensor:
    """f0 as anybody would write it."""
    name = next(n for n, code in ACTIVATIONS.items() if code == a["activation"])
    if a["mean"]:
        u = (u - torch.tensor(a["mean"], dtype=u.dtype)[:, None, None]) / torch.tensor(a["std"], dtype=u.dtype)[
            :, None, None
        ]
    z = F.conv2d(u, a["weight"], a["bias"], a["stride"], a["padding"], a["dilation"], a["groups"])
    if a["scale"] is not None:
        z = z * a["scale"][:, None, None]
    if a["shift"] is not None:
        z = z + a["shift"][:, None, None]
    return TORCH_ACTIVATIONS[name](z, a["negative_slope"])


def definition(a: dict) -> torch.Tensor:
    """Section "inner step", word for word, with autograd for g."""
    lo, hi, eps, sigma = (
        torch.tensor(a[k], dtype=a["x"].dtype).reshape(-1, 1, 1) for k in ("lo", "hi", "eps", "step_size")
    )
    x, eta = a["x"], a["eta"]
    lower, upper = torch.clamp(lo - x, max=0), torch.clamp(hi - x, min=0)
    for i in range(a["steps"]):
        u = torch.minimum(torch.maximum(x + eta, lo), hi) if a["mask_start"] else x + eta
        u.requires_grad_()
        (g,) = torch.autograd.grad((a["costate"].to(x.dtype) * first_layer(a, u)).sum(), u)
        if i == 0 and a["mask_start"]:
            g = torch.where((eta < lower) | (eta > upper), 0.0, g)
        if a["norm"] == NORMS["linf"]:
            eta = torch.minimum(
                torch.maximum(eta + sigma * g.sign(), torch.maximum(-eps, lower)), torch.minimum(eps, upper)
            )
        else:
            norm = g.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
            eta = eta + sigma * torch.where(norm > 0, g / norm.clamp_min(1e-300), 0.0)
            length = eta.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
            eta = torch.clamp(eta * torch.clamp(eps / length.clamp_min(1e-300), max=1.0), lower, upper)
    return eta


@settings(max_examples=80, deadline=None)
@given(case=cases(max_size=12, dtypes=(torch.float64,)))
def test_against_autograd_on_the_definition(case):
    case.update(dtype=torch.float64, need_output=True, need_weight_grad=True)
    arguments = make_arguments(**case)
    a = as_dict(arguments)
    results = ops.first_layer_update_reference(*arguments)
    torch.testing.assert_close(results[0], definition(a) if a["steps"] else a["eta"], rtol=1e-9, atol=1e-11)
    names = [k for k in ("weight", "bias", "scale", "shift") if a[k] is not None]
    leaves = [a[k].requires_grad_() for k in names]
    output = first_layer(a, a["x"] + results[0])
    tolerance = max(1e-9, torch.finfo(a["costate"].dtype).eps)
    torch.testing.assert_close(results[1], output.detach().to(a["costate"].dtype), rtol=tolerance, atol=tolerance)
    grads = torch.autograd.grad((a["costate"].double() * output).sum(), leaves)
    for name, expected in zip(names, grads, strict=True):
        actual = results[2 + ("weight", "bias", "scale", "shift").index(name)]
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_finite_differences(activation):
    a = as_dict(make_arguments(activation=activation, dtype=torch.float64, batch=1, channels=2, kernels=3, size=(5, 6),
                               bias=True, scale=True, shift=True, normalise=True, saturated=0.0))  # fmt: skip
    x, costate, h = a["x"], a["costate"], 1e-6
    # the gradient's value through L2: one step of length sigma along g / ||g|| from zero in an unbounded box
    a.update(eta=torch.zeros_like(x), norm=NORMS["l2"], steps=1, step_size=[1e-3], eps=[1.0], lo=[-9.0], hi=[9.0])
    direction = ops.first_layer_update_reference(*a.values())[0] / 1e-3

    def along(v: torch.Tensor) -> float:
        return float(((first_layer(a, x + h * v) - first_layer(a, x - h * v)) * costate).sum() / (2 * h))

    basis = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape)
    g = torch.tensor([along(e) for e in basis], dtype=x.dtype).reshape(x.shape)
    torch.testing.assert_close(direction, g / g.norm(), rtol=1e-5, atol=1e-6)


def test_slopes_at_the_kink():
    from yopo_ext.kernels import reference

    zero = torch.zeros(1, dtype=torch.float64)
    assert reference.activation_slope(zero, ACTIVATIONS["relu"], 0.0).item() == 0.0
    assert reference.activation_slope(zero, ACTIVATIONS["leaky_relu"], 0.1).item() == 0.1
