"""Whether a file is the one that its record tells of: size and digest, decoding nothing and without torch."""

import errno
import io
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from blake3 import blake3

from ckptcache.environment import processors
from ckptcache.errors import CheckpointDamaged, NotACheckpoint
from ckptcache.storage import fs
from ckptcache.storage.behind import IN_HAND, behind

_BLOCK = 4 << 20
_PARALLEL = 64 << 20
"""Bytes from which on more than one thread digests them: to start it takes as long as to digest a few of them."""
_MAX_THREADS = 4
"""By then reading takes longer than digesting."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a finished file measures."""

    size: int
    digest: str


def digest_of(path: Path) -> Written:
    """Size and digest of a file as it is now; raises FileNotFoundError."""
    with opened(path) as file:
        return measure(file)


def verify(path: Path, *, size: int | None, digest: str | None) -> Written:
    """Check a file against what its record says, decoding nothing.

    Raises:
        FileNotFoundError: it is gone.
        CheckpointDamaged: size or digest differ.
    """
    with opened(path) as file:
        return verify_open(file, path, size, digest)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file for reading; what the system refuses is told apart from damage, so that nothing is set aside for it."""
    try:
        with fs.open_regular(path) as file:
            yield file
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.EIO:
            raise CheckpointDamaged(path=path, reason="the disk cannot read it") from error
        raise NotACheckpoint(path=path, reason=fs.reason_of(error)) from error


def measure(file: BinaryIO) -> Written:
    """Size and digest of what is left to read of an open file."""
    hasher, size = digester(os.fstat(file.fileno()).st_size), 0
    with behind(hasher.update) as digest:
        for block in _blocks(cast(io.BufferedReader, file)):
            digest(block)
            size += len(block)
    return Written(size, f"blake3:{hasher.hexdigest()}")


def digester(length: int) -> blake3:
    """What digests about `length` bytes, in threads of its own where there are processors for them.

    Never in those that all of blake3 shares (`AUTO`): a forked child hasn't got them, and would wait for them for ever.
    """
    threads = min(_MAX_THREADS, processors()) if length >= _PARALLEL else 1
    try:
        return blake3(max_threads=threads)
    except BaseException as error:
        # The system gives no more threads. What Rust panics with is no Exception, and can't be imported.
        if type(error).__name__ != "PanicException":
            raise
        return blake3()


def _blocks(file: io.BufferedReader) -> Iterator[memoryview]:
    """What is left to read of a file, read into the same memory again and again, as fresh pages cost as much."""
    for buffer in itertools.cycle([memoryview(bytearray(_BLOCK)) for _ in range(IN_HAND)]):
        if not (length := file.readinto(buffer)):
            return
        yield buffer[:length]


def verify_open(file: BinaryIO, path: Path, size: int | None, digest: str | None) -> Written:
    """`verify` for a file that is open."""
    check_length(file, path, size)
    measured = measure(file)
    check_digest(measured, path, digest)
    return measured


def check_length(file: BinaryIO, path: Path, size: int | None) -> int:
    """The length of an open file, which stands at its beginning then; CheckpointDamaged if it isn't `size`, or is 0."""
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    if length == 0:
        raise CheckpointDamaged(path=path, reason="it is empty")
    if size is not None and length != size:
        raise CheckpointDamaged(path=path, reason=f"it has {length} bytes, and its record says {size}")
    return length


def check_digest(measured: Written, path: Path, digest: str | None) -> None:
    """Raises CheckpointDamaged when what was measured isn't what a record says, if it says anything."""
    if digest is not None and measured.digest != digest:
        raise CheckpointDamaged(path=path, reason="its content differs from the digest in its record")
