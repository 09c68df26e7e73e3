"""Looking after a cache: what it holds, what is wrong with it, and what other weights would change."""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ckptcache.catalog import Catalog
from ckptcache.config import CacheConfig
from ckptcache.errors import CheckpointDamaged, CkptCacheError, IndexDamaged
from ckptcache.ledger import Ledger
from ckptcache.storage import fs, integrity
from ckptcache.storage.datacache import DataCache
from ckptcache.storage.index import Index
from ckptcache.storage.reconcile import (
    Observed,
    Opened,
    leases,
    observe,
    open_index,
    quarantine,
    read_sidecar,
    sidecar_bytes,
)

_ELSEWHERE = (
    "it belongs to another machine, or has just been made, and is left alone; once that machine is gone, "
    "delete its file in sessions/ by hand"
)


@dataclass(frozen=True, slots=True)
class Stats:
    """What a cache holds, in counts and bytes, beside its limits."""

    checkpoints: int
    records: int
    evicted: int
    missing: int
    damaged: int
    quarantined: int
    pinned: int
    named: int
    groups: int
    sessions: int
    bytes: int
    max_checkpoints: int
    max_cache_bytes: int
    data_entries: int
    data_bytes: int

    def to_json(self) -> dict[str, Any]:
        """As `ckptcache stats --json` prints it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that a checkup found."""

    kind: str
    """index | sidecar | missing | damaged | unreadable | unrecorded | adopted | leftover | lease | name"""
    subject: str
    message: str
    is_damage: bool
    """Whether something was lost or can't be trusted; the rest is untidy at worst."""
    repaired: bool = False


@dataclass(frozen=True, slots=True)
class Move:
    """How a checkpoint's place would change under other settings; places count from 1 within the group."""

    id: str
    quality_before: float | None
    quality_after: float | None
    place_before: int
    place_after: int


def stats(catalog: Catalog, data: DataCache) -> Stats:
    """Counts and bytes of a cache."""
    records, observed, prepared = catalog.index.checkpoints.values(), catalog.observed, data.entries()
    decided = [r.decision for r in records]
    return Stats(
        checkpoints=len(observed.available),
        records=len(catalog.index.checkpoints),
        evicted=decided.count("evicted"),
        missing=len(observed.missing),
        damaged=len(observed.damaged),
        quarantined=decided.count("quarantined"),
        pinned=sum(r.pinned for r in records),
        named=len(catalog.index.names),
        groups=len(catalog.groups),
        sessions=len(catalog.index.sessions),
        bytes=sum(observed.available.values()),
        max_checkpoints=catalog.config.max_checkpoints,
        max_cache_bytes=catalog.config.max_cache_bytes,
        data_entries=len(prepared),
        data_bytes=sum(entry.bytes for entry in prepared),
    )


def rerank(catalog: Catalog, config: CacheConfig) -> list[Move]:
    """Every available checkpoint, by its place under `config`, within its group."""
    other = Catalog(catalog.root, catalog.index, catalog.observed, config)
    before, after = _places(catalog), _places(other)
    return [
        Move(r.id, catalog.scores[r.id].quality, r.quality_score, before[r.id], after[r.id]) for r in other.ranked()
    ]


def _places(catalog: Catalog) -> dict[str, int]:
    places: dict[str, int] = {}
    counted: dict[Any, int] = {}
    for record in catalog.ranked():
        group = catalog.group(catalog.index.checkpoints[record.id])
        counted[group] = places[record.id] = counted.get(group, 0) + 1
    return places


# --- the doctor ----------------------------------------------------------------------------------


def examine(
    ledger: Ledger, *, repair: bool, verify: bool, progress: Callable[[int, int], None] | None = None
) -> list[Finding]:
    """Everything that is wrong or untidy; with `repair`, mended where it can be, and said so."""
    found = _look(ledger, verify, progress)
    if not repair or not found.findings:
        return found.findings
    _repair(ledger, found)
    after = _look(ledger, verify=False)
    left = {(f.kind, f.subject) for f in after.findings}
    # These two can't be seen without reading: what still counts as available wasn't put right.
    left |= {(kind, id) for kind in ("damaged", "unreadable") for id in after.observed.available}
    return [dataclasses.replace(f, repaired=(f.kind, f.subject) not in left) for f in found.findings]


@dataclass(frozen=True, slots=True)
class _Found:
    findings: list[Finding]
    observed: Observed
    sidecars: Collection[str] = ()
    """Checkpoints whose sidecars are missing or can't be read."""
    is_hopeless: bool = False
    """Whether the index can't be read and there is nothing to rebuild it from."""


def _look(ledger: Ledger, verify: bool, progress: Callable[[int, int], None] | None = None) -> _Found:
    with ledger.steady():
        try:
            opened = open_index(ledger.file, ledger.layout)
        except IndexDamaged as error:
            return _Found([Finding("index", str(ledger.file.path), str(error), True)], Observed(), is_hopeless=True)
        observed = observe(opened.index, ledger.layout)
        sidecars = _sidecar_faults(ledger, observed)
        findings = [*_of_index(ledger, opened), *_of_records(opened.index, observed), *_of_leases(ledger)]
    if verify:
        findings += _of_contents(ledger, opened.index, observed, progress)
    findings += [Finding("sidecar", id, text, is_damage) for id, (text, is_damage) in sidecars.items()]
    return _Found(findings, observed, sidecars)


def _of_index(ledger: Ledger, opened: Opened) -> Iterator[Finding]:
    path = str(ledger.file.path)
    if opened.broken is not None:
        yield Finding("index", path, str(opened.broken), True)
    if opened.is_lost:
        yield Finding("index", path, "it is gone; the generation before it and the sidecars stand in for it", True)
    for id in opened.adopted:
        yield Finding("adopted", id, "the index doesn't name it; its sidecar does", False)
    for id, text in opened.unreadable_sidecars.items():
        yield Finding("sidecar", id, text, True)


def _of_records(index: Index, observed: Observed) -> Iterator[Finding]:
    # Missing isn't broken: whoever clones a repository has the index, and no file.
    for id, reason in observed.missing.items():
        yield Finding("missing", id, f"{reason}; its record is kept", False)
    for id, reason in observed.damaged.items():
        yield Finding("damaged", id, reason, True)
    for id, path in observed.unrecorded.items():
        yield Finding("unrecorded", id, f"{path} has neither record nor sidecar", False)
    for path, what in observed.leftovers.items():
        yield Finding("leftover", path.name, what, False)
    for path in observed.condemned:
        yield Finding("leftover", path.name, "it failed verification and has yet to be moved to quarantine", False)
    for name, pointer in index.names.items():
        if pointer.checkpoint not in observed.available:
            yield Finding("name", name, f"it points to {pointer.checkpoint}, whose file isn't there", False)


def _of_leases(ledger: Ledger) -> Iterator[Finding]:
    for owner, state in leases(ledger.layout).items():
        if state != "live":
            yield Finding("lease", owner, "its process is dead" if state == "dead" else _ELSEWHERE, False)


def _sidecar_faults(ledger: Ledger, observed: Observed) -> dict[str, tuple[str, bool]]:
    """For each checkpoint that a lost index would lose: why its sidecar wouldn't bring it back, and whether that is
    damage."""
    faults = {}
    for id in observed.available:
        try:
            if read_sidecar(ledger.layout, id) is None:
                faults[id] = ("it has no sidecar, from which a lost index is rebuilt", False)
        except CkptCacheError as error:
            faults[id] = (str(error), True)
    return faults


def _of_contents(
    ledger: Ledger, index: Index, observed: Observed, progress: Callable[[int, int], None] | None
) -> list[Finding]:
    findings, done, total = [], 0, sum(observed.available.values())
    for id, size in sorted(observed.available.items()):
        record = index.checkpoints[id]
        try:
            integrity.verify(ledger.layout.locate(id), size=record.size, digest=record.digest)
        except FileNotFoundError:
            pass  # evicted since it was listed
        except CheckpointDamaged as error:
            observed.damaged[id] = str(error.fields["reason"])
            findings.append(Finding("damaged", id, observed.damaged[id], True))
        except CkptCacheError as error:
            # A permission, or too many open files, says nothing of what is in it.
            findings.append(Finding("unreadable", id, f"it can't be verified ({error.fields['reason']})", False))
        done += size
        if progress is not None:
            progress(done, total)
    return findings


def _repair(ledger: Ledger, found: _Found) -> None:
    if found.is_hopeless:
        with ledger.file.held():
            ledger.set_aside_index()
        found = _look(ledger, verify=False)
    _quarantine_damaged(ledger, found.observed.damaged)
    if found.observed.unrecorded:
        from ckptcache.adoption import learn

        learn(ledger, [], sorted(found.observed.unrecorded))
    ledger.tidy_thoroughly()
    with ledger.change() as change:
        for id in found.observed.unrecorded.keys() & change.observed.unrecorded.keys():
            quarantine(change.observed.unrecorded[id], ledger.layout, reason="it has no record, and can't be read")
        for id in (set(found.sidecars) | found.observed.unrecorded.keys()) & change.observed.available.keys():
            data = sidecar_bytes(change.index.checkpoints[id], change.index)
            fs.write_atomically(ledger.layout.sidecar(id), data, writer=ledger.writer)


def _quarantine_damaged(ledger: Ledger, suspects: Collection[str]) -> None:
    """Verify again before anything is taken away: a look may have met a file on its way in or out."""
    records = ledger.view().index.checkpoints if suspects else {}
    for record in (records[id] for id in suspects if id in records):
        try:
            integrity.verify(ledger.layout.locate(record.id), size=record.size, digest=record.digest)
        except CheckpointDamaged as error:
            ledger.quarantine(record.id, str(error.fields["reason"]))
        except (CkptCacheError, FileNotFoundError):
            pass  # it may not be read just now, or another process was first
