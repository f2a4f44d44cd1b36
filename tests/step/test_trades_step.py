"""`trades_yopo_step` against its definition in plain autograd, and its options."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from step_oracle import Network, batch, frozen, network
from torch import Tensor, nn

from yopo_ext import trades_yopo_step

EPS, SIGMA, BETA = 0.1, 0.03, 3.0

STEMS = {
    "conv": lambda: nn.Conv2d(3, 6, 3),
    "conv_relu": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()),
    "conv_bn_relu": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
    "opaque": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh()),
}


def divergence(logits: Tensor, clean: Tensor) -> Tensor:
    """sum p log(p / q) / B"""
    p, q = clean.softmax(1), logits.softmax(1)
    return (p * (p.log() - q.log())).sum() / len(p)


def oracle(
    model: Network, x: Tensor, y: Tensor, eta: Tensor, m: int, n: int, bn_mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    attacked = model
    attacked.train(bn_mode == "train")
    lower, upper = torch.clamp(-x, max=0), torch.clamp(1 - x, min=0)
    with torch.no_grad():
        clean = attacked(x)
    losses = []
    for _ in range(m):
        still = frozen(attacked.first, x + eta)
        hidden = attacked.first(x + eta).detach().requires_grad_()
        loss = divergence(attacked.rest(hidden * 1.0), clean)
        (p,) = torch.autograd.grad(loss, hidden)
        losses.append(loss.detach())
        for _ in range(n):
            u = (x + eta).requires_grad_()
            (g,) = torch.autograd.grad(still(u), u, p)
            eta = torch.clamp(torch.clamp(eta + SIGMA * g.sign(), -EPS, EPS), lower, upper)
    model.train()
    clean = model(x)
    loss = F.cross_entropy(clean, y) + BETA * divergence(model(x + eta), clean)
    loss.backward()
    return eta, torch.stack(losses), loss.detach()


@pytest.mark.parametrize("bn_mode", ["eval", "train"])
@pytest.mark.parametrize("stem", STEMS)
def test_equals_the_definition(stem: str, bn_mode: str) -> None:
    x, y, eta = batch()
    ours = network(STEMS[stem])
    theirs = copy.deepcopy(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if stem == "opaque" else "error")
        result = trades_yopo_step(
            ours, x, y, first_layer="first", beta=BETA, outer_steps=2, inner_steps=3, eps=EPS, step_size=SIGMA,
            init=eta, bn_mode=bn_mode,
        )  # fmt: skip
    perturbation, losses, loss = oracle(theirs, x, y, eta, 2, 3, bn_mode)
    torch.testing.assert_close(result.perturbation, perturbation, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.losses, losses)
    torch.testing.assert_close(result.loss, loss)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, other)


def small_step(model: nn.Module, **options):
    x, y, _ = batch()
    return trades_yopo_step(model, x, y, **{"outer_steps": 3, "eps": EPS, "step_size": SIGMA} | options)


def test_starts_near_zero_and_raises_the_divergence() -> None:
    result = small_step(network(STEMS["conv"]), generator=torch.Generator().manual_seed(0))
    assert 0 < result.losses[0] < 1e-4
    assert result.losses[2] > 100 * result.losses[0]
    again = small_step(network(STEMS["conv"]), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.perturbation, result.perturbation)


def test_the_attack_computes_no_weight_gradient_and_restores_modes() -> None:
    model = network(STEMS["conv_bn_relu"])
    model.first[1].eval()
    model.rest[2].bias.requires_grad_(False)
    seen: list[int] = []
    model.rest[2].weight.register_hook(lambda g: seen.append(1))
    modes = [module.training for module in model.modules()]
    small_step(model)
    assert len(seen) == 1
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert model.rest[2].bias.grad is None
    assert int(model.rest[0].num_batches_tracked) == 2  # the update's two forwards; the attack ran in evaluation mode


def test_restores_modes_when_the_model_raises() -> None:
    model = network(STEMS["conv"])

    def fail(*_):
        raise RuntimeError("on purpose")

    handle = model.rest[3].register_full_backward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        small_step(model)
    handle.remove()
    assert all(module.training and "forward" not in vars(module) for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", ["skip", "raise"])
def test_nonfinite_loss(mode: str) -> None:
    model = network(STEMS["conv"])
    buffers = [b.clone() for b in model.buffers()]
    options = {"loss_fn": lambda out, y: F.cross_entropy(out, y) * float("inf"), "on_nonfinite": mode}
    if mode == "raise":
        with pytest.raises(FloatingPointError):
            small_step(model, **options)
    else:
        assert torch.isinf(small_step(model, **options).loss)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))


def test_certain_predictions_do_not_give_nan() -> None:
    model = network(STEMS["conv"])
    with torch.no_grad():
        model.rest[-1].weight.mul_(1e4)
    result = small_step(model)
    assert result.loss.isfinite()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
