"""The only module that writes, syncs, renames or removes a file.

What a durable write may rely on: data reach the disk with fsync of the file; a new or renamed name
reaches it with fsync of the folder. Neither is promised by rename alone. A failed fsync is never
retried: Linux marks the pages clean after reporting the error once, so that a second call that
succeeds proves nothing (Rebello et al., "Can Applications Recover from fsync Failures?", 2020).
"""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ckptcache.errors import CacheDirIsFile, CacheDirNotWritable, NotACheckpoint
from ckptcache.storage.system import BINARY, NO_FOLLOW, System

TEMP_SUFFIX = ".tmp"
_CHUNK = 8 * 1024 * 1024
_PAGE = 4096
"""What a direct write is in whole multiples of: its place in memory, its place in the file, its length."""


system = System()
"""What every change goes through; tests put one in its place that counts, fails or kills."""


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


def scan(folder: Path, *, ending: str | tuple[str, ...] = "") -> dict[str, Entry]:
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
        fd = os.open(path, os.O_RDONLY | NO_FOLLOW | BINARY | getattr(os, "O_NONBLOCK", 0))
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
        self._is_direct = False

    def write(self, data: Any) -> int:
        """Write all of `data`, which is anything with a buffer; returns its length in bytes."""
        view = memoryview(data)
        if view.nbytes:  # a view with a zero in its shape can't be cast
            self._write_all(view.cast("B"))
        return view.nbytes

    def pass_cache_by(self) -> bool:
        """Write straight to the disk from here on, if the system does that; returns whether it does.

        That takes a tenth of the processor's time, of memory that begins at a page, in blocks of megabytes. From the
        first write on that can't be made so, which is as a rule the last one, everything goes through the cache again.
        """
        self._is_direct = system.direct(self._open(), True)
        return self._is_direct

    def _write_all(self, data: memoryview) -> None:
        while len(data):
            pages = data[: len(data) // _PAGE * _PAGE]
            if self._is_direct and not pages:
                self._use_cache()
            try:
                data = data[system.write(self._open(), pages if self._is_direct else data) :]
            except OSError as error:
                # So a file system says that it wants greater multiples, or memory elsewhere; nothing was written.
                if not self._is_direct or error.errno != errno.EINVAL:
                    raise
                self._use_cache()

    def _use_cache(self) -> None:
        system.direct(self._open(), False)
        self._is_direct = False

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


def overwrite(path: Path, data: bytes) -> None:
    """Write an existing file anew, durably; only for lock files, which nobody relies on to be whole."""
    fd = system.overwrite(path)
    try:
        _write_all(fd, memoryview(data))
        system.fsync(fd)
    finally:
        os.close(fd)


def new_file(path: Path) -> BinaryIO:
    """A new file, unbuffered, for what need not be durable, such as another program's output."""
    return os.fdopen(system.create(path), "wb", buffering=0)


@contextmanager
def scratch(prefix: str, *, inside: Path | None = None, keep: bool = False) -> Iterator[Path]:
    """A new folder, among the system's temporary ones or `inside` another, that goes at the end with all that is in it.

    Links in it go, and what they point to stays.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=inside)).resolve()
    try:
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder)


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
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:  # a chain may come back to itself
        if isinstance(cause, OSError):
            return reason_of(cause)
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return str(error).split("\n")[0]
