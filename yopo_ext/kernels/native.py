"""Finds and loads the native libraries that override the operator's reference kernels, once per process."""

from __future__ import annotations

import ctypes
import functools
import json
import os
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
