"""Validation losses over all sessions, as far as they can be drawn and compared."""

import math
from collections.abc import Iterable
from itertools import accumulate

from ckptcache.metadata import SessionRecord
from ckptcache.progress.views import RunView

Points = list[tuple[int, float]]
"""Pairs of iteration and value."""
_MOST = 1e12
"""A value beyond it has diverged in all but name, and would flatten every other curve to a line."""


def points(session: SessionRecord, quantity: str = "val_loss") -> Points:
    """What can be drawn of a curve, by iteration: NaN, infinite and absurd values are left out."""
    found = [(i, float(v)) for i, v in session.curves.get(quantity, ()) if math.isfinite(v) and abs(v) < _MOST]
    return sorted(found, key=lambda point: point[0])


def drawable(view: RunView) -> list[tuple[SessionRecord, Points]]:
    """The sessions that have a validation loss to draw, with it, the newest first."""
    return [(s, found) for s in view.sessions if (found := points(s))]


def comparable(view: RunView) -> frozenset[str]:
    """Ids of the sessions whose losses can be compared with the newest's: same architecture, same validation data.

    A session of which nothing is known counts as comparable.
    """
    groups = view.session_groups()
    known = [groups[s.id] for s in view.sessions if groups[s.id] is not None]
    return frozenset(id for id, group in groups.items() if group is None or group == known[0])


def lowest(points: Iterable[tuple[int, float]]) -> Points:
    """For each iteration at which a loss fell below all those at lower ones, that loss."""
    falling: Points = []
    for iteration, value in sorted(points):
        if not falling or value < falling[-1][1]:
            falling.append((iteration, value))
    return falling


def running_minimum(values: Iterable[float]) -> list[float]:
    """For each value, the lowest up to it."""
    return list(accumulate(values, min))
