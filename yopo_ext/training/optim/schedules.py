"""Learning rate as a function of progress through the run, so that a run may be measured in epochs or in seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

SCHEDULES: dict[str, str] = {
    "triangular": "0 to the full rate at mid-run and back to 0: few epochs suffice",
    "cosine": "half a cosine from the full rate to 0",
    "one-cycle": "half a cosine from 1/25 of the rate to it in 0.3 of the run, then one to 0",
    "piecewise": "x0.1 at each milestone: what the older papers used",
    "constant": "for debugging",
}


def make_schedule(name: str, milestones: Sequence[float] = (), warmup: float = 0.0) -> Callable[[float], float]:
    """The factor on the learning rate at progress 0..1.

    Args:
        name: one of SCHEDULES.
        milestones: for "piecewise", increasing fractions of the run in (0, 1).
        warmup: fraction of the run, in [0, 1), over which the factor also rises linearly from 0.

    Raises:
        ValueError: for anything else.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {name!r}")
    if not 0.0 <= warmup < 1.0:
        raise ValueError(f"warmup must be a fraction of the run in [0, 1); got {warmup}")
    if (name == "piecewise") != bool(milestones):
        raise ValueError(f"milestones must be given for schedule 'piecewise', and for no other; got {list(milestones)}")
    if list(milestones) != sorted(set(milestones)) or any(not 0.0 < m < 1.0 for m in milestones):
        raise ValueError(f"milestones must be increasing fractions of the run in (0, 1); got {list(milestones)}")

    def factor(progress: float) -> float:
        if name == "triangular":
            shape = 1.0 - abs(2.0 * progress - 1.0)
        elif name == "cosine":
            shape = 0.5 * (1.0 + math.cos(math.pi * progress))
        elif name == "one-cycle":
            rising = progress < 0.3
            share = progress / 0.3 if rising else (1.0 - progress) / 0.7  # of the way up
            lowest = 0.04 if rising else 0.0
            shape = lowest + (1.0 - lowest) * 0.5 * (1.0 - math.cos(math.pi * share))
        elif name == "piecewise":
            shape = 0.1 ** sum(progress >= milestone for milestone in milestones)
        else:
            shape = 1.0
        return shape * min(1.0, progress / warmup) if warmup else shape

    return factor
