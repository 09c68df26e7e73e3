"""One save in flight: its thread, what it waits for, and what it failed with."""

import logging
import os
import threading
from collections.abc import Callable

from ckptcache.state.staging import Staging

log = logging.getLogger("ckptcache")


class InFlight:
    """At most one save at a time, in a thread of its own; what it fails with is raised by whoever waits.

    In a forked child nothing is in flight: the thread, and what it writes, are the parent's.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._thread: threading.Thread | None = None
        self._staging: Staging | None = None
        self._error: BaseException | None = None

    def start(self, write: Callable[[], object], staging: Staging) -> None:
        """Run `write` in a thread; RuntimeError where the system has none to give.

        Not a daemon: the interpreter waits for it at exit, so that no half file is left behind.
        """
        self._forget_parent()
        thread = threading.Thread(target=self._run, args=(write, staging), name="ckptcache-save")
        thread.start()
        self._thread, self._staging = thread, staging

    def settle(self) -> None:
        """Wait until the live tensors may be changed; the file may still be on its way."""
        self._forget_parent()
        if self._staging is not None:
            self._staging.settle()

    def wait(self) -> None:
        """Wait for the save in flight, and raise what it failed with."""
        self.settle()
        if self._thread is not None:
            self._thread.join()
        self._thread = self._staging = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, write: Callable[[], object], staging: Staging) -> None:
        try:
            write()
        except BaseException as error:
            # Said at once as well: a process may end before anybody asks.
            log.error("a save in the background failed: %s", error)
            self._error = error
        finally:
            staging.end()

    def _forget_parent(self) -> None:
        if self._owner != os.getpid():
            self._owner = os.getpid()
            self._thread = self._staging = self._error = None
