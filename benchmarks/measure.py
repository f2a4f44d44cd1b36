"""Shared by the benchmarks: interleaved timing, ceilings of the machine, environment, JSON."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import yopo_ext

RESULTS = Path(__file__).parent / "results"

# Twelve independent chains cover two FMAs a cycle at a latency of four, with room.
_PEAK_SOURCE = """
#include <chrono>
typedef float Vec __attribute__((vector_size(VECTOR_BYTES)));
extern "C" double fma_gflops() {
  Vec acc[12], x = Vec{} + 0.999f, y = Vec{} + 1e-3f;
  for (auto& a : acc) a = Vec{} + 1.0f;
  asm volatile("" : "+x"(x), "+x"(y));
  const long rounds = 4000000;
  const auto start = std::chrono::steady_clock::now();
  for (long i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) acc[j] = acc[j] * x + y;
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  for (auto& a : acc) asm volatile("" : "+x"(a));
  return 2.0 * 12 * rounds * (VECTOR_BYTES / 4) / seconds / 1e9;
}
"""


def fma_ceiling() -> Callable[[], float] | None:
    """A function that measures one core's fp32 FMA rate in GFLOP/s; None without a compiler."""
    width = {"avx512": 64, "avx2": 32}.get(cpu_isa(), 16)
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "peak.cpp", Path(folder) / "peak.so"
        source.write_text(_PEAK_SOURCE)
        command = [os.environ.get("CXX", "c++"), "-O3", "-march=native", "-mprefer-vector-width=512", "-shared", "-fPIC",
                   f"-DVECTOR_BYTES={width}", str(source), "-o", str(library)]  # fmt: skip
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        peak = ctypes.CDLL(str(library)).fma_gflops
    peak.restype = ctypes.c_double
    return peak


def copy_ceiling(megabytes: int = 256) -> float:
    """GB/s (read plus write) of a large copy on the current threads."""
    source = torch.rand(megabytes * 2**18)
    target = torch.empty_like(source)
    times = [_timed(lambda: target.copy_(source)) for _ in range(7)]
    return 2 * source.numel() * 4 / statistics.median(times[1:]) / 1e9


def cpu_isa() -> str:
    library = Path(yopo_ext.__file__).parent / "lib" / "libyopo_ext_cpu.so"
    if not library.exists():
        return "none"
    name = ctypes.CDLL(str(library)).yopo_ext_cpu_isa
    name.restype = ctypes.c_char_p
    return name().decode()


def environment() -> dict[str, Any]:
    """What a figure was measured on."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": cpu_isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "yopo_ext": yopo_ext.__version__,
        "commit": commit.stdout.strip() or None,
        "load": round(os.getloadavg()[0], 2),
    }


def _timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(functions: dict[str, Callable[[], Any]], seconds: float, minimum: int = 7) -> dict[str, list[float]]:
    """Seconds of every repetition; one of each in turn, so that a slow moment of the machine hits all alike.

    Every round has another order: what ran before decides what the caches hold.
    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    order, generator = list(functions), random.Random(0)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[order[0]]) < minimum:
        generator.shuffle(order)
        for name in order:
            times[name].append(_timed(functions[name]))
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Milliseconds: median and the quartiles."""
    low, middle, high = statistics.quantiles(times, n=4)
    return {"ms": middle * 1e3, "ms_q1": low * 1e3, "ms_q3": high * 1e3, "repetitions": len(times)}


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """slow / fast, round by round: median and quartiles."""
    low, middle, high = statistics.quantiles([s / f for s, f in zip(slow, fast, strict=True)], n=4)
    return {"ratio": middle, "ratio_q1": low, "ratio_q3": high}


def parser(description: str, seconds: float) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, default=seconds, help="measuring time per case")
    parser.add_argument(
        "--threads", type=int, default=None, help="threads of PyTorch (default: the benchmark's own choice)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file and the plot")
    parser.add_argument("--only", default="", help="run only cases whose name contains this")
    return parser


def arguments(description: str, seconds: float) -> argparse.Namespace:
    return parser(description, seconds).parse_args()


def save(name: str, data: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(data, indent=1) + "\n")
    print(f"wrote {path}", file=sys.stderr)
