from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # policy.py, cases.py
import binaries

# Inductor's cache does not ask which instruction set PyTorch was told to use, and what it compiled for another one crashes.
_ISA = "-".join(os.environ.get(name, "native") for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(binaries.ROOT / "build" / "inductor" / _ISA))

import torch

torch.set_num_threads(1)  # tensors here are tiny; waiting threads would cost more than they do
EMULATED = Path(__file__).parent / "emulated"


def pytest_configure(config: pytest.Config) -> None:
    """Build the emulated kernels once, before any process imports them; here a failure shows its cause."""
    paths = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    asked = any(path == EMULATED or path in EMULATED.parents or EMULATED in path.parents for path in paths)
    if hasattr(config, "workerinput") or not asked:
        return
    try:
        binaries.build_emulated()
    except binaries.NoTools:
        pass  # tests/emulated/conftest.py skips its tests and says why
    except RuntimeError as problem:
        raise pytest.UsageError(f"the emulated CUDA kernels could not be built: {problem}") from None
