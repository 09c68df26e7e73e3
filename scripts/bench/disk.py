"""What the system does to the files of a benchmark: syncs them, forgets or holds them in its page cache, writes raw."""

import mmap
import os
from collections.abc import Iterable
from pathlib import Path

PIECE = 16 << 20


def sync(files: Iterable[Path]) -> None:
    """Sync files and their folders."""
    folders = set()
    for file in files:
        _sync_one(file)
        folders.add(file.parent)
    for folder in folders:
        _sync_one(folder)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def forget(files: Iterable[Path]) -> None:
    """Let the page cache forget synced files; their names and sizes it may still know."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def read_once(files: Iterable[Path]) -> None:
    """Read files from end to end, into memory that is used again for every piece."""
    buffer = mmap.mmap(-1, PIECE)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def disk_bytes(files: Iterable[Path]) -> int:
    """What files take on the disk; holes take nothing."""
    return sum(file.stat().st_blocks * 512 for file in files)


# --- the yardsticks ------------------------------------------------------------------------------


def touched(nbytes: int) -> mmap.mmap:
    """Page-aligned memory of its own that has been written to, in whole pieces."""
    buffer = mmap.mmap(-1, -(-nbytes // PIECE) * PIECE)
    noise = os.urandom(PIECE)
    for start in range(0, len(buffer), PIECE):
        buffer[start : start + PIECE] = noise
    return buffer


def write_and_sync(path: Path, buffer: mmap.mmap, nbytes: int) -> None:
    """Write through the page cache, and sync file and folder."""
    _write(path, buffer, nbytes, 0)


def write_directly(path: Path, buffer: mmap.mmap, nbytes: int) -> None:
    """Write past the page cache (O_DIRECT), and sync file and folder; the last block is written whole.

    Raises:
        OSError: the file system can't.
    """
    _write(path, buffer, -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE, os.O_DIRECT)


def _write(path: Path, buffer: mmap.mmap, nbytes: int, flags: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags, 0o644)
    view = memoryview(buffer)
    try:
        # Room that is reserved first is written faster, and as one piece.
        os.posix_fallocate(handle, 0, nbytes)
        written = 0
        while written < nbytes:
            written += os.pwrite(handle, view[written : min(written + PIECE, nbytes)], written)
        os.fsync(handle)
    finally:
        view.release()
        os.close(handle)
    _sync_one(path.parent)
