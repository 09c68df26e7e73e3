"""Rolling back: the next session goes on from a checkpoint of the user's choice; what came after it stays, marked.

The index holds all of it: the mark `rolled_back` on each record that is left behind, and the name `rollback`, which
points to the checkpoint for as long as nothing that descends from it was saved.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptcache import resume
from ckptcache.catalog import Catalog
from ckptcache.errors import NoRollback
from ckptcache.ledger import Change, Ledger
from ckptcache.metadata import ROLLBACK, CheckpointMetadata, NamePointer
from ckptcache.policy import branches
from ckptcache.storage.index import Index


@dataclass(frozen=True, slots=True)
class Rollback:
    """What a rollback does, or what taking one back does.

    Attributes:
        checkpoint: the one that was rolled back to.
        undone: whether it was taken back.
        marked: ids of the checkpoints that are marked by it and weren't, oldest first.
        unmarked: ids of those that were marked and no longer are.
        replaced: the checkpoint of the rollback that was in force and that nothing had followed; it counts no more.
        live: ids of the sessions that run and go on with what is left behind; what they save is marked too.
    """

    checkpoint: CheckpointMetadata
    undone: bool
    marked: tuple[str, ...]
    unmarked: tuple[str, ...]
    replaced: str | None = None
    live: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As `ckptcache rollback --json` prints it, beside the checkpoint."""
        plain = dataclasses.asdict(dataclasses.replace(self, checkpoint=CheckpointMetadata(id=self.checkpoint.id)))
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items() if k != "checkpoint"}


# --- rolling back --------------------------------------------------------------------------------


def roll_back(ledger: Ledger, wanted: str, *, dry_run: bool) -> Rollback:
    """Roll back to a checkpoint, in one commit; see `TrainingCache.rollback`."""
    seen = ledger.view()
    found = _planned(seen, resume.find_available(seen, wanted), ledger)[0]  # refused before a lock is made for it
    if dry_run:
        return found
    with ledger.change() as change:
        catalog = change.catalog()
        found, marks, pointer = _planned(catalog, resume.find_available(catalog, wanted), ledger)
        _mark(change, marks)
        change.index.names[ROLLBACK] = pointer
        change.is_dirty = True
    return found


def undo(ledger: Ledger, *, dry_run: bool) -> Rollback:
    """Take back the rollback that is in force; raises NoRollback."""
    found = _undone(ledger.view())[0]
    if dry_run:
        return found
    with ledger.change() as change:
        found, marks = _undone(change.catalog())
        _mark(change, marks)
        del change.index.names[ROLLBACK]
        change.is_dirty = True
    return found


def _planned(
    catalog: Catalog, target: CheckpointMetadata, ledger: Ledger
) -> tuple[Rollback, dict[str, str | None], NamePointer]:
    index, held = catalog.index, catalog.index.names.get(ROLLBACK)
    before = _without(index, held)
    after = branches.marks_after(index.checkpoints, index.sessions, target.id, before)
    changed = branches.to_put_back(before, after, target.id)
    pointer = NamePointer(checkpoint=target.id, revision=0 if held is None else held.revision + 1, before=changed)
    live = [id for id in sorted(ledger.live_sessions(index)) if after[id] is not None]
    replaced = held.checkpoint if held is not None and held.checkpoint != target.id else None
    return _told(index, target, after, replaced=replaced, live=tuple(live)), after, pointer


def _undone(catalog: Catalog) -> tuple[Rollback, dict[str, str | None]]:
    held = catalog.index.names.get(ROLLBACK)
    if held is None:
        raise NoRollback(path=catalog.root)
    target = catalog.index.checkpoints.get(held.checkpoint) or CheckpointMetadata(id=held.checkpoint)
    marks = _without(catalog.index, held)
    return dataclasses.replace(_told(catalog.index, target, marks), undone=True), marks


def _without(index: Index, held: NamePointer | None) -> dict[str, str | None]:
    """The marks as they were before the rollback that is in force, if one is."""
    target, before = (None, {}) if held is None else (held.checkpoint, held.before)
    return branches.marks_without(index.checkpoints, index.sessions, target, before)


def _told(index: Index, target: CheckpointMetadata, marks: branches.Marks, **more: Any) -> Rollback:
    by_age = sorted(index.checkpoints.values(), key=lambda r: r.order)
    changed = [r for r in by_age if (r.rolled_back is None) != (marks[r.id] is None)]
    marked = tuple(r.id for r in changed if r.rolled_back is None)
    return Rollback(target, False, marked, tuple(r.id for r in changed if r.rolled_back is not None), **more)


def _mark(change: Change, marks: Mapping[str, str | None]) -> None:
    index = change.index
    for record in list(index.checkpoints.values()):
        if record.rolled_back != marks[record.id]:
            change.put(record.changed(rolled_back=marks[record.id]))
    for session in list(index.sessions.values()):
        if session.rolled_back != marks[session.id]:
            # The revision stays: it is the running session that counts it, and its next record must not be behind.
            index.sessions[session.id] = dataclasses.replace(session, rolled_back=marks[session.id])


# --- what is saved afterwards --------------------------------------------------------------------


def placed(index: Index, record: CheckpointMetadata) -> CheckpointMetadata:
    """A new checkpoint in its place: marked, if its session was left behind.

    If it is the first that follows the rollback in force, the pointer goes from `index`, and is in force no longer.
    """
    session = index.sessions.get(record.session or "")
    if session is not None and session.rolled_back is not None:
        return dataclasses.replace(record, rolled_back=session.rolled_back)
    pointer = index.names.get(ROLLBACK)
    if pointer is not None and branches.follows(record, pointer.checkpoint, index.checkpoints):
        del index.names[ROLLBACK]
    return record
