"""compute-sanitizer over one small problem per variant: memory accesses and shared-memory races."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
SCRIPT = Path(__file__).parent / "sanitized.py"


@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer was not found")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer(tool):
    command = [TOOL, "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=yopo", sys.executable, str(SCRIPT)]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # allocations of their own size
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    output = done.stdout + done.stderr
    if "not supported" in output:
        pytest.skip(f"compute-sanitizer does not run here: {output[-300:]}")
    assert done.returncode == 0, output[-4000:]
    assert "sanitized: 12 updates" in output
