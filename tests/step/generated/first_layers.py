"""First layers for generated models: one function per kind, each drawing its variant from a seeded random generator.

A kind returns `Kind`: the module, how many channels it puts out, and what is known of it. All take images [B, c, H, W].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from custom_layers import (
    Branches,
    ClampNormalise,
    ConvParameter,
    Counter,
    CountsInPython,
    Doubled,
    Foreign,
    LateBuffer,
    Noisy,
    Normalise,
    OwnConvForward,
    Patches,
    Scaled,
    Tokens,
    TwiceCalled,
    TwoConvs,
    Unfolded,
)  # fmt: skip
from parts import K, activation, batch_norm, convolution
from torch import nn


@dataclass
class Kind:
    """What the generator knows of a first layer."""

    module: nn.Module
    channels: int = K
    found: str | None = None  # what first_layer=None finds, relative to the module; None: it must refuse
    may_refuse: bool = False  # a refusal by name is as good as the right result
    random: bool = False  # draws random numbers
    stateful: bool = False  # its output depends on state that its forward moves
    fixed_shape: bool = False  # takes images of one size only
    fitted: bool = False  # computes with constants that a step may have to fit: results are right to their rounding


KINDS: dict[str, Callable[[Random, int, tuple[int, int]], Kind]] = {}


def kind(make: Callable[[Random, int, tuple[int, int]], Kind]) -> Callable[[Random, int, tuple[int, int]], Kind]:
    KINDS[make.__name__] = make
    return make


@kind
def conv(r, c, size):
    return Kind(convolution(r, c), found="")


@kind
def conv_grouped(r, c, size):
    return Kind(convolution(r, c, groups=c if K % c == 0 else 1), found="")


@kind
def conv_same(r, c, size):
    return Kind(convolution(r, c, padding=r.choice(["same", "same", "valid"]), stride=1), found="")


@kind
def conv_padding_mode(r, c, size):
    mode = r.choice(["reflect", "replicate", "circular"])
    return Kind(convolution(r, c, padding_mode=mode, padding=r.choice([1, (1, 2)])), found="")


@kind
def conv_bn(r, c, size):
    return Kind(nn.Sequential(convolution(r, c), batch_norm(r)), found="0")


@kind
def conv_bn_act(r, c, size):
    return Kind(nn.Sequential(convolution(r, c), batch_norm(r), activation(r)), found="0")


@kind
def conv_act(r, c, size):
    return Kind(nn.Sequential(convolution(r, c), activation(r)), found="0")


@kind
def conv_same_object_twice(r, c, size):
    again = r.choice(
        [lambda: nn.LeakyReLU(0.3), lambda: nn.SiLU(), lambda: nn.GELU(), lambda: nn.Hardtanh(-0.3, 0.5)]
    )()
    layers = [convolution(r, c), again, again]
    if r.random() < 0.4:
        layers.insert(1, batch_norm(r))
    return Kind(nn.Sequential(*layers), found="0")


@kind
def bn_first(r, c, size):
    return Kind(nn.Sequential(batch_norm(r, c), convolution(r, c), *([activation(r)] if r.random() < 0.5 else [])))


@kind
def bn_alone(r, c, size):
    return Kind(batch_norm(r, c), channels=c)


@kind
def linear(r, c, size):
    head = nn.Linear(c * size[0] * size[1], K, bias=r.random() < 0.7)
    tail = [activation(r)] if r.random() < 0.5 else []
    return Kind(nn.Sequential(nn.Flatten(), head, *tail), fixed_shape=True, found="1")


@kind
def nested(r, c, size):
    inner = nn.Sequential(nn.Identity(), convolution(r, c), nn.Sequential())
    outer = nn.Sequential(*([batch_norm(r)] if r.random() < 0.5 else []), activation(r), nn.Identity())
    return Kind(nn.Sequential(inner, outer), found="0.1")


@kind
def spectral_norm(r, c, size):
    wrap = r.choice([nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
    layer = wrap(convolution(r, c, kernel_size=3))
    return _perhaps_in_sequential(r, layer, stateful=True)


@kind
def weight_norm(r, c, size):
    wrap = r.choice(
        [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.weight_norm]
    )
    return _perhaps_in_sequential(r, wrap(convolution(r, c)))


@kind
def orthogonal(r, c, size):
    return _perhaps_in_sequential(r, nn.utils.parametrizations.orthogonal(convolution(r, c, kernel_size=3)))


def _perhaps_in_sequential(r: Random, layer: nn.Module, **known: bool) -> Kind:
    if r.random() < 0.35:
        return Kind(layer, found="", **known)
    parts = [layer, *([batch_norm(r)] if r.random() < 0.3 else []), activation(r)]
    return Kind(nn.Sequential(*parts), found="0", **known)


@kind
def conv_subclass(r, c, size):
    of = r.choice([Scaled, OwnConvForward, Doubled])
    return _perhaps_in_sequential(r, of(c, K, 3, padding=1, stride=r.choice([1, 2])))


@kind
def conv_patched(r, c, size):
    layer = convolution(r, c)
    original = layer.forward
    layer.forward = lambda u: original(u) * 1.5
    return _perhaps_in_sequential(r, layer)


@kind
def neighbour_patched(r, c, size):
    layers = [convolution(r, c), batch_norm(r), activation(r)]
    changed = layers[r.choice([1, 2])]
    original = changed.forward
    changed.forward = lambda z: original(z) * 1.3
    return Kind(nn.Sequential(*layers), found="0")


@kind
def counter_in_buffer(r, c, size):
    how = r.choice(["in_place", "re_assigned", "data"])
    return Kind(Counter(convolution(r, c), how, r.random() < 0.5), found="conv", stateful=True)


@kind
def counter_in_python(r, c, size):
    return Kind(CountsInPython(convolution(r, c)), found="conv", may_refuse=True, stateful=True)


@kind
def late_buffer(r, c, size):
    return Kind(LateBuffer(convolution(r, c), r.random() < 0.5), found="conv", stateful=True)


@kind
def dropout(r, c, size):
    p = r.choice([0.2, 0.5])
    drop = r.choice([nn.Dropout(p), nn.Dropout2d(p), nn.AlphaDropout(p)])
    before = r.random() < 0.3
    parts = [drop, convolution(r, c)] if before else [convolution(r, c), drop]
    tail = [activation(r)] if r.random() < 0.5 else []
    return Kind(nn.Sequential(*parts, *tail), found=None if before else "0", random=True)


@kind
def noise(r, c, size):
    source = r.choice(["torch", "torch", "numpy", "python", "own_generator"])
    return Kind(
        Noisy(convolution(r, c), source), found="conv", random=True, stateful=True, may_refuse=source != "torch"
    )


@kind
def group_norm(r, c, size):
    norm = r.choice([nn.GroupNorm(2, K), nn.GroupNorm(1, K, affine=False)])
    return Kind(nn.Sequential(convolution(r, c), norm, activation(r)), found="0")


@kind
def layer_norm(r, c, size):
    return Kind(nn.Sequential(nn.LayerNorm([c, *size]), convolution(r, c)), fixed_shape=True)


@kind
def instance_norm(r, c, size):
    norm = nn.InstanceNorm2d(K, affine=r.random() < 0.5, track_running_stats=r.random() < 0.5)
    layer = convolution(r, c, kernel_size=3, stride=1, padding=1, dilation=1)
    return Kind(nn.Sequential(layer, norm, activation(r)), found="0")


@kind
def patch_embedding(r, c, size):
    return Kind(Patches(c, K, r.choice([2, 3])), found="projection")


@kind
def unfolded(r, c, size):
    return Kind(Unfolded(c, K, 3))


@kind
def tokens(r, c, size):
    """Pixels quantised to an embedding table by distance: a soft embedding, so that a gradient reaches the pixels."""
    return Kind(Tokens(c, K))


@kind
def branches(r, c, size):
    return Kind(Branches(c, K, r.choice([True, False])))


@kind
def transposed(r, c, size):
    return Kind(
        nn.Sequential(nn.ConvTranspose2d(c, K, 3, stride=r.choice([1, 2])), *[activation(r)] * r.choice([0, 1]))
    )


@kind
def wrapped_in_identity(r, c, size):
    return Kind(
        nn.Sequential(nn.Identity(), convolution(r, c), *([activation(r)] if r.random() < 0.5 else [])), found="1"
    )


@kind
def pooling_first(r, c, size):
    pool = r.choice([nn.AvgPool2d(2), nn.MaxPool2d(2), nn.AvgPool2d(3, stride=1, padding=1)])
    return Kind(nn.Sequential(pool, convolution(r, c, kernel_size=2, padding=1)))


@kind
def parameter_elsewhere(r, c, size):
    """A parameter that the layer uses but does not hold: the gradient, or a refusal."""
    return Kind(Foreign(convolution(r, c), r.random() < 0.5), found="conv", may_refuse=True)


@kind
def frozen_weights(r, c, size):
    made = conv_bn_act(r, c, size) if r.random() < 0.5 else conv_act(r, c, size)
    for parameter in made.module[0].parameters() if r.random() < 0.5 else made.module.parameters():
        parameter.requires_grad_(False)
    return made


@kind
def normalised(r, c, size):
    norm = Normalise(c, r.choice(["[C]", "[C,1,1]", "[1,C,1,1]"]), r.choice(["buffer", "attribute", "list"]))
    tail = [*([batch_norm(r)] if r.random() < 0.4 else []), *([activation(r)] if r.random() < 0.6 else [])]
    return Kind(nn.Sequential(norm, convolution(r, c), *tail), found="1", fitted=True)


@kind
def clamped_and_normalised(r, c, size):
    return Kind(nn.Sequential(ClampNormalise(c), convolution(r, c), *([activation(r)] * r.choice([0, 1]))), found="1",
                fitted=True)  # fmt: skip


@kind
def two_convs(r, c, size):
    return Kind(TwoConvs(c, K, r.random() < 0.5))


@kind
def called_twice(r, c, size):
    """A module that calls its convolution twice: right when the module is named, refused when the convolution is."""
    return Kind(TwiceCalled(convolution(r, c, kernel_size=3, padding=1, stride=1, dilation=1)))


@kind
def functional(r, c, size):
    return Kind(ConvParameter(c, K, r.choice([F.relu, torch.tanh, F.gelu])))
