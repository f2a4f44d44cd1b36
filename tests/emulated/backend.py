"""The operator on the emulated CUDA kernels: the same positional arguments and results as `yopo_ext.ops`."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path

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
ROOT = Path(__file__).parents[2]
BUILD = Path(os.environ.get("YOPO_EMULATED_DIR", ROOT / "build" / "emulated"))


def build(target: str = "_emulated") -> str | None:
    """Compile the kernels for the CPU (half a minute; nothing if they are up to date). Returns why it could not."""
    tools = {
        name: shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
        for name in ("cmake", "ninja")
    }
    for name, path in tools.items():
        if path is None:
            return f"{name} was not found"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / ".lock", "w") as lock:  # one build at a time, whatever the number of test processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = [tools["cmake"], "-S", ROOT / "csrc" / "testing", "-B", BUILD, "-G", "Ninja",
                     f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}", f"-DPython3_EXECUTABLE={sys.executable}",
                     f"-DPython_EXECUTABLE={sys.executable}"]  # fmt: skip
        for command in (configure, [tools["cmake"], "--build", BUILD, "--target", target]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                return f"{' '.join(map(str, command))} failed:\n{(done.stdout + done.stderr)[-3000:]}"
    return None


def _load():
    path = BUILD / f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("_emulated", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["_emulated"] = module
    spec.loader.exec_module(module)
    return module


why_missing = "no C++ compiler was found" if not any(map(shutil.which, ("c++", "g++", "clang++"))) else build()
native = None if why_missing else _load()


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


def _results(a: dict) -> tuple[torch.Tensor, ...]:
    """Empty results of the shapes, dtypes and strides the operator promises, full of NaN."""
    x, costate = a["x"], a["costate"]

    def gradient(parameter: torch.Tensor | None) -> torch.Tensor:
        wanted = a["need_weight_grad"] and parameter is not None
        return torch.empty_like(parameter, dtype=x.dtype) if wanted else x.new_empty(0)

    output = torch.empty_like(costate) if a["need_output"] else costate.new_empty(0)
    gradients = (gradient(a[name]) for name in ("weight", "bias", "scale", "shift"))
    return tuple(_poisoned(t) for t in (torch.empty_like(x), output, *gradients))


def prepare(arguments: tuple) -> tuple[dict, tuple[torch.Tensor, ...]]:
    """(what the module takes, the results it will fill)."""
    a = as_dict(arguments)
    x, eta, costate, weight = a["x"], a["eta"], a["costate"], a["weight"].contiguous()
    results = _results(a)
    d = {k: a[k] for k in ("groups", "stride", "padding", "dilation", "activation", "norm", "negative_slope", "steps")}
    d |= {k: a[k] for k in ("allow_tf32", "mean", "std", "step_size", "eps", "lo", "hi")}
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
    return native.describe(prepare(arguments)[0])


def update(*arguments) -> tuple[torch.Tensor, ...]:
    d, results = prepare(arguments)
    if arguments[0].numel() == 0:  # as the glue does: nothing is launched, sums over nothing are zero
        for gradient in results[2:]:
            gradient.zero_()
        return results
    native.run(d)
    return results
