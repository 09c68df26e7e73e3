"""TrainingSession: one process's stretch of training. It resumes, logs, saves, and leaves a record."""

import atexit
import logging
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from ckptcache import trace
from ckptcache.cache import TrainingCache
from ckptcache.checkpointing import SURVIVABLE
from ckptcache.config import in_scratch
from ckptcache.deadline import Deadline
from ckptcache.errors import CkptCacheError, InvalidValue, SessionClosed
from ckptcache.events import Events, Handler
from ckptcache.metadata import POLICIES, CheckpointMetadata, SessionRecord
from ckptcache.overrides import (
    apply_overrides,
    check_overrides,
    differences,
    lowered,
    note_starting_rates,
    optimizers_in,
    scale_learning_rate,
    settings_of,
)
from ckptcache.policy.divergence import DivergenceGuard
from ckptcache.recovery import Divergence, Recovery, clear_gradients
from ckptcache.registry import Registry
from ckptcache.signals import SignalWatch
from ckptcache.startup import Startup, announce, be_heard, loader_note, reseed_object, start
from ckptcache.state.renaming import KeyMap
from ckptcache.state.restore import RNG, RestoreReport, apply
from ckptcache.state.rng import capture_rng, derived_seed
from ckptcache.state.warmreport import WarmStartReport
from ckptcache.storage import fs
from ckptcache.stretch import Stretch
from ckptcache.tally import summary_of
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
    `training_summary.json` and the session's record in the index are written. `start` and `close` do without the block.

    Args:
        cache: where checkpoints are kept.
        model, optimizer, scheduler, scaler, loader: registered under these names, if given. A loader without
            `state_dict` is not saved: after a resume its epoch begins anew, which is said.
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
        max_seconds: be done, last save included, within so many seconds of entry, as far as the steps and saves so
            far tell. If left out, what the environment variable CKPTCACHE_MAX_SECONDS says, so that who starts a
            training can limit it; without that, no limit.
        overrides: settings of the optimizers that hold whatever a checkpoint says, such as ``{"lr": 1e-4}`` for all of
            them, or ``{"optimizer": {"lr": 1e-4}}`` for one. Under a scheduler ``lr`` is where its schedule starts.
        divergence_guard: what counts as diverged by the values logged as ``loss`` and by validation losses; the session
            then goes back to the best good checkpoint, see `DivergenceGuard`. None: no guard. An iterator that the loop
            has drawn from a loader is the loop's own: make it anew at "diverged".
        summary_path: where the summary goes; the cache's folder if left out.
        objects: anything else to save and restore, by name: what `TrainingCache.save` takes. Numbers and other plain
            values are kept in `values`.

    Raises:
        InvalidValue: an interval, a limit or a configuration doesn't work.
        DuplicateName: a name is taken.

    Raises (at entry):
        NotSavable: an object could be saved and never be read back; it is named.
        InvalidValue: an object can't be restored, a scheduler drives an optimizer that isn't registered, or an override
            names no setting.
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
        overrides: Mapping[str, Any] | None = None,
        divergence_guard: DivergenceGuard | None = None,
        summary_path: str | os.PathLike[str] | None = None,
        **objects: Any,
    ) -> None:
        _check_above_0("checkpoint_interval", checkpoint_interval)
        _check_above_0("max_seconds", max_seconds)
        configs = {"model_config": model_config, "data_config": data_config, "training_config": training_config}
        self.cache = cache
        self.configs: dict[str, Any] = {
            name: None if value is None else plain_config(value, name) for name, value in configs.items()
        }
        self._trace = trace.from_environment()
        self.resume = self._trace.policy(resume)
        self._wish = wish_of(warm_start, key_map)
        self.seed = seed
        self.checkpoint_interval = checkpoint_interval
        self.max_seconds = _limit_from_outside() if max_seconds is None else max_seconds
        self.overrides = dict(overrides or {})
        self.summary_path = Path(in_scratch(os.fspath(summary_path or cache.cache_dir / SUMMARY_NAME)))
        self._registry = Registry()
        standard = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "loader": loader}
        for name, value in {**{k: v for k, v in standard.items() if v is not None}, **objects}.items():
            self._registry.add(name, value)
        self._state, self._owner = "new", os.getpid()
        self._events = Events()
        self._stretch = self._new_stretch(resume)
        guard = divergence_guard
        self._recovery = None if guard is None else Recovery(guard, endures_overflow=scaler is not None)
        self._recoveries = 0
        self._branches_left: list[str] = []
        self._deadline = Deadline(self.max_seconds)
        self._signals = SignalWatch()
        self._owes_interval = False
        self._stop_reason: str | None = None
        self._entered = self._step_began = time.monotonic()

    def _new_stretch(self, resume: str) -> Stretch:
        return Stretch(self.cache, self._registry, self.configs, self._events, resume=resume)

    # --- what it found ---------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """The session's id; after a divergence, that of the branch that it went on with."""
        return self._stretch.id

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

    def tell(self, line: str) -> None:
        """Add to `messages` what a front end has to say of how the session starts, and log it."""
        self._stretch.startup = self._startup.telling([line])
        log.info("%s", line)

    @property
    def report(self) -> RestoreReport:
        """Which parts were restored, which stayed fresh, and which parts of the checkpoint went unused."""
        return self._startup.report

    @property
    def values(self) -> dict[str, Any]:
        """Plain values that are saved with every checkpoint and come back at a resume: change them as you like."""
        return self._registry.values

    @property
    def iteration(self) -> int:
        """Optimizer steps taken so far, over all sessions."""
        return self._stretch.counter.iteration

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
        return self._stretch.tally.evaluated_at

    @property
    def recoveries(self) -> int:
        """How often it went back to a checkpoint because it had diverged."""
        return self._recoveries

    @property
    def record(self) -> SessionRecord:
        """The session's record as it stands, and once the session is closed, as it was then."""
        return self._stretch.record(self._stop_reason)

    @property
    def _startup(self) -> Startup:
        return self._stretch.startup

    def on(self, event: str, handler: Handler) -> None:
        """Call `handler` at each `event` with what it tells; one that raises is reported, and training goes on.

        Args:
            event: "resumed": the record, at entry; "saved": the record of a checkpoint that is durable; "evicted": a
                mapping of id to reason; "diverged": a `Divergence`; "save_failed": the error; "stopped": the reason.

        Raises:
            InvalidValue: there is no such event.
        """
        self._events.on(event, handler)

    # --- entry and exit --------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._state != "new":
            raise SessionClosed(session=self.id)
        self._entered = time.monotonic()
        be_heard()
        self._registry.check()
        check_overrides(self.overrides, self._registry.objects)
        if self.resume not in POLICIES:
            self.cache.choose(self.cache.needed(self._registry.objects, **self._needed()), self.resume)
        self._stretch.hold()
        try:
            self._start()
        except BaseException:
            self._stretch.release()
            raise
        self._state = "open"
        announce(self._startup, self.cache.last_warned)
        self._trace.opened(self._registry.all(), self._startup)
        if self.resumed_from is not None:
            self._events.emit("resumed", self.resumed_from)
        return self

    def _start(self) -> None:
        objects = self._registry.objects
        note_starting_rates(objects)
        given = {name: settings_of(optimizer) for name, optimizer in optimizers_in(objects).items()}
        found = start(self.cache, objects, self._needed(), resume=self.resume, wish=self._wish)
        self._registry.take_values(found.state)
        told = [] if found.record is None else differences(given, objects, self.overrides)
        told += apply_overrides(self.overrides, objects)
        if found.record is not None:
            told += map(loader_note, self._registry.without_state.values())
        self._stretch.begin(found.telling(told), seed=self.seed)
        if self._recovery is not None:
            self._recovery.begin(self.cache, found)

    def _needed(self) -> dict[str, Any]:
        return {name: self.configs[name] for name in ("model_config", "data_config")}

    def start(self) -> Self:
        """Enter without a ``with`` block, for a script whose loop is not to be indented; `close` ends it.

        A script that ends without `close`, by an error say, ends the session as one: without a last checkpoint.
        """
        self.__enter__()
        atexit.register(self._abandon)
        return self

    def close(self) -> None:
        """End the session that `start` began, with a last save; does nothing where it has ended.

        Raises what the end of a ``with`` block raises: SaveFailed, KeyboardInterrupt or SystemExit.
        """
        atexit.unregister(self._abandon)
        self.__exit__(None, None, None)

    def _abandon(self) -> None:
        if self._state == "open" and os.getpid() == self._owner:
            self.__exit__(SystemExit, SystemExit("the program ended without close()"), None)

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
        self._stretch.counter.abandon()
        if self._recovery is not None:
            self._recovery.catch_up()
        if self._stop_reason is None:
            ended = "diverged" if self._has_diverged else "finished"
            self._stop_reason = ended if self._signals.stop is None else "signal"
        try:
            self._stretch.saves.collect()
        except BaseException:
            self._stop_reason = "error"
            raise
        finally:  # whatever became of the save before
            if self._owes_last_save():
                self._save_last()

    def _owes_last_save(self) -> bool:
        is_new = self.iteration > self.start_iteration and self._stretch.tally.saved_at != self.iteration
        return is_new and not self._has_diverged

    @property
    def _has_diverged(self) -> bool:
        return self._recovery is not None and self._recovery.found is not None

    def _save_last(self) -> None:
        """A last save that fails makes the run end non-zero."""
        try:
            self._stretch.saves.save("final", self._state_now(), lambda: self.record, blocking=True)
        except CkptCacheError as error:
            self._stretch.tally.failed(self.iteration)
            self._stop_reason = "error"
            self._events.emit("save_failed", error)
            raise
        except BaseException as error:
            self._stop_reason = "signal" if isinstance(error, KeyboardInterrupt) else "error"
            raise

    def _fail(self, error: BaseException) -> None:
        """No checkpoint: the state in the middle of a step that failed is nothing to resume from."""
        self._stretch.saves.collect()
        is_signal = isinstance(error, KeyboardInterrupt) or self._signals.stop is not None
        self._stop_reason = "signal" if is_signal else "error"
        last = self._stretch.tally.last_saved or self._startup.record
        log.warning(
            "the session ends by %s at iteration %d; %s",
            type(error).__name__,
            self.iteration,
            f"the last checkpoint is {last.id}" if last else "no checkpoint was saved",
        )

    def _close(self) -> None:
        self._shut()
        self._trace.end(self.iteration, self._stop_reason)
        try:
            self._stretch.close(self._stop_reason)
            with suppress(*SURVIVABLE):
                self._write_summary()
        finally:
            self._stretch.release()
        self._events.emit("stopped", self._stop_reason)

    def _shut(self) -> None:
        self._state = "closed"
        self._signals.uninstall()

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
        self._shut()
        self._stretch.end(self._stop_reason)
        try:
            self._stretch.saves.collect()
            for id in (self.id, *reversed(self._branches_left)):
                self.cache.forget_session(id)
            if any(session.id == self.id for session in self.cache.sessions()):
                self.cache.record_session(self.record)
        finally:
            self._stretch.release()

    # --- objects ---------------------------------------------------------------------------------

    def register(self, name: str, value: Any) -> Any:
        """Save `value` from now on under `name`; if the session resumed and the checkpoint holds it, it is restored.

        Returns:
            `value`; for a number or another plain value the one that holds now, a restored one if there was one. It
            lives on in `values`: ``session.values[name] = ...`` changes it.

        Raises DuplicateName, NotSavable, InvalidValue or NotRestorable; `value` is then not registered.
        """
        self._check_open()
        held = self._registry.add(name, value)
        try:
            self._registry.check(names=[name])
            self._restore_late(name, value)
        except BaseException:
            self._registry.forget(name)
            raise
        self._stretch.counter.watch([value])
        if self._recovery is not None:
            self._recovery.keep_more({name: value})
        return held

    def _restore_late(self, name: str, value: Any) -> None:
        if name not in self._registry.objects:
            return
        if name in self._startup.state and self._startup.record is not None:
            self.staged()
            apply({name: value}, {name: self._startup.state[name]}, id=self._startup.record.id, rng=False)
            self._stretch.startup = self._startup.without(name)
        if self._startup.reseeded:
            reseed_object(name, value, derived_seed(self.seed, self.id))

    # --- the loop --------------------------------------------------------------------------------

    def steps(self, max_iters: int | None = None, *, session_iters: int | None = None) -> Iterator[int]:
        """The iterations that are left, counted from 0 over all sessions; one optimizer step each.

        With a divergence guard, the iteration after one that diverged may be an earlier one.

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
            step, self._step_began = self._stretch.counter.begin(), time.monotonic()
            self._trace.begin()
            try:
                yield step
            except GeneratorExit:
                self._stretch.counter.abandon()
                raise
            self._stretch.counter.end()
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
        elif self._recovery is not None and self.resumed_from is None and self.iteration == self.start_iteration:
            self._recovery.keep_start(self._registry.state())

    def _after_step(self, *, is_last: bool) -> None:
        self._stretch.saves.collect_finished()
        self._deadline.stepped(time.monotonic() - self._step_began)
        self._deadline.saved(self._stretch.saves.seconds)
        if self.recover():
            return
        is_last = self._is_over() or is_last
        if self._signals.stop is not None or self._signals.save_requested:
            self._signals.save_requested = False
            self._offer("signal")
        elif self.checkpoint_interval and self.iteration % self.checkpoint_interval == 0:
            # After the last step an evaluation may follow, whose loss the checkpoint should hold.
            self._owes_interval = True
            if not is_last:
                self._save_interval()
        self._trace.step(
            self.iteration, save=lambda: self._offer("interval"), settle=self._stretch.saves.collect, stop=self.stop
        )

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
        self._stretch.counter.note()

    def _is_over(self) -> bool:
        if self._stop_reason is not None:
            return True
        if self._signals.stop is not None:
            self._stop_reason = "signal"
        elif self._deadline.is_due(time.monotonic() - self._entered):
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
        self._stretch.tally.curves.add(self.iteration, values)
        self._trace.log(values)
        if self._recovery is not None and "loss" in values:
            self._recovery.logged(self.iteration, values["loss"], self._stretch.counter.begun)

    def latest(self, name: str) -> float | None:
        """The last value that was logged under `name`; None without one."""
        return self._stretch.tally.curves.latest(name)

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
        loss = self._stretch.tally.evaluated(self.iteration, val_loss, metrics or {})
        self._trace.log({**({} if val_loss is None else {"val_loss": val_loss}), **(metrics or {})})
        if self._recovery is not None:
            self._recovery.evaluated(self.iteration, loss)

    # --- saving ----------------------------------------------------------------------------------

    def _offer(self, reason: str, **options: Any) -> CheckpointMetadata | None:
        if self._has_diverged:
            return None  # what has diverged is nothing to go back to, and would push out what is
        return self._stretch.saves.offer(reason, self._state_now(), lambda: self.record, **options)

    def _state_now(self) -> dict[str, Any]:
        return {**self._registry.state(), RNG: capture_rng()}

    def _check_open(self) -> None:
        if self._state != "open":
            raise SessionClosed(session=self.id)

    # --- when it diverges ------------------------------------------------------------------------

    def recover(self) -> bool:
        """If the guard has noticed a divergence, go back to the best good checkpoint, as a new branch.

        `steps` does so by itself after each iteration; a loop that evaluates after its last one may call it, and
        go through `steps` again. Where all has been tried, the session stops as "diverged".

        Returns:
            Whether it went back.
        """
        recovery = self._recovery
        if recovery is None or self._stop_reason not in (None, "finished"):
            return False
        if recovery.found is None:
            if (last := self._stretch.saves.last_durable) is not None:
                recovery.saved(last)
            return False
        reason, iteration = recovery.found
        factor = recovery.next_factor()
        startup = None if factor is None else self._go_back(recovery)
        if factor is None or startup is None:
            divergence = Divergence(reason, iteration, stops=True)
            self.stop("diverged")
        else:
            divergence = Divergence(reason, iteration, startup.record, factor)
            self._branch(startup, factor)
        log.warning("%s", divergence)
        if not divergence.stops:
            announce(self._startup)
        self._events.emit("diverged", divergence)
        return not divergence.stops

    def _go_back(self, recovery: Recovery) -> Startup | None:
        self._stretch.saves.collect()
        return recovery.restore(self.cache, self._registry.objects, self._needed(), session=self.id)

    def _branch(self, startup: Startup, learning_rate_factor: float) -> None:
        """Close this stretch as diverged, and begin another where `startup` is."""
        fresh = self._new_stretch("recovery")
        fresh.hold()
        try:
            self._registry.take_values(startup.state)
            fresh.begin(startup, seed=self.seed, reseed_because="training has diverged")
        except BaseException:  # the disk is full, say: the stretch that was open is the one that ends
            fresh.end("error")
            fresh.release()
            raise
        ended, self._stretch = self._stretch, fresh
        ended.close("diverged")
        ended.release()
        self._branches_left.append(ended.id)
        clear_gradients(self._registry.objects)
        scale_learning_rate(self._registry.objects, learning_rate_factor)
        self.overrides = lowered(self.overrides, learning_rate_factor)
        apply_overrides(self.overrides, self._registry.objects)
        self._recoveries += 1
        if self._recovery is not None:
            self._recovery.begin(self.cache, startup)

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
