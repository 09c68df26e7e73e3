"""Which checkpoints may give their weights to another model, and how much of it each gives; pure, without reading."""

import math
import re
from collections.abc import Collection, Mapping

from ckptcache.policy.compatibility import Kind

_DIMENSIONS = re.compile(r"\[([\d, ]*)\]\Z")
_ORDER: Mapping[Kind, int] = {"exact": 0, "other_data": 1, "partial": 2, "incompatible": 3}


def share_given(saved: Mapping[str, str], needed: Mapping[str, str], *, grows: bool = False) -> float:
    """The share, from 0 to 1, of the elements of the needed tensors that a checkpoint gives.

    Args:
        saved: its tensors by name, each written like ``float32[256, 64]``.
        needed: the model's, likewise.
        grows: whether the model makes larger tensors of smaller ones; such a one counts with what it holds.
    """
    total = sum(_elements(_shape(spec)) for spec in needed.values())
    given = sum(_given(_shape(saved[name]), _shape(spec), grows) for name, spec in needed.items() if name in saved)
    return given / total if total else 0.0


def donor_order(kind: Kind, share: float) -> tuple[int, float]:
    """By this a checkpoint stands among those that may give weights: the verdict first, then the share."""
    return _ORDER[kind], -share


def may_give(kind: Kind, share: float, *, renames: bool, grows: bool) -> bool:
    """Whether a checkpoint with this verdict and this share is worth trying.

    A verdict knows of no names that are read as others, and of no tensors that grow.
    """
    return kind != "incompatible" or ((renames or grows) and share > 0)


def _given(saved: Collection[int], needed: Collection[int], grows: bool) -> int:
    if saved == needed:
        return _elements(needed)
    is_smaller = len(saved) == len(needed) and all(a <= b for a, b in zip(saved, needed, strict=True))
    return _elements(saved) if grows and is_smaller else 0


def _elements(shape: Collection[int]) -> int:
    return math.prod(shape)


def _shape(spec: str) -> tuple[int, ...]:
    found = _DIMENSIONS.search(spec)
    return tuple(int(size) for size in found[1].split(",") if size.strip()) if found else ()
