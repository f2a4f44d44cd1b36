"""The CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, for every instruction set at hand."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="needs cmake and a C++ compiler"),
]


# ThreadSanitizer looks at the sharing of work, which no instruction set changes.
@pytest.mark.parametrize(
    ("sanitizer", "isas"), [("address,undefined", ["avx512", "baseline"]), ("thread", ["baseline"])]
)
def test_cpu_kernels(sanitizer, isas):
    build = ROOT / "build" / f"sanitize-{sanitizer.replace(',', '-')}"
    subprocess.run(
        ["cmake", "-S", ROOT, "-B", build, "-DCMAKE_BUILD_TYPE=Release", "-DYOPO_CUDA=OFF",
         f"-DYOPO_CPU_ISAS={';'.join(isas)}",
         f"-DYOPO_SANITIZE={sanitizer}", f"-DYOPO_TORCH_DIR={torch.__path__[0]}"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    subprocess.run(
        ["cmake", "--build", build, "--target", "cpu_sanitized", "--parallel", "2"],
        check=True,
        capture_output=True,
        text=True,
    )
    for isa in isas:
        run = subprocess.run(
            [build / "cpu_sanitized"], capture_output=True, text=True, env={**os.environ, "YOPO_EXT_ISA": isa}
        )
        assert run.returncode == 0, f"{isa}:\n{run.stdout}\n{run.stderr}"
        assert "60 cases agree" in run.stdout
