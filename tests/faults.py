"""Fault injection: stand-ins for `fs.system` that count, fail or kill at a given system call.

Every operation that changes anything goes through `ckptcache.storage.fs.system`, so that swapping
it reaches all of them. Count first, then fail or kill at each number up to the count:

    with swapped(CountingSystem()) as counting:
        save()
    for at in range(len(counting.operations)):
        ...

An operation that another one makes use of (the fsync inside `fsync_folder`) is not counted by itself.
"""

import functools
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from ckptcache.storage import fs

OPERATIONS = tuple(name for name in vars(fs.System) if not name.startswith("_"))

S = TypeVar("S", bound=fs.System)


class CountingSystem(fs.System):
    """Does what `fs.System` does, and keeps the name of each operation in `operations`."""

    def __init__(self) -> None:
        self.operations: list[str] = []
        self._lock = threading.Lock()
        self._nested = threading.local()

    def before(self, number: int, operation: str, arguments: tuple[Any, ...]) -> None:
        """Called before the operation with this number, counted from 0; an exception takes its place."""


def _intercepted(operation: str) -> Callable[..., Any]:
    real = getattr(fs.System, operation)

    @functools.wraps(real)
    def call(self: CountingSystem, *arguments: Any) -> Any:
        if getattr(self._nested, "inside", False):
            return real(self, *arguments)
        with self._lock:
            number = len(self.operations)
            self.operations.append(operation)
        self.before(number, operation, arguments)
        self._nested.inside = True
        try:
            return real(self, *arguments)
        finally:
            self._nested.inside = False

    return call


for _operation in OPERATIONS:
    setattr(CountingSystem, _operation, _intercepted(_operation))


class FailingSystem(CountingSystem):
    """Fails at one operation with a system error, and does everything before and after it.

    Args:
        at: which one, counted from 0; among those called `operation`, where that is given.
        error: the errno.
        operation: one of `OPERATIONS`.
        lasting: whether every later one fails as well, like on a disk that stays full.
    """

    def __init__(self, at: int, error: int, operation: str | None = None, *, lasting: bool = False) -> None:
        super().__init__()
        self.at, self.error, self.operation, self.lasting = at, error, operation, lasting
        self.hit = False
        """Whether the failure has happened; a test that doesn't look proves nothing."""

    def before(self, number: int, operation: str, arguments: tuple[Any, ...]) -> None:
        if self.operation not in (None, operation):
            return
        if self.operation is not None:
            number = self.operations[: number + 1].count(operation) - 1
        if number == self.at or (self.lasting and number > self.at):
            self.hit = True
            raise OSError(self.error, os.strerror(self.error), *map(str, arguments[:1]))


class KillingSystem(CountingSystem):
    """Kills its own process with SIGKILL right before the operation numbered `at`, counted from 0.

    Args:
        at: which operation is never made.
        torn: when it is a write, make half of it first.
    """

    def __init__(self, at: int, *, torn: bool = False) -> None:
        super().__init__()
        self.at, self.torn = at, torn

    def before(self, number: int, operation: str, arguments: tuple[Any, ...]) -> None:
        if number != self.at:
            return
        if self.torn and operation == "write":
            fd, data = arguments
            with suppress(OSError):  # half a page can't be written past the cache
                os.write(fd, data[: len(data) // 2 // 512 * 512 or len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def swapped(system: S) -> Iterator[S]:
    """Put `system` in the place of `fs.system`, and the real one back at the end."""
    real, fs.system = fs.system, system
    try:
        yield system
    finally:
        fs.system = real


def start_child(body: Callable[[], object]) -> int:
    """Run `body` in a forked child and return its process id; it ends with 0, or 1 when `body` raises.

    Forked, because importing torch anew for each of many points of failure would take minutes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of numerical libraries, idle here
        pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        body()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def end_of(pid: int) -> int:
    """Wait for a child: its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_child(body: Callable[[], object]) -> int:
    """Run `body` in a forked child to its end: its exit status, or minus the signal that ended it."""
    return end_of(start_child(body))


@contextmanager
def ended(processes: list[int]) -> Iterator[None]:
    """End what was started, whatever happens."""
    try:
        yield
    finally:
        for pid in processes:
            os.kill(pid, signal.SIGKILL)
            end_of(pid)


def wait_for(path: Path, seconds: float = 20.0) -> None:
    """Wait until another process has made the file `path`; TimeoutError when it doesn't."""
    wait_until(path.exists, seconds, f"{path} was not made")


def wait_until(
    is_so: Callable[[], bool], seconds: float = 20.0, what: str = "it did not come about", pause: float = 0.005
) -> None:
    """Wait until `is_so()`, asked every `pause` seconds; TimeoutError saying `what` when that takes over `seconds`."""
    never = threading.Event()
    for _ in range(int(seconds / pause)):
        if is_so():
            return
        never.wait(pause)
    raise TimeoutError(f"{what} within {seconds:g} seconds")
