"""Where every byte of a torch file will stand, known before any of them is written.

torch writes the file's outline itself, over gaps that it leaves for the stored tensors
(`torch.serialization.skip_data`), so that the format is torch's own in every version. The tensors' bytes
then go from where they are into the file, without a checksum that nothing reads: the digest is the check.
"""

import ctypes
import itertools
import mmap
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import IO, Any, NamedTuple, cast

import torch
from blake3 import blake3

from ckptcache.storage import fs
from ckptcache.storage.behind import IN_HAND, behind
from ckptcache.storage.integrity import Written

_BLOCK = 16 << 20
"""Bytes that are digested and written at once; a file that has no more goes through the system's cache."""
_SMALL = 1 << 16
"""What is shorter is gathered: a system call costs more than its copy."""


class Unplannable(RuntimeError):
    """torch has no outline of such a value, or not one that leaves the gaps expected."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A storage, whole, and where it stands in the file."""

    offset: int
    """Bytes from the file's beginning, a multiple of torch's own alignment of 64."""
    length: int
    storage: torch.UntypedStorage
    """Its bytes, on whatever device they are; shared with the tensors they belong to."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A file that is laid out and not yet written: what stands between the storages, and the storages."""

    size: int
    """Bytes of the whole file."""
    between: tuple[tuple[int, bytes], ...]
    """Offset and content of everything that is no storage."""
    storages: tuple[Placed, ...]
    """By offset; each once, however many tensors share it; empty ones have no place."""


# --- planning ------------------------------------------------------------------------------------


def plan(payload: Mapping[str, Any]) -> Plan:
    """Lay out the file that ``torch.save(payload)`` would write; the same payload gives the same plan.

    The tensors are neither read nor copied. Nothing that other threads save with torch is touched.

    Raises:
        Unplannable: torch can't outline it (quantised tensors), or can't save it at all; what no pickle can hold
            is refused by torch as in `torch.save`.
    """
    target = _Outline()
    try:
        with _noticing() as noticed, torch.serialization.skip_data():
            torch.save(dict(payload), cast(IO[bytes], target))
    except RuntimeError as error:
        raise Unplannable(str(error)) from error
    # torch names them in the order in which it came upon them, and need not write them in that order.
    named = {str(number): storage for number, storage in enumerate(noticed.values()) if storage.nbytes()}
    gaps = {gap.name: gap for gap in target.gaps}
    if {name: storage.nbytes() for name, storage in named.items()} != {name: g.length for name, g in gaps.items()}:
        raise Unplannable("the gaps in torch's outline are not its storages")
    placed = (Placed(gap.offset, gap.length, named[name]) for name, gap in gaps.items())
    return Plan(target.size, tuple((at, bytes(data)) for at, data in target.between), tuple(placed))


class _Gap(NamedTuple):
    name: str
    """What follows ``data/`` in the entry's name."""
    offset: int
    length: int


class _Outline:
    """Takes what torch writes around the tensors, and the place of each gap that it leaves by seeking ahead."""

    def __init__(self) -> None:
        self.size = 0
        self.between: list[tuple[int, bytearray]] = [(0, bytearray())]
        self.gaps: list[_Gap] = []

    def write(self, data: Any) -> int:
        self.between[-1][1].extend(data)
        self.size += len(data)
        return len(data)

    def seek(self, distance: int, whence: int) -> int:
        if whence != 1 or distance < 0:
            raise Unplannable(f"torch seeks ({distance}, {whence})")
        self.gaps.append(_Gap(_entry_name(self.between[-1][1]), self.size, distance))
        self.size += distance
        self.between.append((self.size, bytearray()))
        return self.size

    def flush(self) -> None:
        """Nothing is buffered."""


def _entry_name(written: bytes | bytearray) -> str:
    """The name below ``data/`` of the entry whose header was written last (APPNOTE.TXT, 4.3.7)."""
    start = written.rfind(b"PK\x03\x04")
    if start < 0 or len(written) < start + 30:
        raise Unplannable("torch's outline has a gap without a header")
    name_length, extra_length = struct.unpack_from("<HH", written, start + 26)
    name = bytes(written[start + 30 : start + 30 + name_length]).decode()
    if len(written) != start + 30 + name_length + extra_length or "/data/" not in name:
        raise Unplannable(f"torch's outline has a gap in {name!r}")
    return name.rsplit("/data/", 1)[1]


class _Noticed(threading.local):
    """The storages that torch asked the device of, in that order, which is the order of their names in the file."""

    storages: dict[int, torch.UntypedStorage] | None = None


_noticed = _Noticed()


@contextmanager
def _noticing() -> Iterator[dict[int, torch.UntypedStorage]]:
    outer, _noticed.storages = _noticed.storages, {}
    try:
        yield _noticed.storages
    finally:
        _noticed.storages = outer


def _notice(storage: torch.UntypedStorage) -> None:
    if _noticed.storages is not None:
        _noticed.storages.setdefault(storage._cdata, storage)


def _restores_nothing(storage: Any, location: str) -> None:
    """A place for tensors is registered with the way back; this one is none."""


# torch asks every registered place in turn. Two of one priority can't be sorted, hence one that no other can have.
torch.serialization.register_package(-id(_notice), cast(Any, _notice), cast(Any, _restores_nothing))


# --- writing -------------------------------------------------------------------------------------


def write(file: fs.TempFile, plan: Plan) -> Written:
    """Write what is planned, unsynced, its room on the disk reserved first; digested as it goes by.

    Beside the state it takes memory for three blocks, and where there is none, it does without.

    Raises:
        OSError: the system refused; a full disk does so before anything is written, where room can be reserved.
        RuntimeError: a storage was resized since it was planned.
    """
    file.reserve(plan.size)
    buffers = _buffers() if plan.size > _BLOCK else []
    if buffers and file.pass_cache_by():
        return _put_out(file, plan.size, _filled(buffers, plan))
    return _put_out(file, plan.size, blocks(plan))


def write_image(file: fs.TempFile, image: memoryview, *, between_blocks: Callable[[], None] | None = None) -> Written:
    """Write a finished file out of memory, unsynced, its room on the disk reserved first; digested as it goes by.

    Args:
        file: new and empty.
        image: all of the file's bytes, as a plan lays them out, in memory that begins at a page, or it takes longer;
            they must not change meanwhile.
        between_blocks: called before each block; what it raises ends the writing.

    Raises:
        OSError: the system refused; a full disk does so before anything is written, where room can be reserved.
    """
    file.reserve(len(image))
    if len(image) > _BLOCK:
        file.pass_cache_by()
    return _put_out(file, len(image), _cut(image, between_blocks))


def _cut(image: memoryview, between_blocks: Callable[[], None] | None) -> Iterator[memoryview]:
    for start in range(0, len(image), _BLOCK):
        if between_blocks is not None:
            between_blocks()
        yield image[start : start + _BLOCK]


def _put_out(file: fs.TempFile, size: int, blocks: Iterable[memoryview]) -> Written:
    """Digest each block while the one before it is written, which leaves the processor idle for the most part."""
    digest = blake3()
    with behind(file.write) if size > _BLOCK else nullcontext(file.write) as put:
        for block in blocks:
            digest.update(block)
            put(block)
    return Written(size, f"blake3:{digest.hexdigest()}")


def _buffers() -> list[memoryview]:
    """Memory that begins at a page, for all blocks that are there at once; less where there is little, or none."""
    for size in (_BLOCK, _BLOCK // 4, _BLOCK // 16):
        with suppress(OSError, MemoryError):
            return [memoryview(mmap.mmap(-1, size)) for _ in range(IN_HAND)]
    return []


def _filled(buffers: Sequence[memoryview], plan: Plan) -> Iterator[memoryview]:
    """The planned file from its beginning to its end, copied into one buffer after the other."""
    free = itertools.cycle(buffers)
    buffer, filled = next(free), 0
    for piece in _pieces(plan):
        while piece:
            part = piece[: len(buffer) - filled]
            buffer[filled : filled + len(part)] = part
            piece, filled = piece[len(part) :], filled + len(part)
            if filled == len(buffer):
                yield buffer
                buffer, filled = next(free), 0
    if filled:
        yield buffer[:filled]


def blocks(plan: Plan) -> Iterator[memoryview]:
    """The planned file from its beginning to its end: views of what lies on the CPU, copies of the rest."""
    gathered = bytearray()
    for piece in _pieces(plan):
        if len(piece) < _SMALL and len(gathered) < _BLOCK:
            gathered += piece
            continue
        if gathered:
            yield memoryview(gathered)
            gathered = bytearray()
        yield piece
    if gathered:
        yield memoryview(gathered)


def _pieces(plan: Plan) -> Iterator[memoryview]:
    entries: list[tuple[int, bytes | Placed]] = [*plan.between, *((placed.offset, placed) for placed in plan.storages)]
    for _, content in sorted(entries, key=lambda entry: entry[0]):
        if isinstance(content, Placed):
            yield from _bytes_in(content)
        else:
            for start in range(0, len(content), _BLOCK):
                yield memoryview(content)[start : start + _BLOCK]


def _bytes_in(placed: Placed) -> Iterator[memoryview]:
    data = torch.empty(0, dtype=torch.uint8, device=placed.storage.device).set_(placed.storage)
    for start in range(0, placed.length, _BLOCK):
        if placed.storage.nbytes() != placed.length:  # its memory may be gone
            raise RuntimeError(f"a tensor was resized while it was saved, from {placed.length} bytes")
        yield bytes_of(data[start : start + _BLOCK].cpu())


def bytes_of(data: torch.Tensor) -> memoryview:
    """The memory of a tensor of bytes on the CPU. `Tensor.numpy` would leave a storage that can't be resized."""
    array: Any = (ctypes.c_char * len(data)).from_address(data.data_ptr())
    array.tensor = data  # lives as long as any view of it
    return memoryview(array).cast("B")
