"""Which of the CPU kernels' instruction sets this processor has, found without the package."""

from __future__ import annotations

from pathlib import Path

NEEDED = {"avx512": {"avx512f", "avx512vl", "avx512bw", "avx512dq"}, "avx2": {"avx2", "fma"}, "baseline": set()}


def supported(isa: str) -> bool:
    needed = NEEDED[isa]
    if not needed:
        return True
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return needed <= set(flags)
