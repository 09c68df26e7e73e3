"""Locks between processes: held for an instant, or for as long as their owner lives."""

import functools
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Literal

import orjson
from filelock import FileLock, Timeout

from ckptcache.errors import CkptCacheError, LockTimeout
from ckptcache.storage import fs

LOCK_TIMEOUT = 120.0
"""Seconds to wait for the index; it is held for milliseconds, so more than this means a stuck process."""


@contextmanager
def locked(path: Path, *, timeout: float = LOCK_TIMEOUT, poll: float = 0.002) -> Iterator[None]:
    """Hold the cross-process lock file `path`, which is created at need and never removed; looks every `poll` seconds.

    Raises:
        LockTimeout: another process or thread kept it for `timeout` seconds, which may be infinite.
        OSError: the file can't be created or opened.
    """
    # Threads exclude each other by it too, as each opens the file anew. A lock of their own would make
    # every wait as long as the longest, and a child forked while it is held would wait for ever.
    lock = FileLock(path, poll_interval=poll)
    try:
        lock.acquire(timeout=timeout)
    except Timeout as error:
        raise LockTimeout(path=path, seconds=timeout) from error
    try:
        yield
    finally:
        lock.release()


LeaseState = Literal["live", "dead", "unknown"]
_LONGEST = 4096
"""Bytes of a lease, at the most."""


class Lease:
    """A lock file held for as long as its owner lives; the system frees it when the owner dies.

    filelock drops it in forked children, so that a worker that outlives its parent doesn't keep it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._owner = os.getpid()
        self._lock = FileLock(path, thread_local=False)
        # Whoever looks whether it is held takes it for an instant, hence not timeout=0.
        try:
            self._lock.acquire(timeout=LOCK_TIMEOUT)
            self._sign()
        except Timeout as error:
            raise LockTimeout(path=path, seconds=LOCK_TIMEOUT) from error
        except BaseException:
            self.release()
            raise

    def _sign(self) -> None:
        # Durably: after a power cut an empty lease would be anybody's, and what its writer left would stay for ever.
        fs.overwrite(self.path, orjson.dumps({**_this_machine(), "pid": self._owner}))

    def release(self) -> None:
        """Give it back and remove the file: its name is used once, so that nobody waits for it."""
        if os.getpid() != self._owner:
            return
        # Whether it is still locked says nothing: at exit filelock may have released it before.
        with suppress(OSError):
            fs.remove(self.path, root=self.path.parent)
        self._lock.release()


def lease_state(path: Path) -> LeaseState:
    """Whether the owner of the lease at `path` lives; "unknown" for one of another machine, or out of reach.

    One that nobody has signed yet is "live" or "unknown": its owner may be just about to, on any machine.
    """
    try:
        with fs.open_regular(path) as file:
            return _state_of(path, file)
    except FileNotFoundError:
        return "dead"
    except (OSError, CkptCacheError):
        return "unknown"


def _state_of(path: Path, file: BinaryIO) -> LeaseState:
    content = file.read(_LONGEST + 1)
    is_signed = _is_of_this_machine(content)
    if not is_signed and not _is_unsigned(content):
        return "unknown"
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return "live"
    try:
        is_made_here = _is_another(path, file)
        if is_made_here:
            fs.remove(path, root=path.parent)
    finally:
        lock.release()
    return "dead" if is_signed or is_made_here else "unknown"


def _is_another(path: Path, file: BinaryIO) -> bool:
    """Whether a lease was removed since it was read, and an empty file made in its place by who took its lock.

    A name is used once, so that nobody else's is empty there. While `file` is open its number is nobody else's.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return found.st_size == 0 and not os.path.samestat(found, os.fstat(file.fileno()))


def remove_dead_lease(path: Path) -> bool:
    """Remove a lease unless somebody holds it; returns whether it went.

    It goes while it is locked here: an owner-to-be that waits for it then sees that it is gone, and makes a new one.
    """
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return False
    try:
        fs.remove(path, root=path.parent)
    finally:
        lock.release()
    return True


def _is_of_this_machine(content: bytes) -> bool:
    """Whether a lease was signed here, in this boot or in one before, of which no process is left."""
    try:
        signed, here = orjson.loads(content), _this_machine()
        boots = {signed["boot_id"], here["boot_id"]}
        return bool(signed["host"] == here["host"] and (len(boots) == 1 or all(boots)))
    except (ValueError, TypeError, KeyError):
        return False


def _is_unsigned(content: bytes) -> bool:
    """Whether nothing stands in a lease, or the beginning of what this machine would sign."""
    return orjson.dumps(_this_machine())[:-1].startswith(content)


@functools.cache
def _this_machine() -> dict[str, str]:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return {"host": socket.gethostname(), "boot_id": boot}
