"""The first layer as one autograd node, so that a model's own backward pass updates the perturbation.

The node computes y0 = f0(x + eta). In its backward it receives the costate p = dL/dy0 and returns, as the "gradient" of the
leaf `eta`, the perturbation after n inner steps; the gradients of the first layer's parameters come out as ordinary
gradients: at the perturbation the pass ran at (`gradient_before`), at the one its costate led to (`gradient_after`), the sum
of both, or none. The node is a pure function of its arguments: what torch.compile, DistributedDataParallel or a gradient
scaler do around a layer they can do around it.

`FusedNode` is the node of eager mode. `first_layer_node` is the same as an operator, for compiled graphs. It takes two
things more. The threat model comes as a tensor `threat` on the CPU, [step_size, eps, lo, hi] by [1 or C]: a graph would hold
numbers as constants, and a schedule of eps would compile it again and again. And a leaf `check` [2] receives as its
"gradient" [1, whether the layer's input was another one than x + eta normalised], judged by a few pixels, `seen`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import ops, reference
from ..kernels.constants import ACTIVATIONS
from ..kernels.dispatch import run
from ..threat import Ball
from ..validation import COSTATE_DTYPES
from .normalisation import differs, normalised, sample


class Settings(NamedTuple):
    """What a node needs besides tensors, in the order of the operators' arguments."""

    mean: list[float]
    std: list[float]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    activation: int
    negative_slope: float
    steps: int
    norm: int
    mask_start: bool
    gradient_before: bool
    gradient_after: bool
    allow_tf32: bool
    dtype: torch.dtype  # of y0

    @property
    def geometry(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups


Update = Callable[..., tuple[Tensor, ...]]  # (x, eta, p, weight, bias, scale, shift, settings, steps, need_weight_grad)


def update_of(ball: Ball) -> Update:
    """The update with a threat model's constants, on the backend that suits its arguments."""

    def update(
        x: Tensor, eta: Tensor, p: Tensor, weight: Any, bias: Any, scale: Any, shift: Any, settings: Settings, steps: int,
        need_weight_grad: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        s = settings
        return run(
            x, eta, p, weight, bias, scale, shift, s.mean, s.std, *s.geometry, s.activation, s.negative_slope, steps,
            *ball.operator_constants, s.norm, s.mask_start, False, need_weight_grad, s.allow_tf32,
        )  # fmt: skip

    return update


def costate_for(p: Tensor, x: Tensor) -> Tensor:
    """p as the operator takes it: dense, and of a dtype that goes with x."""
    if p.dtype not in COSTATE_DTYPES and p.dtype != x.dtype:
        p = p.to(x.dtype)
    dense = p.is_contiguous() or p.is_contiguous(memory_format=torch.channels_last)
    return p if dense else p.contiguous()


def as_parameter(parameter: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """The gradient in its parameter's dtype."""
    if parameter is None or gradient is None or parameter.dtype == gradient.dtype:
        return None if parameter is None else gradient
    return gradient.to(parameter.dtype)


def convolve(u: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    """The convolution of u, in `settings.dtype`."""
    dtype = settings.dtype
    if not (u.dtype == weight.dtype == dtype and (bias is None or bias.dtype == dtype)):
        u, weight, bias = u.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return torch.conv2d(u, weight, bias, *settings.geometry)


def add_up(total: list[Tensor | None], terms: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Sums term by term, None being nothing."""
    return [t if s is None else s if t is None else s + t for s, t in zip(total, terms, strict=True)]


def output(x: Tensor, eta: Tensor, parameters: Sequence[Any], settings: Settings, u: Tensor | None = None) -> Tensor:
    """y0 = act(scale * conv2d((x + eta - mean) / std, weight, bias) + shift) in `settings.dtype` [B, K, OH, OW].

    u: the normalised x + eta, if it is there already.
    """
    weight, bias, scale, shift = parameters
    if u is None:
        u = normalised(x + eta, settings.mean, settings.std)
    z = convolve(u, weight, bias, settings)
    if scale is not None:
        z = z * scale[:, None, None]
    if shift is not None:
        z = z + shift[:, None, None]
    z = reference.activate(z, settings.activation, settings.negative_slope)
    return z if z.dtype == settings.dtype else z.to(settings.dtype)


def results(
    update: Update,
    x: Tensor,
    eta: Tensor,
    p: Tensor,
    parameters: Sequence[Tensor | None],
    settings: Settings,
    wanted: bool,
) -> tuple[Tensor, list[Tensor | None]]:
    """The perturbation after the inner steps, and the gradients of the parameters (None where they are not wanted)."""
    p = costate_for(p, x)
    # The operator works in x's dtype; the parameters of a half-precision model are widened for it.
    wide = [t if t is None or t.dtype == x.dtype else t.to(x.dtype) for t in parameters]
    after = wanted and settings.gradient_after
    new_eta, _, *gradients = update(x, eta, p, *wide, settings, settings.steps, after)
    total: list[Tensor | None] = list(gradients) if after else [None] * 4
    if wanted and settings.gradient_before:
        total = add_up(total, update(x, eta, p, *wide, settings, 0, True)[2:])
    return new_eta, [as_parameter(*pair) for pair in zip(parameters, total, strict=True)]


def as_in_forward(parameters: Sequence[Tensor | None], settings: Settings) -> tuple[Tensor | None, ...]:
    """Parameters to keep for the backward pass: copies where the layer is not affine.

    A hook may change weights through `.data` before the node's backward runs. An affine layer's weight gradient does not
    depend on them; another layer's would be taken at an activation that the forward never had.
    """
    if settings.activation == ACTIVATIONS["identity"]:
        return tuple(parameters)
    return tuple(None if t is None else t.detach().clone() for t in parameters)


class FusedNode(torch.autograd.Function):
    """The node in eager mode, without the dispatch of an operator, which costs more than a small first layer."""

    @staticmethod
    def forward(ctx: Any, run: Any, settings: Settings, eta: Tensor, x: Tensor, *parameters: Tensor | None) -> Tensor:
        ctx.run, ctx.settings = run, settings
        ctx.save_for_backward(eta, x, *as_in_forward(parameters, settings))
        arrived = None if run is None or run.place.layer.normalisation else run.arrived
        return output(x, eta, parameters, settings, arrived)

    @staticmethod
    def backward(ctx: Any, p: Tensor) -> tuple[Any, ...]:
        eta, x, *parameters = ctx.saved_tensors
        ctx.run.backwards += 1
        wanted = any(ctx.needs_input_grad[4:])
        new_eta, gradients = results(update_of(ctx.run.ball), x, eta, p, parameters, ctx.settings, wanted)
        return None, None, new_eta, None, *gradients


# --- the operators of compiled graphs ---


def _update_by_table(threat: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *layer, steps, norm, mask_start, need_output, need_weight_grad, allow_tf32 = arguments
    numbers = [row[:1] if len(set(row)) == 1 else row for row in threat.tolist()]
    return run(x, *layer, steps, *numbers, norm, mask_start, need_output, need_weight_grad, allow_tf32)


_NUMBERS = "float[] step_size, float[] eps, float[] lo, float[] hi, "
_library = torch.library.Library("yopo_ext", "FRAGMENT")
_library.define(
    "first_layer_update_by_tensor" + ops.SCHEMA.replace("(Tensor x", "(Tensor threat, Tensor x").replace(_NUMBERS, ""),
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("first_layer_update_by_tensor", _update_by_table, "CompositeExplicitAutograd")
torch.library.register_fake(
    "yopo_ext::first_layer_update_by_tensor", lambda threat, *arguments: ops.fake(*arguments), lib=_library
)
_update_operator = torch.ops.yopo_ext.first_layer_update_by_tensor.default


def update_in_graph(threat: Tensor) -> Update:
    """`update_of` with the threat model's constants from a tensor, as one operator of a compiled graph."""

    def update(x, eta, p, weight, bias, scale, shift, settings: Settings, steps: int, need_weight_grad: bool):
        s = settings
        return _update_operator(
            threat, x, eta, p, weight, bias, scale, shift, s.mean, s.std, *s.geometry, s.activation, s.negative_slope,
            steps, s.norm, s.mask_start, False, need_weight_grad, s.allow_tf32,
        )  # fmt: skip

    return update


def verdict(seen: Tensor, x: Tensor, eta: Tensor, settings: Settings) -> Tensor:
    """[1, whether `seen` are other pixels than those of x + eta normalised]: the "gradient" of `check`."""
    expected = normalised(sample(x) + sample(eta), settings.mean, settings.std)
    other = differs(seen, expected.to(seen.dtype)).to(x.dtype)
    return torch.stack([torch.ones_like(other), other])


def in_full_precision(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Without autocast, whose casts a compiler would otherwise carry from the forward pass into the backward pass."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, p: Tensor, *rest: Any) -> Any:
        with torch.autocast(p.device.type, enabled=False):
            return backward(ctx, p, *rest)

    return wrapped


def _forward(
    eta: Tensor,
    check: Tensor,
    seen: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    threat: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
    negative_slope: float,
    steps: int,
    norm: int,
    mask_start: bool,
    gradient_before: bool,
    gradient_after: bool,
    allow_tf32: bool,
    dtype: torch.dtype,
) -> Tensor:
    settings = Settings(
        list(mean), list(std), list(stride), list(padding), list(dilation), groups, activation, negative_slope, steps, norm,
        mask_start, gradient_before, gradient_after, allow_tf32, dtype,
    )  # fmt: skip
    return output(x, eta, (weight, bias, scale, shift), settings)


first_layer_node = torch.library.custom_op("yopo_ext::first_layer_node", _forward, mutates_args=())


@first_layer_node.register_fake
def _(eta, check, seen, x, weight, bias, scale, shift, threat, *settings) -> Tensor:
    s = Settings(*settings)
    return torch.nn.functional.conv2d(x.to(s.dtype), weight.to(s.dtype), None, *s.geometry)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.settings = Settings(*inputs[9:])


@in_full_precision
def _backward(ctx: Any, p: Tensor) -> tuple[Any, ...]:
    eta, _, seen, x, *parameters, threat = ctx.saved_tensors
    wanted = any(ctx.needs_input_grad[4:8])
    new_eta, gradients = results(update_in_graph(threat), x, eta, p, parameters, ctx.settings, wanted)
    checked = verdict(seen, x, eta, ctx.settings)
    return new_eta, checked, None, None, *gradients, None, *[None] * len(ctx.settings)


first_layer_node.register_autograd(_backward, setup_context=_setup)
