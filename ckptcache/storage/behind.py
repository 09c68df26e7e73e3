"""A second pair of hands: one thread that takes what another hands on, in order."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class _Worker(Generic[T]):
    """Runs a function on one item after another; after a failure it runs it no more, and tells of it."""

    def __init__(self, work: Callable[[T], object]) -> None:
        self._work = work
        # Not queue.Queue, which an interrupt inside can leave such that nobody is woken by it any more.
        self._items: queue.SimpleQueue[tuple[T] | None] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._room.put(None)
        self._error: BaseException | None = None
        # A daemon: were it ever left waiting for another item, it would keep the interpreter from ending.
        self._thread: threading.Thread | None = threading.Thread(target=self._run, name="ckptcache-behind", daemon=True)

    def start(self) -> None:
        try:
            if self._thread is not None:
                self._thread.start()
        except RuntimeError:
            self._thread = None  # no more threads: the interpreter is ending, or the system's limit is reached

    def put(self, item: T) -> None:
        if self._thread is None:
            self._work(item)
            return
        self._tell()
        self._room.get()
        self._items.put((item,))

    def finish(self) -> None:
        self.stop()
        self._tell()

    def stop(self) -> None:
        """Wait for what was handed on, whatever came of it."""
        self._items.put(None)  # in any case: one that was interrupted while it was started may be about to run
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join()

    def _tell(self) -> None:
        error, self._error = self._error, None  # not to be held with all that its traceback holds
        if error is not None:
            raise error

    def _run(self) -> None:
        try:
            while (item := self._next()) is not None:
                self._work(item[0])
        except BaseException as error:
            self._error = error
            while self._next() is not None:
                pass

    def _next(self) -> tuple[T] | None:
        item = self._items.get()
        self._room.put(None)
        return item


IN_HAND = 3
"""How many items there are at once: one being made, one handed on, one at work. With as many buffers, filled in turn,
none is filled while it is still needed."""


@contextmanager
def behind(work: Callable[[T], object]) -> Iterator[Callable[[T], None]]:
    """Have `work` done on one item after another in a thread, while the caller makes the next; yields what takes them.

    It raises what `work` raised for an earlier item, and so does the end of the block, by which all is done. Where
    no thread can be started, `work` is done at once.
    """
    worker = _Worker(work)
    try:
        worker.start()  # in here: an interrupt right after it would leave a thread that waits for ever
        yield worker.put
        worker.finish()
    except BaseException:
        worker.stop()
        raise
