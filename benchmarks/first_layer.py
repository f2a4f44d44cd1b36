"""The first-layer operation on the CPU against what a PyTorch user can write.

    eager       the iterated definition: n times autograd through clamp(x + eta), then output and weight gradient
    collapsed   affine f0 only: one conv2d_input, the pointwise steps, conv2d, conv2d_weight; in its faster layout
    compiled    collapsed (or, for a non-linear f0, the eager loop with hand-written gradients) through torch.compile

Every baseline is first checked to compute what the operation computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

import yopo_ext

EPS, STEP = 8 / 255, 2 / 255


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    channels: int
    kernels: int
    size: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1
    steps: int = 3
    norm: str = "linf"
    activation: str = "identity"
    full: bool = True  # with output and weight gradient
    dtype: torch.dtype = torch.float32  # of the costate
    layout: torch.memory_format = torch.contiguous_format
    targets: dict[str, float] = field(default_factory=dict)  # DESIGN targets: ratio to a baseline, "peak": fraction

    @property
    def output(self) -> int:
        return (self.size + 2 * self.padding - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    @property
    def threat(self) -> tuple[float, float]:
        """(eps, step_size): in L2 so that the step and the ball both matter."""
        pixels = self.channels * self.size**2
        return (EPS, STEP) if self.norm == "linf" else (EPS * pixels**0.5 / 2, STEP * pixels**0.5 / 2)

    def flops(self) -> float:
        """Multiply-adds of the convolutions, counted twice: an affine f0 needs one input gradient whatever `steps` is."""
        one = 2.0 * self.batch * self.kernels * self.channels / self.groups * self.kernel**2 * self.output**2
        steps = (1 if self.activation == "identity" else 2 * self.steps) if self.steps else 0
        return one * (steps + (2 if self.full else 0))

    def bytes(self) -> float:
        """What must move: x, eta, eta' and p once, the output once."""
        outputs = self.batch * self.kernels * self.output**2 * self.dtype.itemsize
        return 3.0 * self.batch * self.channels * self.size**2 * 4 + outputs * (2 if self.full else 1)


CIFAR = {"batch": 64, "channels": 3, "size": 32}
CASES = [
    Case("affine 3->64, eta' only", **CIFAR, kernels=64, full=False, targets={"collapsed": 4.5}),
    Case("affine 3->64, n=3", **CIFAR, kernels=64, targets={"collapsed": 2.2, "eager": 15, "peak": 0.6}),
    Case("affine 3->64, n=10", **CIFAR, kernels=64, steps=10, targets={"collapsed": 2.2, "eager": 40, "peak": 0.6}),
    Case("affine 3->64, n=3, channels_last", **CIFAR, kernels=64, layout=torch.channels_last),
    Case("affine 3->64, n=3, bf16 channels_last", **CIFAR, kernels=64, dtype=torch.bfloat16, layout=torch.channels_last),
    Case("affine 3->16, n=3", **CIFAR, kernels=16),
    Case("conv+ReLU 3->64, n=3", **CIFAR, kernels=64, activation="relu", targets={"eager": 10, "peak": 0.55}),
    Case("conv+ReLU MNIST 1->32, n=10", batch=64, channels=1, kernels=32, size=28, padding=0, steps=10, activation="relu",
         targets={"eager": 15, "peak": 0.45}),
    Case("conv+SiLU 3->64, n=3", **CIFAR, kernels=64, activation="silu"),
    Case("ImageNet 7x7/2 3->64, n=3", batch=4, channels=3, kernels=64, size=224, kernel=7, stride=2, padding=3),
    Case("patch 16x16/16 3->192, n=3", batch=8, channels=3, kernels=192, size=224, kernel=16, stride=16, padding=0),
]  # fmt: skip
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"identity": lambda z: z, "relu": F.relu, "silu": F.silu}


@dataclass
class Inputs:
    x: Tensor
    eta: Tensor
    costate: Tensor
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, case: Case, layout: torch.memory_format) -> Inputs:
        torch.manual_seed(0)
        x = torch.rand(case.batch, case.channels, case.size, case.size)
        eta = ((torch.rand_like(x) * 2 - 1) * EPS).clamp(-x, 1 - x)
        costate = torch.randn(case.batch, case.kernels, case.output, case.output).to(case.dtype)
        channels = case.channels // case.groups
        weight = torch.randn(case.kernels, channels, case.kernel, case.kernel) / (channels * case.kernel**2) ** 0.5
        bias = None if case.activation == "identity" else torch.randn(case.kernels) * 0.1
        return cls(*(t.contiguous(memory_format=layout) for t in (x, eta, costate, weight)), bias)


def ours(case: Case, i: Inputs) -> tuple[Any, ...]:
    eps, step_size = case.threat
    update = yopo_ext.first_layer_update(
        i.x, i.eta, i.costate, i.weight, i.bias, stride=case.stride, padding=case.padding, dilation=case.dilation,
        groups=case.groups, activation=case.activation, steps=case.steps, step_size=step_size, eps=eps, norm=case.norm,
        need_output=case.full, need_weight_grad=case.full,
    )  # fmt: skip
    return update.eta, update.output, update.grad_weight


def eager(case: Case, i: Inputs) -> tuple[Any, ...]:
    act, p = ACTIVATIONS[case.activation], i.costate.float()

    def first_layer(u: Tensor, weight: Tensor) -> Tensor:
        return act(F.conv2d(u, weight, i.bias, case.stride, case.padding, case.dilation, case.groups))

    eps, step_size = case.threat
    eta = i.eta
    for _ in range(case.steps):
        u = (i.x + eta).clamp(0, 1).requires_grad_()
        (g,) = torch.autograd.grad((first_layer(u, i.weight) * p).sum(), u)
        if case.norm == "linf":
            eta = (eta + step_size * g.sign()).clamp(-eps, eps)
        else:
            eta = l2_projected(eta + step_size * l2_unit(g), eps)
        eta = (i.x + eta).clamp(0, 1) - i.x
    if not case.full:
        return eta, None, None
    weight = i.weight.detach().requires_grad_()
    y = first_layer(i.x + eta, weight)
    (grad,) = torch.autograd.grad((y * p).sum(), weight)
    return eta, y.detach(), grad


def l2_norm(t: Tensor) -> Tensor:
    return t.flatten(1).norm(dim=1)[:, None, None, None]


def l2_unit(g: Tensor) -> Tensor:
    return g / l2_norm(g).clamp_min(1e-12)


def l2_projected(eta: Tensor, eps: float) -> Tensor:
    return eta * (eps / l2_norm(eta).clamp_min(1e-12)).clamp(max=1.0)


def collapsed(case: Case, i: Inputs) -> tuple[Any, ...]:
    """For a non-linear f0 there is no collapse: the same code with the slope inside the loop."""
    geometry = ([case.stride] * 2, [case.padding] * 2, [case.dilation] * 2, False, [0, 0], case.groups)
    p = i.costate.float()
    eps, step_size = case.threat
    bound = eps if case.norm == "linf" else float("inf")
    a, b = torch.clamp(-i.x, min=-bound), torch.clamp(1 - i.x, max=bound)
    direction = torch.sign if case.norm == "linf" else l2_unit

    def backward(u: Tensor, q: Tensor, mask: list[bool]) -> Any:
        return torch.ops.aten.convolution_backward(q, u, i.weight, [case.kernels], *geometry, mask)

    def slope(z: Tensor) -> Tensor:
        if case.activation == "relu":
            return p * (z > 0)
        s = torch.sigmoid(z)
        return p * (s * (1 + z * (1 - s)))

    def conv(u: Tensor) -> Tensor:
        return F.conv2d(u, i.weight, i.bias, case.stride, case.padding, case.dilation, case.groups)

    eta, affine = i.eta, case.activation == "identity"
    if affine:
        step = step_size * direction(backward(i.x, p, [True, False, False])[0])
    for _ in range(case.steps):
        if not affine:
            u = i.x + eta
            step = step_size * direction(backward(u, slope(conv(u)), [True, False, False])[0])
        moved = eta + step
        eta = torch.minimum(torch.maximum(moved if case.norm == "linf" else l2_projected(moved, eps), a), b)
    if not case.full:
        return eta, None, None
    u = i.x + eta
    z = conv(u)
    y = z if affine else ACTIVATIONS[case.activation](z)
    grad = backward(u, p if affine else slope(z), [False, True, False])[1]
    return eta, y.to(case.dtype), grad


def verify(case: Case, expected: tuple[Any, ...], actual: tuple[Any, ...], name: str) -> None:
    moved = (expected[0] - actual[0]).abs() > 1e-5 + 1e-3 * case.threat[
        1
    ]  # a sign may differ where the gradient is all but zero
    if moved.float().mean() > 2e-3:
        raise AssertionError(f"{case.name}: {name} computes another eta ({moved.float().mean():.2%} of the pixels)")
    for e, a in zip(expected[1:], actual[1:], strict=True):
        if e is not None:
            tolerance = 2e-2 * e.float().abs().max()
            if (e.float() - a.float()).abs().max() > tolerance:
                raise AssertionError(f"{case.name}: {name} computes another output or weight gradient")


def run(case: Case, seconds: float, peak: Callable[[], float] | None) -> dict[str, Any]:
    inputs = Inputs.of(case, case.layout)
    other = torch.channels_last if case.layout == torch.contiguous_format else torch.contiguous_format
    swapped = Inputs.of(case, other)
    torch._dynamo.reset()  # one case's graphs do not count against the next one's limit
    compiled = torch.compile(lambda i: collapsed(case, i), dynamic=False)
    variants: dict[str, Callable[[], Any]] = {
        "yopo_ext": lambda: ours(case, inputs),
        "eager": lambda: eager(case, inputs),
        "collapsed": lambda: collapsed(case, inputs),
        "collapsed, other layout": lambda: collapsed(case, swapped),
        "compiled": lambda: compiled(inputs),
    }
    expected = variants["yopo_ext"]()
    for name, function in variants.items():
        if name != "yopo_ext":
            verify(case, expected, function(), name)
    peaks: list[float] = []
    timed = {**variants}
    if peak is not None:
        timed["peak"] = lambda: peaks.append(peak())
    times = measure.interleaved(timed, seconds)
    faster = min(("collapsed", "collapsed, other layout"), key=lambda n: sorted(times[n])[len(times[n]) // 2])
    ratios = {name: measure.ratio(times[name], times["yopo_ext"]) for name in ("eager", "compiled")}
    ratios["collapsed"] = measure.ratio(times[faster], times["yopo_ext"])
    own = measure.summary(times["yopo_ext"])
    result: dict[str, Any] = {
        "case": case.name, "batch": case.batch, "steps": case.steps, "full": case.full,
        "gflop": case.flops() / 1e9, "megabytes": case.bytes() / 1e6,
        "variants": {name: measure.summary(times[name]) for name in variants}, "ratios": ratios,
        "gflops": case.flops() / own["ms"] / 1e6, "gbytes_per_s": case.bytes() / own["ms"] / 1e6, "targets": case.targets,
    }  # fmt: skip
    if peaks:
        peaks.sort()
        result["fma_peak_gflops"] = peaks[len(peaks) // 2]
        result["fraction_of_peak"] = result["gflops"] / result["fma_peak_gflops"]
    return result


def main() -> None:
    options = measure.arguments(__doc__.splitlines()[0], seconds=6.0)
    torch.set_num_threads(options.threads or 1)  # the targets are per core
    peak = measure.fma_ceiling()
    results = []
    print(f"{'case':42s} {'ms':>8s} {'GFLOP/s':>8s} {'of peak':>8s} {'x eager':>8s} {'x coll.':>8s} {'x comp.':>8s}")
    for case in CASES:
        if options.only not in case.name:
            continue
        r = run(case, options.seconds, peak)
        results.append(r)
        ratios = [r["ratios"][name]["ratio"] for name in ("eager", "collapsed", "compiled")]
        print(
            f"{case.name:42s} {r['variants']['yopo_ext']['ms']:8.2f} {r['gflops']:8.1f} {r.get('fraction_of_peak', 0):8.0%} "
            + " ".join(f"{v:8.1f}" for v in ratios),
            flush=True,
        )
    measure.save(
        "first_layer_cpu",
        {"environment": measure.environment(), "copy_gbytes_per_s": measure.copy_ceiling(), "cases": results},
        options.out,
    )


if __name__ == "__main__":
    main()
