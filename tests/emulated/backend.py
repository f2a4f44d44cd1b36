"""The operator on the emulated CUDA kernels: the same positional arguments and results as `yopo_ext.kernels.ops`."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from contextlib import contextmanager

import binaries
import torch
from policy import as_dict

FORWARD, REVERSE, RANDOM = 0, 1, 2
SCHEDULES = {"forward": (FORWARD, 0), "reverse": (REVERSE, 0), "random": (RANDOM, 11)}
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# (shared memory per block, per processor) in KB; the number of processors is small so that a block takes several images.
ARCHITECTURES = {
    "sm_80": (163, 164), "sm_86": (99, 100), "sm_89": (99, 100), "sm_90": (227, 228), "sm_100": (227, 228),
    "sm_120": (99, 100),
}  # fmt: skip
LIBRARY = binaries.EMULATED / f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"


def _load():
    spec = importlib.util.spec_from_file_location("_emulated", LIBRARY)
    module = importlib.util.module_from_spec(spec)
    sys.modules["_emulated"] = module
    spec.loader.exec_module(module)
    return module


# Importing this file compiles nothing: tests/conftest.py has.
native = _load() if LIBRARY.exists() else None


def set_architecture(name: str, processors: int = 3) -> None:
    block, processor = ARCHITECTURES[name]
    native.set_limits(block * 1024, processor * 1024, processors)


@contextmanager
def machine(schedule: str = "forward", architecture: str = "sm_90", processors: int = 3, removed_barrier: int = 0):
    native.set_schedule(*SCHEDULES[schedule])
    set_architecture(architecture, processors)
    native.remove_barrier(removed_barrier)
    try:
        yield
    finally:
        native.set_schedule(FORWARD, 0)
        set_architecture("sm_90")
        native.remove_barrier(0)


def _poisoned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(float("nan")) if tensor.numel() else tensor


def _results(a: dict, poisoned: bool) -> tuple[torch.Tensor, ...]:
    """Empty results of the shapes, dtypes and strides the operator promises, full of NaN if `poisoned`."""
    x, costate = a["x"], a["costate"]

    def gradient(parameter: torch.Tensor | None) -> torch.Tensor:
        wanted = a["need_weight_grad"] and parameter is not None
        return torch.empty_like(parameter, dtype=x.dtype) if wanted else x.new_empty(0)

    output = torch.empty_like(costate) if a["need_output"] else costate.new_empty(0)
    gradients = (gradient(a[name]) for name in ("weight", "bias", "scale", "shift"))
    results = (torch.empty_like(x), output, *gradients)
    return tuple(_poisoned(t) for t in results) if poisoned else results


def prepare(arguments: tuple, poisoned: bool = True) -> tuple[dict, tuple[torch.Tensor, ...]]:
    """(what the module takes, the results it will fill)."""
    a = as_dict(arguments)
    x, eta, costate, weight = a["x"], a["eta"], a["costate"], a["weight"].contiguous()
    results = _results(a, poisoned)
    d = {k: a[k] for k in ("groups", "stride", "padding", "dilation", "activation", "norm", "negative_slope", "steps")}
    d |= {k: a[k] for k in ("mask_start", "allow_tf32", "mean", "std", "step_size", "eps", "lo", "hi")}
    d |= dict(zip(("batch", "channels", "height", "width"), x.shape, strict=True))
    d |= {"kernels": weight.shape[0], "rows": weight.shape[2], "cols": weight.shape[3]}
    d |= {"out_height": costate.shape[2], "out_width": costate.shape[3]}
    d |= {"compute": DTYPES[x.dtype], "costate_dtype": DTYPES[costate.dtype]}
    inputs = {"x": x, "eta": eta, "costate": costate, "weight": weight, **{k: a[k] for k in ("bias", "scale", "shift")}}
    outputs = dict(
        zip(("eta_out", "output", "grad_weight", "grad_bias", "grad_scale", "grad_shift"), results, strict=True)
    )
    for name, tensor in (inputs | outputs).items():
        present = tensor is not None and tensor.numel() > 0
        d[name] = tensor.data_ptr() if present else 0
        d[f"{name}_strides"] = list(tensor.stride()) if present and tensor.dim() == 4 else [0, 0, 0, 0]
    d["_alive"] = weight
    return d, results


def describe(arguments: tuple) -> dict:
    return native.describe(prepare(arguments, poisoned=False)[0])


def update(*arguments) -> tuple[torch.Tensor, ...]:
    d, results = prepare(arguments)
    if arguments[0].numel() == 0:  # as the glue does: nothing is launched, sums over nothing are zero
        for gradient in results[2:]:
            gradient.zero_()
        return results
    native.run(d)
    return results
