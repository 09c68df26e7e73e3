"""Clocks, cases in processes of their own, and the machine that they ran on."""

import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ckptcache.storage import fs

MAIN = Path(__file__).resolve().parent / "__main__.py"


@dataclass(frozen=True)
class Case:
    """One thing that is measured: which benchmark's, its name, and how many records there are."""

    benchmark: str
    name: str
    records: int


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


# --- one run -------------------------------------------------------------------------------------


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


# --- many cases ----------------------------------------------------------------------------------


def run(cases: Sequence[Case], repeats: int, told: Callable[[Case], None]) -> list[dict[str, Any]]:
    """The medians of each case, in milliseconds, each measured in a process of its own."""
    results = []
    for case in cases:
        told(case)
        command = [sys.executable, str(MAIN), "--only", json.dumps(asdict(case)), "--repeats", str(repeats)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        found = [Sample(**each) for each in json.loads(done.stdout)]
        results.append({**asdict(case), "repeats": repeats, **_medians(found)})
    return results


def _medians(found: Sequence[Sample]) -> dict[str, float]:
    columns = {
        "wall_ms": [s.wall for s in found],
        "processor_ms": [s.processor for s in found],
        "disk_ms": [s.disk for s in found],
        "beyond_disk_ms": [s.wall - s.disk for s in found],
    }
    return {name: round(1000 * statistics.median(values), 3) for name, values in columns.items()}


# --- the machine ---------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Processor, cores, system and versions; no name by which the machine could be told from its like."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
