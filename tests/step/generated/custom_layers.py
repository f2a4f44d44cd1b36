"""Modules that a first layer may be made of and that torch has none of: state, noise, branches, foreign parameters."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Scaled(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, u: Tensor) -> Tensor:
        return super().forward(u) * 1.5


class OwnConvForward(nn.Conv2d):
    """A subclass that changes what nn.Conv2d.forward calls (weight standardisation)."""

    def _conv_forward(self, u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        centred = weight - weight.mean((1, 2, 3), keepdim=True)
        return super()._conv_forward(u, centred, bias)


class Doubled(nn.Conv2d):
    """A subclass that only has another name."""


class Counter(nn.Module):
    """Its output depends on how often it ran, which a buffer counts."""

    def __init__(self, conv: nn.Module, how: str, late: bool) -> None:
        super().__init__()
        self.conv, self.how, self.late = conv, how, late
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, u: Tensor) -> Tensor:
        y = self.conv(u) * (1.0 + self.count.clone()) if self.late else None
        if self.how == "in_place":
            self.count += 1
        elif self.how == "re_assigned":
            self.count = self.count + 1
        else:
            self.count.data.add_(1)
        return torch.tanh(y if y is not None else self.conv(u) * self.count.clone())


class CountsInPython(nn.Module):
    """Its output depends on how often it ran, which an attribute counts."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv, self.count = conv, 0

    def forward(self, u: Tensor) -> Tensor:
        self.count += 1
        return torch.tanh(self.conv(u) * (1.0 + 0.5 * self.count))


class LateBuffer(nn.Module):
    """Its buffer gets a size in the first forward, or with each shape; a running mean moves the output."""

    def __init__(self, conv: nn.Module, empty: bool) -> None:
        super().__init__()
        self.conv = conv
        self.register_buffer("running", torch.empty(0, dtype=torch.float64) if empty else None)

    def forward(self, u: Tensor) -> Tensor:
        z = self.conv(u)
        if self.running is None or self.running.shape != z.shape[1:2]:
            self.running = z.new_zeros(z.shape[1])
        y = torch.tanh(z + self.running.clone()[:, None, None])
        if self.training:
            self.running.mul_(0.9).add_(0.1 * z.detach().mean((0, 2, 3)))
        return y


class Noisy(nn.Module):
    """Adds noise inside a non-linear layer, drawn from one of the places that random numbers come from."""

    def __init__(self, conv: nn.Module, source: str) -> None:
        super().__init__()
        self.conv, self.source = conv, source
        self.generator = torch.Generator().manual_seed(3) if source == "own_generator" else None

    def forward(self, u: Tensor) -> Tensor:
        z = self.conv(u)
        shape = (z.shape[0], z.shape[1])
        if self.source == "numpy":
            drawn = torch.from_numpy(np.random.randn(*shape))
        elif self.source == "python":
            drawn = torch.tensor([[random.gauss(0, 1) for _ in range(shape[1])] for _ in range(shape[0])])
        else:
            drawn = torch.randn(shape, generator=self.generator)
        return torch.tanh(z + drawn.to(z)[:, :, None, None])


class Foreign(nn.Module):
    """Uses a parameter that another module registers (`lend` puts it there)."""

    def __init__(self, conv: nn.Module, bent: bool) -> None:
        super().__init__()
        self.conv, self.bent = conv, bent
        self.borrowed = [nn.Parameter(torch.rand(4, 1, 1) + 0.5)]  # in a list: not registered here

    def forward(self, u: Tensor) -> Tensor:
        z = self.conv(u) * self.borrowed[0]
        return torch.tanh(z) if self.bent else z


class Branches(nn.Module):
    """A stem of two convolutions on the input."""

    def __init__(self, c: int, k: int, normalise: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(c, k // 2, 3, padding=1), nn.Conv2d(c, k - k // 2, 5, padding=2)
        self.norm = nn.BatchNorm2d(k) if normalise else nn.Identity()

    def forward(self, u: Tensor) -> Tensor:
        return F.silu(self.norm(torch.cat([self.a(u), self.b(u)], 1)))


class TwoConvs(nn.Module):
    """A residual stem with BatchNorm inside."""

    def __init__(self, c: int, k: int, tracked: bool) -> None:
        super().__init__()
        self.a, self.b, self.skip = nn.Conv2d(c, k, 3, padding=1), nn.Conv2d(k, k, 1), nn.Conv2d(c, k, 1)
        self.bn = nn.BatchNorm2d(k, track_running_stats=tracked)

    def forward(self, u: Tensor) -> Tensor:
        return self.skip(u) + self.b(torch.tanh(self.bn(self.a(u))))


class TwiceCalled(nn.Module):
    """One convolution over the image and its mirror image."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, u: Tensor) -> Tensor:
        return torch.tanh(self.conv(u)) + self.conv(u.flip(3)).flip(3)


class ConvParameter(nn.Module):
    """A convolution by torch.nn.functional, with weights of its own."""

    def __init__(self, c: int, k: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(k, c, 3, 3) * 0.3)
        self.activation = activation

    def forward(self, u: Tensor) -> Tensor:
        return self.activation(F.conv2d(u, self.kernel, padding=1))


class Patches(nn.Module):
    """A ViT's patch embedding: tokens [B, N, D]."""

    def __init__(self, c: int, k: int, patch: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(c, k, patch, stride=patch)

    def forward(self, u: Tensor) -> Tensor:
        return self.projection(u).flatten(2).transpose(1, 2)


class Unfolded(nn.Module):
    """Patches by unfold, then a Linear: tokens [B, N, D]."""

    def __init__(self, c: int, k: int, patch: int) -> None:
        super().__init__()
        self.patch, self.linear = patch, nn.Linear(c * patch * patch, k)

    def forward(self, u: Tensor) -> Tensor:
        return self.linear(F.unfold(u, self.patch, stride=2).transpose(1, 2))


class Tokens(nn.Module):
    """A soft embedding of pixels: each takes the table's rows by its distance to the row's level."""

    def __init__(self, c: int, k: int) -> None:
        super().__init__()
        self.table = nn.Embedding(3, k)
        self.register_buffer("levels", torch.linspace(0, 1, 3))

    def forward(self, u: Tensor) -> Tensor:
        near = torch.softmax(-((u.mean(1)[..., None] - self.levels.to(u)) ** 2) * 4, -1)
        return (near @ self.table.weight).permute(0, 3, 1, 2)


class Normalise(nn.Module):
    """(u - mean) / std with constants in one of the shapes and places that published models hold them in."""

    def __init__(self, c: int, shape: str, place: str) -> None:
        super().__init__()
        mean, std = torch.linspace(0.3, 0.6, c).double(), torch.linspace(0.2, 0.4, c).double()
        view = {"[C]": (c,), "[C,1,1]": (c, 1, 1), "[1,C,1,1]": (1, c, 1, 1)}[shape]
        if place == "list":
            self.mean, self.std = mean.tolist(), std.tolist()
        elif place == "attribute":
            self.mean, self.std = mean.view(view), std.view(view)
        else:
            self.register_buffer("mean", mean.view(view))
            self.register_buffer("std", std.view(view))

    def forward(self, u: Tensor) -> Tensor:
        mean, std = (torch.as_tensor(v, dtype=torch.float64).to(u).reshape(-1, 1, 1) for v in (self.mean, self.std))
        return (u - mean) / std


class ClampNormalise(Normalise):
    """Clamps to [0, 1] first, which changes no image inside the bounds."""

    def __init__(self, c: int) -> None:
        super().__init__(c, "[C,1,1]", "buffer")

    def forward(self, u: Tensor) -> Tensor:
        return super().forward(u.clamp(0, 1))
