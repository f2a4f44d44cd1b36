"""Steps of 500 generated models beside the definition and beside plain passes; `tally.py` runs more of them."""

from __future__ import annotations

import os

import pytest
from compare import outcome
from draft import draw

FIRST = int(os.environ.get("YOPO_TEST_SEED", "0"))
PER_TEST, TESTS = 25, 20


@pytest.mark.parametrize("part", range(TESTS))
def test_steps_are_right_or_refused_by_name(part: int) -> None:
    wrong = []
    statuses = []
    for seed in range(FIRST + part * PER_TEST, FIRST + (part + 1) * PER_TEST):
        result = outcome(seed)
        statuses.append(result.status)
        if result.status == "differs":
            wrong.append(f"{draw(seed)}\n  step {result.step}: {result.message}")
    assert not wrong, f"{len(wrong)} of {PER_TEST} models:\n" + "\n".join(wrong)
    assert statuses.count("equal") >= PER_TEST // 3, f"the generator compares too little: {statuses}"
