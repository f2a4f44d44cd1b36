"""The operators: schema, reference kernels, fake kernels. Loading a native library overrides its device's kernel.

`yopo_ext::first_layer_update` is the operation of the package; `yopo_ext::first_layer_update_reference` has the same
schema and is always the PyTorch definition, so that tests, and inputs no kernel takes, can reach it beside a native one.
`yopo_ext::first_layer_update_library` is the same with products of PyTorch's library and the native kernels' steps.
`yopo_ext::first_layer_variant` says in words which kernel the first would run; it allocates results and launches nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import library, native, reference

ARGUMENTS = (
    "(Tensor x, Tensor eta, Tensor costate, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, "
    "float[] mean, float[] std, int[] stride, int[] padding, int[] dilation, int groups, int activation, "
    "float negative_slope, int steps, float[] step_size, float[] eps, float[] lo, float[] hi, int norm, "
    "bool mask_start, bool need_output, bool need_weight_grad, bool allow_tf32)"
)
SCHEMA = ARGUMENTS + " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
VARIANT_SCHEMA = ARGUMENTS + " -> str"

_library = torch.library.Library("yopo_ext", "DEF")


def fake(x, eta, costate, weight, bias, scale, shift, *rest) -> reference.Outputs:
    need_output, need_weight_grad = rest[-3], rest[-2]

    def grad(parameter: Tensor | None) -> Tensor:
        wanted = need_weight_grad and parameter is not None
        return torch.empty_like(parameter, dtype=x.dtype) if wanted else x.new_empty(0)  # type: ignore[arg-type]

    output = torch.empty_like(costate) if need_output else costate.new_empty(0)
    return torch.empty_like(x), output, grad(weight), grad(bias), grad(scale), grad(shift)


for _name, _implementation in (
    ("first_layer_update", reference.first_layer_update),
    ("first_layer_update_reference", reference.first_layer_update),
    ("first_layer_update_library", library.first_layer_update),
):
    _library.define(_name + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"yopo_ext::{_name}", fake, lib=_library)

_library.define("first_layer_variant" + VARIANT_SCHEMA)
_library.impl("first_layer_variant", lambda *_: "PyTorch operations", "CompositeExplicitAutograd")

native_status = native.status()

first_layer_update = torch.ops.yopo_ext.first_layer_update.default
first_layer_update_reference = torch.ops.yopo_ext.first_layer_update_reference.default
first_layer_update_library = torch.ops.yopo_ext.first_layer_update_library.default
first_layer_variant = torch.ops.yopo_ext.first_layer_variant.default
