"""`yopo_step` on a GPU: against the CPU, without waiting for the device, in mixed precision, compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from step_oracle import batch, network
from torch import nn

from yopo_ext import trades_yopo_step, yopo_step

DEVICE = "cuda"
STEMS = {
    "conv": lambda: nn.Conv2d(3, 6, 3, padding=1),
    "conv_relu": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()),
    "conv_bn_relu": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
    "opaque": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh()),
}
THREAT = {"eps": 0.1, "step_size": 0.03}


def run(step, model: nn.Module, dtype: torch.dtype, **options):
    x, y, eta = (t.to(next(model.parameters()).device) for t in batch(dtype))
    return step(model, x, y, **{"first_layer": "first", "outer_steps": 3, "init": eta, **THREAT} | options)


@pytest.mark.filterwarnings("ignore:the first layer runs through autograd")
@pytest.mark.parametrize("step", [yopo_step, trades_yopo_step])
@pytest.mark.parametrize("stem", STEMS)
def test_equals_the_cpu_in_double_precision(stem: str, step) -> None:
    host = network(STEMS[stem])
    device = copy.deepcopy(host).to(DEVICE)
    for _ in range(2):
        expected, result = run(step, host, torch.float64), run(step, device, torch.float64)
    torch.testing.assert_close(result.perturbation.cpu(), expected.perturbation, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.losses.cpu(), expected.losses)
    for mine, theirs in zip(device.parameters(), host.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.cpu(), theirs.grad)
    for mine, theirs in zip(device.buffers(), host.buffers(), strict=True):
        torch.testing.assert_close(mine.cpu(), theirs)


@pytest.mark.parametrize("options", [{}, {"train_on": "last"}, {"norm": "l2"}, {"gradient": "released"}])
@pytest.mark.parametrize("stem", ["conv", "conv_relu", "conv_bn_relu"])
def test_a_step_does_not_wait_for_the_device(stem: str, options: dict) -> None:
    model = network(STEMS[stem], dtype=torch.float32).to(DEVICE)
    x, y, _ = (t.to(DEVICE) for t in batch(torch.float32))
    generator = torch.Generator(DEVICE).manual_seed(0)
    settings = {"first_layer": "first", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.2], **THREAT, **options}
    yopo_step(model, x, y, generator=generator, **settings)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yopo_step(model, x, y, generator=generator, **settings)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stem", ["conv", "conv_relu", "conv_bn_relu"])
def test_mixed_precision_with_loss_scaling(stem: str, dtype: torch.dtype) -> None:
    model = network(STEMS[stem], dtype=torch.float32).to(DEVICE)
    plain = copy.deepcopy(model)
    expected = run(yopo_step, plain, torch.float32, outer_steps=2)
    scaler = torch.amp.GradScaler(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast(DEVICE, dtype):
        result = run(
            yopo_step, model, torch.float32, outer_steps=2, backward=lambda loss: scaler.scale(loss).backward()
        )
    scaler.unscale_(optimizer)
    assert result.perturbation.dtype == torch.float32
    assert (result.perturbation == expected.perturbation).float().mean() > 0.8
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (mine.grad - theirs.grad).norm() <= 0.2 * theirs.grad.norm() + 1e-3


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode: str) -> None:
    host = network(STEMS["conv_bn_relu"]).to(DEVICE)
    model = copy.deepcopy(host)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(3):
        expected, result = run(yopo_step, host, torch.float64), run(yopo_step, compiled, torch.float64)
    torch.testing.assert_close(result.perturbation, expected.perturbation, rtol=0, atol=1e-12)
    for mine, theirs in zip(model.parameters(), host.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
