"""Taking up files that came without a full record: the oldest layout's, and those that lost theirs."""

import dataclasses
import logging
from collections.abc import Iterable
from contextlib import suppress

import orjson

from ckptcache.errors import CacheDirNotWritable, CheckpointDamaged, CkptCacheError, IndexDamaged
from ckptcache.ledger import Ledger
from ckptcache.metadata import CheckpointMetadata, utc_now
from ckptcache.state.capture import fingerprint
from ckptcache.storage import ptfile
from ckptcache.storage.index import Index, merge, parse

log = logging.getLogger("ckptcache")


def learn(ledger: Ledger, incomplete: Iterable[str], unrecorded: Iterable[str]) -> None:
    """Read files whose records lack a fingerprint, and files without a record; the index then knows them.

    A file that can't be read is left where it is, and said so. In a folder that can't be written, what
    was learned is kept in memory.
    """
    catalog = ledger.view()
    found = Index()
    for id in incomplete:
        found = merge(Index(), found, _completed(ledger, catalog.index.checkpoints[id]))
    for id in unrecorded:
        found = merge(Index(), found, _recorded(ledger, id))
    if not found.checkpoints:
        return
    try:
        with ledger.change() as change:
            change.index = merge(Index(), change.index, _still_unknown(found, change.index))
            change.is_dirty = True
    except CacheDirNotWritable:
        ledger.overlay = merge(Index(), ledger.overlay, found)


def _still_unknown(found: Index, index: Index) -> Index:
    """What was found, without what a writer that had been about to commit has put into the index meanwhile."""
    records = {
        id: record
        for id, record in found.checkpoints.items()
        if id not in index.checkpoints or index.checkpoints[id].fingerprint is None
    }
    return Index(checkpoints=records, configs=found.configs, fingerprints=found.fingerprints)


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
            id=id, created_at=utc_now(), contents=tuple(content.state), fingerprint=name, tags=("adopted",)
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
