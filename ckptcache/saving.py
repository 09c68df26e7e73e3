"""Saving: from live objects to a checkpoint that counts, at once or in the background."""

import dataclasses
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import orjson
import torch

from ckptcache.catalog import Catalog
from ckptcache.environment import environment
from ckptcache.errors import CkptCacheError, InvalidValue, NoSpace, NotSavable, SaveFailed
from ckptcache.ledger import Change, Ledger
from ckptcache.metadata import CheckpointMetadata, SaveReason, SessionRecord, check_id, new_checkpoint_id, utc_now
from ckptcache.policy import quality, retention
from ckptcache.policy.compatibility import Description, architecture_key
from ckptcache.state.capture import Captured, capture, walk
from ckptcache.state.restore import RNG
from ckptcache.state.rng import is_rng_state
from ckptcache.state.staging import snapshot
from ckptcache.storage import fs, ptfile
from ckptcache.storage.index import Index
from ckptcache.storage.publish import Publication
from ckptcache.storage.reconcile import Observed, sidecar_bytes
from ckptcache.values import as_float, plain_config, text, texts

log = logging.getLogger("ckptcache")
_OVERHEAD = 1 << 20
"""Bytes that a file takes beyond its tensors, generously."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A checkpoint that is captured and described, and not yet written."""

    state: Mapping[str, Any]
    record: CheckpointMetadata
    piece: Index
    """The configurations and the fingerprint that the record names."""
    session: SessionRecord | None = None
    architecture: str = ""
    """What stands for the model in the id."""


class Saver:
    """Writes the checkpoints of one cache from one process, one at a time."""

    def __init__(self, ledger: Ledger, *, on_evicted: Callable[[Mapping[str, str]], None]) -> None:
        self._ledger = ledger
        self._on_evicted = on_evicted
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    # --- describing ------------------------------------------------------------------------------

    def draft(
        self,
        state: Mapping[str, Any],
        measured: Mapping[str, Any],
        configs: Mapping[str, Any],
        described: Mapping[str, Any],
        session: SessionRecord | None,
    ) -> Draft:
        """Capture and describe; raises NotSavable or InvalidValue before anything is written."""
        if isinstance(state, Mapping) and ptfile.HEADER in state:
            raise NotSavable(key=ptfile.HEADER, kind="named like the file's own header", remedy="give it another name")
        if isinstance(state, Mapping) and RNG in state and not is_rng_state(state[RNG]):
            kind = "named like the part for the global generators"
            raise NotSavable(key=RNG, kind=kind, remedy="give it another name, or save what capture_rng() gives")
        captured = capture(state)
        piece = Index()
        names: dict[str, Any] = {
            name: piece.store_config(None if value is None else _config(value, name)) for name, value in configs.items()
        }
        names["fingerprint"] = piece.store_fingerprint(captured.fingerprint)
        key = architecture_key(
            Description(captured.fingerprint, piece.configs.get(names["model_config"] or "")),
            self._ledger.config.critical_params,
        )
        numbers = _measured(measured, captured)
        record = CheckpointMetadata(
            id=new_checkpoint_id(numbers["iteration"], key),
            created_at=utc_now(),
            session=None if session is None else session.id,
            contents=captured.contents,
            environment=environment(),
            **names,
            **numbers,
            **_described(described),
        )
        return Draft(captured.state, record, piece, session, key)

    # --- writing ---------------------------------------------------------------------------------

    def write(self, draft: Draft) -> CheckpointMetadata:
        """Write a checkpoint and commit it; raises SaveFailed or NoSpace, with everything as it was before."""
        self.wait()
        return self._write(*self._reserve(draft))

    def write_later(self, draft: Draft) -> CheckpointMetadata:
        """Copy the state and write it in a thread; the record has neither size nor digest yet."""
        self.wait()
        draft, publication = self._reserve(draft)
        try:
            staged = dataclasses.replace(draft, state=snapshot(draft.state))
        except BaseException:
            _withdraw(publication)
            raise
        # Not a daemon: the interpreter waits for it at exit, so that no half file is left behind.
        self._thread = threading.Thread(target=self._write_quietly, args=(staged, publication), name="ckptcache-save")
        self._thread.start()
        return draft.record

    def wait(self) -> None:
        """Wait for the save in flight, and raise what it failed with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write_quietly(self, draft: Draft, publication: Publication) -> None:
        try:
            self._write(draft, publication)
        except BaseException as error:
            # Said at once as well: a process may end before anybody asks.
            log.error("a save in the background failed: %s", error)
            self._error = error

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
            record = dataclasses.replace(draft.record, id=new_checkpoint_id(draft.record.iteration, draft.architecture))
            draft = dataclasses.replace(draft, record=record)

    def _make_room(self, draft: Draft) -> None:
        """Where the disk is full, give up what is beyond the limits already; never the best or the latest for it."""
        needed, folder = _bytes_needed(draft), self._ledger.layout.checkpoints
        if needed > fs.free_bytes(folder) and self._ledger.config.auto_cleanup and folder.exists():
            with self._ledger.change() as change:
                catalog = change.catalog()
                plan = catalog.retention_plan(catalog.latest(), self._ledger.live_sessions(change.index))
                self._ledger.evict(change, plan.evicted)
        if needed > (free := fs.free_bytes(folder)):
            raise NoSpace(id=draft.record.id, path=folder, needed=needed, free=free)

    def _write(self, draft: Draft, publication: Publication) -> CheckpointMetadata:
        id, layout = draft.record.id, self._ledger.layout
        try:
            with _as_save_failed(id, layout.checkpoints):
                written = ptfile.write(publication.file, draft.state, _embedded(draft))
                publication.file.sync()
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
        try:
            self._ledger.remove_files(plan.evicted)
        except (OSError, CkptCacheError) as error:
            log.warning("%s was saved; removing what was evicted failed: %s", record.id, fs.reason_behind(error))


# --- pieces --------------------------------------------------------------------------------------


def improves(catalog: Catalog, draft: Draft) -> bool:
    """Whether the quality of a draft is better than the best available of its group by the threshold, or the first."""
    record, piece, index = draft.record, draft.piece, catalog.index.copy()
    index.checkpoints[record.id] = record
    index.configs |= piece.configs
    index.fingerprints |= piece.fingerprints
    observed = Observed(available={**catalog.observed.available, record.id: 0})
    after = Catalog(catalog.root, index, observed, catalog.config)
    best = after.best_of(after.group(record), without=record.id)
    best_quality = None if best is None else after.scores[best.id].quality
    if after.scores[record.id].status == "diverged":
        return False
    return quality.improves(after.scores[record.id].quality, best_quality, catalog.config.min_improvement_threshold)


def _measured(given: Mapping[str, Any], captured: Captured) -> dict[str, Any]:
    numbers = {
        name: None if given[name] is None else as_float(given[name], name)
        for name in ("epoch", "train_loss", "val_loss", "last_val_loss")
    }
    return {
        **numbers,
        "iteration": _iteration(given["iteration"]),
        "last_val_loss_iteration": None
        if given["last_val_loss_iteration"] is None
        else _iteration(given["last_val_loss_iteration"], "last_val_loss_iteration"),
        "metrics": {
            text(str(name), "a name in metrics"): as_float(value, f"metrics.{name}")
            for name, value in given["metrics"].items()
        },
        "learning_rate": _rates(given["learning_rate"]) or captured.learning_rate,
    }


def _iteration(value: Any, name: str = "iteration") -> int:
    try:
        number = int(value)
        is_whole = number == value and not isinstance(value, bool) and 0 <= number < 2**53
    except (TypeError, ValueError, OverflowError, RuntimeError):
        is_whole = False
    if not is_whole:
        raise InvalidValue(name=name, value=value, reason="it must be a whole number of at least 0")
    return number


def _config(value: Any, name: str) -> Mapping[str, Any]:
    plain = plain_config(value, name)
    if not isinstance(plain, dict):
        raise InvalidValue(name=name, value=value, reason="it must be a mapping, a dataclass or a namespace")
    return plain


def _described(given: Mapping[str, Any]) -> dict[str, Any]:
    """The words of a record; anything but text would make an index that can't be read again."""
    return {
        **given,
        "tags": texts(given["tags"], "tags"),
        "parents": tuple(check_id(parent) for parent in texts(given["parents"], "parents")),
        "notes": text(given["notes"], "notes"),
        "save_reason": _reason(given["save_reason"]),
    }


def _reason(given: Any) -> str:
    known = get_args(SaveReason)
    if given not in known:
        raise InvalidValue(name="save_reason", value=given, reason=f"it must be one of {', '.join(known)}")
    return str(given)


def _rates(given: float | Iterable[float] | None) -> tuple[float, ...]:
    if given is None:
        return ()
    rates = given if isinstance(given, Iterable) else (given,)
    return tuple(as_float(rate, "learning_rate") for rate in rates)


def _embedded(draft: Draft) -> dict[str, Any]:
    """What stands inside the file: a sidecar without size and digest, which nobody knows before it is written."""
    document: dict[str, Any] = orjson.loads(sidecar_bytes(draft.record, draft.piece))
    return document


def _bytes_needed(draft: Draft) -> int:
    storages = {
        (t.device, t.untyped_storage().data_ptr()): t.untyped_storage().nbytes()
        for _, t in walk(draft.state)
        if isinstance(t, torch.Tensor) and t.layout is torch.strided
    }
    return sum(storages.values()) + _OVERHEAD


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
