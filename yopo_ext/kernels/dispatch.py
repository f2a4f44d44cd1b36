"""One predicate: which backend and variant runs a first-layer update, and why not a faster one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch

from ..compilation import constant_when_compiled
from . import ops
from .constants import ACTIVATIONS


@dataclass(frozen=True)
class Choice:
    """The backend and the loop that will run, with the reasons against faster ones."""

    backend: str  # "native cpu", "native cuda", "reference"
    loop: str
    reasons: tuple[str, ...] = field(default=())
    kernel: str = ""  # which of the backend's kernels, and why no faster one of them

    @property
    def native(self) -> bool:
        return self.backend != "reference"

    def __str__(self) -> str:
        backend = f"{self.backend}, {self.kernel}" if self.kernel else self.backend
        return "\n".join([f"{backend}: {self.loop}", *(f"  not faster because {r}" for r in self.reasons)])


def _why_not_native(x: torch.Tensor, *tensors: torch.Tensor | None) -> str | None:
    status = ops.native_status
    if x.device.type == "cpu":
        reason = status.why_not_cpu
    elif x.device.type == "cuda":
        reason = status.why_not_cuda
    else:
        reason = f"there are no kernels for device type '{x.device.type}'"
    return reason


def choose(x, eta, costate, weight, bias, scale, shift, *rest) -> Choice:
    """The choice for the operator's own arguments (see `yopo_ext.kernels.ops`); reads only shapes, dtypes and devices."""
    activation, steps = rest[6], rest[8]
    affine = activation == ACTIVATIONS["identity"]
    loop = "collapsed (affine first layer: cost independent of steps)" if affine else f"{steps} iterated steps"
    reason = _why_not_native(x, eta, costate, weight)
    if reason is None:
        return Choice(f"native {x.device.type}", loop)
    return Choice("reference", loop, (reason,))


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
