"""Saving: from live objects to a checkpoint that counts, at once or in the background."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ckptcache import rollback
from ckptcache.background import InFlight
from ckptcache.catalog import Catalog
from ckptcache.drafting import Draft, embedded, file_size, with_new_id
from ckptcache.errors import CkptCacheError, NoSpace, SaveFailed
from ckptcache.ledger import Change, Ledger
from ckptcache.metadata import CheckpointMetadata
from ckptcache.policy import retention
from ckptcache.state.arena import Arena
from ckptcache.state.capture import tensors_in
from ckptcache.state.staging import Staging, TakenAgain, is_small, tensors_of
from ckptcache.storage import fs, ptfile
from ckptcache.storage.index import Index
from ckptcache.storage.integrity import Written
from ckptcache.storage.publish import Publication
from ckptcache.storage.reconcile import sidecar_bytes

log = logging.getLogger("ckptcache")


class Saver:
    """Writes the checkpoints of one cache from one process, one at a time."""

    def __init__(self, ledger: Ledger, *, on_evicted: Callable[[Mapping[str, str]], None]) -> None:
        self._ledger = ledger
        self._on_evicted = on_evicted
        self._arena = Arena()
        self.in_flight = InFlight()
        self.evicted: dict[str, Mapping[str, str]] = {}
        """What the saves of sessions evicted, by the checkpoint that was saved, until it is asked for."""

    # --- writing ---------------------------------------------------------------------------------

    def write(self, draft: Draft) -> CheckpointMetadata:
        """Write a checkpoint and commit it; raises SaveFailed or NoSpace, with everything as it was before."""
        self.wait(_owner(draft))
        draft, publication = self._reserve(draft)
        return self._write(draft, publication, partial(_fill, draft, publication))

    def write_later(self, draft: Draft, objects: Mapping[str, Any]) -> CheckpointMetadata:
        """Copy the state of `objects` out of their way and write it in a thread; the record has no size or digest yet.

        Parameters are still read after this returns, and until the next optimizer's step: see `Staging`.
        """
        self.wait(_owner(draft))
        draft, publication = self._reserve(draft)
        staging = None
        try:
            staging = Staging(draft.state, objects)
            self._start(dataclasses.replace(draft, state=staging.state), publication, staging)
        except RuntimeError:  # there is no thread to be had, or no memory even for what is copied at once
            _end(staging)
            return self._write(draft, publication, partial(_fill, draft, publication))
        except BaseException:
            if staging is None or not self.in_flight.has(staging):
                _end(staging)
                _withdraw(publication)
            raise  # what was started by then goes on, and counts when it is done
        finally:
            self.in_flight.go()
        if staging.must_settle_at_once:
            staging.settle()
        return draft.record

    def _start(self, draft: Draft, publication: Publication, staging: Staging) -> None:
        fill = partial(self._fill_staged, draft, publication, staging)
        while not self.in_flight.start(partial(self._write, draft, publication, fill), staging, _owner(draft)):
            self.in_flight.wait()  # another thread was quicker

    def prepare(self, objects: Mapping[str, Any]) -> None:
        """Take the memory that saves of `objects` in the background will be staged in, before the first of them."""
        size = file_size(tensors_of(objects))
        if not is_small(size):
            self._arena.prepare(size)

    def wait(self, session: str | None = None) -> None:
        """Wait for the save in flight; raises what the last one failed with that `session`, or no session, made."""
        self.in_flight.wait()
        self.in_flight.raise_error(session)

    def _reserve(self, draft: Draft) -> tuple[Draft, Publication]:
        """Create the file, under an id that no other writer has: in one second, many processes may reach one iteration.

        The file is there before the others are looked for, so that of two writers at least one notices.
        """
        layout = self._ledger.layout
        self._make_room(draft)
        self._ledger.hold(self._ledger.writer)
        while True:
            id = draft.record.id
            with _as_save_failed(id, layout.checkpoints):
                publication = Publication(layout, id, self._ledger.writer)
                own = publication.file.path.name
                try:
                    if not any(name.startswith(f"{id}.") and name != own for name in fs.scan(layout.checkpoints)):
                        return draft, publication
                except BaseException:
                    _withdraw(publication)
                    raise
                publication.withdraw()
            draft = with_new_id(draft)

    def _make_room(self, draft: Draft) -> None:
        """Where the disk is full, give up what is beyond the limits already; never the best or the latest for it."""
        needed, folder = file_size(tensors_in(draft.state)), self._ledger.layout.checkpoints
        if needed > fs.free_bytes(folder) and self._ledger.config.auto_cleanup and folder.exists():
            with self._ledger.change() as change:
                catalog = change.catalog()
                plan = catalog.retention_plan(catalog.latest(), self._ledger.live_sessions(change.index))
                self._ledger.evict(change, plan.evicted)
        if needed > (free := fs.free_bytes(folder)):
            raise NoSpace(id=draft.record.id, path=folder, needed=needed, free=free)

    def _fill_staged(self, draft: Draft, publication: Publication, staging: Staging) -> Written:
        staging.begin()
        try:
            written = self._fill_from_copy(draft, publication, staging)
            publication.file.sync()
            staging.confirm()
        except TakenAgain:
            with staging.held_still():
                return staging.read_unchanged(partial(_fill_again, draft, publication))
        return written

    def _fill_from_copy(self, draft: Draft, publication: Publication, staging: Staging) -> Written:
        """Write what was copied; where there is no memory for a copy, or no plan, what is live, before it changes."""
        staging.wait_for_device()
        planned = None if staging.is_settled else _planned(draft)
        image = None if planned is None else self._arena.take(planned.size, pinned=staging.is_on_cuda)
        if planned is None or image is None:
            written = ptfile.write(publication.file, draft.state, embedded(draft))
            staging.copied_elsewhere()
            return written
        try:
            staging.copy_into(image, planned.between, planned.storages)
            return ptfile.write_image(publication.file, image, between_blocks=staging.raise_if_changed)
        finally:
            self._arena.give_back()

    def _write(self, draft: Draft, publication: Publication, fill: Callable[[], Written]) -> CheckpointMetadata:
        """Write the file by `fill`, which leaves it synced, and commit it."""
        id, layout = draft.record.id, self._ledger.layout
        try:
            with _as_save_failed(id, layout.checkpoints):
                written = fill()
            record = dataclasses.replace(draft.record, size=written.size, digest=written.digest)
            with self._ledger.change() as change:
                with _as_save_failed(id, layout.checkpoints):
                    record, plan = self._commit(change, publication, dataclasses.replace(draft, record=record))
                publication.keep()
                self._remove_evicted(record, plan)
        except BaseException:
            _withdraw(publication)
            raise
        return record

    def _commit(
        self, change: Change, publication: Publication, draft: Draft
    ) -> tuple[CheckpointMetadata, retention.Plan | None]:
        """Publish the files and commit the record, and with it what has to go for it; all of it, or nothing."""
        if draft.record.id in change.index.checkpoints:
            raise OSError(f"another checkpoint has the id {draft.record.id}; save again")
        before = change.index.copy()
        record = dataclasses.replace(draft.record, sequence=change.index.sequence + 1)
        record = rollback.placed(change.index, record)
        change.put(record, draft.piece)
        change.observed.available[record.id] = record.size or 0
        if draft.session is not None:
            change.put_session(draft.session)
        catalog = change.catalog()
        record = catalog.scored(record)
        change.put(record)
        plan = self._plan(catalog, record)
        if plan is not None:
            self._ledger.decide(change, plan.evicted)
        try:
            publication.publish(sidecar_bytes(record, draft.piece))
            change.commit()
        except BaseException:
            # Still under the lock, or another process could take up what is about to go.
            if self._roll_back(change, before, record.id):
                _withdraw(publication)
            publication.keep()
            raise
        return record, plan

    def _plan(self, catalog: Catalog, record: CheckpointMetadata) -> retention.Plan | None:
        if not self._ledger.config.auto_cleanup:
            return None
        return catalog.retention_plan(record, self._ledger.live_sessions(catalog.index))

    def _roll_back(self, change: Change, before: Index, id: str) -> bool:
        """Put the old index back; returns False where the disk refuses, so that what it now names has to stay."""
        change.index, change.is_dirty = before, False
        try:
            # Where the new one never took the old one's place there is nothing to do, and less that can fail.
            if id in (self._ledger.file.read() or Index()).checkpoints:
                change.commit()
        except (OSError, CkptCacheError) as error:
            log.error("the index may name %s, whose save failed: %s", id, error)
            return False
        return True

    def _remove_evicted(self, record: CheckpointMetadata, plan: retention.Plan | None) -> None:
        """Remove what was evicted. The checkpoint counts already, so that a failure here is said and survived."""
        if plan is None:
            return
        if plan.over_limit:
            log.warning("%s", plan.over_limit)
        self._on_evicted(plan.evicted)
        if record.session is not None:
            self.evicted[record.id] = plan.evicted
        try:
            self._ledger.remove_files(plan.evicted)
        except (OSError, CkptCacheError) as error:
            log.warning("%s was saved; removing what was evicted failed: %s", record.id, fs.reason_behind(error))


# --- pieces --------------------------------------------------------------------------------------


def _owner(draft: Draft) -> str | None:
    """Whose save it is, and who is told when it fails."""
    return None if draft.session is None else draft.session.id


def _fill(draft: Draft, publication: Publication) -> Written:
    """Write the state from where it is, and sync it."""
    written = ptfile.write(publication.file, draft.state, embedded(draft))
    publication.file.sync()
    return written


def _fill_again(draft: Draft, publication: Publication) -> Written:
    publication.begin_again()
    return _fill(draft, publication)


def _end(staging: Staging | None) -> None:
    """Whoever waits for a copy that will never be made would wait for ever."""
    if staging is not None:
        staging.end()


def _planned(draft: Draft) -> ptfile.Plan | None:
    """Where everything will stand; None for what only torch itself can write."""
    try:
        return ptfile.plan(draft.state, embedded(draft))
    except ptfile.Unplannable:
        return None


@contextmanager
def _as_save_failed(id: str, path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise SaveFailed(id=id, path=path, reason=fs.reason_behind(error)) from error


def _withdraw(publication: Publication) -> None:
    try:
        publication.withdraw()
    except OSError as error:
        log.warning("what was left of a failed save could not be removed: %s", fs.reason_of(error))
