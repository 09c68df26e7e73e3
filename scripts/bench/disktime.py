"""One run of an action on the clock, and of it what the calls that write, rename and sync took."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ckptcache.storage import fs


@dataclass(frozen=True)
class Sample:
    """One run, in seconds.

    Attributes:
        wall: by the clock on the wall, all of it.
        processor: of this process, beyond what its writes and syncs took.
        disk: by the clock on the wall, what the calls that write, rename and sync took.
    """

    wall: float
    processor: float
    disk: float


class TimedSystem(fs.System):
    """The system calls that change anything, with the time that they take added up."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0
        self._depth = 0

    @contextmanager
    def _timed(self) -> Iterator[None]:
        wall, processor = time.perf_counter(), time.process_time()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            # A folder's sync is a call of `fsync` too, and must not count twice.
            if not self._depth:
                self.wall += time.perf_counter() - wall
                self.processor += time.process_time() - processor


def _timed(name: str) -> Callable[..., Any]:
    inner = getattr(fs.System, name)

    def call(self: TimedSystem, *arguments: Any) -> Any:
        with self._timed():
            return inner(self, *arguments)

    return call


for _name in ("create", "overwrite", "write", "fsync", "fsync_folder", "replace", "link", "unlink", "mkdir"):
    setattr(TimedSystem, _name, _timed(_name))


def sample(action: Callable[[], object]) -> Sample:
    """What one call of `action` takes."""
    # What earlier runs left behind is not this one's to clean up.
    gc.collect()
    before, fs.system = fs.system, TimedSystem()
    disk = fs.system
    try:
        wall, processor = time.perf_counter(), time.process_time()
        kept = action()
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
    finally:
        fs.system = before
    del kept  # after the clock was read: who uses the result keeps it
    return Sample(wall, processor - disk.processor, disk.wall)


def samples(action: Callable[[], object], repeats: int) -> list[Sample]:
    """`repeats` runs of `action`, after one that isn't counted."""
    return [sample(action) for _ in range(repeats + 1)][1:]
