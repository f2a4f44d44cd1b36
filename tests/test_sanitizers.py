"""The CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, on every instruction set."""

from __future__ import annotations

import os
import subprocess

import binaries
import pytest
from instruction_sets import supported


@pytest.mark.parametrize(
    ("sanitizer", "isa"),
    [*(("address,undefined", isa) for isa in ("avx512", "avx2", "baseline")), ("thread", "baseline")],
)
def test_cpu_kernels(sanitizer, isa):
    if not supported(isa):
        pytest.skip(f"this processor has no {isa}")
    try:
        program = binaries.build_sanitized(sanitizer)
    except binaries.NoToolsError as reason:
        pytest.skip(str(reason))
    run = subprocess.run([program], capture_output=True, text=True, env={**os.environ, "YOPO_EXT_ISA": isa})
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    assert f"60 cases agree ({isa})" in run.stdout
