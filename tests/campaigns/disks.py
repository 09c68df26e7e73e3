"""File systems that a test mounts for itself: an ext4 whose power can be cut, a small one in memory."""

import ctypes
import fcntl
import functools
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

Requires = Callable[..., None]
"""The fixture of that name."""
_SHUTDOWN = 0x8004587D
"""EXT4_IOC_SHUTDOWN, from the kernel's fs/ext4/ext4.h."""
_WITHOUT_FLUSHING_THE_LOG = 2
_CLONE_NEWNS = 0x00020000


def mount(*arguments: str | Path) -> None:
    """Call the system's mount, seen by this process and its children alone."""
    _see_mounts_alone()
    run("mount", *arguments)


def run(*command: str | Path) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode != 0:
        raise OSError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")


@functools.cache
def _see_mounts_alone() -> None:
    """What is mounted from here on goes when this process ends, however it ends, and its loop device with it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare: the mounts of this process can't be made its own")
    run("mount", "--make-rprivate", "/")


class Disk:
    """A file system of a test's own, at `root` while it is mounted.

    Args:
        folder: where its image and the folder that it is mounted at are made.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder / "disk"
        self.root.mkdir()

    def put_in(self) -> None:
        raise NotImplementedError

    def take_out(self) -> None:
        if self.root.is_mount():
            run("umount", self.root)

    def close(self) -> None:
        """Leave nothing behind."""
        if self.root.is_mount():
            run("umount", "--lazy", self.root)
        self.root.rmdir()


class Ext4(Disk):
    """An ext4 in a file, by a loop device."""

    def __init__(self, folder: Path, megabytes: int = 64) -> None:
        super().__init__(folder)
        self.image = folder / "disk.img"
        with self.image.open("wb") as file:
            file.truncate(megabytes << 20)
        run("mkfs.ext4", "-q", "-F", self.image)

    def put_in(self, *options: str) -> None:
        """Mount it; after a cut the journal is replayed, as at a start."""
        mount("-o", ",".join(("loop", *options)), self.image, self.root)

    def cut(self) -> None:
        """Everything that has not reached the disk is lost, and nothing more is written, the journal included."""
        fd = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _WITHOUT_FLUSHING_THE_LOG))
        finally:
            os.close(fd)

    def close(self) -> None:
        super().close()
        self.image.unlink()


class Memory(Disk):
    """A tmpfs of a few megabytes."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        super().__init__(folder)
        self.megabytes = megabytes

    def put_in(self) -> None:
        mount("-t", "tmpfs", "-o", f"size={self.megabytes}m,mode=755", "tmpfs", self.root)


D = TypeVar("D", bound=Disk)


def inserted(disk: D, requires: Requires) -> D:
    """Mount `disk`, or skip the test where this machine does not let it."""
    try:
        disk.put_in()
    except OSError as error:
        disk.close()
        requires(f"to mount ({error})", found=False)
    return disk


def need_mounts(requires: Requires, *tools: str) -> None:
    """Skip the test without root and the tools for mounting."""
    for tool in ("root", "mount", "umount", *tools):
        requires(tool)
    if not hasattr(ctypes.CDLL(None), "unshare"):
        pytest.skip("needs Linux")
