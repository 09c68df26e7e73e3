"""TrainingSession: one process's stretch of training. It resumes, logs, saves, and leaves a record."""

import dataclasses
import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from ckptcache.cache import TrainingCache
from ckptcache.curves import Curves
from ckptcache.environment import environment
from ckptcache.errors import CacheDirNotWritable, DuplicateName, LockTimeout, SaveFailed, SessionClosed
from ckptcache.metadata import CheckpointMetadata, SessionRecord, encode_float, new_session_id, utc_now
from ckptcache.signals import SignalWatch
from ckptcache.startup import Startup, start
from ckptcache.state.capture import capture
from ckptcache.state.restore import RNG, apply
from ckptcache.state.rng import capture_rng
from ckptcache.state.stepping import StepCounter
from ckptcache.storage import fs
from ckptcache.storage.ptfile import HEADER

log = logging.getLogger("ckptcache")
SUMMARY_NAME = "training_summary.json"
_SURVIVABLE = (SaveFailed, CacheDirNotWritable, LockTimeout)


class TrainingSession:
    """Makes a training loop resumable.

    ``with TrainingSession(cache, model=model, optimizer=optimizer, ...) as session:`` resumes at
    entry, or says why not; ``for step in session.steps(max_iters):`` goes on from where it stopped;
    `log` and `checkpoint` are called in the loop. At the end the last state is saved, and
    `training_summary.json` and the session's record in the index are written.

    Args:
        cache: where checkpoints are kept.
        model, optimizer, scheduler, scaler, loader: registered under these names, if given.
        model_config, data_config, training_config: what `TrainingCache.save` takes.
        resume: "best", "latest", "auto", "never", or an id or name.
        seed: from which a reseeded session's generators are derived.
        checkpoint_interval: save at every so many iterations, evaluated or not.
        max_seconds: stop, with a last save, once so many seconds have passed since entry.
        summary_path: where the summary goes; the cache's folder if left out.
        objects: anything else to save and restore, by name: what `TrainingCache.save` takes.

    Raises (at entry):
        NotSavable: an object could be saved and never be read back; it is named.
        CacheDirNotWritable, IndexDamaged, IndexTooNew: the cache can't be used.
        CheckpointNotFound, CheckpointMissing, Incompatible, ...: what `resume` names can't be restored.
    """

    def __init__(
        self,
        cache: TrainingCache,
        *,
        model: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        scaler: Any = None,
        loader: Any = None,
        model_config: Any = None,
        data_config: Any = None,
        training_config: Any = None,
        resume: str = "best",
        seed: int = 0,
        checkpoint_interval: int | None = None,
        max_seconds: float | None = None,
        summary_path: Path | None = None,
        **objects: Any,
    ) -> None:
        self.cache = cache
        self.id = new_session_id()
        self.configs = {"model_config": model_config, "data_config": data_config, "training_config": training_config}
        self.resume = resume
        self.seed = seed
        self.checkpoint_interval = checkpoint_interval
        self.max_seconds = max_seconds
        self.summary_path = summary_path or cache.cache_dir / SUMMARY_NAME
        self._objects: dict[str, Any] = {}
        standard = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "loader": loader}
        for name, value in {**{k: v for k, v in standard.items() if v is not None}, **objects}.items():
            self._add(name, value)
        self._state = "new"
        self._startup = Startup()
        self._record = SessionRecord(id=self.id)
        self._curves = Curves()
        self._counter = StepCounter(0)
        self._signals = SignalWatch()
        self._evaluated: tuple[int, float, dict[str, float]] | None = None
        self._saved_at: int | None = None
        self._last_saved: CheckpointMetadata | None = None
        self._stop_reason: str | None = None
        self._clock = time.monotonic()

    # --- what it found ---------------------------------------------------------------------------

    @property
    def resumed_from(self) -> CheckpointMetadata | None:
        """The checkpoint that it resumed from; None after a fresh start."""
        return self._startup.record

    @property
    def start_iteration(self) -> int:
        """Where it started: the iteration of `resumed_from`, or 0."""
        return self._startup.iteration

    @property
    def messages(self) -> tuple[str, ...]:
        """What was found, what was chosen and why, what was passed over and why; a line each."""
        return self._startup.messages

    @property
    def iteration(self) -> int:
        """Optimizer steps taken so far, over all sessions."""
        return self._counter.iteration

    @property
    def stop_reason(self) -> str | None:
        """Why `steps` ended; None while it goes on."""
        return self._stop_reason

    @property
    def evaluated_at(self) -> int | None:
        """The iteration of the last evaluation."""
        return None if self._evaluated is None else self._evaluated[0]

    @property
    def record(self) -> SessionRecord:
        """The session's record as it stands."""
        return dataclasses.replace(
            self._record,
            end_iteration=self.iteration,
            seconds=round(time.monotonic() - self._clock, 3),
            curves=self._curves.thinned(),
            stop_reason=self._stop_reason,
            revision=self._record.revision + 1,
        )

    # --- entry and exit --------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._state != "new":
            raise SessionClosed(session=self.id)
        self._clock = time.monotonic()
        capture(self._objects)  # what can't be saved is refused now, and not after hours
        self.cache.ledger.hold(self.id)
        try:
            self._startup = start(self.cache, self.id, self._objects, self.configs, resume=self.resume, seed=self.seed)
            self._counter = StepCounter(self._startup.iteration, self._objects.values())
            self._record = self.cache.record_session(self._new_record())
        except BaseException:
            self.cache.ledger.release(self.id)
            raise
        self._state = "open"
        return self

    def _new_record(self) -> SessionRecord:
        parent, end = self._startup.record, self._startup.iteration
        return SessionRecord(
            id=self.id,
            parent=None if parent is None else parent.id,
            resume=self.resume,
            reseeded=self._startup.reseeded,
            started_at=utc_now(),
            start_iteration=end,
            end_iteration=end,
            environment=environment(),
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._state != "open":
            return
        try:
            if error is None:
                self._finish()
            else:
                self._fail(error)
        finally:
            self._close()
        if error is None:
            self._pass_on_signal()

    def _finish(self) -> None:
        self._counter.abandon()
        if self._stop_reason is None:
            self._stop_reason = "finished" if self._signals.stop is None else "signal"
        self.cache.wait_until_finished()
        if self.iteration > self.start_iteration and self._saved_at != self.iteration:
            self._save("final")  # a last save that fails makes the run end non-zero

    def _fail(self, error: BaseException) -> None:
        """No checkpoint: the state in the middle of a step that failed is nothing to resume from."""
        self._stop_reason = "signal" if isinstance(error, KeyboardInterrupt) else "error"
        last = self._last_saved or self._startup.record
        log.warning(
            "the session ends by %s at iteration %d; %s",
            type(error).__name__,
            self.iteration,
            f"the last checkpoint is {last.id}" if last else "no checkpoint was saved",
        )

    def _close(self) -> None:
        self._state = "closed"
        self._signals.uninstall()
        self._counter.remove()
        try:
            self._record = self.cache.record_session(dataclasses.replace(self.record, ended_at=utc_now()))
            self._write_summary()
        except _SURVIVABLE as error:
            log.warning("the session's record could not be written: %s", error)
        finally:
            self.cache.ledger.release(self.id)

    def _pass_on_signal(self) -> None:
        """End as the signal would have ended the process, now that everything is safe."""
        if self._signals.stop == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signals.stop is not None:
            raise SystemExit(128 + self._signals.stop)

    def discard(self) -> None:
        """Close and keep nothing of this session: its checkpoints and its record go.

        Checkpoints that are pinned, named, or that another session resumed from stay.
        """
        self._check_open()
        self._stop_reason = "discarded"
        self._state = "closed"
        self._signals.uninstall()
        self._counter.remove()
        try:
            self.cache.wait_until_finished()
            self.cache.forget_session(self.id)
        finally:
            self.cache.ledger.release(self.id)

    # --- objects ---------------------------------------------------------------------------------

    def register(self, name: str, value: Any) -> None:
        """Save `value` from now on under `name`; if the session resumed and the checkpoint holds it, it is restored.

        Raises DuplicateName, NotSavable or NotRestorable.
        """
        self._check_open()
        capture({name: value})
        self._add(name, value)
        self._counter.watch([value])
        if name in self._startup.state:
            record = self._startup.record
            apply({name: value}, {name: self._startup.state[name]}, id=record.id if record else "", rng=False)

    def _add(self, name: str, value: Any) -> None:
        if name in self._objects or name in (RNG, HEADER):
            raise DuplicateName(name=name)
        self._objects[name] = value

    # --- the loop --------------------------------------------------------------------------------

    def steps(self, max_iters: int | None = None, *, session_iters: int | None = None) -> Iterator[int]:
        """The iterations that are left, counted from 0 over all sessions; one optimizer step each.

        Args:
            max_iters: how many in all. None: no end.
            session_iters: how many at most in this session.
        """
        self._check_open()
        self._signals.install()
        end = math.inf if max_iters is None else max_iters
        if session_iters is not None:
            end = min(end, self.start_iteration + session_iters)
        if self.iteration >= end:
            self._stop_reason = "nothing_to_do"
            log.info("nothing is left to do: iteration %d of %s", self.iteration, end)
        while self.iteration < end and not self._is_over():
            step = self._counter.begin()
            try:
                yield step
            except GeneratorExit:
                self._counter.abandon()
                raise
            self._counter.end()
            self._after_step()

    def _after_step(self) -> None:
        if self._signals.stop is not None or self._signals.save_requested:
            self._signals.save_requested = False
            self._try_save("signal")
        elif self.checkpoint_interval and self.iteration % self.checkpoint_interval == 0:
            self._try_save("interval")

    def _is_over(self) -> bool:
        if self._signals.stop is not None:
            self._stop_reason = "signal"
        elif self.max_seconds is not None and time.monotonic() - self._clock >= self.max_seconds:
            self._stop_reason = "max_seconds"
        return self._stop_reason is not None

    def stop(self, reason: str = "finished") -> None:
        """End `steps` after this iteration."""
        self._stop_reason = reason

    def log(self, **values: Any) -> None:
        """Note values of this iteration, e.g. ``log(loss=loss)``; a tensor is read later, and never waited for."""
        self._curves.add(self.iteration, values)

    def latest(self, name: str) -> float | None:
        """The last value that was logged under `name`; None without one."""
        return self._curves.latest(name)

    def checkpoint(
        self,
        val_loss: float | None = None,
        metrics: Mapping[str, float] | None = None,
        *,
        epoch: float | None = None,
        save_reason: str = "manual",
        **extra: Any,
    ) -> CheckpointMetadata | None:
        """Offer a checkpoint. With `val_loss`, it is saved if it improved; without, always.

        An ordinary failed save is reported, counted and survived.

        Returns the record; None where it was not saved.
        """
        self._check_open()
        if val_loss is not None or metrics:
            self.evaluated(val_loss, metrics)
        if save_reason == "manual" and val_loss is not None:
            return self._try_save("improved", if_improved=True, epoch=epoch, extra=extra)
        return self._try_save(save_reason, epoch=epoch, extra=extra)

    def evaluated(self, val_loss: float | None, metrics: Mapping[str, float] | None = None) -> None:
        """Note an evaluation at this iteration, without offering a checkpoint."""
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        self._curves.add(self.iteration, numbers)
        if val_loss is None:
            return
        loss = float(val_loss)
        self._evaluated = (self.iteration, loss, numbers)
        self._curves.add(self.iteration, {"val_loss": loss})
        first, best = self._record.first_val_loss, self._record.best_val_loss
        changes: dict[str, Any] = {"last_val_loss": loss, "first_val_loss": loss if first is None else first}
        if math.isfinite(loss) and (best is None or loss < best):
            changes["best_val_loss"] = loss
        self._record = dataclasses.replace(self._record, **changes)

    # --- saving ----------------------------------------------------------------------------------

    def _try_save(self, reason: str, **options: Any) -> CheckpointMetadata | None:
        if self._saved_at == self.iteration and reason not in ("manual", "growth"):
            return self._last_saved
        try:
            return self._save(reason, **options)
        except _SURVIVABLE as error:
            self._record = dataclasses.replace(self._record, failed_saves=self._record.failed_saves + 1)
            log.error("a checkpoint could not be saved, and training goes on: %s", error)
            return None

    def _save(
        self, reason: str, *, if_improved: bool = False, epoch: float | None = None, extra: Any = None
    ) -> CheckpointMetadata | None:
        record = self.cache.save(
            {**self._objects, RNG: capture_rng()},
            iteration=self.iteration,
            epoch=epoch,
            train_loss=self._curves.latest("loss"),
            save_reason=reason,
            session=dataclasses.replace(self.record, saved=self._record.saved + 1),
            parents=self._parents(),
            if_improved=if_improved,
            extra=extra,
            **self._measured(),
            **self.configs,
        )
        if record is not None:
            self._note_saved(record)
        return record

    def _measured(self) -> dict[str, Any]:
        """The evaluation, if it was made at this iteration; otherwise when the last one was, and what it gave."""
        if self._evaluated is None:
            return {}
        iteration, loss, metrics = self._evaluated
        if iteration == self.iteration:
            return {"val_loss": loss, "metrics": metrics}
        return {"last_val_loss": loss, "last_val_loss_iteration": iteration}

    def _parents(self) -> tuple[str, ...]:
        parent = self._last_saved or self._startup.record
        return () if parent is None else (parent.id,)

    def _note_saved(self, record: CheckpointMetadata) -> None:
        self._last_saved, self._saved_at = record, self.iteration
        best = self._record.best_checkpoint
        is_best = record.val_loss is not None and record.val_loss == self._record.best_val_loss
        self._record = dataclasses.replace(
            self._record,
            saved=self._record.saved + 1,
            evicted=self._record.evicted + len(self.cache.last_evicted),
            best_checkpoint=record.id if is_best else best,
            revision=self._record.revision + 1,
        )

    def _check_open(self) -> None:
        if self._state != "open":
            raise SessionClosed(session=self.id)

    # --- the end ---------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """What `training_summary.json` holds."""
        record, steps = self.record, self.iteration - self.start_iteration
        names = ("first_val_loss", "last_val_loss", "best_val_loss")
        losses = {name: getattr(record, name) for name in names}
        return {
            "session": self.id,
            "parent": record.parent,
            "resumed_from": record.parent,
            "start_iteration": record.start_iteration,
            "end_iteration": record.end_iteration,
            **{name: None if loss is None else encode_float(loss) for name, loss in losses.items()},
            "best_checkpoint": record.best_checkpoint,
            "saved": record.saved,
            "evicted": record.evicted,
            "failed_saves": record.failed_saves,
            "seconds": record.seconds,
            "iterations_per_second": round(steps / record.seconds, 3) if record.seconds else 0.0,
            "stop_reason": record.stop_reason,
            "cache_dir": str(self.cache.cache_dir),
        }

    def _write_summary(self) -> None:
        fs.ensure_folder(self.summary_path.parent)
        data = orjson.dumps(self.summary(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        try:
            fs.write_atomically(self.summary_path, data, writer=self.cache.ledger.writer)
        except OSError as error:
            log.warning("%s could not be written: %s", self.summary_path, fs.reason_of(error))
