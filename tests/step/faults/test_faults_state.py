"""A first layer, or a model, whose forward moves its own state; and what a step that is left out or refused puts back."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fault_oracle import Make, Net, agrees, batch, conv, net, plain_passes, same, same_model, trades_agrees, untouched
from fault_rows import AS_EXPECTED, EAGER, EVERYWHERE, ONE_PROCESS, REFERENCE, TWO_PROCESSES, Row, Setting, cells
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from yopo_ext import trades_yopo_step, yopo_step

HERE = (EAGER, REFERENCE)
NOT_COMPILED = (EAGER, TWO_PROCESSES, REFERENCE)  # torch.compile draws or counts otherwise


class Stateful(nn.Module):
    """A convolution times a factor that its own state gives."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.register_buffer("count", torch.zeros(()))
        self.calls = 0
        self.generator = torch.Generator().manual_seed(2)

    def factor(self) -> Any:
        raise NotImplementedError

    def forward(self, u: Tensor) -> Tensor:
        return self.conv(u) * self.factor()


class InPlaceCounter(Stateful):
    def factor(self) -> Tensor:
        self.count.add_(1)
        return 1.0 + self.count.clone()


class ReassignedCounter(Stateful):
    def factor(self) -> Tensor:
        self.count = self.count + 1
        return 1.0 + self.count


class AttributeCounter(Stateful):
    def factor(self) -> float:
        self.calls += 1
        return 1.0 + self.calls


class NumpyNoise(Stateful):
    def factor(self) -> float:
        return 1.0 + float(np.random.uniform())


class RandomNoise(Stateful):
    def factor(self) -> float:
        return 1.0 + random.random()


class GeneratorNoise(Stateful):
    def factor(self) -> Tensor:
        return 1.0 + torch.rand((), generator=self.generator, dtype=torch.float64)


class TorchNoise(Stateful):
    def factor(self) -> Tensor:
        return 1.0 + torch.rand((), dtype=torch.float64)


class SizedBuffer(nn.Module):
    """A convolution minus a buffer that gets its size in the first forward."""

    def __init__(self, how: str, inputs: int = 3, outputs: int = 6) -> None:
        super().__init__()
        self.conv, self.how, self.outputs = nn.Conv2d(inputs, outputs, 3), how, outputs
        self.register_buffer("offset", None if how == "none" else torch.zeros(0))

    def forward(self, u: Tensor) -> Tensor:
        if self.offset is None or self.offset.numel() == 0:
            if self.how == "resized":
                self.offset.resize_(self.outputs, 1, 1).fill_(0.5)
            else:
                self.offset = torch.full((self.outputs, 1, 1), 0.5, dtype=u.dtype)
        return self.conv(u) - self.offset


class LateMean(nn.Module):
    """A convolution minus a running mean that is None before the first forward, which moves it at once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.register_buffer("running", None)

    def forward(self, u: Tensor) -> Tensor:
        z = self.conv(u)
        now = z.detach().mean((0, 2, 3))
        self.running = 0.1 * now if self.running is None else 0.9 * self.running + 0.1 * now
        return torch.tanh(z - self.running[:, None, None])


class LowPrecision(Net):
    """Its first layer draws numbers that differ from call to call, in bfloat16."""

    def forward(self, u: Tensor) -> Tensor:
        return self.body(self.first(u.bfloat16()).to(u.dtype))


def bfloat16_first(model: Any) -> Any:
    model.first.bfloat16()
    return model


class RunningMean(nn.Module):
    """Moves a buffer towards the mean of what it sees; `poisoned`: makes what it sees NaN."""

    def __init__(self, how: str, channels: int = 6) -> None:
        super().__init__()
        self.how, self.poisoned, self.channels = how, False, channels
        self.register_buffer("running", None if how == "created" else torch.zeros(channels))

    def forward(self, z: Tensor) -> Tensor:
        if self.poisoned:
            z = z * float("nan")
        now = z.detach().mean((0, 2, 3))
        if self.how == "in place":
            self.running.mul_(0.9).add_(0.1 * now)
        else:
            self.running = 0.1 * now if self.running is None else 0.9 * self.running + 0.1 * now
        return z


class Watched(Net):
    """A running mean between first layer and body."""

    def __init__(self, first: nn.Module, how: str = "reassigned") -> None:
        super().__init__(first)
        self.body.insert(0, RunningMean(how))


class Lazy(Net):
    """Its last layer has no weights before its first forward."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__(first)
        self.body[-1] = nn.LazyLinear(5)


class SizedBody(Net):
    def __init__(self, first: nn.Module, how: str) -> None:
        super().__init__(first)
        self.body.insert(0, SizedBuffer(how, 6, 6))
        self.body[3] = nn.Conv2d(6, 4, 3)


class SecondWay(SizedBody):
    """Its output depends on the input beside the first layer."""

    def forward(self, u: Tensor) -> Tensor:
        return super().forward(u) + u.mean((1, 2, 3))[:, None]


class SecondWayWatched(Watched):
    def forward(self, u: Tensor) -> Tensor:
        return super().forward(u) + u.mean((1, 2, 3))[:, None]


def left_out(make: Make, find: Callable[[Any], RunningMean], *, known: bool, trades: bool = False):
    """A batch whose values become NaN inside the model leaves gradients and buffers as they were."""

    def run(setting: Setting) -> None:
        model, twin = make(), make()
        wrapped = setting.wrap(model)
        x, y, eta = batch(0, setting.rank)
        options: dict[str, Any] = {"first_layer": "first", "outer_steps": 2, "eps": 0.0, "step_size": 0.0}
        options |= {"init": eta, "bn_mode": "train"} if trades else {"reduction": "sum"}
        step = trades_yopo_step if trades else yopo_step
        if known:
            step(wrapped, x, y, **options)
            plain_passes(twin, x, y, F.cross_entropy, 2)
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        find(model).poisoned = True
        result = step(wrapped, x, y, on_nonfinite="skip", **options)
        find(model).poisoned = False
        now = dict(model.named_buffers())
        with setting.together():
            assert not result.loss.isfinite()
            for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
                same(f"{name}.grad", p.grad, gradient, 0, 0)
            assert now.keys() == buffers.keys(), f"buffers {now.keys() ^ buffers.keys()}"
            if setting.rank == 0:
                for name, value in buffers.items():
                    same(name, now[name], value, 0, 0)
        step(wrapped, x, y, on_nonfinite="skip", **options)
        plain_passes(twin, x, y, F.cross_entropy, 1 if trades else 2)
        same_model(setting, model, twin, buffers=not trades)

    return run


def other_dtype(make: Make, model_dtype: torch.dtype, x_dtype: torch.dtype, *, known: bool):
    """A batch of another dtype than the model: the model's dtype is used, or x is refused and nothing moved."""

    def run(setting: Setting) -> None:
        model, twin = make().to(model_dtype), make().to(model_dtype)
        wrapped = setting.wrap(model)
        x, y, _ = batch(0, setting.rank)
        options = {"first_layer": "first", "outer_steps": 1, "eps": 0.0, "step_size": 0.0}
        if known:
            yopo_step(wrapped, x.to(model_dtype), y, **options)
            plain_passes(twin, x.to(model_dtype), y, F.cross_entropy)
        model.zero_grad(), twin.zero_grad()
        with untouched(model, buffers=setting.rank == 0):
            yopo_step(wrapped, x.to(x_dtype), y, **options)
        plain_passes(twin, x.to(model_dtype), y, F.cross_entropy)
        same_model(setting, model, twin, rtol=1e-3, atol=1e-5)

    return run


FIRST = r"\bfirst_layer\b"

ROWS = [
    *(
        Row("a first layer that moves buffers", name, agrees(net(make), ["first"], steps=3))
        for name, make in (
            ("spectral_norm, ReLU", lambda: nn.Sequential(spectral_norm(conv()), nn.ReLU())),
            ("spectral_norm, tanh", lambda: nn.Sequential(spectral_norm(conv()), nn.Tanh())),
            ("counter in place", InPlaceCounter),
            ("counter assigned anew", ReassignedCounter),
        )
    ),
    Row(
        "a first layer that moves buffers", "spectral_norm of old, ReLU",
        agrees(
            net(lambda: nn.Sequential(nn.utils.spectral_norm(conv()), nn.ReLU())), kinds=["plain", "sum"],
            first_layer="first", steps=3,
        ),
        FIRST, or_equal=True,  # its weight is a tensor that a hook sets, no parameter
    ),
    *(
        Row(
            "a first layer whose state is no buffer", name, agrees(net(make), ["first"], refused_from=0), FIRST,
            or_equal=True, settings=NOT_COMPILED,
        )
        for name, make in (
            ("counter in an attribute", AttributeCounter), ("numpy noise", NumpyNoise),
            ("noise of random", RandomNoise), ("noise of its own generator", GeneratorNoise),
        )
    ),
    Row("a first layer whose state is no buffer", "noise of torch (guard)", agrees(net(TorchNoise), ["first"])),
    Row("a first layer whose state is no buffer", "noise of numpy, in bfloat16",
        agrees(lambda: bfloat16_first(net(NumpyNoise, LowPrecision)()), kinds=["plain"], first_layer="first"), FIRST,
        settings=HERE),
    Row("a buffer that gets its size in the first forward", "None, moved at once, in the first layer",
        # Not in two processes: DistributedDataParallel gives rank 1 the running mean of rank 0.
        agrees(net(LateMean), ["first"]), settings=ONE_PROCESS),
    *(
        Row("a buffer that gets its size in the first forward", f"{how}, {where}", agrees(make, ["first"]))
        for how in ("resized", "reassigned", "none")
        for where, make in (
            ("in the first layer", net(lambda how=how: SizedBuffer(how))),
            ("in the body", net(conv, lambda first, how=how: SizedBody(first, how))),
        )
    ),
    *(
        Row(
            "a refused first step puts back buffers", name, agrees(make, ["first"], kinds=["plain"]), FIRST,
        )
        for name, make in (
            ("resized", net(conv, lambda first: SecondWay(first, "resized"))),
            ("created", net(conv, lambda first: SecondWay(first, "none"))),
            ("assigned anew", net(conv, SecondWayWatched)),
        )
    ),
    *(
        Row(
            "a left-out batch puts back buffers", f"{how}, {'known' if known else 'first step'}",
            left_out(net(conv, lambda first, how=how: Watched(first, how)), lambda model: model.body[0], known=known),
        )
        for how in ("in place", "reassigned", "created")
        for known in (False, True)
    ),
    Row(
        "a left-out batch puts back buffers", "reassigned, in the first layer",
        left_out(
            net(lambda: nn.Sequential(conv(), RunningMean("reassigned"))), lambda model: model.first[1], known=True
        ),
    ),
    *(
        Row(
            "a left-out batch puts back buffers", f"TRADES, {how}, first step",
            left_out(
                net(conv, lambda first, how=how: Watched(first, how)), lambda model: model.body[0], known=False,
                trades=True,
            ),
        )
        for how in ("reassigned", "created")
    ),
    *(
        Row("lazy parameters", name, checked(net(conv, Lazy), first_layer="first"), r"\bmodel\b.*forward", settings=HERE)
        for name, checked in (("yopo_step", agrees), ("trades_yopo_step", trades_agrees))
    ),
    *(
        Row(
            "x of another dtype than the model", f"{name}, {'known' if known else 'first step'}",
            other_dtype(make, model_dtype, x_dtype, known=known), r"\bx\b", or_equal=True,
            settings=EVERYWHERE if "BatchNorm" in name else (EAGER, REFERENCE),
        )
        for known in (False, True)
        for name, make, model_dtype, x_dtype in (
            ("float32 x", net(conv), torch.float64, torch.float32),
            ("float64 x", net(conv), torch.float32, torch.float64),
            ("float32 x, BatchNorm in the first layer",
             net(lambda: nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU())), torch.float64, torch.float32),
        )
    ),
]  # fmt: skip


@cells(ROWS)
def test_fault(row: Row, setting: str, outcome: Callable[[Row, str], set[str]]) -> None:
    assert outcome(row, setting) == {AS_EXPECTED}
