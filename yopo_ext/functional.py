"""The first-layer operation as functions on tensors: `adversary_steps`, `first_layer_update`, `explain`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import validation
from ._version import __version__
from .kernels import ops
from .kernels.constants import ACTIVATIONS, NORMS
from .kernels.dispatch import describe, resolve_allow_tf32, run
from .threat import ThreatModel
from .validation import Constants

IntOrPair = int | Sequence[int]


class FirstLayerUpdate(NamedTuple):
    """Results of `first_layer_update`; a field is None where it was not asked for or its parameter is absent."""

    eta: Tensor  # [B, C, H, W], x's dtype and layout
    output: Tensor | None  # [B, K, OH, OW], the costate's dtype and layout
    grad_weight: Tensor | None  # [K, C/groups, R, S]
    grad_bias: Tensor | None  # [K]
    grad_scale: Tensor | None  # [K]
    grad_shift: Tensor | None  # [K]


def _output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _arguments(
    x, eta, costate, weight, bias, *, stride, padding, dilation, groups, mean, std, scale, shift, activation,
    negative_slope, steps, step_size, eps, norm, bounds, mask_start, allow_tf32, need_output, need_weight_grad,
) -> tuple[Any, ...]:  # fmt: skip
    """Check everything and return the operator's positional arguments."""
    x = validation.floating("x", validation.tensor("x", x, (None,) * 4), validation.X_DTYPES)
    batch, channels, height, width = x.shape
    eta = validation.floating("eta", validation.tensor("eta", eta, tuple(x.shape), like=x), (x.dtype,))
    groups = validation.integer("groups", groups, 1)
    if channels % groups:
        raise ValueError(f"groups must divide x's channels ({channels}); got {groups}")
    weight = validation.tensor("weight", weight, (None, channels // groups, None, None), like=x)
    validation.floating("weight", weight, (*validation.COSTATE_DTYPES, torch.float64))
    kernels, _, rows, cols = weight.shape
    if kernels % groups:
        raise ValueError(f"groups must divide weight's output channels ({kernels}); got {groups}")
    stride, dilation = validation.pair("stride", stride, 1), validation.pair("dilation", dilation, 1)
    padding = validation.pair("padding", padding, 0)
    out_h = _output_size(height, rows, stride[0], padding[0], dilation[0])
    out_w = _output_size(width, cols, stride[1], padding[1], dilation[1])
    if min(out_h, out_w) < 1:
        raise ValueError(
            f"weight's {rows}x{cols} kernel does not fit into x [{height}, {width}] with padding {padding}"
        )
    allowed = (*validation.COSTATE_DTYPES, torch.float64) if x.dtype == torch.float64 else validation.COSTATE_DTYPES
    costate = validation.tensor("costate", costate, (batch, kernels, out_h, out_w), like=x)
    validation.floating("costate", costate, allowed)

    def parameter(name: str, value: Tensor | None) -> Tensor | None:
        return None if value is None else validation.tensor(name, value, (kernels,), like=x).to(x.dtype)

    mean, std = map(list, validation.normalisation(mean, std, channels))
    ball = ThreatModel(eps, step_size, norm, bounds).around(x)
    if not isinstance(mask_start, bool):
        raise TypeError(f"mask_start must be True or False; got {type(mask_start).__name__}")
    return (
        x, eta, costate, weight.to(x.dtype), parameter("bias", bias), parameter("scale", scale),
        parameter("shift", shift), mean, std, stride, padding, dilation, groups,
        ACTIVATIONS[validation.choice("activation", activation, ACTIVATIONS)], float(negative_slope),
        validation.integer("steps", steps, 0), *ball.operator_constants, NORMS[norm], mask_start, bool(need_output),
        bool(need_weight_grad), resolve_allow_tf32(allow_tf32),
    )  # fmt: skip


def first_layer_update(
    x: Tensor,
    eta: Tensor,
    costate: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    mean: Constants | None = None,
    std: Constants | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    steps: int = 1,
    step_size: Constants,
    eps: Constants,
    norm: str = "linf",
    bounds: tuple[Constants, Constants] | None = (0.0, 1.0),
    mask_start: bool = False,
    allow_tf32: bool | None = None,
    need_output: bool = True,
    need_weight_grad: bool = True,
) -> FirstLayerUpdate:
    """Everything one outer pass does at the first layer f0, once the costate p is known.

    f0(u) = act(scale * conv2d((u - mean) / std, weight, bias) + shift). With p fixed, `steps` times (L-inf):

        g = d/du <p, f0(u)> at u = x + eta
        eta = clamp(eta + step_size * sign(g), max(-eps, min(lo - x, 0)), min(eps, max(hi - x, 0)))

    L2: eta + step_size * g / ||g||, projected on the ball of radius eps, then clamped to the box. A first eta outside the
    ball or the box is stepped from like any other (see `mask_start`). Then, at the new eta, the output f0(x + eta) and the
    gradients of <p, f0(x + eta)>. n steps equal n calls of one step, bit by bit. If f0 is affine (activation "identity")
    g does not depend on eta and is computed once, whatever `steps` is; the result is the same, for L-inf bit by bit.
    (Section 3 of the YOPO paper: n gradient steps on the Hamiltonian <p, f0> of the first layer.)

    Args:
        x: input [B, C, H, W], float32 or float64, NCHW or channels_last.
        eta: perturbation, x's shape and dtype. Its L-inf or L2 ball is only enforced by a step: `steps=0` returns it as it is.
        costate: dL/d(output) [B, K, OH, OW]; float32, bfloat16, float16 (float64 with a float64 x); any positive scale.
        weight, bias, stride, padding, dilation, groups: as in `torch.nn.functional.conv2d` (integer padding).
        mean, std: per-channel input normalisation inside f0, applied before zero padding.
        scale, shift: per-output-channel affine [K] after the convolution (a BatchNorm with frozen statistics).
        activation: "identity", "relu", "leaky_relu" (with `negative_slope`), "gelu", "gelu_tanh" or "silu".
        steps: n >= 0.
        step_size, eps, bounds: in x's units; numbers or one per input channel (L2: numbers). bounds=None: unbounded.
        norm: "linf" or "l2".
        mask_start: True: g is taken at u = clamp(x + eta, lo, hi) in every step, and in the first step it is 0 where
            the incoming eta lies outside [min(lo - x, 0), max(hi - x, 0)], as if it were differentiated through that
            clamp: what the YOPO authors' released code does from its unprojected random start.
        allow_tf32: whether tensor cores may round fp32 products to TF32; None follows torch.backends.cudnn.conv.
        need_output, need_weight_grad: which results to compute besides eta.

    Returns:
        FirstLayerUpdate. Nothing of it carries an autograd graph.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what is allowed.
    """
    arguments = _arguments(
        x, eta, costate, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups, mean=mean,
        std=std, scale=scale, shift=shift, activation=activation, negative_slope=negative_slope, steps=steps,
        step_size=step_size, eps=eps, norm=norm, bounds=bounds, mask_start=mask_start, allow_tf32=allow_tf32,
        need_output=need_output, need_weight_grad=need_weight_grad,
    )  # fmt: skip
    with torch.no_grad():
        new_eta, output, grad_weight, grad_bias, grad_scale, grad_shift = run(*arguments)

    def grad(value: Tensor, parameter: Tensor | None) -> Tensor | None:
        return value.to(parameter.dtype) if need_weight_grad and parameter is not None else None

    return FirstLayerUpdate(
        new_eta, output if need_output else None, grad(grad_weight, weight), grad(grad_bias, bias),
        grad(grad_scale, scale), grad(grad_shift, shift),
    )  # fmt: skip


def adversary_steps(
    x: Tensor, eta: Tensor, costate: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """The n inner steps alone: `first_layer_update` without output and weight gradients; returns eta' [B, C, H, W].

    Takes the keyword arguments of `first_layer_update` except `need_output` and `need_weight_grad`.
    """
    return first_layer_update(x, eta, costate, weight, bias, need_output=False, need_weight_grad=False, **options).eta


def explain(x: Tensor, eta: Tensor, costate: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> str:
    """Which backend and variant `first_layer_update` would run for these arguments, and why not a faster one."""
    defaults = first_layer_update.__kwdefaults__ or {}
    return describe(*_arguments(x, eta, costate, weight, bias, **{**defaults, **options}))


def build_info() -> dict[str, object]:
    """Versions, native libraries (or why one is missing), CUDA architectures, dtypes and activations, as plain data."""
    status = ops.native_status

    def names(dtypes: tuple[torch.dtype, ...]) -> list[str]:
        return [str(d).removeprefix("torch.") for d in dtypes]

    return {
        "version": __version__,
        "torch": torch.__version__,
        "cpu_kernels": status.cpu,
        "cpu_kernels_reason": status.why_not_cpu,
        "cuda_kernels": status.cuda,
        "cuda_kernels_reason": status.why_not_cuda,
        "input_dtypes": names(validation.X_DTYPES),
        "costate_dtypes": names((*validation.COSTATE_DTYPES, torch.float64)),
        "activations": list(ACTIVATIONS),
        "norms": list(NORMS),
        "build": status.build,
    }
