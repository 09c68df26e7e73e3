"""TrainingSession: one process's stretch of training. It resumes, logs, saves, and leaves a record."""

import inspect
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from ckptcache.cache import TrainingCache
from ckptcache.checkpointing import SURVIVABLE
from ckptcache.config import in_scratch
from ckptcache.deadline import Deadline
from ckptcache.ending import Ending
from ckptcache.errors import InvalidValue, SessionClosed
from ckptcache.events import Events, Handler
from ckptcache.metadata import POLICIES, CheckpointMetadata
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
from ckptcache.proof import trace
from ckptcache.recovery import Divergence, Recovery, clear_gradients
from ckptcache.registry import Registry, check_spelling, stray_tensors
from ckptcache.signals import SignalWatch
from ckptcache.startup import Startup, announce, be_heard, loader_note, reseed_object, start, stray_note
from ckptcache.state.renaming import KeyMap
from ckptcache.state.restore import apply
from ckptcache.state.rng import derived_seed
from ckptcache.stretch import Stretch
from ckptcache.values import plain_config
from ckptcache.warming import wish_of

log = logging.getLogger("ckptcache")
_STOP_REASONS = ("finished", "max_seconds", "signal", "diverged", "error")
SUMMARY_NAME = "training_summary.json"
_MAX_SECONDS = "CKPTCACHE_MAX_SECONDS"


class TrainingSession(Ending):
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
        _check_cache(cache)
        check_spelling(objects, _options())
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

    def on(self, event: str, handler: Handler) -> None:
        """Call `handler` at each `event` with what it tells; one that raises is reported, and training goes on.

        Args:
            event: "resumed": the record, at entry; "saved": the record of a checkpoint that is durable; "evicted": a
                mapping of id to reason; "diverged": a `Divergence`; "save_failed": the error; "stopped": the reason.

        Raises:
            InvalidValue: there is no such event.
        """
        self._events.on(event, handler)

    # --- entry ------------------------------------------------------------------------------------

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
        told += [stray_note(*stray) for stray in stray_tensors(objects).items()]
        self._stretch.begin(found.telling(told), seed=self.seed)
        if self._recovery is not None:
            self._recovery.begin(self.cache, found)

    def _needed(self) -> dict[str, Any]:
        return {name: self.configs[name] for name in ("model_config", "data_config")}

    # --- objects ----------------------------------------------------------------------------------

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

    # --- the loop ---------------------------------------------------------------------------------

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
        self._stretch.saves.prepare(self._registry.objects)
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

    def _offer(self, reason: str, **options: Any) -> CheckpointMetadata | None:
        if self._has_diverged:
            return None  # what has diverged is nothing to go back to, and would push out what is
        return self._stretch.saves.offer(reason, self._state_now(), lambda: self.record, **options)

    # --- when it diverges -------------------------------------------------------------------------

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
        recovery.leave(self.id)
        factor = recovery.next_factor()
        startup = None if factor is None else self._go_back(recovery)
        if factor is None or startup is None:
            divergence = Divergence(reason, iteration, stops=True)
            self._leave_spoilt(recovery, self.resumed_from)
            self.stop("diverged")
        else:
            divergence = Divergence(reason, iteration, startup.record, factor)
            self._branch(startup, factor)
            self._leave_spoilt(recovery, startup.record)
        log.warning("%s", divergence)
        if not divergence.stops:
            announce(self._startup)
        self._events.emit("diverged", divergence)
        return not divergence.stops

    def _go_back(self, recovery: Recovery) -> Startup | None:
        self._stretch.saves.collect()
        return recovery.restore(self.cache, self._registry.objects, self._needed())

    def _leave_spoilt(self, recovery: Recovery, gone_back_to: CheckpointMetadata | None) -> None:
        """Mark what was saved of the trouble as left behind, so that no later session resumes from it unasked."""
        try:
            spoilt = [record.id for record in self.cache.checkpoints() if recovery.is_spoilt(record)]
            self.cache.leave_behind(spoilt, self.id if gone_back_to is None else gone_back_to.id)
        except SURVIVABLE as error:
            log.warning("the checkpoints that have diverged could not be marked: %s", error)

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
        self._trace.diverged()
        if self._recovery is not None:
            self._recovery.begin(self.cache, startup)


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


def _check_cache(cache: TrainingCache) -> None:
    if not isinstance(cache, TrainingCache):
        raise InvalidValue(name="cache", value=cache, reason="it must be a TrainingCache: write TrainingCache(FOLDER)")


def _options() -> list[str]:
    """What a session is told by name, but for objects and configurations."""
    given = inspect.signature(TrainingSession.__init__).parameters.values()
    return [p.name for p in given if p.kind is p.KEYWORD_ONLY and p.annotation is not Any]
