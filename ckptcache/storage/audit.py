"""What a checkpoint file may hold, judged before torch decodes it; nothing that the file asks for is done.

torch's restricted unpickler runs no foreign code, but it calls `bytearray`, `torch.Tensor` and its
storages with whatever number stands in the file, so that a kilobyte can claim gigabytes. Honest
files never call those. The archive is held to the one form that every zip reader reads alike, since
what is judged here with `zipfile` is decoded by another reader inside torch.
"""

import math
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ckptcache.errors import CheckpointDamaged, NotACheckpoint, UnsafeCheckpoint

_LOCAL = b"PK\x03\x04"
_ENCRYPTED = 0x1
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")


# --- the archive ---------------------------------------------------------------------------------


def check_archive(file: BinaryIO, path: Path, size: int) -> dict[str, zipfile.ZipInfo]:
    """The entries of torch's archive by name; a small file could otherwise claim gigabytes.

    Raises:
        CheckpointDamaged: it begins like an archive and is broken or cut short.
        NotACheckpoint: it isn't an archive that torch.save writes.
    """
    entries = _entries(file, path)
    names = [entry.orig_filename for entry in entries]
    if reason := _odd_names(names) or _odd_entries(entries, size) or _odd_end(file, size):
        raise NotACheckpoint(path=path, reason=reason)
    file.seek(0)
    return dict(zip(names, entries, strict=True))


def _entries(file: BinaryIO, path: Path) -> list[zipfile.ZipInfo]:
    file.seek(0)
    if file.read(len(_LOCAL)) != _LOCAL:
        raise NotACheckpoint(path=path, reason="it isn't in the zip format that torch.save writes (since torch 1.6)")
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, struct.error) as error:
        raise CheckpointDamaged(path=path, reason=f"its archive is broken or cut short ({error})") from error


def _odd_names(names: list[str]) -> str | None:
    folder = names[0].split("/")[0] if names else ""
    if f"{folder}/data.pkl" not in names:
        return "it is a zip file without torch's data"
    if f"{folder}/constants.pkl" in names:
        return "it is a TorchScript archive"
    if any(not name.startswith(f"{folder}/") or ".." in name or not name.isprintable() for name in names):
        return "it holds entries outside its folder"
    # torch's reader looks names up without regard to case.
    if len({name.lower() for name in names}) != len(names):
        return "it holds several entries of the same name"
    return None


def _odd_entries(entries: list[zipfile.ZipInfo], size: int) -> str | None:
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size for entry in entries):
        return "its entries are compressed, which torch never writes"
    if any(entry.flag_bits & _ENCRYPTED for entry in entries):
        return "its entries are encrypted"
    if sum(entry.file_size for entry in entries) > size:
        return "its directory claims more bytes than the file has"
    return None


def _odd_end(file: BinaryIO, size: int) -> str | None:
    """Whether the directory lies anywhere but right before the end, where readers may disagree on which one counts."""
    tail = min(size, _END.size + _LOCATOR.size + _END64.size)
    file.seek(size - tail)
    data = file.read(tail)
    end = _END.unpack(data[-_END.size :])
    length, offset, start = end[5], end[6], size - _END.size
    if data[-_END.size - _LOCATOR.size :].startswith(b"PK\x06\x07"):
        start = size - tail
        end64 = _END64.unpack_from(data)
        length, offset = end64[8], end64[9]
        if _LOCATOR.unpack_from(data, _END64.size)[2] != start or end64[0] != b"PK\x06\x06":
            return "its directory is not where torch writes it"
    if end[0] != b"PK\x05\x06" or offset + length != start:
        return "its directory is not where torch writes it"
    return None


# --- the pickle inside ---------------------------------------------------------------------------


class _Global(NamedTuple):
    module: str
    name: str


class _Made(NamedTuple):
    """What a call made, by the name of what was called."""

    by: str


_MARK = object()
_OTHER = _Made("")
_STORAGE = _Made("storage")
_ITEM_SIZES = {
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage", "QInt32Storage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    "ComplexDoubleStorage": 16,
}
_VOUCHED_MODULES = ("torch", "builtins", "__builtin__", "collections", "_codecs")
"""What torch's unpickler knows by itself; anything else only passes it where the user vouched for it."""
_REBUILDS = frozenset(
    f"_rebuild_{kind}"
    for kind in (
        *("parameter", "parameter_with_state", "tensor", "tensor_v2", "tensor_v3", "qtensor", "sparse_tensor"),
        *("nested_tensor", "meta_tensor_no_storage", "wrapper_subclass"),
    )
)
_CALLABLE = _REBUILDS | {"OrderedDict", "Counter", "set", "complex", "Size", "device", "_get_layout", "encode"}


class _Refused(ValueError):
    """What is asked for never stands in an honest file."""


_GREEDY = tuple(
    word.encode()
    for word in (
        *("bytearray\n", "Tensor\n", "TypedStorage\n", "UntypedStorage\n", "Parameter\n"),
        *("_rebuild_qtensor\n", "_rebuild_from_type_v2\n", "_rebuild_device_tensor"),
    )
)
"""What a pickle must name before it can take more memory than its file holds."""


def check_pickle(
    file: BinaryIO, path: Path, entries: Mapping[str, zipfile.ZipInfo], size: int, *, vouched: bool = False
) -> None:
    """Follow the instructions of the archive's pickle without carrying any out.

    That takes half as long as torch's own reading of them. A file that is `vouched` for by a digest is
    followed only where it names something greedy, since whoever wrote its record could be hostile too.

    Raises:
        CheckpointDamaged: the pickle is broken, or claims more of a stored tensor than is there.
        UnsafeCheckpoint: it asks for a call that no honest file makes.
    """
    name = next(name for name in entries if name.endswith("/data.pkl"))
    sizes = {key.partition("/data/")[2]: entry.file_size for key, entry in entries.items() if "/data/" in key}
    try:
        with zipfile.ZipFile(file) as archive:
            data = archive.read(name)
        file.seek(0)
        if vouched and not any(word in data for word in _GREEDY):
            return
        _Follower(sizes, size).follow(data)
    except _Refused as error:
        raise UnsafeCheckpoint(path=path, reason=error) from error
    except (zipfile.BadZipFile, ValueError, IndexError, KeyError, OSError, struct.error, EOFError) as error:
        raise CheckpointDamaged(path=path, reason=f"its pickle is broken ({_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(".") or type(error).__name__


class _Follower:
    """The stack that the restricted unpickler would have, holding only what the checks need to know."""

    def __init__(self, sizes: Mapping[str, int], limit: int) -> None:
        self._sizes = sizes
        self._limit = limit
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def follow(self, data: bytes) -> None:
        """Raises _Refused, or ValueError and IndexError for a broken stream."""
        for code, arg in _instructions(data):
            if code in _PLAIN:
                self._stack.append(arg if isinstance(arg, int | str) else _OTHER)
            else:
                _STEPS[code](self, arg)

    def _protocol(self, arg: Any) -> None:
        if arg != 2:
            raise _Refused(f"it is a pickle of protocol {arg}, where torch.save writes 2")

    def _mark(self, arg: Any) -> None:
        self._stack.append(_MARK)

    def _since_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("an instruction finds too little")
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def _drop(self, count: int) -> list[Any]:
        items = self._stack[len(self._stack) - count :] if count else []
        if len(items) < count or any(item is _MARK for item in items):
            raise ValueError("an instruction finds too little")
        del self._stack[len(self._stack) - count :]
        return items

    def _global(self, arg: str) -> None:
        # "torch" + "storage.UntypedStorage" and "torch.storage" + "UntypedStorage" are one to torch.
        module, _, name = arg.rpartition(".")
        self._stack.append(_Global(module, name))

    def _put(self, arg: int) -> None:
        self._memo[arg] = self._stack[-1]

    def _get(self, arg: int) -> None:
        self._stack.append(self._memo[arg])

    def _call(self, arg: Any) -> None:
        called, args = self._drop(2)
        self._stack.append(self._result(called, args))

    def _new(self, arg: Any) -> None:
        called, _ = self._drop(2)
        if isinstance(called, _Global) and called.module.split(".")[0] in _VOUCHED_MODULES:
            raise _Refused(f"it makes a new {called.module}.{called.name}")
        self._stack.append(_OTHER)

    def _build(self, arg: Any) -> None:
        target, _ = self._drop(2)
        if isinstance(target, _Made) and target.by not in ("OrderedDict", ""):
            raise _Refused(f"it changes the inside of a {target.by}")
        self._stack.append(target)

    def _result(self, called: Any, args: Any) -> _Made:
        if not isinstance(called, _Global):
            raise _Refused("it calls what is not a function")
        if called.module.split(".")[0] not in _VOUCHED_MODULES:
            return _OTHER
        allowed = called.name in _CALLABLE or _CHECKED.get(called.name, _never)(self, args)
        if not allowed or (called.name == "_rebuild_qtensor" and not self._fits(args)):
            raise _Refused(f"it calls for {called.module}.{called.name}")
        return _Made(called.name)

    def _bytes_only(self, args: Any) -> bool:
        """`bytearray` of a number allocates that many bytes."""
        return args == () or (isinstance(args, tuple) and args[0] == _Made("encode"))

    def _rebuilds(self, args: Any) -> bool:
        """`_rebuild_from_type_v2` calls its first argument with its third."""
        if not isinstance(args, tuple) or len(args) != 4 or not isinstance(args[0], _Global):
            return False
        return self._result(args[0], args[2]) is not None

    def _fits(self, args: Any) -> bool:
        """A quantised tensor is allocated by its size before it is pointed to its storage."""
        size = args[2] if isinstance(args, tuple) and len(args) > 2 else None
        return isinstance(size, tuple) and all(type(n) is int for n in size) and 0 <= math.prod(size) <= self._limit

    def _storage(self, arg: Any) -> None:
        """("storage", type, key, location, number of elements) names an entry of the archive."""
        (pid,) = self._drop(1)
        if not isinstance(pid, tuple) or len(pid) != 5:
            raise ValueError("a stored tensor is named in an unknown way")
        _, kind, key, _, count = pid
        if not isinstance(kind, _Global) or type(count) is not int or count < 0 or not isinstance(key, str):
            raise ValueError("a stored tensor is named in an unknown way")
        claimed, there = count * _ITEM_SIZES.get(kind.name, 1), self._sizes.get(key, -1)
        if claimed > there:
            raise ValueError(f"it claims {claimed} bytes of the stored tensor {key!r}, and has {max(there, 0)}")
        self._stack.append(_STORAGE)


def _never(follower: _Follower, args: Any) -> bool:
    return False


def _tuple_of(count: int) -> Callable[[_Follower, Any], None]:
    return lambda follower, _: follower._stack.append(tuple(follower._drop(count)))


def _dropping(count: int) -> Callable[[_Follower, Any], None]:
    def step(follower: _Follower, _: Any) -> None:
        follower._drop(count)

    return step


def _drop_to_mark(follower: _Follower, _: Any) -> None:
    follower._since_mark()


def _tuple_to_mark(follower: _Follower, _: Any) -> None:
    follower._stack.append(tuple(follower._since_mark()))


_CHECKED: dict[str, Callable[[_Follower, Any], bool]] = {
    "bytearray": _Follower._bytes_only,
    "_rebuild_from_type_v2": _Follower._rebuilds,
}
_PLAIN = frozenset(b"N\x88\x89]}\x8fGUJKM\x8aX")
"""None, False, True, empty list, dict and set, float, bytes, numbers of 4, 1, 2 and more bytes, text."""
_STEPS: dict[int, Callable[[_Follower, Any], None]] = {
    0x80: _Follower._protocol,
    ord("c"): _Follower._global,
    ord("("): _Follower._mark,
    ord(")"): _tuple_of(0),
    0x85: _tuple_of(1),
    0x86: _tuple_of(2),
    0x87: _tuple_of(3),
    ord("t"): _tuple_to_mark,
    ord("a"): _dropping(1),
    ord("e"): _drop_to_mark,
    ord("s"): _dropping(2),
    ord("u"): _drop_to_mark,
    **dict.fromkeys(b"qr", _Follower._put),
    **dict.fromkeys(b"hj", _Follower._get),
    ord("Q"): _Follower._storage,
    ord("R"): _Follower._call,
    0x81: _Follower._new,
    ord("b"): _Follower._build,
}
_STOP = ord(".")
_SIZED = {
    code: struct.Struct(form)
    for code, form in ((0x80, "<B"), (0x71, "<B"), (0x72, "<I"), (0x68, "<B"), (0x6A, "<I"), (0x47, ">d"))
} | {code: struct.Struct(form) for code, form in ((0x4A, "<i"), (0x4B, "<B"), (0x4D, "<H"))}
_COUNTED = {ord("X"): struct.Struct("<I"), ord("U"): struct.Struct("<B"), 0x8A: struct.Struct("<B")}


def _instructions(data: bytes) -> Iterator[tuple[int, Any]]:
    """The instructions up to the end, read as torch does (`pickletools` would take escapes in names)."""
    at = 0
    while (code := data[at]) != _STOP:
        at += 1
        arg: Any = None
        if code in _SIZED:
            (arg,) = _SIZED[code].unpack_from(data, at)
            at += _SIZED[code].size
        elif code in _COUNTED:
            arg, at = _counted(data, at, code)
        elif code == ord("c"):
            end = data.index(b"\n", data.index(b"\n", at) + 1)
            arg, at = data[at:end].decode().replace("\n", "."), end + 1
        elif code not in _STEPS and code not in _PLAIN:
            raise _Refused(f"it holds the instruction {chr(code)!r}, which torch.save never writes")
        yield code, arg


def _counted(data: bytes, at: int, code: int) -> tuple[Any, int]:
    (length,) = _COUNTED[code].unpack_from(data, at)
    start = at + _COUNTED[code].size
    piece = data[start : start + length]
    if len(piece) < length:
        raise ValueError("it ends within a text")
    if code == ord("X"):
        return piece.decode("utf-8", "surrogatepass"), start + length
    return (int.from_bytes(piece, "little", signed=True) if code != ord("U") else None), start + length
