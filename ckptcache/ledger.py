"""The index as a living thing: viewed without a lock, changed under one, by many processes at once."""

import dataclasses
import logging
import os
import secrets
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ckptcache.catalog import Catalog
from ckptcache.config import CacheConfig
from ckptcache.errors import CacheDirIsFile, CacheDirNotReadable, CacheDirNotWritable
from ckptcache.metadata import CheckpointMetadata, SessionRecord, thin
from ckptcache.storage import fs, locks
from ckptcache.storage.index import Index, IndexFile, serialise
from ckptcache.storage.layout import Layout
from ckptcache.storage.merging import merge
from ckptcache.storage.publish import remove_checkpoint
from ckptcache.storage.reconcile import Observed, Opened, leases, observe, open_index, quarantine, set_aside, tidy

log = logging.getLogger("ckptcache")
FULL_CURVES = 20
"""How many of the newest sessions keep their curves in full."""
SHORT_CURVE = 20
"""Points that each curve of an older session keeps."""
_LOOKS = 20
"""At a cache that others write to without a pause; each look is quicker than a save."""


class Change:
    """An index being changed while its lock is held; `commit` may be called more than once."""

    def __init__(self, ledger: "Ledger", opened: Opened) -> None:
        self._ledger = ledger
        self.index = opened.index.copy()
        self.observed = observe(self.index, ledger.layout)
        self.is_dirty = bool(opened.adopted) or opened.broken is not None or opened.is_lost

    @property
    def root(self) -> Path:
        """The cache folder."""
        return self._ledger.layout.root

    def catalog(self) -> Catalog:
        """The checkpoints as the changed index has them."""
        return Catalog(self._ledger.layout.root, self.index, self.observed, self._ledger.config)

    def put(self, record: CheckpointMetadata, piece: Index | None = None) -> None:
        """Add or replace a record, with the configurations that it names."""
        self.index.checkpoints[record.id] = record
        if piece is not None:
            self.index.configs |= piece.configs
            self.index.fingerprints |= piece.fingerprints
        self.is_dirty = True

    def put_session(self, session: SessionRecord) -> None:
        """Add or replace a session's record."""
        known = self.index.sessions.get(session.id)
        if known is not None and known.rolled_back != session.rolled_back:
            # A session that runs doesn't know that it was rolled back; what the index says of it counts.
            session = dataclasses.replace(session, rolled_back=known.rolled_back)
        if known is None or session.revision >= known.revision:
            self.index.sessions[session.id] = session
            self.is_dirty = True

    def absorb(self, base: Index, theirs: Index) -> None:
        """Merge in what others made of `base`: the union of the records, of what both changed the higher revision."""
        merged = merge(base, self.index, theirs)
        if serialise(merged) != serialise(self.index):
            self.is_dirty = True
        self.index = merged
        self.observed = observe(merged, self._ledger.layout)

    def commit(self) -> None:
        """Make it durable. From here on it counts."""
        for id in self.catalog().surplus_records():
            del self.index.checkpoints[id]
        _thin_old_sessions(self.index)
        self._ledger.file.commit(self.index, writer=self._ledger.writer)
        self.is_dirty = False


def _thin_old_sessions(index: Index) -> None:
    """Keep the curves of old sessions short: in a repository that trains for years they would be all there is."""
    by_age = sorted(index.sessions.values(), key=lambda s: s.order, reverse=True)
    for session in by_age[FULL_CURVES:]:
        if any(len(points) > SHORT_CURVE for points in session.curves.values()):
            short = {name: thin(points, SHORT_CURVE) for name, points in session.curves.items()}
            index.sessions[session.id] = dataclasses.replace(session, curves=short)


class Ledger:
    """One cache folder's index, seen from one process."""

    def __init__(self, root: Path, config: CacheConfig) -> None:
        try:
            if root.exists() and not root.is_dir():
                raise CacheDirIsFile(path=root)
        except PermissionError as error:
            raise CacheDirNotReadable(path=root, reason=fs.reason_of(error)) from error
        self.layout = Layout(root)
        self.config = config
        self.file = IndexFile(root)
        self.overlay = Index()
        """What was learned of records in a folder that can't be written."""
        self._is_tidy = False
        self._own()

    # --- looking ---------------------------------------------------------------------------------

    def view(self) -> Catalog:
        """The checkpoints as they stand; nothing on the disk is changed by looking.

        Raises IndexDamaged when there is nothing to rebuild a broken index from, and IndexTooNew.
        """
        try:
            opened, index, observed = self._look()
        except OSError as error:
            raise CacheDirNotReadable(path=error.filename or self.layout.root, reason=fs.reason_of(error)) from error
        if opened.broken is not None:
            log.warning("%s Until then it is rebuilt in memory at each look.", opened.broken)
        return Catalog(self.layout.root, index, observed, self.config)

    def _look(self) -> tuple[Opened, Index, Observed]:
        """The index, and the files as they are beside it.

        Between a look at the one and at the others a save may have been committed and what it evicted removed, so that
        nothing of the index seems to be there: then both are looked at again.
        """
        for _ in range(_LOOKS):
            stamp = self.file.stamp()
            opened = open_index(self.file, self.layout)
            index = merge(Index(), opened.index, self.overlay) if self.overlay.checkpoints else opened.index
            observed = observe(index, self.layout)
            if not observed.missing or self.file.stamp() == stamp:
                break
        return opened, index, observed

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Keep writers away while looking, wherever that leaves no trace: where the lock exists and can be taken."""
        with ExitStack() as stack:
            if self.file.lock.exists():
                with suppress(OSError):
                    stack.enter_context(self.file.held())
            yield

    def sessions_by_lease(self, index: Index) -> dict[locks.LeaseState, set[str]]:
        """Ids of the sessions that have a lease, by its state."""
        found: dict[locks.LeaseState, set[str]] = {"live": set(), "dead": set(), "unknown": set()}
        for owner, state in leases(self.layout).items():
            if owner in index.sessions:
                found[state].add(owner)
        return found

    def live_sessions(self, index: Index) -> set[str]:
        """Sessions to protect as running: those that do, and the newest of other machines that hasn't ended.

        Only the newest, since a lease from a machine that is gone is never given back, and would protect for ever.
        """
        held = self.sessions_by_lease(index)
        elsewhere = [s for id in held["unknown"] if (s := index.sessions[id]).stop_reason is None]
        newest = sorted(elsewhere, key=lambda session: session.order)[-1:]
        return held["live"] | {session.id for session in newest}

    # --- changing --------------------------------------------------------------------------------

    def refuse_links(self) -> None:
        """Raises CacheDirNotWritable where a folder of the cache is a link, behind which nothing may be moved."""
        for folder in self.layout.linked_folders():
            reason = "it is a link, and nothing outside the cache is ever removed; put the whole cache there instead"
            raise CacheDirNotWritable(path=folder, reason=reason)

    @contextmanager
    def change(self) -> Iterator[Change]:
        """Hold the lock over a fresh view of the index; what was changed is committed at the end.

        Raises:
            CacheDirNotWritable: the folder refuses.
            LockTimeout: another process keeps the lock.
        """
        self.refuse_links()
        try:
            with self.file.held():
                opened = open_index(self.file, self.layout)
                if opened.broken is not None:
                    log.warning("%s was set aside at %s", self.file.path, set_aside(self.file, self.layout))
                change = Change(self, opened)
                self._tidy_once(change.observed)
                yield change
                if change.is_dirty:
                    change.commit()
        except OSError as error:
            raise CacheDirNotWritable(path=self.layout.root, reason=fs.reason_of(error)) from error

    def _remove_evicted(self, id: str) -> None:
        try:
            remove_checkpoint(self.layout, id)
        except ValueError as error:
            raise CacheDirNotWritable(path=self.layout.checkpoints, reason="it was linked elsewhere") from error

    def _tidy_once(self, observed: Observed) -> None:
        if not self._is_tidy:
            self._is_tidy = True
            for path in tidy(observed, self.file, self.layout):
                log.info("removed %s, which a crash had left behind", path)

    def tidy_thoroughly(self) -> None:
        """Adopt, and clean up what the dead left behind, even if this process has done so before.

        Leases of other machines stay, and with them what their writers are at: on a shared file system they may live.
        """
        self._is_tidy = False
        with self.change():
            pass

    def set_aside_index(self) -> Path | None:
        """Move a broken index into quarantine; its lock must be held. Returns where it went."""
        return set_aside(self.file, self.layout)

    def evict(self, change: Change, decided: Mapping[str, str]) -> None:
        """Record the decision durably, and only then remove the files."""
        if decided:
            self.decide(change, decided)
            change.commit()
            self.remove_files(decided)

    def decide(self, change: Change, decided: Mapping[str, str]) -> None:
        """Mark checkpoints as evicted; it counts with the next commit, and only then may their files go."""
        for id, reason in decided.items():
            record = change.index.checkpoints[id]
            change.put(record.changed(decision="evicted", decision_reason=reason))
            change.observed.available.pop(id, None)

    def remove_files(self, decided: Iterable[str]) -> None:
        """Remove the files of checkpoints whose eviction is durable."""
        # Until all are gone, they are leftovers for the next change to remove.
        self._is_tidy = False
        for id in decided:
            self._remove_evicted(id)
        self._is_tidy = True

    def quarantine(self, id: str, reason: str) -> None:
        """Put a checkpoint that failed verification where nothing resumes from it."""
        with self.change() as change:
            path, record = self.layout.locate(id), change.index.checkpoints.get(id)
            if not path.exists() or (record is not None and record.decision is not None):
                return  # another process evicted it, or was first
            log.warning("%s failed verification and goes to quarantine: %s", id, reason)
            self._is_tidy = False
            if record is not None:
                change.put(record.changed(decision="quarantined", decision_reason=reason))
                change.commit()
            quarantine(path, self.layout, reason=reason)
            self.layout.remove(self.layout.sidecar(id))
            self._is_tidy = True

    # --- who writes ------------------------------------------------------------------------------

    @property
    def writer(self) -> str:
        """This process's name in the temporary files it writes; its lease says whether it still lives."""
        if self._owner != os.getpid():
            self._own()
        return self._writer

    def _own(self) -> None:
        """Begin as a writer of its own, as a forked child must: the leases and locks stay the parent's."""
        self._owner = os.getpid()
        self._leases: dict[str, locks.Lease] = {}
        self._threads = threading.Lock()
        self._finalizer = weakref.finalize(self, _release_all, self._leases)
        self._writer = f"writer_{secrets.token_hex(6)}"

    def hold(self, owner: str) -> None:
        """Hold the lease of a session or writer until it is released or this process ends."""
        self.writer  # noqa: B018 - notices a fork
        # Two threads that took the same lease would wait for each other's lock.
        with self._threads:
            if owner not in self._leases:
                self._leases[owner] = self._lease(owner)

    def _lease(self, owner: str) -> locks.Lease:
        fs.ensure_folder(self.layout.sessions)
        try:
            return locks.Lease(self.layout.lease(owner))
        except OSError as error:
            raise CacheDirNotWritable(path=self.layout.sessions, reason=fs.reason_of(error)) from error

    def release(self, owner: str) -> None:
        """Give a lease back."""
        lease = self._leases.pop(owner, None)
        if lease is not None:
            lease.release()

    def close(self) -> None:
        """Give all leases back."""
        _release_all(self._leases)


def _release_all(held: dict[str, locks.Lease]) -> None:
    for owner in list(held):
        held.pop(owner).release()
