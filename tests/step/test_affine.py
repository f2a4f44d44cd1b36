"""What YOPO is on an affine first layer: PGD with n times the step. The documents say so to people who choose a method."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from yopo_ext import attacks, yopo_step

EPS = 8 / 255


def network(activation: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 6, 3, 2, 1, bias=False),
        activation,
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 4),
    )
    return nn.Sequential(*layers).double().train()


def images() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(8, 3, 8, 8, dtype=torch.float64, generator=generator)
    start = (x + EPS * (2 * torch.rand(x.shape, dtype=x.dtype, generator=generator) - 1)).clamp(0, 1) - x
    return x, torch.randint(0, 4, (8,), generator=generator), start


@pytest.mark.parametrize(("outer_steps", "inner_steps"), [(1, 1), (1, 4), (3, 1), (3, 4)])
def test_yopo_is_pgd_with_longer_steps(outer_steps, inner_steps):
    model, (x, y, start) = network(nn.Identity()), images()
    found = yopo_step(
        copy.deepcopy(model),
        x,
        y,
        eps=EPS,
        step_size=1 / 255,
        outer_steps=outer_steps,
        inner_steps=inner_steps,
        init=start,
    )
    options = {"eps": EPS, "step_size": inner_steps / 255, "steps": outer_steps, "init": start, "bn_mode": "train"}
    torch.testing.assert_close(found.perturbation, attacks.pgd(model, x, y, **options).perturbation, rtol=0, atol=1e-12)


@pytest.mark.parametrize("inner_steps", [1, 5])
def test_two_passes_that_train_on_the_last_are_fgsm_rs(inner_steps):
    model, (x, y, start) = network(nn.Identity()), images()
    expected, step = copy.deepcopy(model), 1.25 * EPS
    eta = attacks.pgd(expected, x, y, eps=EPS, step_size=step, steps=1, init=start, bn_mode="train").perturbation
    F.cross_entropy(expected(x + eta), y).backward()
    yopo_step(
        model, x, y, eps=EPS, step_size=step / inner_steps, outer_steps=2, inner_steps=inner_steps, gradient="full",
        train_on="last", init=start,
    )  # fmt: skip
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_an_activation_in_the_first_layer_makes_the_inner_steps_another_attack():
    model = network(nn.ReLU())
    model, (x, y, start) = nn.Sequential(model[:2], *model[2:]), images()
    options = {"outer_steps": 3, "first_layer": "0", "init": start}
    one = yopo_step(copy.deepcopy(model), x, y, eps=EPS, step_size=4 / 255, inner_steps=1, **options).perturbation
    four = yopo_step(copy.deepcopy(model), x, y, eps=EPS, step_size=1 / 255, inner_steps=4, **options).perturbation
    assert ((one - four).abs() > 1e-6).double().mean() > 0.01
