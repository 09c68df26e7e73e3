"""The system calls that change files; `fs` makes them, and nothing else does."""

import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_KEEP_SIZE = 1
"""FALLOC_FL_KEEP_SIZE: what was cut short stays recognisable by its length."""


class System:
    """The system calls that change anything, one method each, so that a test can fail or count them."""

    def create(self, path: Path) -> int:
        """Open a new file for writing; never an existing one, and never through a link."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW | BINARY, 0o666)

    def overwrite(self, path: Path) -> int:
        """Open an existing file to write it anew; only for lock files, which nobody relies on to be whole."""
        return os.open(path, os.O_WRONLY | os.O_TRUNC | NO_FOLLOW | BINARY)

    def write(self, fd: int, data: memoryview) -> int:
        """Write some of `data`; returns how many bytes."""
        return os.write(fd, data)

    def direct(self, fd: int, on: bool) -> bool:
        """Have what is written to a file pass the system's cache by, or no longer; returns whether it does now.

        Only on Linux, and not on every file system of it. By a flag of the open file, so that it can be taken back for
        what is no whole page.
        """
        if sys.platform != "linux":
            return False
        import fcntl

        try:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags)
        except OSError:
            return False
        return on

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
