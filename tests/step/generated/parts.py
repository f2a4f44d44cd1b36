"""Parts that first layers are drawn from: convolutions, BatchNorms and activations in their variants."""

from __future__ import annotations

from random import Random

from torch import Tensor, nn

K = 4  # channels that most kinds of first layers put out


def convolution(r: Random, c: int, **fixed: object) -> nn.Conv2d:
    drawn = {
        "kernel_size": r.choice([1, 2, 3, 3, 3, (2, 3), (3, 1)]), "stride": r.choice([1, 1, 2, (1, 2)]),
        "padding": r.choice([0, 1, 1, 2, (1, 2)]), "dilation": r.choice([1, 1, 1, 2]), "bias": r.random() < 0.6,
    }  # fmt: skip
    return nn.Conv2d(c, K, **(drawn | fixed))


def batch_norm(r: Random, channels: int = K) -> nn.BatchNorm2d:
    drawn = {
        "affine": r.random() < 0.8, "track_running_stats": r.random() < 0.8, "momentum": r.choice([0.1, 0.3, None]),
        "eps": r.choice([1e-5, 1e-2]),
    }  # fmt: skip
    return nn.BatchNorm2d(channels, **drawn)


def fused_activation(r: Random) -> nn.Module:
    return r.choice([
        lambda: nn.ReLU(), lambda: nn.ReLU(inplace=True), lambda: nn.LeakyReLU(r.choice([0.01, 0.3])),
        lambda: nn.LeakyReLU(0.2, inplace=True), lambda: nn.GELU(), lambda: nn.GELU(approximate="tanh"),
        lambda: nn.SiLU(), lambda: nn.SiLU(inplace=True),
    ])()  # fmt: skip


def other_activation(r: Random) -> nn.Module:
    return r.choice([nn.Tanh, nn.ELU, nn.Softplus, nn.PReLU, nn.Sigmoid, nn.Mish, nn.CELU])()


def activation(r: Random) -> nn.Module:
    return fused_activation(r) if r.random() < 0.75 else other_activation(r)


def randomise(module: nn.Module) -> None:
    """Give affine parameters and statistics values that are not 1 and 0, from torch's generator."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm):
            if isinstance(getattr(part, "weight", None), Tensor):
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.uniform_(part.bias, -0.5, 0.5)
            if isinstance(getattr(part, "running_mean", None), Tensor):
                part.running_mean.uniform_(-0.3, 0.3)
                part.running_var.uniform_(0.5, 1.5)
