"""The first-layer operation on a GPU against what a PyTorch user can write, and against copying the bytes that must move.

    eager       the iterated definition: n times autograd through clamp(x + eta), then output and weight gradient
    collapsed   affine f0: one conv2d_input, the pointwise steps, conv2d, conv2d_weight (non-linear: the slope in the loop)
    compiled    collapsed through torch.compile
    graph       the compiled loop replayed from a CUDA graph
    copy        a device copy that moves as many bytes as the operation must

Every repetition of every variant runs once in turn, with a cold L2 cache, timed by CUDA events; medians.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import measure
import torch
from first_layer import EPS, STEP, Case, Inputs, collapsed, eager, ours, verify
from torch import Tensor

import yopo_ext

FP32 = {"dtype": torch.float32, "layout": torch.contiguous_format}
BF16 = {"dtype": torch.bfloat16, "layout": torch.channels_last}
CIFAR = {"batch": 256, "channels": 3, "size": 32}
MNIST = {"batch": 256, "channels": 1, "kernels": 32, "size": 28, "padding": 0, "steps": 10, "activation": "relu"}
IMAGENET = {"batch": 64, "channels": 3, "kernels": 64, "size": 224, "kernel": 7, "stride": 2, "padding": 3}
PATCH = {"batch": 64, "channels": 3, "kernels": 768, "size": 224, "kernel": 16, "stride": 16, "padding": 0}
# Targets: "copy" at most, the others at least.
CASES = [
    Case("CIFAR affine 3->64, fp32", **CIFAR, kernels=64, **FP32, targets={"copy": 1.5, "compiled": 4}),
    Case("CIFAR affine 3->64, bf16 channels_last", **CIFAR, kernels=64, **BF16, targets={"copy": 2, "compiled": 4}),
    Case("CIFAR affine 3->64, fp32, n=10", **CIFAR, kernels=64, steps=10, **FP32, targets={"copy": 1.5, "compiled": 4}),
    Case("CIFAR affine 3->16, fp32", **CIFAR, kernels=16, **FP32, targets={"copy": 1.5, "compiled": 4}),
    Case("CIFAR affine 3->16, bf16 channels_last", **CIFAR, kernels=16, **BF16, targets={"copy": 2, "compiled": 4}),
    Case("CIFAR conv+ReLU 3->64, n=3, fp32", **CIFAR, kernels=64, activation="relu", **FP32, targets={"copy": 3, "graph": 8}),
    Case("CIFAR conv+ReLU 3->64, n=3, bf16 channels_last", **CIFAR, kernels=64, activation="relu", **BF16,
         targets={"copy": 3, "graph": 8}),
    Case("MNIST conv+ReLU 1->32, n=10, fp32", **MNIST, **FP32),
    Case("MNIST conv+ReLU 1->32, n=10, bf16 channels_last", **MNIST, **BF16),
    Case("ImageNet 7x7/2 3->64, fp32", **IMAGENET, **FP32, targets={"copy": 2.5}),
    Case("ImageNet 7x7/2 3->64, bf16 channels_last", **IMAGENET, **BF16, targets={"copy": 2.5}),
    Case("ViT patch 16 3->768, fp32", **PATCH, **FP32),
    Case("ViT patch 16 3->768, bf16 channels_last", **PATCH, **BF16),
]  # fmt: skip


def on_device(inputs: Inputs) -> Inputs:
    move = lambda t: None if t is None else t.cuda()  # noqa: E731
    return Inputs(*(move(t) for t in (inputs.x, inputs.eta, inputs.costate, inputs.weight, inputs.bias)))


def captured(function: Callable[[], Any]) -> Callable[[], Any]:
    """The function's launches as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def copies(nbytes: float) -> Callable[[], Any]:
    source = torch.empty(int(nbytes) // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def timed(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Microseconds of every round, one repetition of each function in turn."""
    cold = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")  # more than any L2 cache
    for function in functions.values():
        for _ in range(3):
            function()
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            cold.zero_()
            start.record()
            function()
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize()
    return {name: [s.elapsed_time(e) * 1e3 for s, e in pairs] for name, pairs in events.items()}


def explain(case: Case, i: Inputs) -> str:
    geometry = {"stride": case.stride, "padding": case.padding, "activation": case.activation}
    return str(
        yopo_ext.explain(i.x, i.eta, i.costate, i.weight, i.bias, **geometry, steps=case.steps, step_size=STEP, eps=EPS)
    )


def run(case: Case, rounds: int) -> dict[str, Any]:
    inputs = on_device(Inputs.of(case, case.layout))
    torch._dynamo.reset()
    compiled = torch.compile(lambda i: collapsed(case, i), dynamic=False)
    candidates: dict[str, Callable[[], Any]] = {
        "yopo_ext": lambda: ours(case, inputs),
        "eager": lambda: eager(case, inputs),
        "collapsed": lambda: collapsed(case, inputs),
        "compiled": lambda: compiled(inputs),
    }
    expected = tuple(t if t is None else t.cpu() for t in ours(case, inputs))
    problems: dict[str, str] = {}
    functions: dict[str, Callable[[], Any]] = {}
    for name, function in candidates.items():
        try:
            actual: tuple[Tensor | None, ...] = function()
            if name != "yopo_ext":
                verify(case, expected, tuple(t if t is None else t.cpu() for t in actual), name)
            functions[name] = function
            if name in ("yopo_ext", "compiled"):  # what launches cost is no part of a kernel's time
                functions["graph" if name == "compiled" else "yopo_ext, graph"] = captured(function)
        except Exception as error:  # a baseline that does not run is reported, the others are measured
            if name == "yopo_ext":
                raise
            problems[name] = f"{type(error).__name__}: {error}"[:300]
    functions["copy"] = copies(case.bytes())
    times = timed(functions, rounds)
    middle = {name: statistics.median(t) for name, t in times.items()}
    own = middle["yopo_ext, graph"]
    ratios = {name: middle[name] / own for name in middle if not name.startswith("yopo_ext")}
    ratios["copy"] = own / middle["copy"]  # the only one where less is better
    return {
        "case": case.name, "batch": case.batch, "steps": case.steps, "megabytes": case.bytes() / 1e6, "gflop": case.flops() / 1e9,
        "variant": explain(case, inputs),
        "us": middle, "quartiles_us": {name: statistics.quantiles(t, n=4) for name, t in times.items()}, "ratios": ratios,
        "gbytes_per_s": case.bytes() / own / 1e3, "tflops": case.flops() / own / 1e6, "targets": case.targets, "problems": problems,
    }  # fmt: skip


def environment() -> dict[str, Any]:
    device = torch.cuda.get_device_properties(0)
    return {
        **measure.environment(), "gpu": device.name, "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count, "cuda": torch.version.cuda,
        "conv_fp32_precision": torch.backends.cudnn.conv.fp32_precision,
    }  # fmt: skip


def main() -> None:
    options = measure.arguments(__doc__.splitlines()[0], seconds=0.0)
    if not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU: nothing to measure")
    if not yopo_ext.build_info()["cuda_kernels"]:
        sys.exit(f"the CUDA kernels are not loaded: {yopo_ext.build_info()['cuda_kernels_reason']}")
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # PyTorch's default for convolutions, for everybody
    torch.backends.cudnn.benchmark = True
    results = []
    print(
        f"{'case':48s} {'us':>8s} {'GB/s':>7s} {'/ copy':>7s} {'x eager':>8s} {'x coll.':>8s} {'x comp.':>8s} {'x graph':>8s}"
    )
    for case in CASES:
        if options.only not in case.name:
            continue
        result = run(case, rounds=30)
        results.append(result)
        ratios = [
            result["ratios"].get(name, float("nan")) for name in ("copy", "eager", "collapsed", "compiled", "graph")
        ]
        print(
            f"{case.name:48s} {result['us']['yopo_ext, graph']:8.1f} {result['gbytes_per_s']:7.0f} {ratios[0]:7.2f} "
            + " ".join(f"{r:8.1f}" for r in ratios[1:]),
            flush=True,
        )
        for name, problem in result["problems"].items():
            print(f"    {name}: {problem}", flush=True)
        measure.save("first_layer_gpu", {"environment": environment(), "cases": results}, options.out)


if __name__ == "__main__":
    main()
