"""Starts outside the bounds, on every backend: only `mask_start` ("released") leaves out their first inner step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import binaries
import pytest
import torch
import torch.nn.functional as F
from cases import make_arguments
from policy import as_dict
from step_oracle import network, oracle_step
from torch import Tensor, nn

import yopo_ext
from yopo_ext import trades_yopo_step, yopo_step
from yopo_ext.kernels import ops

EMULATED = str(Path(__file__).parents[1] / "emulated")
SIZES = {"linf": {"eps": 0.1, "step_size": 0.03}, "l2": {"eps": 0.9, "step_size": 0.4}}
STEMS = {
    "affine": lambda: nn.Conv2d(3, 6, 3, padding=1),
    "non-linear": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.SiLU()),
    "BatchNorm": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
    "autograd": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh()),
    "affine autograd": lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"),
}
Update = Callable[..., tuple[Tensor, ...]]

pytestmark = pytest.mark.filterwarnings("ignore:the first layer runs through autograd")


def _emulated(monkeypatch: pytest.MonkeyPatch) -> Update:
    try:
        binaries.build_emulated()
    except binaries.NoToolsError as reason:
        pytest.skip(str(reason))
    monkeypatch.syspath_prepend(EMULATED)
    from backend import update

    return update


@pytest.fixture(params=["reference", "native", "emulated"])
def update(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Update:
    """The operator on one backend, which the autograd nodes take, too."""
    if request.param == "native" and not ops.native_status.cpu:
        pytest.skip(str(ops.native_status.why_not_cpu))
    update = _emulated(monkeypatch) if request.param == "emulated" else ops.first_layer_update
    update = ops.first_layer_update_reference if request.param == "reference" else update
    for name in ("first_layer_update", "first_layer_update_reference"):
        monkeypatch.setattr(ops, name, update)
    return update


def saturated_batch() -> tuple[Tensor, Tensor, Tensor]:
    """(x with many 0 and 1 pixels, y, a start that leaves bounds and ball in places)."""
    generator = torch.Generator().manual_seed(6)
    x = torch.rand(4, 3, 8, 7, generator=generator, dtype=torch.float64)
    x = torch.where((x < 0.3) | (x > 0.7), x.round(), x)
    y = torch.randint(0, 5, (4,), generator=generator)
    return x, y, (torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1) * 0.13


@pytest.mark.parametrize("gradient", ["paper", "full", "released"])
@pytest.mark.parametrize("norm", SIZES)
@pytest.mark.parametrize("stem", STEMS)
def test_step_from_outside_the_bounds(update: Update, stem: str, norm: str, gradient: str) -> None:
    ours = network(STEMS[stem])
    theirs = copy.deepcopy(ours)
    x, y, eta = saturated_batch()
    result = yopo_step(
        ours, x, y, first_layer="first", outer_steps=2, inner_steps=2, gradient=gradient, reduction="sum", norm=norm,
        init=eta, **SIZES[norm],
    )  # fmt: skip
    perturbation, losses = oracle_step(theirs, x, y, eta, m=2, n=2, gradient=gradient, norm=norm, **SIZES[norm])
    torch.testing.assert_close(result.perturbation, perturbation, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.losses, torch.stack(losses), rtol=0, atol=1e-12)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-11)


def test_passes_without_weight_gradients_mask_like_the_others() -> None:
    """`train_on="last"` moves the perturbation as `train_on="all"` does from the same start."""
    x, y, eta = saturated_batch()
    options = {"first_layer": "first", "outer_steps": 2, "gradient": "released", "init": eta, **SIZES["linf"]}
    moved = [
        yopo_step(network(STEMS["affine"]), x, y, train_on=train_on, **options).perturbation
        for train_on in ("all", "last")
    ]
    assert torch.equal(*moved)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("stem", STEMS)
def test_trades_with_one_inner_step_is_the_published_update(update: Update, stem: str, steps: int) -> None:
    """TRADES (Zhang et al., 2019) with its own start, 0.001 N(0, 1), which it projects on nothing."""
    eps, step_size, beta = 8 / 255, 2 / 255, 6.0
    ours = network(STEMS[stem])
    theirs = copy.deepcopy(ours)
    x, y, _ = saturated_batch()
    start = 0.001 * torch.randn(x.shape, generator=torch.Generator().manual_seed(8), dtype=x.dtype)
    assert ((x + start < 0) | (x + start > 1)).any()
    result = trades_yopo_step(
        ours, x, y, first_layer="first", beta=beta, outer_steps=steps, inner_steps=1, eps=eps, step_size=step_size,
        init=start,
    )  # fmt: skip
    theirs.eval()
    attacked = x + start
    for _ in range(steps):
        attacked.requires_grad_()
        logits = F.log_softmax(theirs(attacked), dim=1)
        divergence = F.kl_div(logits, F.softmax(theirs(x), dim=1), reduction="sum")
        (g,) = torch.autograd.grad(divergence, attacked)
        attacked = attacked.detach() + step_size * torch.sign(g)
        attacked = torch.clamp(torch.min(torch.max(attacked, x - eps), x + eps), 0, 1)
    theirs.train()
    logits = theirs(x)
    divergence = F.kl_div(F.log_softmax(theirs(attacked), dim=1), F.softmax(logits, dim=1), reduction="batchmean")
    loss = F.cross_entropy(logits, y) + beta * divergence
    loss.backward()
    torch.testing.assert_close(result.perturbation, attacked - x, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.loss, loss.detach(), rtol=0, atol=1e-12)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", SIZES)
@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_only_the_first_of_several_calls_masks(update: Update, norm: str, activation: str, dtype: torch.dtype) -> None:
    """n steps with `mask_start` are one masked step and n - 1 plain ones, bit by bit where x + eta does not round."""
    arguments = make_arguments(
        norm=norm, activation=activation, dtype=dtype, mask_start=True, steps=3, kernels=16, saturated=0.5,
        eps=2**-4, step_size=2**-6, need_output=False, need_weight_grad=False,
    )  # fmt: skip
    a = as_dict(arguments)
    for name in ("x", "eta"):
        a[name] = torch.round(a[name] * 2**10) / 2**10
    if norm == "l2" and activation != "identity":
        pytest.skip("L2 steps are no multiples of a power of two: the input of the second step is rounded when clamped")
    one = {**a, "steps": 1}
    chained = update(*one.values())[0]
    assert not torch.equal(chained, update(*{**one, "mask_start": False}.values())[0]), "no start lies outside"
    for _ in range(2):
        chained = update(*{**one, "mask_start": False, "eta": chained}.values())[0]
    assert torch.equal(update(*a.values())[0], chained)


def test_public_functions_take_it() -> None:
    x, eta = torch.zeros(1, 1, 3, 3), torch.full((1, 1, 3, 3), -0.1)
    weight, costate = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 3, 3)
    options = {"steps": 1, "step_size": 0.25, "eps": 0.5}
    steps = yopo_ext.adversary_steps
    assert torch.equal(steps(x, eta, costate, weight, **options), torch.full_like(x, 0.25 - 0.1))
    assert torch.equal(steps(x, eta, costate, weight, mask_start=True, **options), torch.zeros_like(x))
    moved = yopo_ext.first_layer_update(x, eta, costate, weight, mask_start=True, **options).eta
    assert torch.equal(moved, torch.zeros_like(x))
    with pytest.raises(TypeError, match="mask_start"):
        steps(x, eta, costate, weight, mask_start=1, **options)
