"""What the glue promises: streams, graphs, no synchronisation, devices, errors, determinism."""

from __future__ import annotations

import pytest
import torch
from cases import make_arguments
from processes import call
from variants import AFFINE_PARTS, VARIANTS

import yopo_ext
from yopo_ext.kernels import ops

from .device import assert_bitwise_equal, to_device


def problem(name: str = "cifar", **changes) -> tuple:
    base = {"kernels": 64, "size": (32, 32), "batch": 64, "activation": "relu", "steps": 3, **AFFINE_PARTS}
    return to_device(make_arguments(**{**(base if name == "cifar" else VARIANTS[name]), **changes}))


@pytest.mark.parametrize("name", ["cifar", *VARIANTS])
def test_the_same_bits_every_time(name):
    arguments = problem(name)
    expected = ops.first_layer_update(*arguments)
    for _ in range(10):
        assert_bitwise_equal(ops.first_layer_update(*arguments), expected, name)


def test_runs_on_the_current_stream():
    arguments = problem()
    expected = ops.first_layer_update(*arguments)
    costate = arguments[2].clone()
    arguments[2].zero_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        arguments[2].copy_(costate)  # late, on the same stream
        results = ops.first_layer_update(*arguments)
    side.synchronize()
    assert_bitwise_equal(results, expected)


@pytest.mark.parametrize("name", ["cifar", *VARIANTS])
@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_graph_capture(name, activation):
    arguments = problem(name, activation=activation, steps=3)
    ops.first_layer_update(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = ops.first_layer_update(*arguments)
    for seed in (1, 2):
        torch.manual_seed(seed)
        arguments[2].normal_()
        arguments[1].uniform_(-0.05, 0.05)
        graph.replay()
        torch.cuda.synchronize()
        assert_bitwise_equal(results, ops.first_layer_update(*arguments), f"{name}, replay {seed}")


def first_call_in_a_capture() -> None:
    arguments = problem()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = ops.first_layer_update(*arguments)
    graph.replay()
    torch.cuda.synchronize()
    assert_bitwise_equal(results, ops.first_layer_update(*arguments))


def test_the_first_call_may_be_captured(tmp_path):
    """In a process of its own: kernels are loaded when they are first wanted."""
    call(first_call_in_a_capture, folder=tmp_path)


def test_no_synchronisation():
    arguments = problem()
    ops.first_layer_update(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.first_layer_update(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("first_layer", ["conv", "conv-bn-relu"])
def test_yopo_step_does_not_synchronise(first_layer):
    nn = torch.nn
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=first_layer == "conv")]
    rest = [
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    ]
    model = nn.Sequential(*stem, *rest).cuda()
    x, y = torch.rand(8, 3, 32, 32, device="cuda"), torch.randint(0, 10, (8,), device="cuda")
    yopo_ext.yopo_step(model, x, y, outer_steps=2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yopo_ext.yopo_step(model, x, y, outer_steps=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tensors_on_different_devices_are_refused():
    arguments = list(problem())
    arguments[3] = arguments[3].cpu()
    with pytest.raises(RuntimeError, match="device"):
        ops.first_layer_update(*arguments)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_device_that_is_not_current():
    arguments = make_arguments(kernels=64, size=(32, 32), activation="relu", steps=2)
    expected = ops.first_layer_update(*to_device(arguments, "cuda:0"))
    results = ops.first_layer_update(*to_device(arguments, "cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(r.device.index == 1 for r in results)
    assert_bitwise_equal(tuple(r.cpu() for r in results), tuple(e.cpu() for e in expected))


def test_explain_names_the_variant():
    a = problem()
    text = yopo_ext.explain(*a[:4], padding=1, activation="relu", steps=3, eps=0.1, step_size=0.1)
    assert text.startswith("native cuda, fused")
    assert "3 iterated steps" in text
    l2 = yopo_ext.explain(*a[:4], padding=1, steps=3, eps=0.1, step_size=0.1, norm="l2")
    assert "general (the norm is L2)" in l2
