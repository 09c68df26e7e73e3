"""A run's record wherever it is: in the work tree, in a commit, or broken, with what can be saved of it."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

from ckptcache.errors import IndexDamaged
from ckptcache.progress.git import Repository
from ckptcache.storage.index import Index, parse
from ckptcache.storage.merging import merge

_MARKER = re.compile(rb"^(<<<<<<<|\|\|\|\|\|\|\||=======|>>>>>>>)(?: .*)?$")


@dataclass(frozen=True, slots=True)
class Record:
    """An index that was read, and how.

    Attributes:
        mended: how it was read although it is broken; empty where it isn't.
        is_whole: whether what it lacks is lacking on purpose: False for one that was mended, or isn't there.
    """

    index: Index
    mended: str = ""
    is_whole: bool = True


Versions = Callable[[], Iterable[tuple[str, bytes]]]
"""Looks for other versions of a record when they are needed; each comes with what to call it."""


def read(data: bytes, path: Path, older: Versions, sides: Versions = tuple) -> Record:
    """The index in `data`; of a broken one, both sides of a conflict, or else the newest of `older` that is whole.

    Args:
        older: versions from the history, the newest first.
        sides: the versions between which git has left a conflict, if it still knows them.

    Raises:
        IndexDamaged: there is no way to read any of it.
        IndexTooNew: a later version wrote it.
    """
    try:
        return Record(parse(data, path))
    except IndexDamaged as error:
        known = [index for _, side in sides() if (index := _or_none(side, path)) is not None]
        known = known or [index for side in conflict_sides(data) if (index := _or_none(side, path)) is not None]
        if len(known) > 1:
            return Record(merged(*known), "it held a conflict of git's, and both sides were taken up", is_whole=False)
        return from_history(older(), path, error, known)


def conflict_sides(data: bytes) -> list[bytes]:
    """The two files between which git has left a conflict, the side of HEAD first; empty where there is none."""
    lines = data.splitlines(keepends=True)
    if not any(line.startswith(b"<<<<<<<") for line in lines):
        return []
    return [b"".join(_side(lines, wanted)) for wanted in (b"<<<<<<<", b"=======")]


def _side(lines: Iterable[bytes], wanted: bytes) -> Iterator[bytes]:
    part = b""
    for line in lines:
        marker = _MARKER.match(line.rstrip(b"\r\n"))
        if marker is None:
            if part in (b"", wanted):
                yield line
        else:
            part = b"" if marker[1] == b">>>>>>>" else marker[1]


def from_history(
    older: Iterable[tuple[str, bytes]], path: Path, error: IndexDamaged, known: Sequence[Index] = ()
) -> Record:
    """The newest of `older` that is whole, and what else is `known`, in the place of what `error` tells of.

    Raises `error` if there is neither.
    """
    also = ["the side of git's conflict that is whole"] if known else []
    for name, data in older:
        index = _or_none(data, path)
        if index is not None:
            known, also = [*known, index], [*also, f"that of {name}"]
            break
    if not known:
        raise error
    reason = error.fields["reason"]
    return Record(merged(*known), f"it can't be read ({reason}); taken instead: {' and '.join(also)}", is_whole=False)


def _or_none(data: bytes, path: Path) -> Index | None:
    try:
        return parse(data, path)
    except IndexDamaged:
        return None


def merged(*indexes: Index) -> Index:
    """The union of what several records hold; of what several changed, the highest revision."""
    found = Index()
    for index in indexes:
        found = merge(Index(), found, index)
    return found


def told_apart(base: Index, ours: Record, theirs: Record, *, removed: Set[str], kept: Collection[str]) -> Index:
    """`base` as a merge needs it: without what a side lacks and did not remove on purpose.

    The record here may be older than the base, if it came out of a cache, or newly begun, after its folder was lost.
    What git lacks was removed by somebody's commit, but a checkpoint whose file is here stays all the same.

    Args:
        removed: ids of what was removed here on purpose.
        kept: ids of the checkpoints whose files are here.
    """
    found = base.copy()
    for part, held in (("checkpoints", kept), ("sessions", ())):
        here, there = getattr(ours.index, part), getattr(theirs.index, part)
        # Also what git has gained since the base, if it was brought here and removed.
        before = {id: there[id] for id in removed & there.keys()} | getattr(base, part)
        is_known = {id for id in before if id in there or (theirs.is_whole and id not in held)}
        setattr(found, part, {id: before[id] for id in is_known if id in here or id in removed})
    if not (ours.is_whole and theirs.is_whole and base.sessions.keys() <= ours.index.sessions.keys() | removed):
        found.names = {n: p for n, p in base.names.items() if n in ours.index.names and n in theirs.index.names}
    return found


def vouched(index: Index, trusted: Index) -> tuple[Index, list[str]]:
    """`index` with the sizes and digests that `trusted` has, and the ids of those where they differed.

    A checkpoint's file never changes, and so neither does its digest: one that does was edited by hand.
    """
    strange = []
    kept = index.copy()
    for id, known in trusted.checkpoints.items():
        found = kept.checkpoints.get(id)
        if found is not None and known.digest is not None and (found.digest, found.size) != (known.digest, known.size):
            kept.checkpoints[id] = replace(found, digest=known.digest, size=known.size)
            strange.append(id)
    return kept, strange


# --- in git --------------------------------------------------------------------------------------


def in_commit(repository: Repository, commit: str | None, path: Path) -> Record:
    """The record `path` in `commit`; an empty one where there is none. Raises IndexDamaged or IndexTooNew."""
    if commit is None:
        return Record(Index())
    name = repository.relative(path)
    data = repository.read(commit, name)
    if data is None:
        return Record(Index())
    return read(data, path, lambda: versions(repository, commit, name))


def record_at(repository: Repository, commit: str | None, path: Path) -> tuple[Record, str]:
    """`in_commit`, and what is to be said of it; one beyond mending counts as empty, and stays in the history."""
    where = f"{path.name} in commit {(commit or '')[:8]}"
    try:
        record = in_commit(repository, commit, path)
    except IndexDamaged as error:
        return Record(Index(), is_whole=False), f"{where} is left out: {error}"
    return record, f"{where} was mended: {record.mended}" if record.mended else ""


def versions(repository: Repository, commit: str | None, name: str) -> Iterator[tuple[str, bytes]]:
    """Every version of the file `name` before `commit`, the newest first."""
    for older in repository.history(commit, name) if commit else ():
        data = repository.read(older, name)
        if data is not None:
            yield f"commit {older[:8]}", data


def base_of(repository: Repository, tip: str | None, path: Path) -> Index:
    """The record from which this clone and `tip` both went on; empty, so that nothing counts as removed, if unknown."""
    head = repository.head()
    base = repository.merge_base(head, tip) if head and tip else None
    try:
        return in_commit(repository, base, path).index
    except IndexDamaged:
        return Index()
