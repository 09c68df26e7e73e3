"""The checkpoint file: torch's own zip format, with its record inside, verified before it is decoded.

``torch.load(path, weights_only=True)`` reads it anywhere: the parts of the state stand at the top
level under their own names, and `HEADER` holds the format and the record.
"""

import io
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, BinaryIO, cast

import torch
from blake3 import blake3

from ckptcache.errors import CheckpointDamaged, NotACheckpoint, UnsafeCheckpoint
from ckptcache.storage import fs

HEADER = "ckptcache"
"""The key of the file's own header beside the parts of the state."""
FORMAT = 1
_CHUNK = 8 * 1024 * 1024
_LEGACY_PARTS = {
    "model_state_dict": "model",
    "optimizer_state_dict": "optimizer",
    "scheduler_state_dict": "scheduler",
    "scaler_state_dict": "scaler",
    "state_dict": "model",
}


@dataclass(frozen=True, slots=True)
class Written:
    """What a finished file measures."""

    size: int
    digest: str


class _DigestingFile:
    """Counts and digests what passes through to a temporary file."""

    def __init__(self, file: fs.TempFile) -> None:
        self._file = file
        self._hash = blake3()
        self.size = 0

    def write(self, data: Any) -> int:
        self._hash.update(data)
        written = self._file.write(data)
        self.size += written
        return written

    def flush(self) -> None:
        """The temporary file is unbuffered."""

    @property
    def digest(self) -> str:
        return f"blake3:{self._hash.hexdigest()}"


def write(file: fs.TempFile, state: Mapping[str, Any], record: Mapping[str, Any]) -> Written:
    """Write `state` and its record in torch's format, unsynced; `state` holds only what can be read back."""
    target = _DigestingFile(file)
    torch.save({**state, HEADER: {"format": FORMAT, "record": dict(record)}}, cast(IO[bytes], target))
    return Written(target.size, target.digest)


@dataclass(frozen=True, slots=True)
class Content:
    """What was read from a checkpoint file, on the CPU, owning its memory."""

    state: dict[str, Any]
    record: Mapping[str, Any] | None
    """The record inside; None for a foreign file."""
    size: int
    digest: str


def digest_of(path: Path) -> Written:
    """Size and digest of a file as it is now; raises FileNotFoundError."""
    with fs.open_regular(path) as file:
        return _measure(file)


def verify(path: Path, *, size: int | None, digest: str | None) -> Written:
    """Check a file against what its record says, decoding nothing.

    Raises:
        FileNotFoundError: it is gone.
        CheckpointDamaged: size or digest differ.
    """
    with fs.open_regular(path) as file:
        return _verify(file, path, size, digest)


def read(path: Path, *, size: int | None = None, digest: str | None = None) -> Content:
    """Verify a file against `size` and `digest` where they are known, check its directory, and decode it.

    Verification and decoding go through one open file, so that what is decoded is what was verified.

    Raises:
        FileNotFoundError: it is gone.
        CheckpointDamaged: size or digest differ, or the archive is broken.
        NotACheckpoint: it isn't torch's zip format, or holds no mapping.
        UnsafeCheckpoint: it holds more than tensors and plain values.
    """
    with fs.open_regular(path) as file:
        measured = _verify(file, path, size, digest)
        _check_directory(file, path, measured.size)
        payload = _decode(file, path)
    if not isinstance(payload, dict):
        raise NotACheckpoint(path=path, reason=f"it holds a {type(payload).__name__}, not a mapping of named parts")
    header = payload.pop(HEADER, None)
    if isinstance(header, dict) and isinstance(header.get("record"), dict):
        return Content(payload, header["record"], measured.size, measured.digest)
    return Content(_from_foreign(payload), None, measured.size, measured.digest)


def _measure(file: BinaryIO) -> Written:
    hasher, size = blake3(), 0
    while chunk := file.read(_CHUNK):
        hasher.update(chunk)
        size += len(chunk)
    return Written(size, f"blake3:{hasher.hexdigest()}")


def _verify(file: BinaryIO, path: Path, size: int | None, digest: str | None) -> Written:
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    if length == 0:
        raise CheckpointDamaged(path=path, reason="it is empty")
    if size is not None and length != size:
        raise CheckpointDamaged(path=path, reason=f"it has {length} bytes, and its record says {size}")
    measured = _measure(file)
    if digest is not None and measured.digest != digest:
        raise CheckpointDamaged(path=path, reason="its content differs from the digest in its record")
    file.seek(0)
    return measured


def _check_directory(file: BinaryIO, path: Path, size: int) -> None:
    """A small file could otherwise claim gigabytes, and torch would allocate them before looking."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise _broken_archive(file, path, error) from error
    if not any(entry.filename.endswith("/data.pkl") for entry in entries):
        raise NotACheckpoint(path=path, reason="it is a zip file without torch's data")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size for entry in entries):
        raise NotACheckpoint(path=path, reason="its entries are compressed, which torch never writes")
    if sum(entry.file_size for entry in entries) > size:
        raise NotACheckpoint(path=path, reason="its directory claims more bytes than the file has")
    file.seek(0)


def _broken_archive(file: BinaryIO, path: Path, error: Exception) -> CheckpointDamaged | NotACheckpoint:
    file.seek(0)
    if file.read(4) == b"PK\x03\x04":
        return CheckpointDamaged(path=path, reason=f"its archive is broken or cut short ({error})")
    return NotACheckpoint(path=path, reason="it isn't in the zip format that torch.save writes (since torch 1.6)")


def _decode(file: BinaryIO, path: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UnsafeCheckpoint(path=path, reason=_refused(str(error))) from error
    except (RuntimeError, ValueError, EOFError, KeyError, AttributeError, TypeError, OverflowError) as error:
        raise CheckpointDamaged(path=path, reason=str(error).split("\n")[0] or type(error).__name__) from error


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
    renamed = {}
    for key, value in payload.items():
        name = _LEGACY_PARTS.get(key, str(key))
        if value is not None and (name == key or name not in payload):
            renamed[name] = value
    return renamed
