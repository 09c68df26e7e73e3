"""Looking after a cache: what it holds, what is wrong with it, and what other weights would change."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ckptcache.catalog import Catalog
from ckptcache.config import CacheConfig
from ckptcache.errors import CkptCacheError, IndexDamaged
from ckptcache.ledger import Ledger
from ckptcache.storage import fs
from ckptcache.storage.datacache import DataCache
from ckptcache.storage.index import Index
from ckptcache.storage.reconcile import Observed, leases, observe, open_index


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
    """index | sidecar | missing | damaged | unrecorded | adopted | leftover | lease | name"""
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
    try:
        opened = open_index(ledger.file, ledger.layout)
    except IndexDamaged as error:
        return _hopeless_index(ledger, error, repair)
    observed = observe(opened.index, ledger.layout)
    if verify:
        _verify_contents(ledger, opened.index, observed, progress)
    findings: list[Finding] = []
    if opened.broken is not None:
        findings.append(Finding("index", str(ledger.file.path), str(opened.broken), True, repair))
    findings += [Finding("sidecar", id, text, True) for id, text in opened.unreadable_sidecars.items()]
    findings += [
        Finding("adopted", id, "the index doesn't name it; its sidecar does", False, repair) for id in opened.adopted
    ]
    findings += _of_files(ledger, opened.index, observed, repair)
    if repair:
        _repair(ledger, observed)
    return findings


def _hopeless_index(ledger: Ledger, error: IndexDamaged, repair: bool) -> list[Finding]:
    if repair:
        with ledger.file.held():
            ledger.set_aside_index()
    return [Finding("index", str(ledger.file.path), str(error), True, repair)]


def _of_files(ledger: Ledger, index: Index, observed: Observed, repair: bool) -> Iterator[Finding]:
    for id, reason in observed.missing.items():
        yield Finding("missing", id, f"{reason}; its record is kept", True)
    for id, reason in observed.damaged.items():
        yield Finding("damaged", id, reason, True, repair)
    for id, path in observed.unrecorded.items():
        yield Finding("unrecorded", id, f"{path} has neither record nor sidecar", False, repair)
    for path, what in observed.leftovers.items():
        yield Finding("leftover", path.name, what, False, repair)
    for owner, state in leases(ledger.layout).items():
        if state != "live":
            what = "its process is dead" if state == "dead" else "it belongs to another machine, or an earlier boot"
            yield Finding("lease", owner, what, False, repair)
    for name, pointer in index.names.items():
        if pointer.checkpoint not in observed.available:
            yield Finding("name", name, f"it points to {pointer.checkpoint}, whose file isn't there", False)


def _verify_contents(
    ledger: Ledger, index: Index, observed: Observed, progress: Callable[[int, int], None] | None
) -> None:
    from ckptcache.storage import ptfile

    sizes, done = dict(observed.available), 0
    for id in sorted(sizes):
        record = index.checkpoints[id]
        try:
            ptfile.verify(ledger.layout.locate(id), size=record.size, digest=record.digest)
        except (CkptCacheError, OSError) as error:
            observed.damaged[id] = error.fields["reason"] if isinstance(error, CkptCacheError) else fs.reason_of(error)
            del observed.available[id]
        done += sizes[id]
        if progress is not None:
            progress(done, sum(sizes.values()))


def _repair(ledger: Ledger, observed: Observed) -> None:
    for id, reason in observed.damaged.items():
        ledger.quarantine(id, reason)
    if observed.unrecorded:
        from ckptcache.adoption import learn

        learn(ledger, [], sorted(observed.unrecorded))
    ledger.tidy_thoroughly()
