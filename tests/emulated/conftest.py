from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # backend.py
import backend


def pytest_collection_modifyitems(items):
    if backend.why_missing is None:
        return
    if any(map(shutil.which, ("c++", "g++", "clang++"))) and "YOPO_EMULATED_OPTIONAL" not in os.environ:
        raise pytest.UsageError(f"the emulated CUDA kernels could not be built: {backend.why_missing}")
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.skip(reason=backend.why_missing))


@pytest.fixture(params=list(backend.SCHEDULES))
def schedule(request):
    with backend.machine(request.param):
        yield request.param
