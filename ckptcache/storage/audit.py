"""What a checkpoint file may hold, judged before torch decodes it; nothing that the file asks for is done.

torch's restricted unpickler runs no foreign code, but it calls `bytearray`, `torch.Tensor` and its
storages with whatever number stands in the file, so that a kilobyte can claim gigabytes. Honest
files never call those. The archive is held to the one form that every zip reader reads alike, since
what is judged here with `zipfile` is decoded by another reader inside torch.
"""

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
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


def check_pickle(file: BinaryIO, path: Path, entries: Mapping[str, zipfile.ZipInfo], size: int) -> None:
    """Follow the instructions of the archive's pickle without carrying any out.

    Raises:
        CheckpointDamaged: the pickle is broken, or claims more of a stored tensor than is there.
        UnsafeCheckpoint: it asks for a call that no honest file makes.
    """
    name = next(name for name in entries if name.endswith("/data.pkl"))
    sizes = {key.partition("/data/")[2]: entry.file_size for key, entry in entries.items() if "/data/" in key}
    try:
        with zipfile.ZipFile(file) as archive:
            data = archive.read(name)
        _Follower(sizes, size).follow(data)
    except _Refused as error:
        raise UnsafeCheckpoint(path=path, reason=error) from error
    except (zipfile.BadZipFile, ValueError, IndexError, KeyError, OSError, struct.error, EOFError) as error:
        raise CheckpointDamaged(path=path, reason=_one_line(error)) from error
    file.seek(0)


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
        for opcode, arg, _ in pickletools.genops(data):
            if opcode.name in _PLAIN:
                self._stack.append(arg if isinstance(arg, int | str) else _OTHER)
            else:
                step = _STEPS.get(opcode.name)
                if step is None:
                    raise _Refused(f"it uses the instruction {opcode.name}, which torch.save never writes")
                step(self, arg)

    def _ignore(self, arg: Any) -> None:
        pass

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
                raise ValueError("its pickle is broken")
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def _drop(self, count: int) -> list[Any]:
        items = self._stack[-count:]
        if len(items) < count or any(item is _MARK for item in items):
            raise ValueError("its pickle is broken")
        del self._stack[-count:]
        return items

    def _global(self, arg: str) -> None:
        # "torch" + "storage.UntypedStorage" and "torch.storage" + "UntypedStorage" are one to torch.
        module, _, name = arg.replace(" ", ".", 1).rpartition(".")
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
        return args[0].name in _REBUILDS and self._result(args[0], args[2]) is not None

    def _fits(self, args: Any) -> bool:
        """A quantised tensor is allocated by its size before it is pointed to its storage."""
        size = args[2] if isinstance(args, tuple) and len(args) > 2 else None
        return isinstance(size, tuple) and all(type(n) is int for n in size) and 0 <= math.prod(size) <= self._limit

    def _storage(self, arg: Any) -> None:
        """("storage", type, key, location, number of elements) names an entry of the archive."""
        (pid,) = self._drop(1)
        if not isinstance(pid, tuple) or len(pid) != 5:
            raise ValueError("its pickle names a stored tensor in an unknown way")
        _, kind, key, _, count = pid
        if not isinstance(kind, _Global) or type(count) is not int or count < 0 or not isinstance(key, str):
            raise ValueError("its pickle names a stored tensor in an unknown way")
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
_PLAIN = frozenset(
    (
        *("NONE", "NEWFALSE", "NEWTRUE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "BINFLOAT", "SHORT_BINSTRING"),
        *("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE"),
    )
)
_STEPS: dict[str, Callable[[_Follower, Any], None]] = {
    "PROTO": _Follower._protocol,
    "STOP": _Follower._ignore,
    "GLOBAL": _Follower._global,
    "MARK": _Follower._mark,
    "EMPTY_TUPLE": lambda follower, _: follower._stack.append(()),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "TUPLE": _tuple_to_mark,
    "APPEND": _dropping(1),
    "APPENDS": _drop_to_mark,
    "SETITEM": _dropping(2),
    "SETITEMS": _drop_to_mark,
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Follower._put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Follower._get),
    "BINPERSID": _Follower._storage,
    "REDUCE": _Follower._call,
    "NEWOBJ": _Follower._new,
    "BUILD": _Follower._build,
}
