"""Cases in processes of their own, the figures that they give, and the machine that they ran on."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MAIN = Path(__file__).resolve().parent / "__main__.py"
Result = dict[str, Any]
"""What was measured of one thing: `benchmark`, `name` and figures; in their place, why there are none: `missing`, the
module that isn't installed, or `failed`."""


@dataclass(frozen=True)
class Case:
    """One thing that is measured in a process of its own.

    Attributes:
        names: what is measured, by the names that its benchmark knows; several where they take turns.
        sizes: how many records, or about how many bytes of state; several where one after another is measured.
        step: seconds that a training step is to take, where one is timed.
    """

    benchmark: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    repeats: int
    step: float = 0.0


@dataclass(frozen=True)
class Options:
    """What the command line says; None leaves it to the benchmark.

    Attributes:
        sizes: of the state, in bytes.
        most: records, of the index.
    """

    full: bool = False
    repeats: int | None = None
    sizes: tuple[int, ...] | None = None
    peers: tuple[str, ...] | None = None
    most: int | None = None
    step: float = 0.7


def run(cases: Sequence[Case], folder: str | None, told: Callable[[Case], None]) -> Iterator[Result]:
    """Measure cases one after another, below `folder`; one that fails says so in its result."""
    for case in cases:
        told(case)
        # Made here, so that it goes even when the process that fills it is killed.
        with tempfile.TemporaryDirectory(prefix="ckptcache_bench_", dir=folder) as own:
            command = [sys.executable, str(MAIN), "--only", json.dumps(asdict(case)), "--folder", own]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
        if done.returncode == 0:
            yield from json.loads(done.stdout)
        else:
            failed = f"failed with exit code {done.returncode}"
            yield from (result(case, name, size, failed=failed) for name in case.names for size in case.sizes)


def result(case: Case, name: str, size: int, **figures: Any) -> Result:
    """A result of `case`."""
    return {"benchmark": case.benchmark, "name": name, "size": size, "repeats": case.repeats, **figures}


def figures(columns: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """For each column of seconds, like ``wall``, its median in milliseconds, as ``wall_ms``, and beside it
    the quartiles, as ``wall_ms_quartiles``."""
    found: dict[str, Any] = {}
    for name, values in columns.items():
        in_ms = [1000 * value for value in values]
        found[f"{name}_ms"] = round(statistics.median(in_ms), 3)
        found[f"{name}_ms_quartiles"] = [round(value, 3) for value in _quartiles(in_ms)]
    return found


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


# --- the machine ---------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Processor, cores, system and versions; no name by which the machine could be told from its like."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(memory()[0] / 1e9, 1),
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


def memory() -> tuple[int, int]:
    """Bytes of memory there are, and available now; zeros where the system doesn't say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0, 0
    found = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return found.get("MemTotal", 0), found.get("MemAvailable", 0)
