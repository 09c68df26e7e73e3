"""The only module that writes, syncs, renames, removes or locks a file.

What a durable write may rely on: data reach the disk with fsync of the file; a new or renamed name
reaches it with fsync of the folder. Neither is promised by rename alone. A failed fsync is never
retried: Linux marks the pages clean after reporting the error once, so that a second call that
succeeds proves nothing (Rebello et al., "Can Applications Recover from fsync Failures?", 2020).
"""

import errno
import functools
import os
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import orjson
from filelock import FileLock, Timeout

from ckptcache.errors import CacheDirIsFile, CacheDirNotWritable, CkptCacheError, LockTimeout, NotACheckpoint

LOCK_TIMEOUT = 120.0
"""Seconds to wait for the index; it is held for milliseconds, so more than this means a stuck process."""
TEMP_SUFFIX = ".tmp"
_CHUNK = 8 * 1024 * 1024
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_KEEP_SIZE = 1
"""FALLOC_FL_KEEP_SIZE: what was cut short stays recognisable by its length."""


class System:
    """The system calls that change anything, one method each, so that a test can fail or count them."""

    def create(self, path: Path) -> int:
        """Open a new file for writing; never an existing one, and never through a link."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _BINARY, 0o666)

    def overwrite(self, path: Path) -> int:
        """Open an existing file to write it anew; only for lock files, which nobody relies on to be whole."""
        return os.open(path, os.O_WRONLY | os.O_TRUNC | _NO_FOLLOW | _BINARY)

    def write(self, fd: int, data: memoryview) -> int:
        """Write some of `data`; returns how many bytes."""
        return os.write(fd, data)

    def reserve(self, fd: int, size: int) -> None:
        """Take `size` bytes of the disk for a file that keeps its length; does nothing where that isn't known.

        Not `os.posix_fallocate`, which writes to every block where the file system can't reserve.
        """
        if (fallocate := _fallocate()) is not None:
            number = fallocate(fd, size)
            if number not in (0, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM):
                raise OSError(number, os.strerror(number))

    def fsync(self, fd: int) -> None:
        """Bring the file's data to the disk; on macOS past the drive's cache too."""
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        else:
            os.fsync(fd)

    def fsync_folder(self, path: Path) -> None:
        """Bring a folder's names to the disk; Windows has no such call and orders them itself."""
        if os.name == "nt":
            return
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            self.fsync(fd)
        finally:
            os.close(fd)

    def replace(self, source: Path, target: Path) -> None:
        """Rename, taking the target's place at one instant."""
        source.replace(target)

    def link(self, source: Path, target: Path) -> None:
        """A second name for the same file."""
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a name."""
        path.unlink()

    def mkdir(self, path: Path) -> None:
        """Create one folder."""
        path.mkdir()


system = System()


@functools.cache
def _fallocate() -> Callable[[int, int], int] | None:
    """The C library's `fallocate` (Linux) of a descriptor and a size, giving the error's number; None elsewhere."""
    if sys.platform != "linux" or sys.maxsize < 2**32:
        return None
    import ctypes

    function = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if function is None:
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return lambda fd, size: ctypes.get_errno() if function(fd, _KEEP_SIZE, 0, size) != 0 else 0


# --- folders -------------------------------------------------------------------------------------


def ensure_folder(path: Path) -> Path:
    """Create `path` and its parents, durably; returns it.

    Raises:
        CacheDirIsFile: something that isn't a folder stands at `path` or above it.
        CacheDirNotWritable: the system refuses.
    """
    try:
        if path.is_dir():
            return path
        ensure_folder(path.parent)
        try:
            system.mkdir(path)
        except FileExistsError:
            if not path.is_dir():  # else somebody else has made it since
                raise CacheDirIsFile(path=path) from None
        system.fsync_folder(path.parent)
    except OSError as error:
        raise CacheDirNotWritable(path=path.parent, reason=reason_of(error)) from error
    return path


def free_bytes(path: Path) -> int:
    """Bytes that an ordinary user may still write on the file system of `path` or its nearest parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


@dataclass(frozen=True, slots=True)
class Entry:
    """A regular file found in a folder."""

    name: str
    size: int
    mtime_ns: int


def scan(folder: Path, *, ending: str = "") -> dict[str, Entry]:
    """The regular files directly in `folder`, by name; links are left out, a missing folder is empty."""
    found = {}
    for item in _items(folder):
        # One that vanishes while we look must not hide the others: writers rename and evict all the time.
        if item.name.endswith(ending):
            with suppress(FileNotFoundError):
                found[item.name] = _entry(item)
    return found


def names(folder: Path) -> list[str]:
    """The names of the regular files directly in `folder`: `scan` without asking the system about each."""
    return [item.name for item in _items(folder)]


def _items(folder: Path) -> "list[os.DirEntry[str]]":
    try:
        with os.scandir(folder) as items:
            return [item for item in items if item.is_file(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _entry(item: "os.DirEntry[str]") -> Entry:
    status = item.stat(follow_symlinks=False)
    return Entry(item.name, status.st_size, status.st_mtime_ns)


# --- reading -------------------------------------------------------------------------------------


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, never through a link.

    Raises:
        FileNotFoundError: it is gone.
        NotACheckpoint: it is a link, a folder or a device.
    """
    try:
        # O_NONBLOCK: opening a named pipe would otherwise wait for its writer for ever.
        fd = os.open(path, os.O_RDONLY | _NO_FOLLOW | _BINARY | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise NotACheckpoint(path=path, reason="it is not a regular file") from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise NotACheckpoint(path=path, reason="it is not a regular file")
    return os.fdopen(fd, "rb")


def read_bytes(path: Path, *, limit: int) -> bytes:
    """All of a small regular file; ValueError when it is longer than `limit` bytes."""
    with open_regular(path) as file:
        # Python takes memory for all that it is asked to read, and limits are far above what is there.
        data = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)
    if len(data) > limit:
        raise ValueError(f"it is longer than {limit} bytes")
    return data


# --- writing -------------------------------------------------------------------------------------


class TempFile:
    """A new file beside its final place, invisible to readers until it is published.

    Its name ends in ``.<writer>.tmp``, so that what a crash leaves behind can be told from what a
    living writer is still at.
    """

    def __init__(self, final: Path, writer: str) -> None:
        self.final = final
        self.path = final.with_name(f"{final.name}.{writer}{TEMP_SUFFIX}")
        self._fd: int | None = system.create(self.path)

    def write(self, data: Any) -> int:
        """Write all of `data`, which is anything with a buffer; returns its length in bytes."""
        view = memoryview(data)
        if view.nbytes:  # a view with a zero in its shape can't be cast
            _write_all(self._open(), view.cast("B"))
        return view.nbytes

    def reserve(self, size: int) -> None:
        """Take room for `size` bytes on the disk, so that a full one says so before anything is written."""
        if size:
            system.reserve(self._open(), size)

    def flush(self) -> None:
        """Nothing is buffered here; writers of archives call it."""

    def sync(self) -> None:
        """Bring the data to the disk and close."""
        system.fsync(self._open())
        self.close()

    def close(self) -> None:
        """Close without a sync; a second call does nothing."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def publish(self) -> None:
        """Take the final name; the caller syncs the folder."""
        system.replace(self.path, self.final)

    def discard(self) -> None:
        """Remove what was written; nothing to do once published."""
        self.close()
        with suppress(FileNotFoundError):
            system.unlink(self.path)

    def _open(self) -> int:
        if self._fd is None:
            raise ValueError(f"{self.path} is closed")
        return self._fd


def _write_all(fd: int, data: memoryview) -> None:
    while len(data):
        data = data[system.write(fd, data) :]


@contextmanager
def replacing(path: Path, *, writer: str) -> Iterator[TempFile]:
    """A temporary file that is durable and at `path` when the block ends, never before; one that fails goes."""
    temp = TempFile(path, writer)
    try:
        yield temp
        temp.sync()
        temp.publish()
    except BaseException:
        temp.discard()
        raise
    sync_folder(path.parent)


def write_atomically(path: Path, data: bytes, *, writer: str) -> None:
    """Write a small file so that readers, and a power cut, see the old one or the new, whole and durable."""
    with replacing(path, writer=writer) as temp:
        temp.write(data)


def append(path: Path, data: bytes) -> None:
    """Add to a file that somebody else keeps, such as a job's summary; it is made where it isn't there."""
    with path.open("ab") as file:
        file.write(data)


def keep_generation(path: Path, kept: Path, *, writer: str) -> None:
    """Make `kept` a second name of the present file at `path`, which itself never disappears."""
    temp = kept.with_name(f"{kept.name}.{writer}{TEMP_SUFFIX}")
    try:
        system.link(path, temp)
    except FileNotFoundError:
        return
    except OSError:
        # File systems without hard links (FAT, some network ones) get a copy.
        write_atomically(kept, path.read_bytes(), writer=writer)
        return
    try:
        system.replace(temp, kept)
    finally:
        # Renaming one name of a file over another of the same file does nothing and leaves both.
        with suppress(FileNotFoundError):
            system.unlink(temp)


def sync_folder(path: Path) -> None:
    """Bring a folder's names to the disk."""
    system.fsync_folder(path)


def move(source: Path, target: Path) -> None:
    """Rename within the cache, durably on both sides."""
    system.replace(source, target)
    sync_folder(target.parent)
    if source.parent != target.parent:
        sync_folder(source.parent)


def move_aside(source: Path, folder: Path) -> Path:
    """Rename into `folder` under a name that is free there, durably; returns the new path.

    A link is taken before the old name goes, since a rename would replace what another process put there meanwhile.
    """
    number = 0
    while True:
        target = folder / (f"{source.stem}.{number}{source.suffix}" if number else source.name)
        try:
            if not os.path.lexists(target):
                _rename_new(source, target)
                break
        except FileExistsError:
            pass
        number += 1
    sync_folder(folder)
    sync_folder(source.parent)
    return target


def _rename_new(source: Path, target: Path) -> None:
    try:
        system.link(source, target)
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError as error:
        if error.errno == errno.EXDEV:
            _copy(source, target)
            system.unlink(source)
        else:
            # Folders, and file systems without hard links.
            system.replace(source, target)
    else:
        system.unlink(source)


def _copy(source: Path, target: Path) -> None:
    """A durable copy on another file system, where neither a link nor a rename leads."""
    with open_regular(source) as file, replacing(target, writer="copy") as temp:
        while chunk := file.read(_CHUNK):
            temp.write(chunk)


def remove(path: Path, *, root: Path) -> bool:
    """Remove a regular file inside `root`; returns whether it was there.

    Raises:
        ValueError: `path` is not inside `root`; nothing outside a cache is ever removed.
    """
    if not path.parent.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{path} is outside {root}")
    try:
        system.unlink(path)
    except FileNotFoundError:
        return False
    return True


def reason_of(error: OSError) -> str:
    """The cause of a system error in the system's own words."""
    return (error.strerror or str(error)).lower() if error.errno else str(error)


def reason_behind(error: BaseException) -> str:
    """The system error that an error came of, in the system's own words; the error's first line without one.

    torch turns an OSError of the file that it writes to into a RuntimeError of its own.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return reason_of(cause)
        cause = cause.__cause__ or cause.__context__
    return str(error).split("\n")[0]


# --- locks ---------------------------------------------------------------------------------------


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
        fd = system.overwrite(self.path)
        try:
            _write_all(fd, memoryview(orjson.dumps({**_this_machine(), "pid": self._owner})))
            # After a power cut an empty lease would be anybody's, and what its writer left behind would stay for ever.
            system.fsync(fd)
        finally:
            os.close(fd)

    def release(self) -> None:
        """Give it back and remove the file: its name is used once, so that nobody waits for it."""
        if os.getpid() != self._owner:
            return
        # Whether it is still locked says nothing: at exit filelock may have released it before.
        with suppress(OSError):
            system.unlink(self.path)
        self._lock.release()


def lease_state(path: Path) -> LeaseState:
    """Whether the owner of the lease at `path` lives; "unknown" for one of another machine, or out of reach.

    One that nobody has signed yet is "live" or "unknown": its owner may be just about to, on any machine.
    """
    try:
        content = read_bytes(path, limit=4096)
    except FileNotFoundError:
        return "dead"
    except (OSError, ValueError, CkptCacheError):
        return "unknown"
    is_signed = _is_of_this_machine(content)
    if not is_signed and not _is_unsigned(content):
        return "unknown"
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return "live"
    except OSError:
        return "unknown"
    try:
        # The owner removed it since it was read, and taking the lock made an empty one in its place.
        with suppress(FileNotFoundError):
            if content and path.stat().st_size == 0:
                system.unlink(path)
    finally:
        lock.release()
    return "dead" if is_signed else "unknown"


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
        system.unlink(path)
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
