"""Pins, names, tags and notes, rollbacks, and the records of sessions: what changes no file."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ckptcache import resume
from ckptcache import rollback as rolling_back
from ckptcache.errors import CheckpointNotFound, InvalidName
from ckptcache.looking import Looking
from ckptcache.metadata import ROLLBACK, CheckpointMetadata, NamePointer, SessionRecord, check_id, check_name
from ckptcache.values import jsonable, texts
from ckptcache.values import text as as_text


class Marking(Looking):
    """Changes to records; see `TrainingCache`."""

    def pin(self, wanted: str) -> CheckpointMetadata:
        """Protect a checkpoint from being evicted."""
        return self._mark(wanted, lambda record: {"pinned": True})

    def unpin(self, wanted: str) -> CheckpointMetadata:
        """Take a pin off."""
        return self._mark(wanted, lambda record: {"pinned": False})

    def tag(self, wanted: str, *tags: str, remove: bool = False) -> CheckpointMetadata:
        """Add tags to a checkpoint, or remove them."""
        tags = texts(tags, "tags")
        if remove:
            return self._mark(wanted, lambda r: {"tags": tuple(t for t in r.tags if t not in tags)})
        return self._mark(wanted, lambda r: {"tags": tuple(dict.fromkeys((*r.tags, *tags)))})

    def note(self, wanted: str, text: str) -> CheckpointMetadata:
        """Set a checkpoint's notes."""
        notes = as_text(text, "notes")
        return self._mark(wanted, lambda record: {"notes": notes})

    def name(self, wanted: str, name: str) -> CheckpointMetadata:
        """Let `name` point to a checkpoint, which protects it; the name moves if it pointed elsewhere.

        Raises InvalidName, CheckpointNotFound or AmbiguousId.
        """
        check_name(name)
        self.get(wanted)
        with self._change() as change:
            catalog = change.catalog()
            record = resume.find(catalog, wanted)
            if name in change.index.checkpoints:
                raise InvalidName(name=name, reason="a checkpoint has that id")
            held = change.index.names.get(name)
            change.index.names[name] = NamePointer(
                checkpoint=record.id, revision=0 if held is None else held.revision + 1
            )
            change.is_dirty = True
        return catalog.scored(record)

    def unname(self, name: str) -> str:
        """Remove a name; returns the id that it pointed to, which is no longer protected by it.

        Raises CheckpointNotFound where there is no such name, and InvalidName for that of a rollback.
        """
        if name == ROLLBACK:
            raise InvalidName(name=name, reason="`ckptcache rollback --undo` takes a rollback back")
        if name not in self.names():
            raise CheckpointNotFound(id=name, path=self.cache_dir)
        with self._change() as change:
            if name not in change.index.names:
                raise CheckpointNotFound(id=name, path=self.cache_dir)
            change.is_dirty = True
            return change.index.names.pop(name).checkpoint

    def _mark(self, wanted: str, fields: Callable[[CheckpointMetadata], dict[str, Any]]) -> CheckpointMetadata:
        self.get(wanted)  # refused before a folder or a lock is made for it
        with self._change() as change:
            record = resume.find(change.catalog(), wanted)
            change.put(record.changed(**fields(record)))
            return change.catalog().scored(change.index.checkpoints[record.id])

    def rollback(self, wanted: str, *, dry_run: bool = False) -> rolling_back.Rollback:
        """Let the next session go on from a checkpoint, weights and history, on a new branch.

        All that descends from the checkpoint stays and is marked: it can be named, exported, and resumed from by its
        id, and is never chosen by "best", "latest" or "auto". These choose the checkpoint itself until something that
        descends from it is saved. A rollback that nothing has followed yet is replaced by another.

        Args:
            wanted: an id, a unique prefix of one, or a name; one that is itself marked is unmarked, with all that it
                descends from.
            dry_run: change nothing.

        Raises:
            CheckpointNotFound, AmbiguousId: `wanted` names none, or several.
            CheckpointMissing: its file isn't there.
        """
        self._finish_own()
        return rolling_back.roll_back(self.ledger, wanted, dry_run=dry_run)

    def undo_rollback(self, *, dry_run: bool = False) -> rolling_back.Rollback:
        """Take back the rollback that is in force: all marks are again as they were before it.

        Raises NoRollback where none is in force, or something was saved after it.
        """
        self._finish_own()
        return rolling_back.undo(self.ledger, dry_run=dry_run)

    def leave_behind(self, ids: Iterable[str], gone_back_to: str) -> None:
        """Mark checkpoints as a rollback does, so that only who names them resumes from them; marked ones stay so.

        Args:
            gone_back_to: the checkpoint that training went on from, or the session that began where it did.
        """
        marked = set(ids)
        if not marked:
            return
        with self._change() as change:
            for record in list(change.index.checkpoints.values()):
                if record.id in marked and record.rolled_back is None:
                    change.put(record.changed(rolled_back=gone_back_to))

    def record_session(self, session: SessionRecord, configs: Mapping[str, Any] | None = None) -> SessionRecord:
        """Keep what is known of a session; a new one gets its place in the order. Returns it as it was kept.

        Args:
            configs: its model's, training's and data's configuration by name, as plain values.

        Raises InvalidId or InvalidValue for what could not be read again.
        """
        for id in (session.id, session.parent, session.best_checkpoint):
            if id is not None:
                check_id(id)
        if configs is not None:
            configs = jsonable(dict(configs), "configs")
        with self._change() as change:
            if configs is not None:
                session = dataclasses.replace(session, config=change.index.store_config(dict(configs)))
            if session.sequence == 0:
                session = dataclasses.replace(session, sequence=change.index.sequence + 1)
            change.put_session(session)
        return session

    def forget_session(self, session: str) -> None:
        """Remove a session's checkpoints and its record, but for what is pinned, named or another session's parent."""
        with self._change() as change:
            index = change.index
            kept = {p.checkpoint for p in index.names.values()}
            kept |= {s.parent for s in index.sessions.values() if s.parent is not None and s.id != session}
            own = [r.id for r in index.checkpoints.values() if r.session == session]
            gone = [id for id in own if id not in kept and not index.checkpoints[id].pinned]
            # Decided first, removed second, forgotten last: a crash in between leaves nothing to be adopted again.
            self.ledger.evict(change, dict.fromkeys(gone, "its session was discarded"))
            for id in gone:
                del index.checkpoints[id]
            if len(gone) == len(own):
                index.sessions.pop(session, None)
            change.is_dirty = True
