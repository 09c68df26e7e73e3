"""Bringing the committed record and the cached files together, before a training starts."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ckptcache.config import CacheConfig
from ckptcache.errors import CkptCacheError, IndexDamaged
from ckptcache.ledger import Change, Ledger
from ckptcache.progress.folder import ProgressFolder, Run
from ckptcache.progress.git import Refused, Repository, Unreachable
from ckptcache.progress.record import (
    Record,
    base_of,
    from_history,
    merged,
    read,
    record_at,
    told_apart,
    versions,
    vouched,
)
from ckptcache.progress.removed import removed_from
from ckptcache.progress.target import Target, find_target
from ckptcache.progress.views import RunView
from ckptcache.storage.admission import Progress, refuse_previous, refuse_strangers, verify_files
from ckptcache.storage.index import Index, read_index_bytes


@dataclass(slots=True)
class Restored:
    """What a run can go on from.

    Attributes:
        view: the record, and which of its files are there and verified.
        refused: names of files that went to quarantine, each with the reason.
        notes: what else is to be known, a sentence each.
    """

    view: RunView
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As `ckptcache progress restore --json` prints it."""
        observed = self.view.catalog.observed
        return {
            "run": self.view.name,
            "records": len(self.view.index.checkpoints),
            "sessions": len(self.view.index.sessions),
            "available": sorted(observed.available),
            "missing": sorted(observed.missing),
            "refused": self.refused,
            "notes": self.notes,
        }


def restore(
    folder: ProgressFolder,
    name: str,
    *,
    remote: str | None = None,
    branch: str | None = None,
    adopt: bool = False,
    offline: bool = False,
    progress: Progress | None = None,
) -> Restored:
    """Merge the record that the remote has by now into the one here, and verify every file against it.

    A file whose content differs from the digest in the record, or that the record doesn't name, is
    quarantined unread. What is wrong with the network or the repository is noted, and the record that
    is here counts.

    Args:
        name: the run, such as ``nanecho-cached-ci``.
        adopt: take up files that the record doesn't name, on the word of the sidecars that lie beside them.
        offline: don't ask the remote.

    Raises:
        IndexDamaged: the record can't be read, and nothing in git's history stands in for it.
        CacheDirNotWritable: the folder refuses.
    """
    run, notes = folder.run(name), list[str]()
    committed = _committed(run, remote, branch, offline, notes)
    ours = local_record(run, committed.repository)
    if ours.mended:
        notes.append(f"{run.index} was mended: {ours.mended}")
    ledger = open_ledger(run)
    known = merged(ours.index, committed.record.index)
    if not known.checkpoints and not known.sessions and not run.cache_dir.is_dir():
        return Restored(RunView(name, ledger.view()), notes=[*notes, "there is no record yet: the run begins"])
    ours, refused = _refused_unread(ledger, run, committed, adopt=adopt)
    with ledger.change() as change:
        strange = take_up(change, ours, committed.base, committed.record)
        refused |= {} if adopt else refuse_strangers(change.index, ledger.layout)
        refused |= verify_files(change.index, ledger.layout, writer=ledger.writer, progress=progress).refused
    notes += [f"{id}: its digest was edited here, and the one in git counts" for id in strange]
    return Restored(RunView(name, ledger.view()), refused, notes)


def _refused_unread(ledger: Ledger, run: Run, committed: "_Committed", *, adopt: bool) -> tuple[Record, dict[str, str]]:
    """Put away what nothing vouches for, before the cache is opened and takes it up; returns also the record here."""
    ledger.refuse_links()
    with ledger.file.held():
        # Anew, since a training may have saved meanwhile: its checkpoint is no stranger.
        ours = settled(ledger, run, committed.repository)
        if adopt:
            return ours, {}
        refused = refuse_previous(ledger.file, ledger.layout, is_whole=ours.is_whole, writer=ledger.writer)
        known = merged(ours.index, committed.record.index)
        return ours, refused | refuse_strangers(known, ledger.layout)


def settled(ledger: Ledger, run: Run, repository: Repository | None) -> Record:
    """The record here while nobody changes it; a broken one is set aside. The index's lock must be held."""
    ours = local_record(run, repository)
    if ours.mended:
        ledger.set_aside_index()
    return ours


def take_up(change: Change, ours: Record, base: Index, theirs: Record) -> list[str]:
    """Merge what git has into an open index; returns the ids of those whose digests here differed from git's.

    What was lost or broken here, or is older here than `base`, was not removed on purpose.
    """
    if ours.mended:
        change.absorb(Index(), ours.index)
    known = Record(change.index, is_whole=ours.is_whole)
    change.absorb(
        told_apart(base, known, theirs, removed=removed_from(change.root), kept=change.observed.available), theirs.index
    )
    trusted = Index(checkpoints={**base.checkpoints, **theirs.index.checkpoints})
    change.index, strange = vouched(change.index, trusted)
    change.is_dirty |= bool(strange)
    return strange


def open_ledger(run: Run) -> Ledger:
    """The run's cache, with the settings in force here. Raises CacheDirIsFile or CacheDirNotReadable."""
    return Ledger(run.cache_dir.absolute(), CacheConfig(cache_dir=str(run.cache_dir)))


def local_record(run: Run, repository: Repository | None) -> Record:
    """The record in the work tree, mended where that is needed; an empty one where there is none.

    Raises IndexDamaged, IndexTooNew or IndexUnreadable.
    """
    try:
        data = read_index_bytes(run.index)
    except FileNotFoundError:
        return Record(Index(), is_whole=False)
    except IndexDamaged as error:
        # Too long, or no file at all: what can't be read has no sides either.
        return from_history(_history(run, repository), run.index, error)
    return read(data, run.index, lambda: _history(run, repository), lambda: _stages(run, repository))


def _history(run: Run, repository: Repository | None) -> Iterable[tuple[str, bytes]]:
    return () if repository is None else versions(repository, repository.head(), repository.relative(run.index))


def _stages(run: Run, repository: Repository | None) -> Iterable[tuple[str, bytes]]:
    return () if repository is None else repository.stages(repository.relative(run.index))


# --- what is committed ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Committed:
    repository: Repository | None = None
    record: Record = field(default_factory=lambda: Record(Index()))
    base: Index = field(default_factory=Index)


def _committed(run: Run, remote: str | None, branch: str | None, offline: bool, notes: list[str]) -> _Committed:
    try:
        target = find_target(run.root, remote=remote, branch=branch)
    except CkptCacheError as error:
        notes.append(f"only what is here counts: {error}")
        return _Committed(_repository_or_none(run))
    tip = None if offline else _fetch(target, notes)
    repository = target.repository
    try:
        record, note = record_at(repository, tip or repository.head(), run.index)
        notes += [note] if note else []
        return _Committed(repository, record, base_of(repository, tip, run.index))
    finally:
        repository.forget_fetched()


def _repository_or_none(run: Run) -> Repository | None:
    try:
        return Repository.around(run.root)
    except CkptCacheError:
        return None


def _fetch(target: Target, notes: list[str]) -> str | None:
    if target.remote is None:
        return None
    where = f"{target.branch} of {target.remote}"
    try:
        tip = target.repository.fetch(target.remote, target.branch)
    except (Unreachable, Refused) as error:
        notes.append(f"{where} could not be fetched ({error}): the record that is here counts")
        return None
    notes.append(f"{where} is at {tip[:8]}" if tip else f"there is no {where} yet")
    return tip
