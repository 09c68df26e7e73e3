"""A session's checkpoints: written in the background, and counted once it is known what came of them."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from ckptcache.cache import TrainingCache
from ckptcache.errors import (
    CacheDirIsFile,
    CacheDirNotWritable,
    IndexDamaged,
    IndexTooNew,
    IndexUnreadable,
    LockTimeout,
    SaveFailed,
)
from ckptcache.events import Events
from ckptcache.metadata import CheckpointMetadata, SessionRecord
from ckptcache.tally import Tally

log = logging.getLogger("ckptcache")
SURVIVABLE = (
    *(SaveFailed, CacheDirNotWritable, CacheDirIsFile, LockTimeout),
    *(IndexDamaged, IndexTooNew, IndexUnreadable),
)
"""What the folder, and not the training, is to blame for."""


class Checkpointer:
    """Saves for one session, one save in flight at a time.

    Args:
        configs: what it was told of its model, its data and its training, by the names of `TrainingCache.save`.
        parent: the checkpoint that it resumed from.
        events: told of what is saved, evicted, or fails to be.
    """

    def __init__(
        self,
        cache: TrainingCache,
        tally: Tally,
        configs: Mapping[str, Any],
        parent: CheckpointMetadata | None,
        events: Events,
    ) -> None:
        self._cache, self._tally, self._configs, self._parent = cache, tally, configs, parent
        self._events = events
        self._began = 0.0
        self._is_prepared = False
        self.seconds = 0.0
        """How long the longest save took, from its call until it was known to be durable."""
        self.last_durable: CheckpointMetadata | None = None

    def prepare(self, objects: Mapping[str, Any]) -> None:
        """Make ready for the first save, once the optimizers have made what they keep: after a step."""
        if not self._is_prepared:
            self._is_prepared = True
            self._cache.prepare(objects)

    def offer(
        self, reason: str, state: Mapping[str, Any], session: Callable[[], SessionRecord], **options: Any
    ) -> CheckpointMetadata | None:
        """Save in the background; a failure is reported, counted and survived. None where nothing was saved.

        `session` gives the session's record as it stands, which a save that is waited for may still change.
        """
        iteration = session().end_iteration
        if reason not in ("manual", "growth") and self._has_saved_at(iteration):
            return self._tally.last_saved
        try:
            return self.save(reason, state, session, blocking=False, **options)
        except SURVIVABLE as error:
            self._tally.failed(iteration)
            log.error("a checkpoint could not be saved, and training goes on: %s", error)
            self._events.emit("save_failed", error)
            return None

    def save(
        self,
        reason: str,
        state: Mapping[str, Any],
        session: Callable[[], SessionRecord],
        *,
        blocking: bool,
        **options: Any,
    ) -> CheckpointMetadata | None:
        """Save, once the save before is over; None where it had to be an improvement, and was none."""
        self.collect()
        now, self._began = session(), time.monotonic()
        record = self._cache.save(
            state,
            iteration=now.end_iteration,
            train_loss=self._tally.curves.latest("loss"),
            save_reason=reason,
            session=dataclasses.replace(now, saved=now.saved + 1),
            parents=self._parents(),
            blocking=blocking,
            **self._tally.measured(now.end_iteration),
            **self._configs,
            **options,
        )
        if record is not None:
            self._tally.saved(record)
            if blocking:
                self._note_durable()
        return record

    def _has_saved_at(self, iteration: int) -> bool:
        if self._tally.saved_at == iteration and not self._cache.is_saving:
            self.collect()  # it may have failed
        return self._tally.saved_at == iteration

    def collect_finished(self) -> None:
        """`collect`, where there is something to see without waiting."""
        if self._tally.is_in_flight and not self._cache.is_saving:
            self.collect()

    def collect(self) -> None:
        """See what came of the save in the background; one that failed was said already, and is survived."""
        try:
            self._cache.wait_until_finished(session=self._tally.record.id)
        except SURVIVABLE as error:
            self._tally.unsaved()
            self._events.emit("save_failed", error)
        except Exception:
            self._tally.unsaved()
            raise
        else:
            self._note_durable()

    def _note_durable(self) -> None:
        last = self._tally.last_saved
        if last is None or not self._tally.is_in_flight:
            return
        self.seconds = max(self.seconds, time.monotonic() - self._began)
        self.last_durable, evicted = last, self._cache.evicted_for(last.id)
        self._tally.collected(len(evicted))
        if self._events.is_heard("saved"):
            # As it stands now, with its size and its digest; others may have removed it since.
            self._events.emit("saved", next((r for r in self._cache.checkpoints() if r.id == last.id), last))
        if evicted:
            self._events.emit("evicted", dict(evicted))

    def _parents(self) -> tuple[str, ...]:
        parent = self._tally.last_saved or self._parent
        return () if parent is None else (parent.id,)
