"""The interval of `scripts/paired.py` against its closed form and against simulated pairs of methods."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import numpy as np
import pytest

FUNCTIONS = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "paired.py"))
difference, packed, unpacked = (FUNCTIONS[name] for name in ("difference", "packed", "unpacked"))


def test_outcomes_are_packed_and_unpacked():
    correct = [True, False, False, True, True, True, False]
    assert packed(correct) == "9c"
    assert unpacked("9c", 7) == correct
    assert unpacked("9c", 3) == correct[:3]
    with pytest.raises(ValueError, match=r"images must be in 0\.\.8"):
        unpacked("9c", 9)


def test_one_seed_is_mcnemars_interval():
    first = [True] * 30 + [False] * 10 + [True] * 50 + [False] * 110
    second = (
        [False] * 30 + [True] * 10 + [True] * 50 + [False] * 110
    )  # 30 images for the first, 10 for the second, of 200
    found, half = difference([first], [second])
    assert found == pytest.approx(10.0)
    variance = (30 + 10 - (30 - 10) ** 2 / 200) / 200**2
    assert half == pytest.approx(100 * 1.959964 * math.sqrt(variance * 200 / 199), rel=1e-6)


def test_pairs_count_not_only_accuracies():
    """The same two accuracies lie further apart, in half widths, where the methods fail on the same images."""
    alike = difference([[True] * 60 + [False] * 40], [[True] * 50 + [False] * 50])
    crossed = difference([[True] * 60 + [False] * 40], [[False] * 50 + [True] * 50])
    assert alike[0] == crossed[0]
    assert alike[1] < 0.5 * crossed[1]


def simulated(rng, images, seeds, spread):
    """Two methods of one true mean: an image is correct by its difficulty, its method's taste and its seed's luck."""
    difficulty = rng.normal(0.0, 1.5, images)
    outcomes = []
    for _ in range(2):
        taste = rng.normal(0.0, 0.4, images)
        luck = rng.normal(0.0, spread, (seeds, 1))
        outcomes.append((difficulty + taste + luck + rng.normal(0.0, 0.4, (seeds, images)) > 0.0).tolist())
    return outcomes


@pytest.mark.parametrize(("seeds", "spread"), [(1, 0.0), (3, 0.0), (3, 0.1)])
def test_ninety_five_of_a_hundred_intervals_hold_the_true_difference(seeds, spread):
    rng = np.random.default_rng(7)
    trials = 400
    held = 0
    for _ in range(trials):
        found, half = difference(*simulated(rng, 250, seeds, spread))
        held += abs(found) <= half
    # Four standard errors of a share of 95 % among so many; with more seeds the interval errs on the wide side.
    error = 4 * math.sqrt(0.95 * 0.05 / trials)
    assert 0.95 - error <= held / trials
    assert held / trials <= (0.95 + error if seeds == 1 else 1.0)


def test_luck_of_the_seed_widens_the_interval():
    """Without it, intervals of unlucky seeds would hold the true difference far too rarely."""
    rng = np.random.default_rng(7)
    trials, held = 200, 0
    for _ in range(trials):
        first, second = simulated(rng, 250, 3, 0.3)
        found, _ = difference(first, second)
        by_image = [[sum(column) / 3 for column in zip(*outcomes, strict=True)] for outcomes in (first, second)]
        d = np.subtract(*by_image)
        held += abs(found) <= 196 * d.std(ddof=1) / math.sqrt(len(d))
    assert held / trials < 0.8
    rng, held = np.random.default_rng(7), 0
    for _ in range(trials):
        found, half = difference(*simulated(rng, 250, 3, 0.3))
        held += abs(found) <= half
    assert held / trials > 0.9


def test_what_cannot_be_paired_is_refused():
    for first, second in (([], [[True, True]]), ([[True, True]], [[True] * 3]), ([[True]], [[False]])):
        with pytest.raises(ValueError, match="the same images, at least two"):
            difference(first, second)
