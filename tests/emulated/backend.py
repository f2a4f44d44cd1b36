"""The operator on the emulated CUDA kernels: the same positional arguments and results as `yopo_ext.ops`."""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path

import torch
from policy import as_dict

from yopo_ext import ops

FORWARD, REVERSE, RANDOM = 0, 1, 2
SCHEDULES = {"forward": (FORWARD, 0), "reverse": (REVERSE, 0), "random": (RANDOM, 11)}
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# (shared memory per block, per processor) in KB; the number of processors is small so that a block takes several images.
ARCHITECTURES = {
    "sm_80": (163, 164), "sm_86": (99, 100), "sm_89": (99, 100), "sm_90": (227, 228), "sm_100": (227, 228),
    "sm_120": (99, 100),
}  # fmt: skip
BUILD = Path(os.environ.get("YOPO_EMULATED_DIR", Path(__file__).parents[2] / "build" / "emulated"))


def _load():
    path = BUILD / f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location("_emulated", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["_emulated"] = module
    spec.loader.exec_module(module)
    return module


native = _load()


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


def prepare(arguments: tuple) -> tuple[dict, tuple[torch.Tensor, ...]]:
    """(what the module takes, the results it will fill)."""
    a = as_dict(arguments)
    x, eta, costate, weight = a["x"], a["eta"], a["costate"], a["weight"].contiguous()
    results = tuple(_poisoned(t) for t in ops._fake(*arguments))
    d = {k: a[k] for k in ("groups", "stride", "padding", "dilation", "activation", "norm", "negative_slope", "steps")}
    d |= {k: a[k] for k in ("allow_tf32", "mean", "std", "step_size", "eps", "lo", "hi")}
    d |= dict(zip(("batch", "channels", "height", "width"), x.shape, strict=True))
    d |= {"kernels": weight.shape[0], "rows": weight.shape[2], "cols": weight.shape[3]}
    d |= {"out_height": costate.shape[2], "out_width": costate.shape[3]}
    d |= {"compute": DTYPES[x.dtype], "costate_dtype": DTYPES[costate.dtype]}
    inputs = {"x": x, "eta": eta, "costate": costate, "weight": weight, **{k: a[k] for k in ("bias", "scale", "shift")}}
    outputs = dict(zip(("eta_out", "output", "grad_weight", "grad_bias", "grad_scale", "grad_shift"), results, strict=True))
    for name, tensor in (inputs | outputs).items():
        present = tensor is not None and tensor.numel() > 0
        d[name] = tensor.data_ptr() if present else 0
        d[f"{name}_strides"] = list(tensor.stride()) if present and tensor.dim() == 4 else [0, 0, 0, 0]
    d["_alive"] = weight
    return d, results


def describe(arguments: tuple) -> dict:
    return native.describe(prepare(arguments)[0])


def update(*arguments) -> tuple[torch.Tensor, ...]:
    d, results = prepare(arguments)
    if arguments[0].numel() == 0:  # as the glue does: nothing is launched, sums over nothing are zero
        for gradient in results[2:]:
            gradient.zero_()
        return results
    native.run(d)
    return results
