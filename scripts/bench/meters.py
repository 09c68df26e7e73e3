"""Clocks for what happens in more than one thread: wall, processor, and memory at its highest."""

import ctypes
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_HIGHEST = "5"


def processor_seconds() -> float:
    """What this process has used so far, in all its threads, and in the system on their behalf."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def seconds(action: Callable[[], object]) -> float:
    """How long `action` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def resident() -> int:
    """Bytes of memory that this process holds; 0 where the system doesn't say.

    What the C library keeps of what was freed is given back first, where it can be (glibc): to use that again would
    count as taking none.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    return _status("VmRSS")


def reset_highest() -> None:
    """Begin to look for the highest anew, where the system can."""
    if _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text(_RESET_HIGHEST, encoding="ascii")


def highest() -> int:
    """Bytes that this process held at most since `reset_highest`; 0 where the system doesn't say."""
    return _status("VmHWM")


def _status(name: str) -> int:
    if not _STATUS.exists():
        return 0
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
