"""The comparison's plot: robust accuracy against training time, every method's name beside its point."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yopo_ext.training.comparison.report import Row

if TYPE_CHECKING:
    from matplotlib.transforms import Bbox

DISTANCES = tuple(range(10, 300, 12))  # of a name from its point, in points
MARKER = 5.0  # radius around a point that names keep clear, in points


def save_plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw each method's mean worst-case accuracy (bars: standard deviation over seeds) at its mean training time."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure = Figure(figsize=(7.5, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    seconds = [statistics.fmean(row.seconds) for row in rows]
    accuracy = [statistics.fmean(row.worst) for row in rows]
    for number, row in enumerate(rows):
        axes.errorbar(
            seconds[number],
            accuracy[number],
            yerr=statistics.stdev(row.worst) if len(row.worst) > 1 else None,
            marker="o",
            markersize=7,
            capsize=3,
            linestyle="",
            color=f"C{number % 10}",
        )
    axes.set_xscale("log")
    axes.set_xlim(min(seconds) / 1.08, max(seconds) * 1.08)
    span = max(max(accuracy) - min(accuracy), 5.0)
    axes.set_ylim(min(accuracy) - 0.1 * span, max(accuracy) + 0.15 * span)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(ScalarFormatter() if max(seconds) < 10.0 * min(seconds) else NullFormatter())
    axes.set_xlabel("training time, seconds (without evaluation)")
    axes.set_ylabel(f"correct under all of {', '.join(attack.upper() for attack in rows[0].robust)}, %")
    axes.set_title(
        f"{title}, {rows[0].images} test images, mean of {len(rows[0].seeds)} seed{'s'[: len(rows[0].seeds) - 1]}"
    )
    axes.tick_params(which="both", length=3.5)
    axes.grid(alpha=0.3, which="both")
    _name(axes, [row.method for row in rows], list(zip(seconds, accuracy, strict=True)))
    figure.savefig(path)


def _name(axes: Any, names: Sequence[str], points: Sequence[tuple[float, float]]) -> None:
    """Write each name as near to its point as it can be without touching another name, a point, a line or the frame."""
    from matplotlib.transforms import Bbox

    figure = axes.figure
    figure.draw_without_rendering()  # the layout, which positions depend on
    scale = figure.dpi / 72.0
    centres = axes.transData.transform(points)
    taken: list[Bbox] = [Bbox.from_extents(*(c - MARKER * scale), *(c + MARKER * scale)) for c in centres]
    frame = axes.bbox
    for number in sorted(range(len(names)), key=lambda n: points[n]):
        style = {"fontsize": 8, "color": f"C{number % 10}"}
        probe = axes.text(*points[number], names[number], **style)
        size = probe.get_window_extent()
        probe.remove()
        best: tuple[int, tuple[float, float, str], list[Bbox]] | None = None
        for place in _places():
            dx, dy, align = place
            x, y = centres[number][0] + dx * scale, centres[number][1] + dy * scale
            left = x - {"left": 0.0, "center": 0.5, "right": 1.0}[align] * size.width
            box = Bbox.from_bounds(left, y - size.height / 2, size.width, size.height)
            line = _along(centres[number], (x, y)) if dy else []
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
            hidden = sum(box.overlaps(other) for other in taken)
            crossed = sum(other.overlaps(spot) for other in taken[len(points) :] for spot in line)
            faults = 1000 * outside + 100 * hidden + crossed
            if best is None or faults < best[0]:
                best = (faults, place, [box, *line])
            if faults == 0:  # the places come nearest first
                break
        assert best is not None
        _, (dx, dy, align), boxes = best
        line_style = {
            "arrowstyle": "-",
            "color": style["color"],
            "alpha": 0.6,
            "linewidth": 0.8,
            "shrinkA": 0,
            "shrinkB": 4,
        }
        axes.annotate(
            names[number],
            points[number],
            xytext=(dx, dy),
            textcoords="offset points",
            ha=align,
            va="center",
            arrowprops=line_style if dy else None,
            **style,
        )
        taken += boxes


def _places() -> Iterator[tuple[float, float, str]]:
    """(dx, dy, alignment) of a name relative to its point, in points."""
    for distance in DISTANCES:
        yield from ((distance, 0.0, "left"), (-distance, 0.0, "right")) if distance == DISTANCES[0] else ()
        for dy in (-distance, distance):
            yield from ((0.0, float(dy), "center"), (8.0, float(dy), "left"), (-8.0, float(dy), "right"))


def _along(start: Any, end: Any, steps: int = 12) -> list[Bbox]:
    """Small boxes on the line between two places on the canvas, the start's surroundings left out."""
    from matplotlib.transforms import Bbox

    spots = []
    for step in range(4, steps + 1):
        x, y = (a + (b - a) * step / steps for a, b in zip(start, end, strict=True))
        spots.append(Bbox.from_extents(x - 1, y - 1, x + 1, y + 1))
    return spots
