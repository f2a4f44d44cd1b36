"""Models around a generated first layer: what comes before it, the body, checkpointing, outputs and wrappers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from custom_layers import ClampNormalise, Foreign, Normalise
from torch import Tensor, nn
from torch.utils import checkpoint as checkpointing

CLASSES = 3
_checkpoints = True


@contextmanager
def without_checkpoints() -> Iterator[None]:
    """Inside, a checkpointed part runs like any other."""
    global _checkpoints
    before, _checkpoints = _checkpoints, False
    try:
        yield
    finally:
        _checkpoints = before


def _checkpointed(how: str, function: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    if how == "none" or not _checkpoints:
        return function(u)
    if how == "selective":
        kept = [torch.ops.aten.convolution.default]
        context = functools.partial(checkpointing.create_selective_checkpoint_contexts, kept)
        return checkpointing.checkpoint(function, u, use_reentrant=False, context_fn=context)
    return checkpointing.checkpoint(function, u, use_reentrant=how == "reentrant")


class InlineNormalise(nn.Module):
    """Normalises by arithmetic on constants whose names say nothing."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.register_buffer("shift", torch.linspace(-0.4, -0.6, c).double()[:, None, None])
        self.scale = 2.5

    def forward(self, u: Tensor) -> Tensor:
        return (u + self.shift) * self.scale


class Repeat(nn.Module):
    """One channel shown to every input of the layer."""

    def forward(self, u: Tensor) -> Tensor:
        return u[:, :1].expand_as(u) * 1.0


@dataclass
class Output:
    """A model's output as an object."""

    logits: Tensor


class Net(nn.Module):
    """front, `first`, body; `detour` is a second way from the input to the output, off until a change sets it."""

    def __init__(
        self, first: nn.Module, body: nn.Module, front: nn.Module, checkpoint: str, scope: str, out: str
    ) -> None:
        super().__init__()
        self.front, self.first, self.body = front, first, body
        self.checkpoint, self.scope, self.out = checkpoint, scope, out
        self.detour: Any = None
        self.again = False  # the first layer runs a second time
        for part in first.modules():
            if isinstance(part, Foreign):
                self.lent = part.borrowed[0]

    def trunk(self, u: Tensor) -> Tensor:
        h = self.first(u)
        if self.again:
            h = h + self.first(u)
        if h.dim() == 3:  # tokens [B, N, D]
            h = h.transpose(1, 2)[..., None]
        if h.dim() == 2:
            h = h[:, :, None, None]
        return _checkpointed(self.checkpoint, self.body, h) if self.scope == "body" else self.body(h)

    def forward(self, u: Tensor) -> Any:
        given, u = u, self.front(u)
        logits = _checkpointed(self.checkpoint, self.trunk, u) if self.scope == "all" else self.trunk(u)
        if self.detour is not None:
            logits = logits + self.detour(given)
        return {"tensor": lambda: logits, "tuple": lambda: (logits, logits.detach()), "dict": lambda: {"logits": logits},
                "object": lambda: Output(logits)}[self.out]()  # fmt: skip


class Detour(nn.Module):
    """A second path from the input to the logits."""

    def forward(self, u: Tensor) -> Tensor:
        return u.mean((1, 2, 3))[:, None] * torch.linspace(-1, 1, CLASSES).to(u)


class Head(nn.Sequential):
    def __init__(self, channels: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, CLASSES))


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(channels, channels, 3, padding=1), Head(channels)

    def forward(self, h: Tensor) -> Tensor:
        return self.head(h + F.relu(self.conv(h)))


class Tied(nn.Module):
    """One Linear used twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(channels, channels), Head(channels)

    def forward(self, h: Tensor) -> Tensor:
        h = self.mix(torch.tanh(self.mix(h.movedim(1, -1)))).movedim(-1, 1)
        return self.head(h)


class BorrowsWeight(nn.Module):
    """Uses (and registers) a parameter of the first layer as well; `borrowed` is set once the network stands."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head = Head(channels)
        self.register_parameter("borrowed", None)

    def forward(self, h: Tensor) -> Tensor:
        return self.head(h) * (1.0 if self.borrowed is None else 1.0 + self.borrowed.pow(2).mean())


def _bn_body(c: int) -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(c), nn.ReLU(inplace=True), nn.Conv2d(c, 5, 3, padding=1), nn.BatchNorm2d(5), nn.SiLU(), Head(5)
    )


BODIES: dict[str, Callable[[int], nn.Module]] = {
    "plain": lambda c: nn.Sequential(nn.Conv2d(c, 5, 3, padding=1), nn.ReLU(), Head(5)),
    "in_place": lambda c: nn.Sequential(
        nn.LeakyReLU(0.1, inplace=True), nn.Conv2d(c, 4, 1), nn.ReLU(inplace=True), Head(4)
    ),
    "bn": _bn_body,
    "residual": Residual,
    "dropout": lambda c: nn.Sequential(
        nn.Dropout(0.3), nn.Conv2d(c, 4, 3, padding=1), nn.ELU(), nn.Dropout2d(0.2), Head(4)
    ),
    "tied": Tied,
    "group_norm": lambda c: nn.Sequential(nn.GroupNorm(1, c), nn.Tanh(), Head(c)),
    "borrows": BorrowsWeight,
}

FRONTS: dict[str, Callable[[Random, int], nn.Module]] = {
    "none": lambda r, c: nn.Identity(),
    "normalise": lambda r, c: Normalise(
        c, r.choice(["[C]", "[C,1,1]", "[1,C,1,1]"]), r.choice(["buffer", "attribute", "list"])
    ),
    "inline": lambda r, c: InlineNormalise(c),
    "clamp": lambda r, c: ClampNormalise(c),
    "pad": lambda r, c: nn.ZeroPad2d(1),
    "repeat": lambda r, c: Repeat(),
}


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, u: Tensor) -> Any:
        return self.inner(u)


def _partial(net: nn.Module) -> tuple[nn.Module, str]:
    net.forward = functools.partial(type(net).forward, net)
    return net, ""


WRAPPERS: dict[str, Callable[[nn.Module], tuple[nn.Module, str]]] = {  # -> (model, prefix of the net's submodules)
    "none": lambda net: (net, ""),
    "sequential": lambda net: (nn.Sequential(net), "0."),
    "holder": lambda net: (Holder(net), "inner."),
    "partial": _partial,
    "data_parallel": lambda net: (nn.DataParallel(net), "module."),
    "compiled_eager": lambda net: (torch.compile(net, backend="eager"), ""),
    "compiled_aot": lambda net: (torch.compile(net, backend="aot_eager"), ""),
}
