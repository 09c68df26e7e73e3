"""TrainingSession: one process's stretch of training. It resumes, logs, saves, and leaves a record."""

import dataclasses
import logging
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from ckptcache.cache import TrainingCache
from ckptcache.checkpointing import SURVIVABLE, Checkpointer
from ckptcache.environment import environment
from ckptcache.errors import (
    CkptCacheError,
    DuplicateName,
    InvalidValue,
    SessionClosed,
)
from ckptcache.metadata import RESERVED_NAMES, CheckpointMetadata, SessionRecord, new_session_id, utc_now
from ckptcache.signals import SignalWatch
from ckptcache.startup import Startup, announce, avoid_repeating, be_heard, reseed_object, start
from ckptcache.state.capture import capture
from ckptcache.state.renaming import KeyMap
from ckptcache.state.restore import RNG, apply, check_fillable
from ckptcache.state.rng import capture_rng, derived_seed
from ckptcache.state.stepping import StepCounter
from ckptcache.state.warmreport import WarmStartReport
from ckptcache.storage import fs
from ckptcache.storage.ptfile import HEADER
from ckptcache.tally import Tally, summary_of
from ckptcache.values import plain_config
from ckptcache.warming import wish_of

log = logging.getLogger("ckptcache")
_STOP_REASONS = ("finished", "max_seconds", "signal", "diverged", "error")
SUMMARY_NAME = "training_summary.json"
_MAX_SECONDS = "CKPTCACHE_MAX_SECONDS"


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
        warm_start: where `resume` finds nothing to resume from, take the weights that fit from another checkpoint, and
            begin a training of its own with them, at iteration 0: True for the one that gives most, an id or name for
            that one, "DIR:ID" for one of another cache, which is only read. A module that has a method
            ``grown_state_dict(donor_state, donor_config)`` says itself what is taken: it is given the saved tensors by
            the module's own names (those of DDP and torch.compile removed, `key_map` applied) and the `model_config`
            that they were saved with, or None, and returns tensors of the module's names and shapes. What it leaves
            out stays as it is. Without the method, what agrees in name and shape is taken.
        key_map: how a warm start reads the names of saved tensors within a module: a mapping of names and of
            beginnings (``{"encoder.": "backbone."}``) to what they are now, or to None to leave them out; or a
            function of the name.
        seed: from which a reseeded session's generators are derived.
        checkpoint_interval: save at every so many iterations, evaluated or not.
        max_seconds: stop, with a last save, once so many seconds have passed since entry. If left out, what the
            environment variable CKPTCACHE_MAX_SECONDS says, so that who starts a training can limit it; without
            that, no limit.
        summary_path: where the summary goes; the cache's folder if left out.
        objects: anything else to save and restore, by name: what `TrainingCache.save` takes.

    Raises:
        InvalidValue: an interval, a limit or a configuration doesn't work.
        DuplicateName: a name is taken.

    Raises (at entry):
        NotSavable: an object could be saved and never be read back; it is named.
        InvalidValue: an object can't be changed in place, such as a number, and so never be restored.
        CacheDirNotWritable, IndexDamaged, IndexTooNew: the cache can't be used.
        CheckpointNotFound, CheckpointMissing, Incompatible, ...: what `resume` names can't be restored.
        CannotWarmStart, CacheNotFound, ...: what `warm_start` names can't give weights.
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
        warm_start: bool | str = False,
        key_map: KeyMap | None = None,
        seed: int = 0,
        checkpoint_interval: int | None = None,
        max_seconds: float | None = None,
        summary_path: str | os.PathLike[str] | None = None,
        **objects: Any,
    ) -> None:
        _check_above_0("checkpoint_interval", checkpoint_interval)
        _check_above_0("max_seconds", max_seconds)
        max_seconds = _limit_from_outside() if max_seconds is None else max_seconds
        configs = {"model_config": model_config, "data_config": data_config, "training_config": training_config}
        self.cache = cache
        self.id = new_session_id()
        self.configs: dict[str, Any] = {
            name: None if value is None else plain_config(value, name) for name, value in configs.items()
        }
        self.resume = resume
        self._wish = wish_of(warm_start, key_map)
        self.seed = seed
        self.checkpoint_interval = checkpoint_interval
        self.max_seconds = max_seconds
        self.summary_path = Path(summary_path) if summary_path else cache.cache_dir / SUMMARY_NAME
        self._objects: dict[str, Any] = {}
        standard = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "loader": loader}
        for name, value in {**{k: v for k, v in standard.items() if v is not None}, **objects}.items():
            self._add(name, value)
        self._state = "new"
        self._startup = Startup()
        self._tally = Tally(SessionRecord(id=self.id))
        self._saves = Checkpointer(cache, self._tally, self.configs, None)
        self._final: SessionRecord | None = None
        self._counter = StepCounter(0)
        self._signals = SignalWatch()
        self._owes_interval = False
        self._stop_reason: str | None = None
        self._clock = time.monotonic()

    # --- what it found ---------------------------------------------------------------------------

    @property
    def resumed_from(self) -> CheckpointMetadata | None:
        """The checkpoint that it resumed from; None after a fresh start."""
        return self._startup.record

    @property
    def warm_start_report(self) -> WarmStartReport | None:
        """What a warm start took, resized and left, tensor by tensor; None without one."""
        return self._startup.warm.report

    @property
    def start_iteration(self) -> int:
        """Where it started: the iteration of `resumed_from`, or 0."""
        return self._startup.iteration

    @property
    def is_comparable(self) -> bool:
        """Whether the losses of `resumed_from` were measured on the validation data at hand."""
        return self._startup.is_comparable

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
    def is_closed(self) -> bool:
        """Whether it has ended."""
        return self._state == "closed"

    @property
    def evaluated_at(self) -> int | None:
        """The iteration of the last evaluation in this session; None before the first."""
        return self._tally.evaluated_at

    @property
    def record(self) -> SessionRecord:
        """The session's record as it stands, and once the session is closed, as it was then."""
        if self._final is not None:
            return self._final
        return self._tally.as_of(self.iteration, time.monotonic() - self._clock, self._stop_reason)

    # --- entry and exit --------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._state != "new":
            raise SessionClosed(session=self.id)
        self._clock = time.monotonic()
        be_heard()
        capture(self._objects)  # what can't be saved is refused now, and not after hours
        check_fillable(self._objects)
        if self.resume not in RESERVED_NAMES:
            self.cache.choose(self.cache.needed(self._objects, **self._needed()), self.resume)
        self.cache.ledger.hold(self.id)
        try:
            self._start()
        except BaseException:
            self.cache.ledger.release(self.id)
            raise
        self._state = "open"
        announce(self._startup, self.cache.last_warned)
        return self

    def _start(self) -> None:
        found = start(self.cache, self._objects, self._needed(), resume=self.resume, wish=self._wish)
        declared = {name: config for name, config in self.configs.items() if config is not None}
        record = self.cache.record_session(self._new_record(found), declared or None)
        # Only now is it known who else went on from there: what two commit at once, one of them commits first.
        self._startup = avoid_repeating(found, self.cache, self._objects, session=record, seed=self.seed)
        if self._startup.reseeded:
            record = self.cache.record_session(record.changed(reseeded=True))
        self._tally = Tally(record, found.record if found.is_comparable else None)
        self._saves = Checkpointer(self.cache, self._tally, self.configs, found.parent)
        self._counter = StepCounter(found.iteration, self._objects.values())

    def _needed(self) -> dict[str, Any]:
        return {name: self.configs[name] for name in ("model_config", "data_config")}

    def _new_record(self, found: Startup) -> SessionRecord:
        return SessionRecord(
            id=self.id,
            parent=None if found.parent is None else found.parent.id,
            resume=self.resume,
            warm_start=found.warm.report is not None,
            started_at=utc_now(),
            start_iteration=found.iteration,
            end_iteration=found.iteration,
            environment=environment(),
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._state == "open":
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
        try:
            self._saves.collect()
        except BaseException:
            self._stop_reason = "error"
            raise
        finally:  # whatever became of the save before
            if self.iteration > self.start_iteration and self._tally.saved_at != self.iteration:
                self._save_last()

    def _save_last(self) -> None:
        """A last save that fails makes the run end non-zero."""
        try:
            self._saves.save("final", self._state_now(), lambda: self.record, blocking=True)
        except CkptCacheError:
            self._tally.failed(self.iteration)
            self._stop_reason = "error"
            raise
        except BaseException as error:
            self._stop_reason = "signal" if isinstance(error, KeyboardInterrupt) else "error"
            raise

    def _fail(self, error: BaseException) -> None:
        """No checkpoint: the state in the middle of a step that failed is nothing to resume from."""
        self._saves.collect()
        is_signal = isinstance(error, KeyboardInterrupt) or self._signals.stop is not None
        self._stop_reason = "signal" if is_signal else "error"
        last = self._tally.last_saved or self._startup.record
        log.warning(
            "the session ends by %s at iteration %d; %s",
            type(error).__name__,
            self.iteration,
            f"the last checkpoint is {last.id}" if last else "no checkpoint was saved",
        )

    def _close(self) -> None:
        self._final = dataclasses.replace(self.record, ended_at=utc_now())
        self._shut()
        try:
            self.cache.record_session(self._final)
            self._write_summary()
        except SURVIVABLE as error:
            log.warning("the session's record could not be written: %s", error)
        finally:
            self.cache.ledger.release(self.id)

    def _shut(self) -> None:
        self._state = "closed"
        self._signals.uninstall()
        self._counter.remove()

    def _pass_on_signal(self) -> None:
        """End as the signal would have ended the process, now that everything is safe."""
        stop, self._signals.stop = self._signals.stop, None
        if stop == signal.SIGINT:
            raise KeyboardInterrupt
        if stop is not None:
            raise SystemExit(128 + stop)

    def discard(self) -> None:
        """Close and keep nothing of this session: its checkpoints and its record go, and no summary is written.

        Checkpoints that are pinned, named, or that another session resumed from stay, and the record with them.
        """
        self._check_open()
        self._stop_reason = "discarded"
        self._final = dataclasses.replace(self.record, ended_at=utc_now())
        self._shut()
        try:
            self._saves.collect()
            self.cache.forget_session(self.id)
            if any(session.id == self.id for session in self.cache.sessions()):
                self.cache.record_session(self._final)
        finally:
            self.cache.ledger.release(self.id)

    # --- objects ---------------------------------------------------------------------------------

    def register(self, name: str, value: Any) -> None:
        """Save `value` from now on under `name`; if the session resumed and the checkpoint holds it, it is restored.

        Raises DuplicateName, NotSavable, InvalidValue or NotRestorable; `value` is then not registered.
        """
        self._check_open()
        self._check_name(name)
        capture({name: value})
        check_fillable({name: value})
        state = dict(self._startup.state)
        if name in state and self._startup.record is not None:
            self.staged()
            apply({name: value}, {name: state.pop(name)}, id=self._startup.record.id, rng=False)
            self._startup = dataclasses.replace(self._startup, state=state)
        if self._startup.reseeded:
            reseed_object(name, value, derived_seed(self.seed, self.id))
        self._add(name, value)
        self._counter.watch([value])

    def _add(self, name: str, value: Any) -> None:
        self._check_name(name)
        self._objects[name] = value

    def _check_name(self, name: str) -> None:
        if name in self._objects or name in (RNG, HEADER):
            raise DuplicateName(name=name)

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
        self._begin_steps(end)
        while self.iteration < end and not self._is_over():
            step = self._counter.begin()
            try:
                yield step
            except GeneratorExit:
                self._counter.abandon()
                raise
            self._counter.end()
            if self._state == "open":
                self._after_step(is_last=self.iteration >= end)

    def _begin_steps(self, end: float) -> None:
        if self._owes_interval:
            self._save_interval()
        if self._stop_reason == "nothing_to_do":
            self._stop_reason = None  # a loop within a loop: the first rounds were made by earlier sessions
        if self.iteration >= end and self.iteration == self.start_iteration:
            self._stop_reason = "nothing_to_do"
            log.info("nothing is left to do: iteration %d of %s", self.iteration, end)

    def _after_step(self, *, is_last: bool) -> None:
        is_last = self._is_over() or is_last
        if self._signals.stop is not None or self._signals.save_requested:
            self._signals.save_requested = False
            self._offer("signal")
        elif self.checkpoint_interval and self.iteration % self.checkpoint_interval == 0:
            # After the last step an evaluation may follow, whose loss the checkpoint should hold.
            self._owes_interval = True
            if not is_last:
                self._save_interval()

    def _save_interval(self) -> None:
        self._owes_interval = False
        self._offer("interval")

    def staged(self) -> None:
        """Call this before parameters or optimizer state are changed outside of an optimizer's step.

        Growing, clamping, swapping in averaged weights: a save may still be copying what is changed. Returns at once
        where none is. Without it such a change is noticed, and the state read again, which blocks; a write through
        ``.data`` is not noticed.
        """
        self.cache.staged()

    def stepped(self) -> None:
        """The optimizer step of this iteration is over, though it may have been left out, as a GradScaler does."""
        self._counter.note()

    def _is_over(self) -> bool:
        if self._stop_reason is not None:
            return True
        if self._signals.stop is not None:
            self._stop_reason = "signal"
        elif self.max_seconds is not None and time.monotonic() - self._clock >= self.max_seconds:
            self._stop_reason = "max_seconds"
        return self._stop_reason is not None

    def stop(self, reason: str = "finished") -> None:
        """End `steps` after this iteration.

        Args:
            reason: finished, max_seconds, signal, diverged or error; InvalidValue for another.
        """
        if reason not in _STOP_REASONS:
            raise InvalidValue(name="reason", value=reason, reason=f"it must be one of {', '.join(_STOP_REASONS)}")
        self._stop_reason = reason

    def log(self, **values: Any) -> None:
        """Note values of this iteration, e.g. ``log(loss=loss)``; a tensor on a GPU is read later, not waited for.

        Raises InvalidValue for what is not one number.
        """
        self._tally.curves.add(self.iteration, values)

    def latest(self, name: str) -> float | None:
        """The last value that was logged under `name`; None without one."""
        return self._tally.curves.latest(name)

    def checkpoint(
        self,
        val_loss: float | None = None,
        metrics: Mapping[str, float] | None = None,
        *,
        epoch: float | None = None,
        save_reason: str = "manual",
        extra: Mapping[str, Any] | None = None,
    ) -> CheckpointMetadata | None:
        """Offer a checkpoint. With `val_loss`, it is saved if it improved; without, always.

        The file is written in the background; `TrainingCache.wait_until_finished` waits for it. An ordinary failed
        save is reported, counted and survived.

        Args:
            extra: the user's own metadata, anything that JSON can hold.

        Returns the record, as yet without size and digest; None where it was not saved.
        """
        self._check_open()
        if val_loss is not None or metrics:
            self.evaluated(val_loss, metrics)
        if save_reason == "manual" and val_loss is not None:
            return self._offer("improved", if_improved=True, epoch=epoch, extra=extra)
        return self._offer(save_reason, epoch=epoch, extra=extra)

    def evaluated(self, val_loss: float | None, metrics: Mapping[str, float] | None = None) -> None:
        """Note an evaluation at this iteration, without offering a checkpoint; InvalidValue for what is no number."""
        self._check_open()
        self._tally.evaluated(self.iteration, val_loss, metrics or {})

    # --- saving ----------------------------------------------------------------------------------

    def _offer(self, reason: str, **options: Any) -> CheckpointMetadata | None:
        return self._saves.offer(reason, self._state_now(), lambda: self.record, **options)

    def _state_now(self) -> dict[str, Any]:
        return {**self._objects, RNG: capture_rng()}

    def _check_open(self) -> None:
        if self._state != "open":
            raise SessionClosed(session=self.id)

    # --- the end ---------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """What `training_summary.json` holds."""
        return summary_of(self.record, self.cache.cache_dir)

    def _write_summary(self) -> None:
        fs.ensure_folder(self.summary_path.parent)
        data = orjson.dumps(self.summary(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        try:
            fs.write_atomically(self.summary_path, data, writer=self.cache.ledger.writer)
        except OSError as error:
            log.warning("%s could not be written: %s", self.summary_path, fs.reason_of(error))


def _limit_from_outside() -> float | None:
    text = os.environ.get(_MAX_SECONDS, "").strip()
    try:
        seconds = float(text) if text else None
    except ValueError:
        seconds = math.nan
    if seconds is not None and not seconds > 0:
        raise InvalidValue(name=_MAX_SECONDS, value=text, reason="it must be a number of seconds above 0, or unset")
    return seconds


def _check_above_0(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise InvalidValue(name=name, value=value, reason="it must be above 0")
