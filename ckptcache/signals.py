"""Signals that ask a training to save: noticed at once, acted on between two optimizer steps."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

STOPPING = tuple(s for s in (getattr(signal, "SIGTERM", None), signal.SIGINT) if s is not None)
SAVING = tuple(s for s in (getattr(signal, "SIGUSR1", None),) if s is not None)
"""Asks for a save, after which training goes on: what a scheduler sends ahead of the end."""


class SignalWatch:
    """Catches SIGTERM, SIGINT and SIGUSR1 while it is installed; a second SIGINT interrupts at once.

    Handlers that were there before are called too, where they are callable; Python's own for
    SIGINT only the second time, since it would interrupt in the middle of a step.
    """

    def __init__(self) -> None:
        self.stop: signal.Signals | None = None
        """The first signal that asked to stop."""
        self.save_requested = False
        self._previous: dict[signal.Signals, Any] = {}
        self._owner = os.getpid()

    def install(self) -> bool:
        """Start catching; only the main thread may, elsewhere it returns False."""
        if self._previous or threading.current_thread() is not threading.main_thread():
            return bool(self._previous)
        for number in (*STOPPING, *SAVING):
            self._previous[number] = signal.signal(number, self._notice)
        return True

    def uninstall(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _notice(self, number: int, frame: FrameType | None) -> None:
        caught = signal.Signals(number)
        if os.getpid() != self._owner:
            self._let_child_end(caught)
            return
        previous: Callable[[int, FrameType | None], Any] | Any = self._previous.get(caught)
        is_second = self.stop is not None and caught == signal.SIGINT
        if caught in SAVING:
            self.save_requested = True
        elif self.stop is None:
            self.stop = caught
        if is_second:
            signal.default_int_handler(number, frame)
        elif callable(previous) and previous is not signal.default_int_handler:
            previous(number, frame)

    def _let_child_end(self, caught: signal.Signals) -> None:
        """A forked child inherits the handlers: SIGTERM ends it, what a whole group gets is its parent's."""
        if caught not in (signal.SIGINT, *SAVING):
            signal.signal(caught, signal.SIG_DFL)
            os.kill(os.getpid(), caught)
