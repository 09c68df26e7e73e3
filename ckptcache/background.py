"""One save in flight: its thread, what it waits for, and what it failed with."""

import logging
import os
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from ckptcache.state.staging import Staging

log = logging.getLogger("ckptcache")


@dataclass(frozen=True, slots=True)
class _Flight:
    thread: threading.Thread
    staging: Staging
    may_go: threading.Event


class InFlight:
    """At most one save at a time, in a thread of its own; what it fails with is kept for its owner.

    In a forked child nothing is in flight: the thread, and what it writes, are the parent's.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._turn = threading.Lock()
        self._flight: _Flight | None = None
        self._errors: dict[str | None, BaseException] = {}

    def start(self, write: Callable[[], object], staging: Staging, owner: str | None) -> bool:
        """Run `write` in a thread from `go` on, unless there is another in flight; returns whether it was started.

        Not a daemon: the interpreter waits for it at exit, so that no half file is left behind.

        Raises:
            RuntimeError: the system has no thread to give.
        """
        self._notice_fork()
        with self._turn:
            if self._flight is not None and self._flight.thread.is_alive():
                return False
            may_go = threading.Event()
            arguments = (write, staging, owner, may_go)
            # daemon=False is said, because a daemon's threads would be daemons too.
            thread = threading.Thread(target=self._run, args=arguments, name="ckptcache-save", daemon=False)
            # Known before it is started: an interrupt at the wrong instant must not leave it waiting for ever.
            self._flight = _Flight(thread, staging, may_go)
            try:
                thread.start()
            except RuntimeError:
                self._flight = None
                raise
        return True

    @property
    def is_under_way(self) -> bool:
        """Whether there is one."""
        self._notice_fork()
        return self._flight is not None

    def has(self, staging: Staging) -> bool:
        """Whether that is being saved in a thread by now."""
        flight = self._flight
        return flight is not None and flight.staging is staging and flight.thread.ident is not None

    def go(self) -> None:
        """Let what was started begin: it would take the interpreter's lock from a caller who isn't done yet."""
        if self._flight is not None:
            self._flight.may_go.set()

    def settle(self) -> None:
        """Wait until the tensors that are being saved may be changed; the file may still be on its way."""
        if (flight := self._of_others()) is not None:
            flight.staging.settle()

    def wait(self) -> None:
        """Wait for the save in flight, whoever's it is; what is called within it has nothing to wait for."""
        if (flight := self._of_others()) is not None:
            # Whoever waits stands still: the thread that saved may be one that never comes by again.
            flight.staging.settle()
            if flight.thread.is_alive():
                flight.thread.join()

    def _of_others(self) -> _Flight | None:
        self._notice_fork()
        flight = self._flight
        return None if flight is None or flight.thread is threading.current_thread() else flight

    def raise_error(self, owner: str | None) -> None:
        """Raise, once, what the last save of `owner` failed with."""
        error = self._errors.pop(owner, None)
        if error is not None:
            raise error

    def _run(self, write: Callable[[], object], staging: Staging, owner: str | None, may_go: threading.Event) -> None:
        may_go.wait()
        try:
            write()
        except BaseException as error:
            # Said at once as well: a process may end before anybody asks.
            log.error("a save in the background failed: %s", error)
            self._errors[owner] = _without_locals(error)
        finally:
            staging.end()
            with self._turn:
                self._flight = None  # or it would keep the tensors until the next save
            del write, staging  # the error's frames lead back to this one

    def _notice_fork(self) -> None:
        if self._process != os.getpid():
            self._begin()


def _without_locals(error: BaseException) -> BaseException:
    """The error with its traceback, and without the state and the memory that the frames in it hold."""
    each: BaseException | None = error
    seen: set[int] = set()
    while each is not None and id(each) not in seen:  # a chain may come back to itself
        seen.add(id(each))
        traceback.clear_frames(each.__traceback__)
        each = each.__cause__ or each.__context__
    return error
