"""How a session begins without a block, and how it ends: finished, failed, by a signal, or discarded."""

import atexit
import logging
import os
import signal
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from ckptcache.checkpointing import SURVIVABLE
from ckptcache.errors import CkptCacheError
from ckptcache.events import Events
from ckptcache.facts import Facts
from ckptcache.proof import trace
from ckptcache.recovery import Recovery
from ckptcache.signals import SignalWatch
from ckptcache.state.restore import RNG
from ckptcache.state.rng import capture_rng
from ckptcache.storage import fs
from ckptcache.tally import summary_of

log = logging.getLogger("ckptcache")


class Ending(Facts):
    """See `TrainingSession`."""

    summary_path: Path
    _events: Events
    _owner: int
    _recovery: Recovery | None
    _branches_left: list[str]
    _signals: SignalWatch
    _trace: trace.Trace

    def __enter__(self) -> Self:
        """Resume, or begin afresh."""
        raise NotImplementedError

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

    def _state_now(self) -> dict[str, Any]:
        return {**self._registry.state(), RNG: capture_rng()}

    def summary(self) -> dict[str, Any]:
        """What `training_summary.json` holds."""
        return summary_of(self.record, self.cache.cache_dir)

    def _write_summary(self) -> None:
        data = orjson.dumps(self.summary(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        try:
            fs.ensure_folder(self.summary_path.parent)
            fs.write_atomically(self.summary_path, data, writer=self.cache.ledger.writer)
        except (OSError, *SURVIVABLE) as error:
            reason = fs.reason_of(error) if isinstance(error, OSError) else error
            log.warning("%s could not be written: %s", self.summary_path, reason)
