"""Numbers, sizes, times and ids as a person reads them."""

import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

_BARS = "▁▂▃▄▅▆▇█"
_STEPS = ((60, 1, "s"), (3600, 60, "min"), (86400, 3600, "h"), (86400 * 60, 86400, "days"))


def number(value: float | None) -> str:
    """Four digits behind the point, or four in all where that would be too many or none; "" for None."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.4g}"


def size(count: int | None) -> str:
    """Bytes in powers of 1000, as the limits are given; "" for None."""
    if count is None:
        return ""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def count(number: int, what: str, plural: str = "") -> str:
    """``1 checkpoint``, ``2 checkpoints``."""
    return f"{number} {what if number == 1 else plural or what + 's'}"


def age(written: str, now: datetime | None = None) -> str:
    """How long ago a record's time was; as it is written where it can't be read."""
    try:
        then = datetime.fromisoformat(written)
    except ValueError:
        return written
    seconds = ((now or datetime.now(UTC)) - (then if then.tzinfo else then.replace(tzinfo=UTC))).total_seconds()
    if seconds < 0:
        return written[:10]
    for end, unit, name in _STEPS:
        if seconds < end:
            return f"{int(seconds // unit)} {name} ago"
    return written[:10]


def settings(values: Mapping[str, Any] | None) -> str:
    """A configuration in one line; "" for none."""
    return ", ".join(f"{key} {value(setting)}" for key, setting in (values or {}).items())


def value(setting: Any) -> str:
    """A value of a configuration."""
    if isinstance(setting, Mapping):
        return f"{{{settings(setting)}}}"
    if isinstance(setting, list):
        return f"[{', '.join(map(value, setting))}]"
    return f"{setting:.6g}" if isinstance(setting, float) else str(setting)


def sparkline(values: Iterable[float], most: int) -> str:
    """A curve in at most `most` characters, the highest value the highest bar; what isn't finite is left out."""
    finite = [v for v in values if math.isfinite(v)]
    if len(finite) < 2:
        return ""
    points = _thinned(finite, most)
    low, high = min(points), max(points)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((v - low) * scale)] for v in points)


def _thinned(values: list[float], most: int) -> list[float]:
    if len(values) <= most:
        return values
    edges = [round(i * len(values) / most) for i in range(most + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


# --- ids -----------------------------------------------------------------------------------------

_LEAST = 16
"""Of an id, so that it reads as one, and stays alone for a while: up to the minute."""


def short_ids(ids: Iterable[str], index_ids: Iterable[str], names: Iterable[str] = ()) -> dict[str, str]:
    """For each of `ids`, a beginning that no other id of the index has, and that is no name.

    All are about as long as the longest needs to be, and end where a part of the id ends.
    """
    every, words = sorted({*index_ids, *ids}), {*names, "best", "latest"}
    needed = max((_common_beginning(a, b) + 1 for a, b in pairwise(every)), default=0)
    shortened = {id: _cut(id, max(needed, _LEAST)) for id in ids}
    return {id: id if short in words else short for id, short in shortened.items()}


def _common_beginning(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _cut(id: str, least: int) -> str:
    end = id.find("_", least)
    return id[:least] if end == -1 else id[:end]
