"""Numbers as people write them: 0.03, 8/255, 1e-3. Nothing is evaluated."""

from __future__ import annotations

import math
import re

_DECIMAL = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_NUMBER = re.compile(rf"\s*({_DECIMAL})\s*(?:/\s*({_DECIMAL})\s*)?")


def parse_number(value: str | int | float, name: str = "value") -> float:
    """A finite float from a number or from text such as "0.5", "8/255", "1e-3".

    Raises:
        ValueError: for anything else, zero denominators and overflow included; the message names `name`.
    """
    error = ValueError(f"{name} must be a number or a fraction such as 8/255; got {value!r}")
    if isinstance(value, bool):
        raise error
    if isinstance(value, int | float):
        number = float(value)
    else:
        match = _NUMBER.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise error
        numerator, denominator = float(match[1]), float(match[2] or 1.0)
        if denominator == 0.0:
            raise error
        number = numerator / denominator
    if not math.isfinite(number):
        raise error
    return number
