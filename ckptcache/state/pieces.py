"""Copying storages into the image of a file: in pieces that several threads share, and beside a device's training."""

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch

PIECE = 8 << 20
"""Bytes that a thread copies at once, so that two can share the work."""
_LOOK_SECONDS = 0.05
Piece = Callable[[], object]


class Placed(Protocol):
    """A storage, and where its bytes stand in the image of the file."""

    @property
    def offset(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def storage(self) -> torch.UntypedStorage: ...


class Work:
    """Pieces of work that any thread may take; whoever waits for the rest of them helps.

    To do a piece twice does no harm. What a helper leaves undone, be it because Ctrl-C interrupted it, is therefore
    done again by the thread that answers for all of it, and only what fails there has failed.
    """

    def __init__(self) -> None:
        self._undone: dict[int, Piece] = {}
        self._free: deque[int] = deque()
        self._helpers: set[object] = set()
        self._left = threading.Event()
        self.is_done = False

    def share(self, pieces: Iterable[Piece]) -> None:
        self._undone = dict(enumerate(pieces))
        self._free.extend(self._undone)

    def help(self) -> Exception | None:
        """Take part until no piece is left to take; returns what one failed with, which may be the helper's own."""
        helper = object()
        try:
            self._helpers.add(helper)
            self._take()
        except Exception as error:
            return error
        finally:
            self._helpers.discard(helper)
            self._left.set()
        return None

    def finish(self) -> None:
        """Do what is left, once the helpers are done with theirs; raises what a piece fails with."""
        try:
            self._take()
        finally:
            self._free.clear()
            while self._helpers:
                self._left.wait(_LOOK_SECONDS)
                self._left.clear()
        for number in list(self._undone):
            self._do(number)
        self.is_done = True

    def _take(self) -> None:
        while self._free:
            try:
                number = self._free.popleft()
            except IndexError:
                return
            self._do(number)

    def _do(self, number: int) -> None:
        self._undone[number]()
        del self._undone[number]


def pieces(image: memoryview, placed: Iterable[Placed]) -> Iterator[Piece]:
    """Copies of about equal size: large storages in parts, small ones together."""
    gathered: list[Piece] = []
    size = 0
    for each in placed:
        if each.storage.nbytes() != each.length:
            raise RuntimeError(f"a tensor was resized while it was saved, from {each.length} bytes")
        for start in range(0, each.length, PIECE):
            length = min(PIECE, each.length - start)
            at = each.offset + start
            gathered.append(_copy(image[at : at + length], each.storage, start))
            size += length
            if size >= PIECE:
                yield _all(gathered)
                gathered, size = [], 0
    if gathered:
        yield _all(gathered)


def _copy(target: memoryview, storage: torch.UntypedStorage, start: int) -> Piece:
    if storage.device.type != "cpu":
        source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)[start : start + len(target)]
        return lambda: torch.frombuffer(target, dtype=torch.uint8).copy_(source, non_blocking=source.is_cuda)
    # Half the processor time of torch's own copy of bytes, and without the interpreter's lock as well.
    address = ctypes.addressof(ctypes.c_char.from_buffer(target))
    return lambda: _copy_bytes(address, storage, start, len(target))


def _copy_bytes(address: int, storage: torch.UntypedStorage, start: int, length: int) -> None:
    if storage.nbytes() < start + length:
        raise RuntimeError("a tensor was resized while it was saved")
    ctypes.memmove(address, storage.data_ptr() + start, length)


def _all(pieces: list[Piece]) -> Piece:
    return lambda: [piece() for piece in pieces]


# --- accelerators --------------------------------------------------------------------------------


def side_streams(storages: Iterable[torch.UntypedStorage]) -> list["torch.cuda.Stream"]:
    """For each CUDA device a stream beside the training's, that begins where the training's is at this moment."""
    devices = {storage.device for storage in storages if storage.device.type == "cuda"}
    streams = [torch.cuda.Stream(device) for device in devices]  # type: ignore[no-untyped-call]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream(stream.device))
    return streams


@contextmanager
def beside(streams: list["torch.cuda.Stream"]) -> Iterator[None]:
    """Do what is done inside on the side streams, and wait for it at the end, however that comes.

    After an error too: the memory that is copied from and to would otherwise go to others while a device still uses it.
    """
    try:
        with ExitStack() as stack:
            for stream in streams:
                stack.enter_context(torch.cuda.stream(stream))
            yield
    finally:
        for stream in streams:
            stream.synchronize()
