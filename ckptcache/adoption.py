"""Taking up files that came without a full record: the oldest layout's, and those that lost theirs."""

import dataclasses
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import orjson

from ckptcache.errors import CacheDirNotWritable, CheckpointDamaged, CkptCacheError, IndexDamaged
from ckptcache.ledger import Change, Ledger
from ckptcache.metadata import CheckpointMetadata, utc_now
from ckptcache.state.capture import fingerprint
from ckptcache.storage import ptfile
from ckptcache.storage.index import Index, parse
from ckptcache.storage.merging import merge

log = logging.getLogger("ckptcache")


def learn(ledger: Ledger, incomplete: Iterable[str], unrecorded: Iterable[str]) -> None:
    """Read files whose records lack a fingerprint, and files without a record; the index then knows them.

    A file that can't be read is left where it is, and said so. In a folder that can't be written, what
    was learned is kept in memory.
    """
    catalog = ledger.view()
    found = Index()
    for id in incomplete:
        found = merge(Index(), found, _or_nothing(id, _completed, ledger, catalog.index.checkpoints[id]))
    for id in unrecorded:
        found = merge(Index(), found, _or_nothing(id, _recorded, ledger, id))
    if not found.checkpoints:
        return
    try:
        with ledger.change() as change:
            for record in found.checkpoints.values():
                _put(change, record, found)
    except CacheDirNotWritable:
        ledger.overlay = merge(Index(), ledger.overlay, found)


def _or_nothing(id: str, look: Callable[..., Index], *given: Any) -> Index:
    """One file that can't be learned of, such as a newer version's, must not keep the others from being."""
    try:
        return look(*given)
    except CkptCacheError as error:
        log.warning("%s is passed over: %s", id, error)
        return Index()


def _put(change: Change, found: CheckpointMetadata, piece: Index) -> None:
    """Add what was found to the record as it now is: others may have pinned, decided or committed meanwhile."""
    present = change.index.checkpoints.get(found.id)
    if present is None:
        change.put(found, piece)
    elif present.fingerprint is None:
        learned = {name: getattr(found, name) for name in ("fingerprint", "contents", "size", "digest")}
        change.put(present.changed(**learned), piece)


def _completed(ledger: Ledger, record: CheckpointMetadata) -> Index:
    content = _content(ledger, record.id, record)
    piece = Index()
    if content is not None:
        piece.checkpoints[record.id] = record.changed(
            fingerprint=piece.store_fingerprint(fingerprint(content.state, content.state)),
            contents=tuple(content.state),
            size=content.size,
            digest=content.digest,
        )
    return piece


def _recorded(ledger: Ledger, id: str) -> Index:
    """The record inside a file; a foreign file gets one that says only what it holds."""
    content = _content(ledger, id, None)
    if content is None:
        return Index()
    piece = Index()
    if content.record is not None:
        with suppress(IndexDamaged, TypeError):
            piece = parse(orjson.dumps(content.record), ledger.layout.locate(id))
    record = piece.checkpoints.get(id)
    if record is None:
        piece = Index()
        name = piece.store_fingerprint(fingerprint(content.state, content.state))
        record = CheckpointMetadata(
            id=id,
            created_at=utc_now(),
            contents=tuple(content.state),
            fingerprint=name,
            tags=("adopted",),
            pinned=True,  # it may be the only copy of something that isn't this cache's to delete
        )
    record = dataclasses.replace(record, size=content.size, digest=content.digest)
    log.info("%s was found without a record and taken up", id)
    return Index(checkpoints={id: record}, configs=piece.configs, fingerprints=piece.fingerprints)


def _content(ledger: Ledger, id: str, record: CheckpointMetadata | None) -> ptfile.Content | None:
    path = ledger.layout.locate(id)
    try:
        return ptfile.read(path, size=record.size if record else None, digest=record.digest if record else None)
    except CheckpointDamaged as error:
        with suppress(CkptCacheError):
            ledger.quarantine(id, str(error.fields["reason"]))
    except (CkptCacheError, OSError) as error:
        log.warning("%s is passed over: %s", id, error)
    return None
