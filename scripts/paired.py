"""How far two methods' accuracies on the same images lie apart, with a 95 % interval over images and seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from statistics import NormalDist

Outcomes = Sequence[Sequence[bool]]  # of one method: by seed, then by image, whether the image is classified correctly

CONFIDENCE = 0.95


def packed(correct: Sequence[bool]) -> str:
    """The outcomes of one model as hexadecimal digits, four images a digit; the last digit is filled up with zeros."""
    bits = "".join("1" if value else "0" for value in correct)
    return "".join(f"{int(bits[at : at + 4].ljust(4, '0'), 2):x}" for at in range(0, len(bits), 4))


def unpacked(text: str, images: int) -> list[bool]:
    """The outcomes of the first `images` images; inverse of `packed`."""
    if not 0 <= images <= 4 * len(text):
        raise ValueError(f"images must be in 0..{4 * len(text)} for {len(text)} digits; got {images}")
    return [digit == "1" for character in text for digit in f"{int(character, 16):04b}"][:images]


def difference(first: Outcomes, second: Outcomes) -> tuple[float, float]:
    """Accuracy of `first` minus that of `second`, and the half width of its 95 % interval, in percentage points.

    With d_i the difference on image i of the two means over seeds, the variance of the mean of d is var(d) / images. A method
    with S > 1 seeds adds the variance of its accuracy over seeds / S, and the interval is Student's, its degrees of freedom by
    Welch and Satterthwaite. A method with one seed adds nothing: the interval is then about that model, not about the method.

    Raises:
        ValueError: no seeds, fewer than two images, or unequal numbers of images.
    """
    images = {len(outcomes) for outcomes in (*first, *second)}
    if not first or not second or len(images) != 1 or min(images) < 2:
        raise ValueError(
            f"both methods need the same images, at least two, of at least one seed each; got {images} images"
        )
    count = images.pop()
    means = [[statistics.fmean(column) for column in zip(*outcomes, strict=True)] for outcomes in (first, second)]
    d = [a - b for a, b in zip(*means, strict=True)]
    parts = [(statistics.variance(d) / count, count - 1)]  # variance and its degrees of freedom
    for outcomes in (first, second):
        if len(outcomes) > 1:
            accuracies = [statistics.fmean(outcome) for outcome in outcomes]
            parts.append((statistics.variance(accuracies) / len(accuracies), len(accuracies) - 1))
    total = sum(variance for variance, _ in parts)
    quantile = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    if len(parts) > 1 and total > 0.0:
        from scipy.stats import t

        quantile = float(t.ppf(0.5 + CONFIDENCE / 2, total**2 / sum(v**2 / freedom for v, freedom in parts)))
    return 100.0 * statistics.fmean(d), 100.0 * quantile * math.sqrt(total)
