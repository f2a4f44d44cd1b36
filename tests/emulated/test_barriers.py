"""Every barrier is needed: taken out, ThreadSanitizer or a wrong result shows it."""

from __future__ import annotations

import re
import subprocess

import backend
import binaries
import pytest

# barrier -> cases (of csrc/testing/race_check.cpp) in which its absence is a race
BARRIERS = {
    1: "general l2", 2: "general l2", 3: "general", 4: "general", 5: "general", 6: "general affine", 7: "general",
    9: "affine", 10: "bands", 20: "affine", 21: "bands", 22: "affine", 23: "affine", 24: "relu", 25: "affine", 26: "output",
    27: "relu",
}  # fmt: skip
CASES = ("affine", "output", "relu", "bands", "general", "general affine", "general l2", "general affine l2")
RACE = 66  # ThreadSanitizer's exit code


@pytest.fixture(scope="module")
def race_check():
    try:
        binaries.build_emulated("emulated_race_check")
    except RuntimeError as problem:
        if "tsan" in str(problem).lower() and "cannot find" in str(problem):
            pytest.skip("this compiler has no ThreadSanitizer runtime")
        raise

    def run(case: str, schedule: int, removed: int) -> subprocess.CompletedProcess:
        command = [str(binaries.EMULATED / "emulated_race_check"), case, str(schedule), str(removed)]
        done = subprocess.run(command, capture_output=True, text=True, env={"TSAN_OPTIONS": "halt_on_error=1"})
        if "unexpected memory mapping" in done.stderr:
            pytest.skip("ThreadSanitizer does not run on this kernel's address-space layout")
        return done

    return run


def test_every_barrier_is_listed():
    source = "".join(p.read_text() for p in (binaries.ROOT / "csrc" / "cuda").glob("*.h"))
    numbers = [int(n) for n in re.findall(r"\bsync<(\d+)>", source)]
    assert sorted(numbers) == sorted(set(numbers)), "two barriers share a number"
    assert set(numbers) == set(BARRIERS)


@pytest.mark.parametrize("case", CASES)
def test_no_races(race_check, case):
    done = race_check(case, backend.RANDOM, 0)
    assert done.returncode == 0, done.stderr[:2000]


@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_removed_barrier_is_a_race(race_check, barrier):
    done = race_check(BARRIERS[barrier], backend.FORWARD, barrier)
    assert done.returncode == RACE, f"barrier {barrier} is not needed in '{BARRIERS[barrier]}'? {done.stderr[:500]}"
    assert "data race" in done.stderr
