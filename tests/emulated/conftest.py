from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # backend.py
import backend


def pytest_collection_modifyitems(items):
    if backend.why_missing is None:
        return
    if "failed:" in backend.why_missing:  # the tools are there, so this is a defect and no reason to skip
        raise pytest.UsageError(f"the emulated CUDA kernels could not be built: {backend.why_missing}")
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.skip(reason=backend.why_missing))


@pytest.fixture(params=list(backend.SCHEDULES))
def schedule(request):
    with backend.machine(request.param):
        yield request.param
