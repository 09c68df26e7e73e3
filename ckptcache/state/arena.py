"""Memory to stage saves in: taken once, used again for each, given back after a while without any."""

import contextlib
import ctypes
import mmap
import os
import sys
import threading
import time
import weakref
from pathlib import Path

import torch

IDLE_SECONDS = 300.0
"""How long memory is kept for the next save, at the least: fresh pages for 1.5 GB cost more than all else of a copy."""
LONGEST_IDLE_SECONDS = 7200.0
"""And at the most, where saves are further apart."""
_PATIENCE = 1.5
"""So many times as long as the last save was after the one before."""
_PORTABLE = 1
"""cudaHostRegisterPortable: locked for every device of the process, not only for the one that is current."""
_MARGIN = 64 << 20
"""Bytes that are left to the rest of the program."""
_NO_DEVICE = -1
"""torch's own word for it."""
_HUGE_PAGE = 2 << 20
_AT_ONCE = 32 << 20
_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE (Linux 5.14), which Python has no name for; nor has it for the next."""
_WIPE_ON_FORK = 18
"""MADV_WIPEONFORK (Linux 4.14)."""


class Arena:
    """Page-aligned memory of one process, for one save at a time.

    A forked child sees zeros in its place and shares nothing of it: a data loader's worker would otherwise
    keep the pages of the save before, and have the next one copy each page that it writes.
    """

    def __init__(self, idle_seconds: float = IDLE_SECONDS, longest: float = LONGEST_IDLE_SECONDS) -> None:
        self._idle_seconds = idle_seconds
        self._longest = longest
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._memory: mmap.mmap | None = None
        self._taken: float | None = None
        self._pause = 0.0
        self._is_pinned = False
        self._device = _NO_DEVICE
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def take(self, size: int, *, pinned: bool = False) -> memoryview | None:
        """`size` bytes, whatever they hold; None where memory doesn't suffice for them beside everything else.

        Args:
            pinned: lock the pages for the copies of a CUDA device, where its driver lets us.
        """
        if self._process != os.getpid():
            self._begin()  # a child has its own; the lock may have been held when it was forked
        with self._lock:
            self._stop_timer()
            self._notice_pause()
            if self._memory is None or len(self._memory) < size:
                self._drop()  # the old goes before the new comes
                self._memory = _allocate(size)
            if self._memory is None:
                return None
            if pinned and not self._is_pinned:
                self._device = _current_device()
                self._is_pinned = _register(self._memory)
            return memoryview(self._memory)[:size]

    def prepare(self, size: int) -> None:
        """Take `size` bytes for the next save, and have the system give them now, in a thread.

        Otherwise the first save would be copied into pages that the system has yet to find and clear: that takes far
        longer than the copy, and the next step waits for it. Nothing happens where some are held already, or where
        memory doesn't suffice.
        """
        if self._process != os.getpid():
            self._begin()
        with self._lock:
            if self._memory is None:
                self._memory = _allocate(size)
                if self._memory is not None:
                    with contextlib.suppress(RuntimeError):  # no more threads: the first save does it
                        threading.Thread(
                            target=_populate, args=(self._memory,), name="ckptcache-prepare", daemon=True
                        ).start()

    def _notice_pause(self) -> None:
        now = time.monotonic()
        self._pause = 0.0 if self._taken is None else now - self._taken
        self._taken = now

    def give_back(self) -> None:
        """The save is over; unless another one comes in about the time that this one took to come, the memory goes."""
        with self._lock:
            self._stop_timer()
            if self._memory is not None:
                # Weakly, or it would keep the memory of a cache that nobody holds any more.
                seconds = max(self._idle_seconds, min(_PATIENCE * self._pause, self._longest))
                timer = threading.Timer(seconds, _release, [weakref.ref(self)])
                timer.daemon = True
                try:
                    timer.start()
                except RuntimeError:  # no more threads: the interpreter is ending, or the system's limit is reached
                    self._drop()
                else:
                    self._timer = timer

    def release(self) -> None:
        """Give the memory back to the system now; whoever still holds a view of it keeps it until then."""
        with self._lock:
            self._stop_timer()
            self._drop()

    def __del__(self) -> None:
        # Pages that are locked for a device stay so, for good, when their addresses go.
        if self._process == os.getpid() and not sys.is_finalizing():
            self._drop()

    def _drop(self) -> None:
        memory, self._memory = self._memory, None
        if self._is_pinned and memory is not None:
            # In a thread of its own this would take place on the first device, and waken it.
            with torch.cuda.device(self._device):
                torch.cuda.cudart().cudaHostUnregister(_address(memory))  # type: ignore[no-untyped-call]
        self._is_pinned = False

    @property
    def size(self) -> int:
        """Bytes that are held."""
        return 0 if self._memory is None else len(self._memory)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _release(arena: "weakref.ref[Arena]") -> None:
    held = arena()
    if held is not None:
        held.release()


def _allocate(size: int) -> mmap.mmap | None:
    rounded = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    free = available_bytes()
    if free is not None and rounded + _MARGIN > free:
        return None
    try:
        memory = _anonymous(rounded)
    except (OSError, MemoryError):
        return None
    # Advice, which a system may not know.
    for advice in (getattr(mmap, "MADV_HUGEPAGE", None), getattr(mmap, "MADV_DONTDUMP", None), _wipe_on_fork()):
        if advice is not None:
            with contextlib.suppress(OSError):
                memory.madvise(advice)
    return memory


def _populate(memory: mmap.mmap) -> None:
    """Have every page of `memory` there, whatever it holds (Linux 5.14; elsewhere nothing happens)."""
    if sys.platform == "linux":
        library, start = ctypes.CDLL(None), _address(memory)
        for offset in range(0, len(memory), _AT_ONCE):
            # Not by mmap's own method, which keeps the interpreter's lock all the while.
            length = min(_AT_ONCE, len(memory) - offset)
            library.madvise(ctypes.c_void_p(start + offset), ctypes.c_size_t(length), _POPULATE_WRITE)


def _anonymous(size: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    # Private: shared memory, mmap's default, would count against /dev/shm's rules for huge pages.
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _wipe_on_fork() -> int | None:
    return _WIPE_ON_FORK if sys.platform == "linux" else None


def _current_device() -> int:
    return torch.cuda.current_device() if torch.cuda.is_available() else _NO_DEVICE


def _register(memory: mmap.mmap) -> bool:
    size = len(memory)
    return int(torch.cuda.cudart().cudaHostRegister(_address(memory), size, _PORTABLE)) == 0  # type: ignore[no-untyped-call]


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def available_bytes() -> int | None:
    """Bytes that this process could still take without swapping or being killed; None where the system doesn't tell."""
    found = [bytes for bytes in (_of_machine(), _of_container()) if bytes is not None]
    return min(found, default=None)


def _of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _of_container(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's limit leaves (cgroup v2): what was read of files and isn't in use can go."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        files = (folder / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return None
    idle = next((int(line.split()[1]) for line in files if line.startswith("inactive_file ")), 0)
    return None if limit == "max" else max(0, int(limit) - used + idle)
