from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # policy.py, cases.py
import binaries

# Inductor's cache does not ask which instruction set PyTorch was told to use, and what it compiled for another one crashes.
_ISA = "-".join(os.environ.get(name, "native") for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(binaries.ROOT / "build" / "inductor" / _ISA))

import torch  # noqa: E402  (reads the setting)

# Tensors here are tiny; waiting threads would cost more than they do.
torch.set_num_threads(int(os.environ.get("YOPO_TEST_THREADS", "1")))
EMULATED = Path(__file__).parent / "emulated"


def pytest_configure(config: pytest.Config) -> None:
    """Build the emulated kernels once, before any process imports them; here a failure shows its cause."""
    paths = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    asked = any(path == EMULATED or path in EMULATED.parents or EMULATED in path.parents for path in paths)
    if hasattr(config, "workerinput") or not asked:
        return
    try:
        binaries.build_emulated()
    except binaries.NoToolsError:
        pass  # tests/emulated/conftest.py skips its tests and says why
    except RuntimeError as problem:
        raise pytest.UsageError(f"the emulated CUDA kernels could not be built: {problem}") from None


def pytest_report_header() -> list[str]:
    from yopo_ext.kernels import ops

    return [f"torch {torch.__version__}, CPU kernels: {ops.native_status.why_not_cpu or 'native'}", *_shuffled()]


def _shuffled() -> list[str]:
    seed = os.environ.get("YOPO_TEST_SHUFFLE")
    return [f"random order: YOPO_TEST_SHUFFLE={seed}"] if seed else []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Random order, the same in every process, file by file: fixtures of a module are made once."""
    seed = os.environ.get("YOPO_TEST_SHUFFLE")
    if not seed:
        return
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    generator, groups = random.Random(seed), list(files.values())
    generator.shuffle(groups)
    for group in groups:
        generator.shuffle(group)
    items[:] = [item for group in groups for item in group]
