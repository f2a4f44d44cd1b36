"""Finds and loads the native libraries that override the operator's reference kernels, once per process."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from .._version import __version__

_LIBRARY_DIR = Path(__file__).parent.parent / "lib"


class NativeStatus(NamedTuple):
    """Which native libraries this process runs, and why one is missing (None where it is loaded)."""

    cpu: bool
    cuda: bool
    why_not_cpu: str | None
    why_not_cuda: str | None
    build: dict[str, object]  # what the build recorded of itself; {} in a pure-Python install


def _driver_cuda_version() -> int | None:
    """The CUDA version the installed NVIDIA driver supports (13000 for 13.0), or None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def _why_not_cuda(library: Path, build: dict[str, object]) -> str | None:
    if not library.exists():
        return f"the package was built without CUDA kernels ({build.get('cuda_reason', 'pure-Python install')})"
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is a CPU-only build"
    supported, needed = _driver_cuda_version(), int(str(build.get("cuda_runtime_version", 0)))
    if supported is None:
        return "no NVIDIA driver (libcuda.so.1) was found"
    if supported // 1000 < needed // 1000:
        return (
            f"the NVIDIA driver supports CUDA {supported / 1000:.1f}, the kernels were built with {needed / 1000:.1f}"
        )
    return None


def _load(library: Path) -> str | None:
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return f"{library.name} does not load into torch {torch.__version__}: {error}"
    return None


def why_not_capability(capability: tuple[int, int], architectures: str) -> str | None:
    """Why kernels built for CMake's `architectures` ("80;90", "90-real", "90a") do not run on a GPU of this capability.

    Machine code runs on its own major version from its own minor version on ("a": on its own alone). An entry without
    "-real" also holds PTX, which the driver compiles for every later GPU.
    """
    number = 10 * capability[0] + capability[1]
    for entry in filter(None, architectures.split(";")):
        match = re.fullmatch(r"(\d+)([af]?)(-real|-virtual)?", entry)
        if match is None:
            return None  # "native", "all": whoever built it knows
        built, suffix = int(match[1]), match[2]
        machine_code = match[3] != "-virtual" and number // 10 == built // 10 and number >= built
        ptx = match[3] != "-real" and number >= built
        if number == built or (suffix == "f" and machine_code) or (suffix == "" and (machine_code or ptx)):
            return None
    return (
        f"its compute capability is {capability[0]}.{capability[1]}, and the CUDA kernels were built for "
        f"{architectures.replace(';', ', ')} (times ten)"
    )


@functools.cache
def why_not_device(index: int) -> str | None:
    """Why CUDA kernels do not run on device `index`, which is asked and warned of once."""
    name = torch.cuda.get_device_name(index)
    reason = why_not_capability(
        torch.cuda.get_device_capability(index), str(status().build.get("cuda_architectures", ""))
    )
    if reason is not None:
        warnings.warn(
            f"yopo_ext {__version__} runs its PyTorch reference kernels on cuda:{index} ({name}): {reason}. "
            "Results are the same, only slower.",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason


@functools.cache
def status() -> NativeStatus:
    """Load what there is to load (first call only) and say what is running.

    `YOPO_EXT_NATIVE=0` in the environment keeps everything on the reference kernels.
    """
    info = _LIBRARY_DIR / "build_info.json"
    build: dict[str, object] = json.loads(info.read_text()) if info.exists() else {}
    cpu, cuda = _LIBRARY_DIR / "libyopo_ext_cpu.so", _LIBRARY_DIR / "libyopo_ext_cuda.so"
    why_not_cpu: str | None
    why_not_cuda: str | None
    if os.environ.get("YOPO_EXT_NATIVE", "1") == "0":
        why_not_cpu = why_not_cuda = "the environment variable YOPO_EXT_NATIVE is 0"
    else:
        why_not_cpu = (
            _load(cpu)
            if cpu.exists()
            else "no native library lies beside it (installed without a C++ compiler, or a source tree that was not built)"
        )
        why_not_cuda = _why_not_cuda(cuda, build) or _load(cuda)
    # A GPU whose kernels are missing is worth the same words as a missing CPU library.
    missing = why_not_cpu or (why_not_cuda if torch.version.cuda is not None and torch.cuda.is_available() else None)
    if missing is not None:
        warnings.warn(
            f"yopo_ext {__version__} runs its PyTorch reference kernels{'' if why_not_cpu else ' on CUDA devices'}: {missing}. "
            "Results are the same, only slower.",
            RuntimeWarning,
            stacklevel=2,
        )
    return NativeStatus(why_not_cpu is None, why_not_cuda is None, why_not_cpu, why_not_cuda, build)
