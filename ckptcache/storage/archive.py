"""A backup: a whole cache in one plain tar file, which begins with a manifest of all that is in it.

What such a file has to be, to the byte, follows from its manifest: the header of every member, where it lies, and how
long the whole is. So nothing but the manifest is parsed, and what differs from what follows is refused, whatever it
may mean to other programs that read tar: links, devices, sparse files, extended headers, a second file of one name.
"""

import io
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from blake3 import blake3

from ckptcache.errors import BackupDamaged, BackupTooNew, NotABackup, NotACheckpoint
from ckptcache.storage import fs
from ckptcache.storage.behind import IN_HAND, behind
from ckptcache.storage.manifest import FORMAT, LaterFormat, Manifest, Member

MANIFEST, SEAL = "manifest.json", "manifest.b3"
MAX_MANIFEST_BYTES = 64 * 1024 * 1024
_TAR_BLOCK = 512
_END = bytes(2 * _TAR_BLOCK)
_CHUNK = 1 << 20
_HEADER = re.compile(rb".{124}([0-7]{11})\0([0-7]{11})\0.{364}", re.DOTALL)
"""Size and time of the first member; the rest of the header follows from them."""
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_ZIP = b"PK\x03\x04"

Progress = Callable[[int], object]
"""Called with the bytes that were read since the last call."""
Overall = Callable[[int, int], None]
"""Called with the bytes read so far, and with those in all."""
Sink = Callable[[memoryview], object]


class Differs(Exception):
    """What was to go into a backup isn't what the manifest says of it."""

    def __init__(self, member: Member, reason: str) -> None:
        super().__init__(f"{member.name}: {reason}")
        self.member, self.reason = member, reason


# --- tar -----------------------------------------------------------------------------------------


def counted(overall: Overall | None, total: int) -> Progress | None:
    """What adds up, for `overall`, the bytes that are handled of `total`."""
    if overall is None:
        return None
    tell, done = overall, 0

    def add(size: int) -> None:
        nonlocal done
        done += size
        tell(done, total)

    return add


def header(name: str, size: int, made_at: int) -> bytes:
    """The tar header of a regular file, as GNU tar writes it: a name too long for it, or a size, in its own way.

    After "Basic Tar Format" in the manual of GNU tar; the sum is that of all bytes, its own taken as spaces.
    """
    data = name.encode()
    if len(data) > 100:
        return (
            _header(b"././@LongLink", len(data) + 1, 0, b"L")
            + _padded(data + b"\0")
            + header(data[:100].decode(), size, made_at)
        )
    return _header(data, size, made_at, b"0")


def _header(name: bytes, size: int, made_at: int, kind: bytes) -> bytes:
    fields = (
        *(name.ljust(100, b"\0"), b"0000644\0", b"0000000\0", b"0000000\0"),
        *(_number(size), _number(made_at), b" " * 8, kind, bytes(100), b"ustar  \0"),
    )
    block = b"".join(fields).ljust(_TAR_BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def _number(value: int) -> bytes:
    """Eleven octal digits; from 8 GiB on, binary, marked by the first bit."""
    return b"%011o\0" % value if value < 8**11 else b"\x80" + value.to_bytes(11, "big")


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _TAR_BLOCK)


def _seal(manifest: bytes) -> bytes:
    """What `b3sum` prints for the manifest, and checks."""
    return f"{blake3(manifest).hexdigest()}  {MANIFEST}\n".encode()


def _head(manifest: Manifest) -> bytes:
    """All that stands before the first member."""
    parts = ((MANIFEST, manifest.data), (SEAL, _seal(manifest.data)))
    return b"".join(header(name, len(data), manifest.made_at) + _padded(data) for name, data in parts)


def _places(manifest: Manifest) -> Iterator[tuple[Member, bytes, int]]:
    """Every member with its header and the place of its first byte."""
    at = len(_head(manifest))
    for member in manifest.members:
        before = header(member.name, member.size, manifest.made_at)
        yield member, before, at + len(before)
        at += len(before) + member.size + -member.size % _TAR_BLOCK


def length(manifest: Manifest) -> int:
    """Bytes of the whole backup."""
    *_, (last, _, at) = _places(manifest)
    return at + last.size + -last.size % _TAR_BLOCK + len(_END)


def _poured(source: BinaryIO, size: int, sink: Sink | None, progress: Progress | None) -> str:
    """Read `size` bytes into `sink`, and give their digest; raises EOFError where there are less."""
    hasher, left = blake3(), size
    with behind(hasher.update) as digest:
        for buffer in itertools.cycle([memoryview(bytearray(min(size, _CHUNK))) for _ in range(IN_HAND)]):
            if not left:
                break
            if not (count := cast(io.BufferedReader, source).readinto(buffer[: min(left, len(buffer))])):
                raise EOFError
            digest(buffer[:count])
            if sink is not None:
                sink(buffer[:count])
            if progress is not None:
                progress(count)
            left -= count
    return f"blake3:{hasher.hexdigest()}"


# --- writing -------------------------------------------------------------------------------------


def write(
    temp: fs.TempFile, manifest: Manifest, sources: Mapping[str, BinaryIO], progress: Progress | None = None
) -> None:
    """Write a backup of `sources`, open files by the names of their members; each is read once, from its beginning.

    Raises Differs for the first that isn't what `manifest` says; what is in `temp` is worth nothing then.
    """
    temp.reserve(length(manifest))
    temp.write(_head(manifest))
    for member in manifest.members:
        temp.write(header(member.name, member.size, manifest.made_at))
        check(member, sources[member.name], temp.write, progress)
        temp.write(bytes(-member.size % _TAR_BLOCK))
    temp.write(_END)


def check(member: Member, source: BinaryIO, sink: Sink | None = None, progress: Progress | None = None) -> None:
    """Read an open file, from its beginning; raises Differs when it isn't `member`."""
    size = source.seek(0, io.SEEK_END)
    source.seek(0)
    if size != member.size:
        raise Differs(member, f"it has {size} bytes, and its record says {member.size}")
    guarded = None if sink is None else _guarded(sink)
    try:
        digest = _poured(source, size, guarded, progress)
    except EOFError:
        raise Differs(member, "it became shorter while it was read") from None
    except _SinkFailed as failure:
        raise failure.error from None
    except OSError as error:
        raise Differs(member, f"the disk cannot read it ({fs.reason_of(error)})") from error
    if digest != member.digest:
        raise Differs(member, "its content differs from the digest in its record")


class _SinkFailed(Exception):
    """Told apart from a failing source, whose errors are of the same kind."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error


def _guarded(sink: Sink) -> Sink:
    def guarded(data: memoryview) -> None:
        try:
            sink(data)
        except OSError as error:
            raise _SinkFailed(error) from error

    return guarded


# --- reading -------------------------------------------------------------------------------------


class Archive:
    """A backup that is open for reading, and whose manifest, and length, are what they should be.

    Raises:
        NotABackup: it is something else, or can't be read.
        BackupDamaged: it is cut short, or differs from what its manifest says.
        BackupTooNew: a later version wrote it.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self.size = file.seek(0, io.SEEK_END)
        file.seek(0)
        self.manifest = self._manifest()
        self._at = {member.name: at for member, _, at in _places(self.manifest)}
        if self.size != (whole := length(self.manifest)):
            cut = "it is cut short: " if self.size < whole else ""
            raise self._damaged(f"{cut}it has {self.size} bytes, and should have {whole}")

    def _damaged(self, reason: str) -> BackupDamaged:
        return BackupDamaged(path=self.path, reason=reason)

    def _manifest(self) -> Manifest:
        size, made_at = self._first_header()
        data, padding = self._read(size), bytes(-size % _TAR_BLOCK)
        seal = padding + header(SEAL, len(_seal(data)), made_at) + _padded(_seal(data))
        # Before it is parsed, or a broken one could pass for that of a later version.
        if self._read(len(seal)) != seal:
            raise self._damaged("its manifest differs from its digest")
        try:
            manifest = Manifest.parse(data, made_at)
        except LaterFormat as error:
            raise BackupTooNew(path=self.path, what="format", found=error.args[0], known=FORMAT) from error
        except ValueError as error:
            raise self._damaged(str(error)) from error
        if data != manifest.data:
            raise self._damaged("its manifest isn't written as a backup's is")
        return manifest

    def _first_header(self) -> tuple[int, int]:
        """Size of the manifest, and time of all members."""
        block = self._file.read(_TAR_BLOCK)
        if not block.startswith(MANIFEST.encode()):
            raise NotABackup(path=self.path, reason=_instead(block))
        found = _HEADER.fullmatch(block)
        size, made_at = (int(number, 8) for number in found.groups()) if found else (0, 0)
        if block != header(MANIFEST, size, made_at):
            raise self._damaged("its first header is broken" if len(block) == _TAR_BLOCK else "it is cut short")
        if size > MAX_MANIFEST_BYTES:
            raise self._damaged(f"its manifest has {size} bytes, and {MAX_MANIFEST_BYTES} are the most")
        if size > self.size:
            raise self._damaged("it is cut short")
        return size, made_at

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise self._damaged("it is cut short")
        return data

    def verify(self, progress: Progress | None = None) -> None:
        """Compare every byte with what the manifest says of it; raises BackupDamaged."""
        with self._reading():
            for member, before, at in _places(self.manifest):
                self._file.seek(at - len(before))
                if self._read(len(before)) != before:
                    raise self._damaged(f"the header of {member.name} is broken")
                self._pour(member, None, progress)
                if any(self._read(-member.size % _TAR_BLOCK)):
                    raise self._damaged(f"something stands behind {member.name}")
            if self._read(len(_END)) != _END:
                raise self._damaged("something stands behind its end")

    def copy(self, member: Member, sink: Sink, progress: Progress | None = None) -> None:
        """Pass a member on, comparing it as it goes: what `sink` was given counts for nothing if this raises.

        Raises BackupDamaged, and what `sink` raises.
        """
        try:
            with self._reading():
                self._file.seek(self._at[member.name])
                self._pour(member, _guarded(sink), progress)
        except _SinkFailed as failure:
            raise failure.error from None

    def read(self, member: Member, *, limit: int) -> bytes:
        """A small member, verified; raises BackupDamaged, also when it is longer than `limit` bytes."""
        if member.size > limit:
            raise self._damaged(f"{member.name} has {member.size} bytes, and {limit} are the most")
        data = bytearray()
        self.copy(member, data.extend)
        return bytes(data)

    def _pour(self, member: Member, sink: Sink | None, progress: Progress | None) -> None:
        try:
            digest = _poured(self._file, member.size, sink, progress)
        except EOFError:
            raise self._damaged("it became shorter while it was read") from None
        if digest != member.digest:
            raise self._damaged(f"{member.name} differs from its digest")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._damaged(f"the disk cannot read it ({fs.reason_of(error)})") from error


def _instead(beginning: bytes) -> str:
    """What a file is that doesn't begin as a backup does."""
    if beginning.startswith(_ZIP):
        return "it is a zip archive, as single checkpoints are, which `ckptcache import` takes"
    compressed = "it is compressed, unpack it first"
    other = compressed if beginning.startswith(_COMPRESSED) else "it doesn't begin with a manifest"
    return other if beginning else "it is empty"


@contextmanager
def opened(path: Path) -> Iterator[Archive]:
    """Open a backup, check its manifest and its length; raises what `Archive` does."""
    try:
        file = fs.open_regular(path.resolve())
    except NotACheckpoint as error:
        raise NotABackup(path=path, reason=error.fields["reason"]) from error
    except (OSError, RuntimeError) as error:  # a circle of links is either
        reason = fs.reason_of(error) if isinstance(error, OSError) else "it is a circle of links"
        raise NotABackup(path=path, reason=reason) from error
    with file:
        yield Archive(path, file)
