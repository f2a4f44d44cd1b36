"""One predicate: which backend and variant runs a first-layer update, and why not a faster one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..compilation import constant_when_compiled
from . import costs, native, ops, reference
from .constants import ACTIVATIONS, NORMS


@contextmanager
def library_precision(wanted: str) -> Iterator[None]:
    """fp32 products and convolutions of PyTorch on CUDA as "tf32" or "ieee" inside the block, for every thread."""
    owners: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [(owner, owner.fp32_precision) for owner in owners if owner.fp32_precision != wanted]
    try:
        for owner, _ in before:
            owner.fp32_precision = wanted
        yield
    finally:
        for owner, value in before:
            owner.fp32_precision = value


@dataclass(frozen=True)
class Choice:
    """The backend and the loop that will run, with the reasons against faster ones."""

    backend: str  # "native cpu", "native cuda", "library", "reference"
    loop: str
    reasons: tuple[str, ...] = field(default=())
    kernel: str = ""  # which of the backend's kernels, and why no faster one of them

    @property
    def native(self) -> bool:
        return self.backend.startswith("native")

    @property
    def operator(self) -> Callable[..., reference.Outputs]:
        """What runs the operator's arguments."""
        if self.native:
            return ops.first_layer_update
        return ops.first_layer_update_library if self.backend == "library" else ops.first_layer_update_reference

    def run(self, *arguments) -> reference.Outputs:
        """The update; where PyTorch's library multiplies on a GPU, as exactly as `allow_tf32` says."""
        x, allow_tf32 = arguments[0], arguments[-1]
        if x.device.type != "cuda" or self.backend == "reference" or torch.compiler.is_compiling():
            return self.operator(*arguments)
        with library_precision("tf32" if allow_tf32 else "ieee"):
            return self.operator(*arguments)

    def __str__(self) -> str:
        backend = f"{self.backend}, {self.kernel}" if self.kernel else self.backend
        return "\n".join([f"{backend}: {self.loop}", *(f"  not faster because {r}" for r in self.reasons)])


@constant_when_compiled
def _why_not_device(index: int | None) -> str | None:
    return native.why_not_device(torch.cuda.current_device() if index is None else index)


def _why_not_native(x: torch.Tensor) -> str | None:
    status = ops.native_status
    if x.device.type == "cpu":
        reason = status.why_not_cpu
    elif x.device.type == "cuda":
        reason = status.why_not_cuda or _why_not_device(x.device.index)
    else:
        reason = f"there are no kernels for device type '{x.device.type}'"
    return reason


_choices: dict[tuple, Choice] = {}  # what was chosen, by all that a choice depends on
_MOST_CHOICES = 1024


def choose(x, eta, costate, weight, bias, scale, shift, *rest) -> Choice:
    """The choice for the operator's own arguments (see `yopo_ext.kernels.ops`); reads only shapes, dtypes and devices."""
    if any(isinstance(value, torch.Tensor) for value in rest[9:13]):
        return Choice(
            "reference", f"{rest[8]} steps", ("eps, step_size or bounds vary inside a channel or between samples",)
        )
    if torch.compiler.is_compiling():
        return _choose(x, costate, weight, rest)
    _, _, stride, padding, dilation, groups, activation, _, steps, *_, norm, _, output, sums, tf32 = rest
    key = (
        x.shape, x.dtype, x.device, costate.shape, costate.dtype, weight.shape, *stride, *padding, *dilation, groups,
        activation, steps, norm, output, sums, tf32,
    )  # fmt: skip
    found = _choices.get(key)
    if found is None:
        if len(_choices) >= _MOST_CHOICES:
            _choices.clear()
        found = _choices[key] = _choose(x, costate, weight, rest)
    return found


def run(*arguments) -> reference.Outputs:
    """The operation on the backend that suits its arguments; its constants may be tensors that broadcast to x."""
    if any(isinstance(value, torch.Tensor) for value in arguments[16:20]):
        return reference.first_layer_update(*arguments)  # an operator's schema has one type for an argument
    return choose(*arguments).run(*arguments)


def _choose(x: torch.Tensor, costate: torch.Tensor, weight: torch.Tensor, rest: tuple) -> Choice:
    activation, steps = rest[6], rest[8]
    affine = activation == ACTIVATIONS["identity"]
    loop = "collapsed (affine first layer: cost independent of steps)" if affine else f"{steps} iterated steps"
    reason = _why_not_native(x)
    if reason is not None:
        return Choice("reference", loop, (reason,))
    reason = costs.why_library(_problem(x, costate, weight, rest), x.device.type)
    if reason is not None:
        return Choice("library", loop, (reason,), "its products and the kernels' steps")
    return Choice(f"native {x.device.type}", loop)


def _problem(x: torch.Tensor, costate: torch.Tensor, weight: torch.Tensor, rest: tuple) -> costs.Problem:
    stride, padding, dilation, groups, activation, _, steps = rest[2:9]
    norm, _, need_output, need_weight_grad, allow_tf32 = rest[13:18]
    batch, channels, *size = x.shape
    return costs.Problem(
        batch, channels, tuple(size), weight.shape[0], tuple(weight.shape[2:]), tuple(costate.shape[2:]), tuple(stride),
        tuple(padding), tuple(dilation), groups, activation == ACTIVATIONS["identity"], norm == NORMS["linf"], steps,
        need_output, need_weight_grad, x.element_size(), costate.element_size(), allow_tf32,
    )  # fmt: skip


def describe(*arguments) -> str:
    """The choice in words, with the kernel that the native library would take; allocates results and launches nothing."""
    choice = choose(*arguments)
    if choice.native:
        choice = dataclasses.replace(choice, kernel=ops.first_layer_variant(*arguments))
    return str(choice)


@constant_when_compiled  # Dynamo cannot read the setting; a compiled graph keeps what it was compiled with
def resolve_allow_tf32(allow_tf32: bool | None) -> bool:
    """None follows PyTorch's own setting for fp32 convolutions."""
    if allow_tf32 is not None:
        return bool(allow_tf32)
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
