"""A checkpoint's file in memory, read once: what is digested is what is decoded, whatever becomes of the file.

Each stored tensor is read into memory of its own, which the decoded tensors then take over, so that nothing is copied
twice. A mapped file would have to be copied too, would change when the file does, and kill the process when that is
cut short.
"""

import ctypes
import functools
import io
import struct
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any, BinaryIO, NamedTuple, cast
from zipfile import ZipInfo

import torch

from ckptcache.storage.behind import behind
from ckptcache.storage.integrity import Written, digester
from ckptcache.storage.ptplan import bytes_of

_BLOCK = 4 << 20
"""Bytes that are read and digested at once."""
_SMALL = 1 << 16
"""What is shorter is copied by torch: memory of its own costs more."""
_HUGE = 4 << 20
"""From so many bytes on, memory is asked for in huge pages: fresh small ones cost more than what is read into them."""
_PAGE = 4096
_MADV_HUGEPAGE = 14


class Place(NamedTuple):
    """Where a stored tensor's bytes lie in a file."""

    offset: int
    length: int


class Image(io.RawIOBase):
    """A whole file in memory, read like the file itself.

    While it is `handing_over`, the bytes of a stored tensor that is asked for as a whole are not copied; `claim`, as
    torch's ``map_location``, gives the memory that they are in already.
    """

    def __init__(self, places: Iterable[Place], size: int) -> None:
        self.size = size
        self._is_handing_over = False
        self.left_unclaimed = False
        self.interrupt: BaseException | None = None
        """What a signal's handler raised while torch was reading, which torch may take for a fault of the file."""
        self._at = 0
        self._stored = {place.offset: _memory(place.length) for place in places}
        pieces = self._around() | {at: bytes_of(data) for at, data in self._stored.items()}
        self._pieces = {at: pieces[at] for at in sorted(pieces)}
        self._starts = [*self._pieces]
        self._claimable: torch.Tensor | None = None

    def _around(self) -> dict[int, memoryview]:
        ends = [0, *(at + len(data) for at, data in self._stored.items())]
        starts = [*self._stored, self.size]
        return {end: memoryview(bytearray(start - end)) for end, start in zip(ends, starts, strict=True) if start > end}

    @property
    def offsets(self) -> set[int]:
        """Where the stored tensors begin that have memory of their own."""
        return set(self._stored)

    def blocks(self) -> Iterator[memoryview]:
        """The memory from its beginning to its end, to be filled."""
        for piece in self._pieces.values():
            for start in range(0, len(piece), _BLOCK):
                yield piece[start : start + _BLOCK]

    # --- a file, to zipfile and torch ----------------------------------------------------------------

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, (0, self._at, self.size)[whence] + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        try:
            return self._read_into(buffer)
        except MemoryError:
            raise
        except BaseException as error:
            self.interrupt = error
            raise

    def _read_into(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        stored = self._stored.get(self._at)
        if self._is_handing_over and stored is not None and len(stored) == len(target):
            self.left_unclaimed |= self._claimable is not None
            self._claimable = stored
            self._at += len(target)
            return len(target)
        return self._copy_into(target)

    def _copy_into(self, target: memoryview) -> int:
        done = 0
        while done < len(target) and self._at < self.size:
            start = self._starts[bisect_right(self._starts, self._at) - 1]
            part = self._pieces[start][self._at - start :][: len(target) - done]
            target[done : done + len(part)] = part
            done += len(part)
            self._at += len(part)
        return done

    @contextmanager
    def handing_over(self) -> Iterator[None]:
        """Stored tensors are handed over until the block ends."""
        self._is_handing_over = True
        try:
            yield
        finally:
            self.left_unclaimed |= self._claimable is not None
            self._is_handing_over = False

    def claim(self, storage: Any, _location: str) -> Any:
        """The memory in which a storage that torch has just read is; the given one where that was copied."""
        data, self._claimable = self._claimable, None
        if data is None:
            return storage
        if data.nbytes == storage.nbytes():
            return data.untyped_storage()
        torch.empty(0, dtype=torch.uint8).set_(storage).copy_(data[: storage.nbytes()])
        return storage


def read(file: BinaryIO, places: Iterable[Place], size: int) -> tuple[Image, Written]:
    """The first `size` bytes of a file, and what they measure; EOFError when there are fewer.

    Takes memory for the file and no more; the digest is taken in a thread while the next block is read.
    """
    image, hasher = Image(places, size), digester(size)
    file.seek(0)
    with behind(hasher.update) if size > _BLOCK else nullcontext(hasher.update) as digest:
        for block in image.blocks():
            _fill(cast(io.BufferedReader, file), block)
            digest(block)
    return image, Written(size, f"blake3:{hasher.hexdigest()}")


def _fill(file: io.BufferedReader, block: memoryview) -> None:
    while block:
        length = file.readinto(block)
        if not length:
            raise EOFError("it was cut short while it was read")
        block = block[length:]


def places(file: BinaryIO, entries: Mapping[str, ZipInfo], size: int) -> list[Place]:
    """Where the larger stored tensors lie in an archive, by offset; ValueError when its entries overlap."""
    found = sorted(_spans(file, entries))
    if any(end > start for (_, end, _), (start, _, _) in pairwise(found)) or (found and found[-1][1] > size):
        raise ValueError("its entries overlap")
    return [Place(end - length, length) for _, end, length in found if length >= _SMALL]


def _spans(file: BinaryIO, entries: Mapping[str, ZipInfo]) -> Iterator[tuple[int, int, int]]:
    """Of each entry, the beginning of its header, its end, and its length if it is a tensor's (APPNOTE.TXT, 4.3.7)."""
    for name, entry in entries.items():
        file.seek(entry.header_offset)
        header = file.read(30)
        if len(header) < 30:
            raise ValueError("an entry has no header")
        end = entry.header_offset + 30 + sum(struct.unpack_from("<2H", header, 26)) + entry.file_size
        yield entry.header_offset, end, entry.file_size if "/data/" in name else 0


# --- memory --------------------------------------------------------------------------------------


def _memory(length: int) -> torch.Tensor:
    """Bytes of torch's own, in huge pages where that helps."""
    data = torch.empty(length, dtype=torch.uint8)
    if length >= _HUGE and (advise := _madvise()) is not None:
        start = -(-data.data_ptr() // _PAGE) * _PAGE
        # Refused where the kernel has none; small pages do as well.
        advise(start, (data.data_ptr() + length - start) // _PAGE * _PAGE, _MADV_HUGEPAGE)
    return data


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's `madvise` (Linux); None elsewhere."""
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return cast("Callable[[int, int, int], int] | None", function)
