"""Curves of a session: appended to in the training loop, thinned so that they never grow without bound."""

from collections.abc import Mapping
from typing import Any

from ckptcache.errors import InvalidValue
from ckptcache.metadata import MAX_CURVE_POINTS, thin
from ckptcache.values import as_float

_HELD = 4 * MAX_CURVE_POINTS


class Curves:
    """Values by name and iteration. Appending costs about a microsecond and never waits for a device."""

    def __init__(self) -> None:
        self._points: dict[str, list[tuple[int, Any]]] = {}
        self._stride: dict[str, int] = {}
        self._seen: dict[str, int] = {}
        self._latest: dict[str, tuple[int, Any]] = {}

    def add(self, iteration: int, values: Mapping[str, Any]) -> None:
        """Append one value per name: a number, or a tensor with one element; one on a GPU is read later.

        Raises InvalidValue for anything else, and appends nothing.
        """
        for name, held in [(name, _held(value, name)) for name, value in values.items()]:
            self._latest[name] = point = (iteration, held)
            count = self._seen.get(name, 0)
            self._seen[name] = count + 1
            if count % self._stride.setdefault(name, 1) == 0:
                points = self._points.setdefault(name, [])
                points.append(point)
                if len(points) >= _HELD:
                    self._points[name] = points[::2]
                    self._stride[name] *= 2

    def latest(self, name: str) -> float | None:
        """The last value of a name, or None."""
        return as_float(self._latest[name][1], name) if name in self._latest else None

    def thinned(self) -> dict[str, tuple[tuple[int, float], ...]]:
        """At most `MAX_CURVE_POINTS` points of each curve, the first and the last among them."""
        curves = {}
        for name, points in self._points.items():
            last = self._latest[name]
            whole = points if points[-1] is last else [*points, last]
            # Six digits are more than any picture shows, and a float32 written out in full has seventeen.
            curves[name] = tuple((i, float(f"{as_float(v, name):.6g}")) for i, v in thin(whole))
        return curves


def _held(value: Any, name: str) -> Any:
    """What stays as it is now: a number, or a copy on the device, which a buffer that is written again would not be."""
    device = getattr(value, "device", None)
    if getattr(device, "type", "cpu") == "cpu":
        return as_float(value, name)
    if value.numel() != 1:
        raise InvalidValue(name=name, value=f"a tensor of shape {list(value.shape)}", reason="it is not a number")
    return value.detach().clone()
