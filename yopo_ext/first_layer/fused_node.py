"""The first layer as one autograd node, so that a model's own backward pass updates the perturbation.

`first_layer_node` computes y0 = f0(x + eta). In its backward it receives the costate p = dL/dy0 and returns, as the
"gradient" of the leaf `eta`, the perturbation after n inner steps; the gradients of the first layer's parameters come
out as ordinary gradients: at the perturbation the pass ran at (`gradient_before`), at the one its costate led to
(`gradient_after`), the sum of both, or none. The node is a pure function of its arguments: what `torch.compile`,
DistributedDataParallel or a gradient scaler do around a layer they can do around it.

The numbers of the threat model come as a tensor `threat` on the CPU, [step_size, eps, lo, hi] by [1 or C]: a compiled
graph would hold numbers as constants, and a schedule of eps would compile it again and again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.dispatch import choose
from ..kernels.reference import activate
from ..validation import COSTATE_DTYPES


def per_channel(values: Sequence[float], like: Tensor) -> Tensor | float:
    """One value as a number, several as a tensor [C, 1, 1] made on the device (a copy from the host would wait)."""
    if len(values) == 1:
        return values[0]
    return torch.stack([like.new_full((), value) for value in values])[:, None, None]


def normalised(u: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(u - mean) / std, scalars or per channel; u itself where they are empty."""
    return (u - per_channel(mean, u)) / per_channel(std, u) if mean else u


def costate_for(p: Tensor, x: Tensor) -> Tensor:
    """p as the operator takes it: dense, and of a dtype that goes with x."""
    if p.dtype not in COSTATE_DTYPES and p.dtype != x.dtype:
        p = p.to(x.dtype)
    dense = p.is_contiguous() or p.is_contiguous(memory_format=torch.channels_last)
    return p if dense else p.contiguous()


def threat_tensor(*constants: list[float]) -> Tensor:
    """step_size, eps, lo, hi, each with 1 or C values, as the node takes them."""
    width = max(map(len, constants))
    rows = [values * (width // len(values)) for values in constants]
    return torch.tensor(rows, dtype=torch.float64, device="cpu")  # whatever the default device is


def threat_constants(threat: Tensor) -> list[list[float]]:
    """step_size, eps, lo, hi of a `threat_tensor`, as the operator takes them."""
    return [values[:1] if len(set(values)) == 1 else values for values in threat.tolist()]


def update(threat: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The operator, on the backend that suits its arguments, with the numbers of the threat model from `threat`."""
    *layer, steps, norm, mask_start, need_output, need_weight_grad, allow_tf32 = arguments
    flags = (norm, mask_start, need_output, need_weight_grad, allow_tf32)
    full = (x, *layer, steps, *threat_constants(threat), *flags)
    return choose(*full).run(*full)


_NUMBERS = "float[] step_size, float[] eps, float[] lo, float[] hi, "
_library = torch.library.Library("yopo_ext", "FRAGMENT")
_library.define(
    "first_layer_update_by_tensor" + ops.SCHEMA.replace("(Tensor x", "(Tensor threat, Tensor x").replace(_NUMBERS, ""),
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("first_layer_update_by_tensor", update, "CompositeExplicitAutograd")
torch.library.register_fake(
    "yopo_ext::first_layer_update_by_tensor", lambda threat, *arguments: ops.fake(*arguments), lib=_library
)
update_operator = torch.ops.yopo_ext.first_layer_update_by_tensor.default


def in_full_precision(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Without autocast, whose casts a compiler would otherwise carry from the forward pass into the backward pass."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, p: Tensor, *rest: Any) -> Any:
        with torch.autocast(p.device.type, enabled=False):
            return backward(ctx, p, *rest)

    return wrapped


def as_parameter(parameter: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """The gradient in its parameter's dtype."""
    return None if parameter is None or gradient is None else gradient.to(parameter.dtype)


def convolve(x, eta, weight, bias, mean, std, geometry, dtype) -> Tensor:
    """The convolution of the normalised x + eta, in `dtype`."""
    u = normalised(x + eta, mean, std).to(dtype)
    return torch.nn.functional.conv2d(u, weight.to(dtype), None if bias is None else bias.to(dtype), *geometry)


def add_up(total: list[Tensor | None], terms: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Sums term by term, None being nothing."""
    return [t if s is None else s if t is None else s + t for s, t in zip(total, terms, strict=True)]


def _forward(
    eta: Tensor,
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
    """y0 = act(scale * conv2d((x + eta - mean) / std, weight, bias) + shift) in `dtype` [B, K, OH, OW]."""
    z = convolve(x, eta, weight, bias, mean, std, (stride, padding, dilation, groups), dtype)
    if scale is not None:
        z = z * scale[:, None, None]
    if shift is not None:
        z = z + shift[:, None, None]
    return activate(z, activation, negative_slope).to(dtype)


first_layer_node = torch.library.custom_op("yopo_ext::first_layer_node", _forward, mutates_args=())


@first_layer_node.register_fake
def _(eta, x, weight, bias, scale, shift, threat, mean, std, stride, padding, dilation, groups, *rest) -> Tensor:
    dtype = rest[-1]
    geometry = (stride, padding, dilation, groups)
    return torch.nn.functional.conv2d(x.to(dtype), weight.to(dtype), None, *geometry)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.settings = inputs[7:]
    ctx.update, ctx.carry = update_operator, None


@in_full_precision
def _backward(ctx: Any, p: Tensor) -> tuple[Any, ...]:
    eta, x, weight, bias, scale, shift, threat = ctx.saved_tensors
    *geometry, steps, norm, mask_start, before, after, allow_tf32, _ = ctx.settings
    p = costate_for(p, x)
    parameters = (weight, bias, scale, shift)
    # The operator works in x's dtype; the parameters of a half-precision model are widened for it.
    layer = (*(None if t is None else t.to(x.dtype) for t in parameters), *geometry)
    wanted = any(ctx.needs_input_grad[2:6])
    carried = ctx.carry is not None
    new_eta, output, *gradients = ctx.update(
        threat, x, eta, p, *layer, steps, norm, mask_start, carried, wanted and after, allow_tf32
    )
    if carried:
        ctx.carry.output = output
    total: list[Tensor | None] = list(gradients) if wanted and after else [None] * 4
    if wanted and before:
        total = add_up(total, ctx.update(threat, x, eta, p, *layer, 0, norm, False, False, True, allow_tf32)[2:])
    return new_eta, None, *map(as_parameter, parameters, total), None, *[None] * len(ctx.settings)


first_layer_node.register_autograd(_backward, setup_context=_setup)


@dataclass
class Carry:
    """Hands the output at the moved perturbation to the next pass: the update reads the costate for it anyway."""

    wanted: bool = False  # whether there is a next pass that may start from it
    output: Tensor | None = None
    state: Any = None  # what the layer was when it was computed

    def take(self, state: Any, dtype: torch.dtype) -> list[Tensor]:
        """The output, once, if the layer is still in the same state, or nothing."""
        output, self.output = self.output, None
        same = output is not None and self.state == state and output.dtype == dtype
        self.state = state
        return [output] if same else []  # type: ignore[list-item]


class FirstLayerNode(torch.autograd.Function):
    """`first_layer_node` for eager mode, without the operator dispatch, which costs more than a small first layer."""

    @staticmethod
    def forward(ctx: Any, carry: Carry | None, ready: list[Tensor], *inputs: Any) -> Tensor:
        # In a list: a tensor among the inputs would come out as a view, which the next layer may not overwrite.
        output = ready.pop() if ready else _forward(*inputs)
        _setup(ctx, inputs, output)
        ctx.update, ctx.carry = update, carry
        return output

    @staticmethod
    def backward(ctx: Any, p: Tensor) -> tuple[Any, ...]:
        return None, None, *_backward(ctx, p)
