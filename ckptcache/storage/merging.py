"""Two indexes that came of one, made one again: nothing that either side changed is lost."""

from typing import Any, TypeVar

from ckptcache.storage.index import BY_CONTENT, PARTS, Index, content_of

T = TypeVar("T")
_ABSENT: Any = object()
"""Not None, which JSON can hold."""


def merge(base: Index, ours: Index, theirs: Index) -> Index:
    """Three-way, by record: the union, the higher revision of what both changed, removals against `base`.

    Each entry takes the greater of both sides in the order: as in the base, removed, changed (by
    revision, then by content). That is a join, so the merge is associative, commutative and
    idempotent, and nothing that one side changed is lost to a removal on the other. Of what is named
    by its content, the configurations and fingerprints, it is always the union.
    """
    # What nothing names anymore isn't written, so that nobody ever removes a configuration which the other side needs.
    bases = {part: {} if part in BY_CONTENT else getattr(base, part) for part in (*PARTS, "unknown")}
    return Index(**{p: _merge_part(before, getattr(ours, p), getattr(theirs, p)) for p, before in bases.items()})


def _merge_part(base: dict[str, T], ours: dict[str, T], theirs: dict[str, T]) -> dict[str, T]:
    merged = {}
    for key in {**base, **ours, **theirs}:
        before = base.get(key, _ABSENT)
        left, right = ours.get(key, _ABSENT), theirs.get(key, _ABSENT)
        winner = left
        # Records are immutable, so what nobody touched is the same object, and needn't be compared.
        if left is not right:
            winner = max((left, right), key=lambda entry: _precedence(before, entry))
        if winner is not _ABSENT:
            merged[key] = winner
    return merged


def _precedence(before: Any, entry: Any) -> tuple[int, int, bytes]:
    if entry is _ABSENT:
        return (1 if before is not _ABSENT else -1), 0, b""
    if entry is before or (before is not _ABSENT and content_of(entry) == content_of(before)):
        return 0, 0, b""
    return 2, getattr(entry, "revision", 0), content_of(entry)
