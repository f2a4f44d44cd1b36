"""`gradient="released"` against a transcription of the released step's formulas, written without the package."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from policy import assert_as_exact_as_plain
from torch import Tensor, nn

from yopo_ext import yopo_step

EPS, SIGMA = 8 / 255, 2 / 255


def conv_stem() -> nn.Module:
    return nn.Conv2d(3, 8, 3, padding=1, bias=False)


def conv_relu_stem() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())


class Split(nn.Module):
    """A network that shows its layer one, as the released code wants it."""

    def __init__(self, layer_one: nn.Module) -> None:
        super().__init__()
        self.layer_one = layer_one
        self.rest = nn.Sequential(
            nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), nn.Linear(32, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.layer_one(x))


def released_step(network: Split, x: Tensor, y: Tensor, eta: Tensor, m: int, n: int) -> Tensor:
    """The released step for one batch: accumulates `.grad`, returns the last perturbation."""
    for _ in range(m):
        hidden = network.layer_one(x + eta)
        hidden.retain_grad()
        F.cross_entropy(network.rest(hidden), y).backward()
        p = -hidden.grad
        for _ in range(n):
            inside = ((x + eta >= 0) & (x + eta <= 1)).to(x.dtype)  # the derivative of clamping x + eta to [0, 1]
            u = torch.clamp(x + eta, 0, 1).requires_grad_()
            hamiltonian = (network.layer_one(u) * p).sum()
            (g,) = torch.autograd.grad(hamiltonian, u)
            eta = torch.clamp(eta - SIGMA * torch.sign(g * inside), -EPS, EPS)
            eta = torch.clamp(x + eta, 0, 1) - x
        (-(network.layer_one(torch.clamp(x + eta, 0, 1)) * p).sum()).backward()
    return eta


def networks(stem, dtype: torch.dtype) -> tuple[Split, Split, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    torch.manual_seed(3)
    ours = Split(stem()).to(dtype)
    theirs = Split(stem()).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randint(0, 256, (6, 3, 10, 9), generator=generator).to(dtype) / 255  # saturated pixels among them
    x[0, :, :3] = 0
    x[1, :, :3] = 1
    y = torch.randint(0, 5, (6,), generator=generator)
    eta = (torch.rand(x.shape, generator=generator, dtype=dtype) * 2 - 1) * EPS
    return ours, theirs, x, y, eta


@pytest.mark.parametrize("n", [1, 3, 10])
@pytest.mark.parametrize("m", [1, 3, 5])
@pytest.mark.parametrize("stem", [conv_stem, conv_relu_stem])
def test_equals_the_released_step(stem, m: int, n: int) -> None:
    ours, theirs, x, y, eta = networks(stem, torch.float64)
    result = yopo_step(
        ours,
        x,
        y,
        first_layer="layer_one",
        outer_steps=m,
        inner_steps=n,
        eps=EPS,
        step_size=SIGMA,
        gradient="released",
        init=eta,
    )
    expected = released_step(theirs, x, y, eta, m, n)
    torch.testing.assert_close(result.perturbation, expected, rtol=0, atol=1e-12)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            mine.grad, other.grad, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )
    for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("stem", [conv_stem, conv_relu_stem])
def test_equals_the_released_step_in_single_precision(stem) -> None:
    ours, theirs, x, y, eta = networks(stem, torch.float32)
    exact = copy.deepcopy(theirs).double()
    result = yopo_step(
        ours,
        x,
        y,
        first_layer="layer_one",
        outer_steps=3,
        inner_steps=3,
        eps=EPS,
        step_size=SIGMA,
        gradient="released",
        init=eta,
    )
    expected = released_step(theirs, x, y, eta, 3, 3)
    oracle = released_step(exact, x.double(), y, eta.double(), 3, 3)
    assert_as_exact_as_plain("eta", result.perturbation, expected, oracle, torch.float32)
    for (name, mine), other, true in zip(ours.named_parameters(), theirs.parameters(), exact.parameters(), strict=True):
        assert_as_exact_as_plain(name, mine.grad, other.grad, true.grad, torch.float32)


def test_starts_uniformly_in_the_ball_without_projecting() -> None:
    ours, _, x, y, _ = networks(conv_stem, torch.float64)
    starts: list[Tensor] = []
    ours.layer_one.register_forward_pre_hook(lambda module, inputs: starts.append(inputs[0].detach().clone()))
    yopo_step(ours, x, y, outer_steps=1, gradient="released", generator=torch.Generator().manual_seed(0))
    start = starts[-1]  # after the inspection's images
    eta = start - x
    assert eta.abs().max() <= EPS * (1 + 1e-9)
    assert 0.45 * EPS < eta.abs().mean() < 0.55 * EPS
    assert start.min() < 0
    assert start.max() > 1
