"""The checkpoint file: torch's own zip format, with its record inside, verified before it is decoded.

``torch.load(path, weights_only=True)`` reads it anywhere: the parts of the state stand at the top
level under their own names, and `HEADER` holds the format and the record.
"""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, BinaryIO, cast
from zipfile import BadZipFile, ZipFile, ZipInfo

import torch
from blake3 import blake3

from ckptcache.errors import CheckpointDamaged, CkptCacheError, NotACheckpoint, UnsafeCheckpoint
from ckptcache.storage import audit, fs, ptimage, ptplan
from ckptcache.storage.integrity import Written, check_digest, check_length, opened
from ckptcache.storage.ptimage import Image, Place
from ckptcache.storage.ptplan import Plan as Plan
from ckptcache.storage.ptplan import Unplannable as Unplannable

HEADER = "ckptcache"
"""The key of the file's own header beside the parts of the state."""
FORMAT = 1
_LEGACY_PARTS = {
    "model_state_dict": "model",
    "optimizer_state_dict": "optimizer",
    "scheduler_state_dict": "scheduler",
    "scaler_state_dict": "scaler",
    "state_dict": "model",
}


class _DigestingFile:
    """Counts and digests what passes through to a temporary file."""

    def __init__(self, file: fs.TempFile) -> None:
        self._file = file
        self._hash = blake3()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self._hash.update(data)
        try:
            written = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.size += written
        return written

    def flush(self) -> None:
        """The temporary file is unbuffered."""

    @property
    def digest(self) -> str:
        return f"blake3:{self._hash.hexdigest()}"


def plan(state: Mapping[str, Any], record: Mapping[str, Any]) -> Plan:
    """Lay out the file of `state` and its record, reading no tensor; the same two give the same bytes.

    Raises:
        Unplannable: it can only be written by torch in one go; `write` does that.
    """
    return ptplan.plan(_payload(state, record))


def write(file: fs.TempFile, state: Mapping[str, Any], record: Mapping[str, Any]) -> Written:
    """Write `state` and its record in torch's format, unsynced; `state` holds only what can be read back.

    Raises:
        OSError: the system refused a write; a full disk is one.
    """
    return _write(file, _payload(state, record))


def write_image(file: fs.TempFile, image: memoryview, *, between_blocks: Callable[[], None]) -> Written:
    """Write a planned file that somebody has filled in page-aligned memory, unsynced.

    Args:
        image: all of the file's bytes.
        between_blocks: called now and then; what it raises ends the write.

    Raises:
        OSError: the system refused a write; a full disk is one.
    """
    return ptplan.write_image(file, image, between_blocks=between_blocks)


def write_plain(file: fs.TempFile, state: Mapping[str, Any]) -> Written:
    """Write `state` alone, unsynced, for whoever reads it with torch and without a cache."""
    return _write(file, dict(state))


def _payload(state: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    return {**state, HEADER: {"format": FORMAT, "record": dict(record)}}


def _write(file: fs.TempFile, payload: dict[str, Any]) -> Written:
    try:
        planned = ptplan.plan(payload)
    except Unplannable:
        return _stream(file, payload)
    return ptplan.write(file, planned)


def _stream(file: fs.TempFile, payload: dict[str, Any]) -> Written:
    """Let torch write by itself what can't be planned, and say what is wrong with what can't be saved."""
    target = _DigestingFile(file)
    try:
        torch.save(payload, cast(IO[bytes], target))
    except RuntimeError as error:
        if target.error is None:
            raise
        # Closing its archive after a failed write, torch fails once more and hides the cause.
        raise target.error from error
    return Written(target.size, target.digest)


@dataclass(frozen=True, slots=True)
class Content:
    """What was read from a checkpoint file, on the CPU, owning its memory."""

    state: dict[str, Any]
    record: Mapping[str, Any] | None
    """The record inside; None for a foreign file."""
    size: int
    digest: str


def read(path: Path, *, size: int | None = None, digest: str | None = None) -> Content:
    """Verify a file against `size` and `digest` where they are known, check its directory, and decode it.

    The file is read once, into memory: what is decoded is what was verified, and the tensors own the memory that it was
    read into. That takes no more than the file's size.

    Raises:
        FileNotFoundError: it is gone.
        CheckpointDamaged: size or digest differ, or the archive is broken.
        NotACheckpoint: it isn't torch's zip format, holds no mapping, or the system or memory forbid reading it.
        UnsafeCheckpoint: it holds more than tensors and plain values.
    """
    image, measured = _image(path, size)
    check_digest(measured, path, digest)
    file = cast(BinaryIO, image)
    entries = audit.check_archive(file, path, measured.size)
    audit.check_pickle(file, path, entries, measured.size, vouched=digest is not None)
    payload = _decode(image, path, hand_over=_is_as_read(image, entries))
    if not isinstance(payload, dict):
        raise NotACheckpoint(path=path, reason=f"it holds a {type(payload).__name__}, not a mapping of named parts")
    if set(getattr(payload, "__dict__", ())) - {"_metadata"}:
        # A mapping may carry attributes, and one named "pop" or "items" would take the method's place.
        raise NotACheckpoint(path=path, reason="its mapping carries attributes that no state_dict has")
    header = payload.pop(HEADER, None)
    if isinstance(header, dict) and isinstance(header.get("record"), dict):
        _check_format(header.get("format"), path)
        return Content(payload, header["record"], measured.size, measured.digest)
    return Content(_from_foreign(payload), None, measured.size, measured.digest)


def _image(path: Path, size: int | None) -> tuple[Image, Written]:
    """A file's bytes, laid out by what it says of itself, of which nothing is believed before it is verified."""
    with opened(path) as file:
        length = check_length(file, path, size)
        try:
            return ptimage.read(file, _places(file, path, length), length)
        except (EOFError, MemoryError, RuntimeError) as error:
            raise _failure(error, path) from error


def _places(file: BinaryIO, path: Path, length: int) -> list[Place]:
    try:
        return ptimage.places(file, audit.check_archive(file, path, length), length)
    except (CkptCacheError, ValueError):
        return []  # what is wrong with it is said once it is known whether it is damaged


def _is_as_read(image: Image, entries: Mapping[str, ZipInfo]) -> bool:
    """Whether what was taken for tensors is that in what was read, and in the order of bytes that this machine has."""
    file = cast(BinaryIO, image)
    orders = [entry for name, entry in entries.items() if name.endswith("/byteorder")]
    try:
        with ZipFile(file) as archive:
            is_ours = [archive.read(entry) for entry in orders] == [sys.byteorder.encode()]
        return is_ours and {place.offset for place in ptimage.places(file, entries, image.size)} == image.offsets
    except (BadZipFile, ValueError, EOFError):
        return False


def _check_format(version: Any, path: Path) -> None:
    if not isinstance(version, int) or version > FORMAT:
        reason = f"it is in format {version!r}, and this ckptcache knows {FORMAT}: install a newer one"
        raise NotACheckpoint(path=path, reason=reason)


def _decode(image: Image, path: Path, *, hand_over: bool) -> Any:
    try:
        try:
            return _loaded(image, hand_over=hand_over)
        except UnpicklingError:
            raise
        except Exception:
            if image.interrupt is not None:
                raise
            # Torch also fails so where a signal's handler interrupts it, which says nothing of the file.
            return _loaded(image, hand_over=False)
    except UnpicklingError as error:
        raise UnsafeCheckpoint(path=path, reason=_refused(str(error))) from error
    except Exception as error:
        if image.interrupt is not None:
            raise image.interrupt from error
        # A hostile file can make torch fail in any way; none of them may reach the caller as it is.
        raise _failure(error, path) from error


def _loaded(image: Image, *, hand_over: bool) -> Any:
    image.seek(0)
    if hand_over:
        with image.handing_over():
            payload = torch.load(cast(BinaryIO, image), map_location=image.claim, weights_only=True)
        if not image.left_unclaimed:
            return payload
        image.seek(0)
    return torch.load(cast(BinaryIO, image), map_location="cpu", weights_only=True)


def _failure(error: Exception, path: Path) -> CheckpointDamaged | NotACheckpoint:
    message = str(error).split("\n")[0].rstrip(". ") or type(error).__name__
    if isinstance(error, MemoryError) or "not enough memory" in message or "can't allocate memory" in message:
        return NotACheckpoint(path=path, reason="there is not enough memory for what it holds")
    return CheckpointDamaged(path=path, reason=message)


def _refused(message: str) -> str:
    """What torch's restricted unpickler stopped at, out of its page-long message."""
    found = re.search(r"GLOBAL ([\w.]+)", message)
    return f"it calls for {found.group(1)}" if found else "it holds more than tensors and plain values"


def _from_foreign(payload: dict[str, Any]) -> dict[str, Any]:
    """The parts of a file that something else wrote, under this cache's names where they are known.

    A bare state_dict, as `torch.save(model.state_dict(), path)` writes it, becomes the part "model".
    """
    if payload and all(isinstance(value, torch.Tensor) for value in payload.values()):
        return {"model": payload}
    renamed: dict[str, Any] = {}
    for key, value in payload.items():
        name = _LEGACY_PARTS.get(key, str(key))
        if value is not None:
            renamed[str(key) if name != key and name in (*payload, *renamed) else name] = value
    return renamed
