"""A backup into a folder: verified to the last byte before anything is written, and counting at one instant.

The files are written under temporary names, get names under which nobody adopts them, and count when the index that
names them is durable. After that they move to their final names, which whoever changes the cache next would do too.
"""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ckptcache.catalog import Catalog
from ckptcache.errors import (
    BackupDamaged,
    BackupTooNew,
    CacheNotEmpty,
    CkptCacheError,
    IndexDamaged,
    IndexTooNew,
    RestoreFailed,
)
from ckptcache.ledger import Change, Ledger
from ckptcache.metadata import ROLLBACK, CheckpointMetadata
from ckptcache.policy.branches import follows
from ckptcache.storage import archive, fs
from ckptcache.storage.archive import Archive
from ckptcache.storage.index import MAX_INDEX_BYTES, Index, parse
from ckptcache.storage.manifest import Member
from ckptcache.storage.merging import merge
from ckptcache.storage.reconcile import quarantine, sidecar_bytes
from ckptcache.words import count

log = logging.getLogger("ckptcache")
"""Called with the bytes read so far and in all."""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What restoring a backup came to.

    Attributes:
        folder: the cache.
        added: ids of the checkpoints whose files it brought.
        present: ids of those whose files were there already.
        kept_out: ids of those that stay away by a decision of the cache, with its reason.
        left_out: ids of those that the backup lacks, because they were damaged when it was made, with the reason.
        records, sessions, names: how many the index holds now.
        rolled_back_to: the checkpoint that the next session goes on from, where a rollback is in force now.
    """

    folder: Path
    added: tuple[str, ...]
    present: tuple[str, ...]
    kept_out: Mapping[str, str]
    left_out: Mapping[str, str]
    records: int
    sessions: int
    names: int
    rolled_back_to: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As `ckptcache restore --json` prints it."""
        return {
            "cache_dir": str(self.folder),
            "added": list(self.added),
            "present": list(self.present),
            "kept_out": dict(self.kept_out),
            "left_out": dict(self.left_out),
            "records": self.records,
            "sessions": self.sessions,
            "names": self.names,
            "rolled_back_to": self.rolled_back_to,
        }


def unpack(ledger: Ledger, path: Path, *, combine: bool = False, progress: archive.Overall | None = None) -> Unpacked:
    """Restore a backup into the folder of `ledger`: all of it, or nothing.

    Args:
        combine: whether the folder may hold checkpoints of its own, to which those that it lacks are added. A
            checkpoint that was evicted there stays evicted, one that was quarantined comes back; of what both have
            the higher revision counts, and a name that both have points where it did there.

    Raises:
        NotABackup, BackupDamaged, BackupTooNew: it can't be trusted or read; nothing was written.
        CacheNotEmpty: the folder holds other checkpoints or sessions, and `combine` is off.
        RestoreFailed: the disk refuses, or both have another checkpoint of the same id.
        CacheDirNotWritable: the folder refuses.
    """
    with archive.opened(path) as backup:
        counted = archive.counted(progress, sum(m.size for m in (*backup.manifest.members, *_files(backup))))
        backup.verify(counted)
        theirs = _index_of(backup)
        ledger.refuse_links()
        wanted = _wanted(_checked(ledger.view(), theirs, path, combine), theirs, backup)
        _check_room(ledger, backup, wanted)
        with _writing(ledger, path) as temps:
            for member in wanted:
                _copy(ledger, backup, member, temps, counted)
            return _published(ledger, backup, theirs, temps, combine)


# --- what may go in ------------------------------------------------------------------------------


def _index_of(backup: Archive) -> Index:
    """The index in a backup, if the files beside it are those that it tells of."""
    try:
        index = parse(backup.read(backup.manifest.members[0], limit=MAX_INDEX_BYTES), backup.path)
    except IndexDamaged as error:
        raise BackupDamaged(path=backup.path, reason=f"its index cannot be read: {error.fields['reason']}") from error
    except IndexTooNew as error:
        raise BackupTooNew(path=backup.path, what="schema", **_versions(error)) from error
    for member in _files(backup):
        if not _tells_of(index.checkpoints.get(member.id), member):
            raise BackupDamaged(path=backup.path, reason=f"its index doesn't tell of {member.name} as it is")
    return index


def _versions(error: IndexTooNew) -> dict[str, Any]:
    return {name: error.fields[name] for name in ("found", "known")}


def _files(backup: Archive) -> Iterator[Member]:
    return (m for m in backup.manifest.members if m.kind == "checkpoint")


def _tells_of(record: CheckpointMetadata | None, member: Member) -> bool:
    return (
        record is not None
        and record.decision is None
        and record.size in (None, member.size)
        and record.digest in (None, member.digest)
    )


def _checked(catalog: Catalog, theirs: Index, path: Path, combine: bool) -> Catalog:
    """Raises where the folder is another cache, or has another checkpoint under an id of the backup's."""
    ours, strangers = catalog.index, catalog.observed.unrecorded
    own = {
        "checkpoint": (ours.checkpoints.keys() - theirs.checkpoints.keys()) | strangers.keys(),
        "session": ours.sessions.keys() - theirs.sessions.keys(),
    }
    if not combine and any(own.values()):
        what = " and ".join(count(len(ids), kind) for kind, ids in own.items() if ids)
        raise CacheNotEmpty(path=catalog.root, what=what)
    for id in sorted(ours.checkpoints.keys() & theirs.checkpoints.keys()):
        digests = {ours.checkpoints[id].digest, theirs.checkpoints[id].digest} - {None}
        if len(digests) > 1:
            raise RestoreFailed(path=path, folder=catalog.root, reason=f"{id} is another checkpoint there")
    return catalog


def combined(ours: Index, theirs: Index, available: Collection[str], brought: Collection[str]) -> Index:
    """The index of both. What is available here is never decided against by a backup, and names stay where they are.

    Args:
        available: ids of the checkpoints whose files are here.
        brought: ids of those whose files the backup holds.
    """
    records = {}
    for id, record in theirs.checkpoints.items():
        mine = ours.checkpoints.get(id)
        if mine is not None and mine.decision == "quarantined" and id in brought:
            # Its file was found damaged, and here is a good one.
            record = max(record, mine.changed(decision=None, decision_reason=None), key=lambda r: r.revision)
        records[id] = mine if mine is not None and id in available and record.decision is not None else record
    theirs = replace(theirs, checkpoints=records)
    ours_first = ("names", "configs", "fingerprints", "unknown")
    theirs = replace(theirs, **{part: {**getattr(theirs, part), **getattr(ours, part)} for part in ours_first})
    both = merge(Index(), ours, theirs)
    held = None if ROLLBACK in ours.names else both.names.get(ROLLBACK)
    # What a backup asks for is in force no longer where training has gone on from there since it was made.
    if held is not None and any(follows(r, held.checkpoint, both.checkpoints) for r in both.checkpoints.values()):
        del both.names[ROLLBACK]
    return both


def _wanted(catalog: Catalog, theirs: Index, backup: Archive) -> list[Member]:
    """The files that the folder lacks."""
    available, brought = catalog.observed.available, {m.id for m in _files(backup)}
    index = combined(catalog.index, theirs, available, brought)
    return [m for m in _files(backup) if m.id not in available and index.checkpoints[m.id].decision is None]


# --- writing -------------------------------------------------------------------------------------


def _check_room(ledger: Ledger, backup: Archive, wanted: Collection[Member]) -> None:
    root = ledger.layout.root
    # The index twice, for the generation before it, and the sidecars once.
    small = sum(m.size for m in backup.manifest.members if m.kind != "checkpoint") + backup.manifest.members[0].size
    needed, free = small + sum(m.size for m in wanted), fs.free_bytes(root)
    if needed > free:
        reason = f"it needs {needed} bytes, and {free} are free there"
        raise RestoreFailed(path=backup.path, folder=root, reason=reason)


Temps = dict[str, fs.TempFile]


@contextmanager
def _writing(ledger: Ledger, path: Path) -> Iterator[Temps]:
    """Files by id that are on their way; what has not come to count by the end is removed."""
    temps: Temps = {}
    try:
        fs.ensure_folder(ledger.layout.checkpoints)
        ledger.hold(ledger.writer)
        yield temps
    except OSError as error:
        raise RestoreFailed(path=path, folder=ledger.layout.root, reason=fs.reason_of(error)) from error
    finally:
        for temp in temps.values():
            with suppress(OSError):  # it is recognised as left over by the writer in its name
                temp.discard()


def _copy(ledger: Ledger, backup: Archive, member: Member, temps: Temps, progress: archive.Progress | None) -> None:
    temp = temps[member.id] = fs.TempFile(ledger.layout.waiting(member.id), ledger.writer)
    temp.reserve(member.size)
    backup.copy(member, temp.write, progress)
    temp.sync()


def _published(ledger: Ledger, backup: Archive, theirs: Index, temps: Temps, combine: bool) -> Unpacked:
    """Make it count, under the index's lock and over the folder as it is by now."""
    layout = ledger.layout
    brought = {m.id for m in _files(backup)}
    with ledger.change() as change:
        before = _checked(change.catalog(), theirs, backup.path, combine)
        available, in_the_way = set(change.observed.available), dict(change.observed.damaged)
        in_the_way |= dict.fromkeys(change.observed.unrecorded, "a backup brought a checkpoint of this id")
        index = combined(before.index, theirs, available, brought)
        added = sorted(id for id in temps if id not in available and index.checkpoints[id].decision is None)
        with _kept_if_committed(ledger, added):
            for id in added:
                if id in in_the_way:
                    quarantine(layout.locate(id), layout, reason=in_the_way[id])
                temps[id].publish()
            fs.sync_folder(layout.checkpoints)
            change.absorb(Index(), index)
            if change.is_dirty:
                change.commit()
        _settle(ledger, change, brought)
        index = change.index
    decided = {id: index.checkpoints[id].decision_reason or "" for id in brought if index.checkpoints[id].decision}
    return Unpacked(
        folder=layout.root,
        added=tuple(added),
        present=tuple(sorted(brought & available)),
        kept_out=decided,
        left_out=backup.manifest.left_out,
        records=len(index.checkpoints),
        sessions=len(index.sessions),
        names=len(index.names),
        rolled_back_to=None if ROLLBACK not in index.names else index.names[ROLLBACK].checkpoint,
    )


@contextmanager
def _kept_if_committed(ledger: Ledger, added: Collection[str]) -> Iterator[None]:
    """Remove what was published if the index that names it never came to be; the lock must be held."""
    try:
        yield
    except BaseException:
        with suppress(OSError, CkptCacheError):
            # The disk may have refused after the index took its place: then all of it counts, and stays.
            named = (ledger.file.read() or Index()).checkpoints
            for id in added:
                if id not in named or named[id].decision is not None:
                    ledger.layout.remove(ledger.layout.waiting(id))
        raise


def _settle(ledger: Ledger, change: Change, brought: Collection[str]) -> None:
    """Sidecars and final names. All of it counts already, so that a failure here is said and survived."""
    layout, index = ledger.layout, change.index
    try:
        for id in sorted(change.observed.available.keys() & brought):
            if not layout.sidecar(id).exists():
                data = sidecar_bytes(index.checkpoints[id], index)
                fs.write_atomically(layout.sidecar(id), data, writer=ledger.writer)
            if layout.waiting(id).exists():
                fs.move(layout.waiting(id), layout.checkpoint(id))
    except OSError as error:
        log.warning(
            "%s is restored, and not tidy yet (%s); `ckptcache doctor --repair` does the rest",
            layout.root,
            fs.reason_of(error),
        )
