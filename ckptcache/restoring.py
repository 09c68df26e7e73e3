"""Restoring: from the checkpoints that a policy offers to live objects, the first that can be."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ckptcache.errors import CheckpointDamaged, CheckpointMissing, CkptCacheError
from ckptcache.ledger import Ledger
from ckptcache.metadata import CheckpointMetadata
from ckptcache.resume import Choice
from ckptcache.state.restore import RestoreReport, apply, from_plain
from ckptcache.storage import fs, ptfile
from ckptcache.storage.ptfile import Content

log = logging.getLogger("ckptcache")


@dataclass(frozen=True, slots=True)
class Restored:
    """A restore that worked."""

    record: CheckpointMetadata
    report: RestoreReport
    """Which parts were restored, which objects stayed fresh, which parts went unused."""
    state: Mapping[str, Any]
    """The parts that no object took, such as plain values."""
    notes: tuple[str, ...] = ()
    """What was passed over on the way, and why; one sentence each."""
    by_rollback: bool = False
    """Whether it is the one that was rolled back to, and was chosen for that."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a restore has said, one sentence each.

    Attributes:
        warned: those that were logged as warnings.
    """

    notes: tuple[str, ...]
    warned: tuple[str, ...]


def restore_first(
    ledger: Ledger, choose: Callable[[], Choice], objects: Mapping[str, Any], *, rng: bool
) -> tuple[Restored | None, Told]:
    """Restore `objects` from the first of the chosen checkpoints that can be read, verified and applied.

    Args:
        choose: asked again once all have failed, since they may have been evicted meanwhile in favour of others.

    Raises what reading or applying raises, for a checkpoint that was chosen by name.
    """
    choice = choose()
    unsaid, warned, tried = choice.notes, _lament(ledger, choice), set[str]()
    while untried := [record for record in choice.records if record.id not in tried]:
        for record in untried:
            tried.add(record.id)
            try:
                restored = _restore(ledger, record, objects, rng)
            except CkptCacheError as error:
                if choice.is_named:
                    raise
                warned.append(f"{record.id} is passed over: {error}")
                log.warning("%s", warned[-1])
            else:
                told, by_rollback = _told(unsaid, warned), record.id == choice.rolled_back_to
                return dataclasses.replace(restored, notes=told.notes, by_rollback=by_rollback), told
        choice = choose()
    return None, _told(unsaid, warned)


def _told(unsaid: Iterable[str], warned: Iterable[str]) -> Told:
    return Told((*unsaid, *warned), tuple(warned))


def _lament(ledger: Ledger, choice: Choice) -> list[str]:
    """Say what would have been restored from, had its file been whole; what is damaged goes to quarantine."""
    said = []
    for id, reason in choice.damaged.items():
        said.append(f"{id} is passed over: {reason}")
        with suppress(CkptCacheError):
            ledger.quarantine(id, reason)
    if choice.missing:
        more = f", as are those of {len(choice.missing) - 1} more" if choice.missing[1:] else ""
        said.append(f"{choice.missing[0]} would have come first, but its file is gone{more}")
    if choice.warning:
        said.append(choice.warning)
    for sentence in said:
        log.warning("%s", sentence)
    return said


def _restore(ledger: Ledger, record: CheckpointMetadata, objects: Mapping[str, Any], rng: bool) -> Restored:
    content = read(ledger, record)
    report = apply(objects, content.state, id=record.id, rng=rng, uses_up=True)
    rest = {key: from_plain(content.state[key]) for key in report.unused}
    return Restored(record, report, rest)


def read(ledger: Ledger, record: CheckpointMetadata, *, untouched: bool = False) -> Content:
    """What a checkpoint's file holds, verified; a damaged one goes to quarantine, unless all is to be left `untouched`.

    Raises CheckpointDamaged, CheckpointMissing, NotACheckpoint or UnsafeCheckpoint.
    """
    path = ledger.layout.locate(record.id)
    try:
        return ptfile.read(path, size=record.size, digest=record.digest)
    except FileNotFoundError as error:
        raise CheckpointMissing(id=record.id, reason="its file is gone", path=path) from error
    except CheckpointDamaged as error:
        # In a folder that can't be written it is passed over each time instead.
        with suppress(CkptCacheError):
            if not untouched:
                ledger.quarantine(record.id, str(error.fields["reason"]))
        raise
    except OSError as error:
        raise CheckpointMissing(id=record.id, reason=fs.reason_of(error), path=path) from error
