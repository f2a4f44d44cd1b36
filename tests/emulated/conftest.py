from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # backend.py
import backend


def pytest_collection_modifyitems(items):
    if backend.native is not None:
        return
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.skip(reason="cmake, ninja or a C++ compiler was not found"))


@pytest.fixture(params=list(backend.SCHEDULES))
def schedule(request):
    with backend.machine(request.param):
        yield request.param
