"""Curves in plain characters, on one scale, so that they can be told apart by eye. Pure."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

Points = Sequence[tuple[int, float]]
"""Pairs of iteration and value, by iteration; all values finite."""
BARS = "▁▂▃▄▅▆▇█"
ASCII = "_.:-=+*#"


def sketch(curves: Sequence[Points], columns: int, levels: str = BARS) -> list[str]:
    """A line of `columns` characters for each curve: the iterations of all from left to right, low values low.

    A curve is blank where it has no values; between two of them it is a straight line.
    """
    points = [point for curve in curves for point in curve]
    if not points:
        return ["" for _ in curves]
    first, last = min(i for i, _ in points), max(i for i, _ in points)
    low, high = min(v for _, v in points), max(v for _, v in points)
    edges = [first + (last + 1 - first) * column / columns for column in range(columns + 1)]
    scale = (len(levels) - 1) / (high - low) if high > low else 0.0
    rows = [[_within(curve, a, b) for a, b in pairwise(edges)] for curve in curves]
    return ["".join(" " if v is None else levels[round((v - low) * scale)] for v in row).rstrip() for row in rows]


def _within(curve: Points, start: float, end: float) -> float | None:
    """The mean of the values from `start` to before `end`; without any, the line between those around."""
    a, b = (bisect_left(curve, edge, key=lambda point: point[0]) for edge in (start, end))
    if a < b:
        return sum(value for _, value in curve[a:b]) / (b - a)
    if a == 0 or a == len(curve):
        return None
    (i, low), (j, high) = curve[a - 1], curve[a]
    return low + (high - low) * ((start + end) / 2 - i) / (j - i)
