"""Who descends from whom, and what a rollback marks: pure answers over the records of checkpoints and sessions."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ckptcache.metadata import CheckpointMetadata, SessionRecord

Marks = Mapping[str, str | None]
"""Id of a checkpoint or session to the checkpoint that was rolled back to past it; None for an unmarked one."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """The tree, or where somebody gave several parents the graph, that checkpoints form.

    A parent is one that the record names. Where the records of those are gone, it is the checkpoint that the same
    session saved before, and for its first one that which the session resumed from.
    """

    parents: Mapping[str, tuple[str, ...]]
    """Of each checkpoint those parents whose records are there."""
    children: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def ancestors(self, *ids: str) -> set[str]:
        """All that some checkpoints came from, themselves left out."""
        return _reach(ids, self.parents)

    def descendants(self, *ids: str) -> set[str]:
        """All that came from some checkpoints, themselves left out."""
        return _reach(ids, self.children)


def lineage(checkpoints: Mapping[str, CheckpointMetadata], sessions: Mapping[str, SessionRecord]) -> Lineage:
    """How the checkpoints hang together; takes time in proportion to their number."""
    latest: dict[str, str] = {}
    parents: dict[str, tuple[str, ...]] = {}
    for record in sorted(checkpoints.values(), key=lambda r: r.order):
        known = tuple(dict.fromkeys(p for p in record.parents if p in checkpoints and p != record.id))
        parents[record.id] = known or _by_session(record, checkpoints, sessions, latest)
        if record.session is not None:
            latest[record.session] = record.id
    return Lineage(parents, _turned_round(parents))


def _by_session(
    record: CheckpointMetadata,
    checkpoints: Mapping[str, CheckpointMetadata],
    sessions: Mapping[str, SessionRecord],
    latest: Mapping[str, str],
) -> tuple[str, ...]:
    if record.session is None:
        return ()
    session = sessions.get(record.session)
    before = latest.get(record.session) or (session.parent if session is not None else None)
    return (before,) if before is not None and before in checkpoints and before != record.id else ()


def _turned_round(parents: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    children: defaultdict[str, list[str]] = defaultdict(list)
    for id, above in parents.items():
        for parent in above:
            children[parent].append(id)
    return {id: tuple(below) for id, below in children.items()}


def _reach(starts: Collection[str], steps: Mapping[str, tuple[str, ...]]) -> set[str]:
    """What is reached from `starts` by any number of steps; an index from elsewhere may hold circles."""
    found, waiting = set(starts), list(starts)
    while waiting:
        fresh = [id for id in steps.get(waiting.pop(), ()) if id not in found]
        found.update(fresh)
        waiting += fresh
    return found.difference(starts)


# --- marks ---------------------------------------------------------------------------------------


def marks_of(records: Iterable[CheckpointMetadata | SessionRecord]) -> dict[str, str | None]:
    """The marks as the records have them."""
    return {record.id: record.rolled_back for record in records}


def marks_without(
    checkpoints: Mapping[str, CheckpointMetadata],
    sessions: Mapping[str, SessionRecord],
    target: str | None,
    before: Marks,
) -> dict[str, str | None]:
    """All marks as they were before a rollback to `target`.

    Args:
        before: what `to_put_back` gave then. What its sessions have saved since is marked as they were.
    """
    marks = marks_of([*checkpoints.values(), *sessions.values()])
    marks |= {id: mark for id, mark in before.items() if id in marks}
    for record in checkpoints.values():
        session = record.session or ""
        if record.id not in before and record.rolled_back == target and session in before:
            marks[record.id] = before[session]
    return marks


def marks_after(
    checkpoints: Mapping[str, CheckpointMetadata],
    sessions: Mapping[str, SessionRecord],
    target: str,
    marks: Marks,
) -> dict[str, str | None]:
    """`marks` as a rollback to `target` makes them.

    Marked is what descends from it, and the sessions that save more of that: those that resumed from any of it, and
    its own as long as that hasn't ended. What is marked already keeps its mark; the target and what it came from lose
    theirs.
    """
    tree = lineage(checkpoints, sessions)
    kept = {target, *tree.ancestors(target)}
    left = tree.descendants(target) - kept
    after = {**marks, **dict.fromkeys(kept)}
    after |= {id: marks[id] or target for id in left}
    own = {checkpoints[id].session for id in kept}
    for session in sessions.values():
        if _goes_on_from(session, target, left, checkpoints[target].session):
            after[session.id] = marks[session.id] or target
        elif session.id in own:
            after[session.id] = None
    return after


def to_put_back(marks: Marks, after: Marks, target: str) -> dict[str, str | None]:
    """What undoing a rollback to `target` needs to know: the marks that it changes as they are, and those like its own.

    The latter, so that what a session saves later can be told from what it saved before.
    """
    return {id: mark for id, mark in marks.items() if mark != after[id] or mark == target}


def _goes_on_from(session: SessionRecord, target: str, left: Collection[str], own: str | None) -> bool:
    if session.id == own:
        return session.ended_at is None
    return session.parent == target or session.parent in left


# --- what is saved afterwards --------------------------------------------------------------------


def follows(record: CheckpointMetadata, target: str, checkpoints: Mapping[str, CheckpointMetadata]) -> bool:
    """Whether a checkpoint descends from `target` by a way that nothing was rolled back on, itself included."""
    seen, waiting = {record.id}, [record]
    while waiting:
        one = waiting.pop()
        if one.rolled_back is not None:
            continue
        if target in one.parents:
            return True
        fresh = [p for p in one.parents if p in checkpoints and p not in seen]
        seen.update(fresh)
        waiting += [checkpoints[p] for p in fresh]
    return False
