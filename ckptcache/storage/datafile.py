"""The file of one piece of prepared data: arrays, tensors and plain values, without pickle.

It is a safetensors file, so that other programs can read the arrays. The record (what the data is,
when it was made, and what each value is) stands in the header's own metadata, and the last tensor,
`DIGEST`, is the BLAKE3 of every byte before it: a file is whole and its own, or it is refused, and
it is replaced by one rename. Complex numbers are stored as pairs, which every safetensors reader knows.
"""

import io
import json
import math
import mmap
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from blake3 import blake3

from ckptcache.errors import NotCacheable
from ckptcache.storage import fs

if TYPE_CHECKING:
    import numpy as np
    import torch

FORMAT = 1
DIGEST = "__blake3__"
_METADATA = "__metadata__"
_RECORD = "ckptcache"
_SINGLE = "data"
_DIGEST_BYTES = 32
_ALIGNMENT = 64
_CHUNK = 8 * 1024 * 1024
MAX_HEADER_BYTES = 100_000_000
"""The safetensors library reads no longer header; plain values live there."""
MAP_FROM = 1024 * 1024
"""Bytes from which a file is mapped. Each mapping keeps a file open, so that small ones are read instead."""
_MAX_DEPTH = 64

_STORED_AS = {
    "complex128": ("F64", 16),
    "complex64": ("F32", 8),
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint64": ("U64", 8),
    "uint32": ("U32", 4),
    "uint16": ("U16", 2),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
"""Each dtype's name to its name in safetensors and the bytes of one element."""


@dataclass(frozen=True, slots=True)
class Record:
    """What a file says of itself.

    Attributes:
        key: the name under which the data was asked for.
        config: hash of the configuration it was prepared with.
        created_at: when it had been prepared, in seconds since 1970 by the clock of whoever did.
    """

    key: str
    config: str
    created_at: float


# --- what can be kept ----------------------------------------------------------------------------


def normal(value: Any, key: str) -> Any:
    """`value` in the form in which it would come back from a file; shares memory with it where it can.

    A mapping becomes a dict; arrays become C-contiguous, in the machine's byte order; tensors become
    contiguous, detached, on the CPU.

    Raises:
        NotCacheable: it, or a value in it, can't come back as it is; names which.
    """
    if not isinstance(value, Mapping):
        return _normal_leaf(value, key)
    for name in value:
        if type(name) is not str or name in (DIGEST, _METADATA):
            raise NotCacheable(key=f"{key}[{name!r}]", kind="under a name of its own kind", remedy="rename it as text")
    return {name: _normal_leaf(leaf, f"{key}[{name!r}]") for name, leaf in value.items()}


def _normal_leaf(value: Any, key: str) -> Any:
    if _is_a(value, "numpy", "ndarray"):
        return _normal_array(value, key)
    if _is_a(value, "torch", "Tensor"):
        return _normal_tensor(value, key)
    _check_plain(value, key, 0)
    return value


def _is_a(value: Any, module: str, name: str) -> bool:
    # What was never imported can't have made the value; importing torch to ask takes seconds.
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], name))


def _normal_array(value: "np.ndarray[Any, Any]", key: str) -> "np.ndarray[Any, Any]":
    import numpy as np

    if type(value) not in (np.ndarray, np.memmap):
        raise NotCacheable(key=key, kind=f"a {type(value).__name__}", remedy="make it a plain array with np.asarray")
    dtype = value.dtype.newbyteorder("=")
    if dtype.kind not in "biufc" or dtype.name not in _STORED_AS:
        remedy = "turn it into numbers, or give text as a list"
        raise NotCacheable(key=key, kind=f"an array of {dtype}", remedy=remedy)
    return np.require(value, dtype, ["C", "E"])


def _normal_tensor(value: "torch.Tensor", key: str) -> "torch.Tensor":
    import torch

    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        raise NotCacheable(key=key, kind=f"a {type(value).__name__}", remedy="make it a plain tensor")
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        raise NotCacheable(key=key, kind="a sparse, quantized or meta tensor", remedy="make it dense")
    if _name_of(value) not in _STORED_AS:
        raise NotCacheable(key=key, kind=f"a tensor of {value.dtype}", remedy="turn it into another dtype")
    return value.detach().cpu().resolve_conj().resolve_neg().contiguous()


def _check_plain(value: Any, key: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise NotCacheable(key=key, kind=f"nested more than {_MAX_DEPTH} deep", remedy="flatten it")
    if type(value) is list:
        for i, item in enumerate(value):
            _check_plain(item, f"{key}[{i}]", depth + 1)
    elif type(value) is dict and all(type(name) is str for name in value):
        for name, item in value.items():
            _check_plain(item, f"{key}[{name!r}]", depth + 1)
    elif type(value) is int:
        if not -(2**63) <= value < 2**64:
            raise NotCacheable(key=key, kind="a whole number of more than 64 bits", remedy="give it as text")
    elif value is not None and type(value) not in (bool, float, str):
        remedy = (
            "give arrays and tensors at the top level of the mapping, and beside them only numbers, text, "
            "true, false, None, lists, and dicts with text for keys"
        )
        raise NotCacheable(key=key, kind=f"a {type(value).__qualname__}", remedy=remedy)


# --- writing -------------------------------------------------------------------------------------


def write(file: fs.TempFile, value: Any, record: Record) -> None:
    """Write `value`, which `normal` returned, and its record, unsynced.

    Raises:
        NotCacheable: its plain values are too long for a header.
    """
    parts = sorted(_parts(value), key=lambda part: -_STORED_AS[_name_of(part[1])][1])
    starts, end = {}, 0
    for name, leaf in parts:
        starts[name], end = end, end + leaf.nbytes
    header = _header(value, record, starts, end)
    digest = blake3()
    start: list[bytes | memoryview] = [len(header).to_bytes(8, "little"), header]
    for data in [*start, *(_bytes_of(leaf) for _, leaf in parts)]:
        digest.update(data)
        file.write(data)
    file.write(digest.digest())


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """The arrays and tensors, by name."""
    named = value if isinstance(value, dict) else {_SINGLE: value}
    return ((name, leaf) for name, leaf in named.items() if _kind_of(leaf) != "plain")


def _kind_of(leaf: Any) -> str:
    return "array" if _is_a(leaf, "numpy", "ndarray") else "tensor" if _is_a(leaf, "torch", "Tensor") else "plain"


def _name_of(leaf: Any) -> str:
    return str(leaf.dtype).removeprefix("torch.")


def _bytes_of(leaf: Any) -> memoryview:
    if _kind_of(leaf) == "tensor":
        import torch

        leaf = leaf.flatten().view(torch.uint8).numpy()
    return memoryview(leaf.reshape(-1).view("u1"))


def _header(value: Any, record: Record, starts: Mapping[str, int], end: int) -> bytes:
    told = {"format": FORMAT, "key": record.key, "config": record.config, "created_at": float(record.created_at)}
    if isinstance(value, dict):
        told["mapping"] = {name: _description(leaf, starts.get(name)) for name, leaf in value.items()}
    else:
        told["single"] = _description(value, starts.get(_SINGLE))
    header: dict[str, Any] = {_METADATA: {_RECORD: json.dumps(told, separators=(",", ":"))}}
    for name, leaf in _parts(value):
        header[name] = _as_safetensors(leaf, starts[name])
    header[DIGEST] = {"dtype": "U8", "shape": [_DIGEST_BYTES], "data_offsets": [end, end + _DIGEST_BYTES]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise NotCacheable(key=record.key, kind="too long in its plain values", remedy="give them as arrays")
    return text


def _description(leaf: Any, start: int | None) -> dict[str, Any]:
    kind = _kind_of(leaf)
    if kind == "plain":
        return {"kind": kind, "value": leaf}
    return {"kind": kind, "dtype": _name_of(leaf), "shape": list(leaf.shape), "start": start}


def _as_safetensors(leaf: Any, start: int) -> dict[str, Any]:
    pair = [2] if "complex" in _name_of(leaf) else []
    dtype = _STORED_AS[_name_of(leaf)][0]
    return {"dtype": dtype, "shape": [*leaf.shape, *pair], "data_offsets": [start, start + leaf.nbytes]}


# --- reading -------------------------------------------------------------------------------------


def peek(path: Path) -> Record:
    """What a file says of itself, unverified. Raises ValueError, OSError, or NotACheckpoint for a link or folder."""
    with fs.open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = _header_length(file.read(8), size)
        return _record_of(_told(file.read(length)))


def read(path: Path) -> tuple[Any, Record]:
    """The value and the record of a file, verified by its digest before anything of it is decoded.

    From `MAP_FROM` bytes on, the arrays lie in a private mapping of the file: only what is touched
    takes memory, processes share it, and what is written to it stays in this process. The whole file
    is read once all the same, for the digest, however long it is: that is what training is about to
    read anyway, and a limit above which a flipped bit passes would be one that nobody remembers.

    Raises:
        ValueError: it is not whole, or not such a file.
        OSError: it can't be read.
        NotACheckpoint: it is a link or a folder.
    """
    with fs.open_regular(path) as file:
        content = _verified(file)
    try:
        return _decoded(content)
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError, RuntimeError) as error:
        raise ValueError(f"its header makes no sense ({error!r})") from error


def _verified(file: BinaryIO) -> bytearray | mmap.mmap:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if size < 8 + _DIGEST_BYTES:
        raise ValueError(f"it has only {size} bytes")
    if size >= MAP_FROM and os.name != "nt":
        # Read, not looked at through the mapping, where a failing disk would kill the process.
        _check_digest(_chunks(file, size), file)
        return _mapped(file, size)
    content = bytearray(file.read(size))
    _check_digest([memoryview(content)[:-_DIGEST_BYTES]], io.BytesIO(content[-_DIGEST_BYTES:]))
    return content


def _chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    rest = size - _DIGEST_BYTES
    while rest and (chunk := file.read(min(rest, _CHUNK))):
        rest -= len(chunk)
        yield chunk


def _check_digest(chunks: Any, tail: BinaryIO) -> None:
    digest = blake3()
    for chunk in chunks:
        digest.update(chunk)
    if digest.digest() != tail.read(_DIGEST_BYTES):
        raise ValueError("its content differs from its digest")


def _mapped(file: BinaryIO, size: int) -> mmap.mmap:
    # Without it, Linux refuses a private mapping of more than the memory there is.
    unreserved = getattr(mmap, "MAP_NORESERVE", 0)
    if sys.platform == "linux" and not unreserved and os.uname().machine in ("x86_64", "aarch64"):
        unreserved = 0x4000  # Python names it since 3.13
    return mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE | unreserved, mmap.PROT_READ | mmap.PROT_WRITE)


def _header_length(data: bytes, size: int) -> int:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(size - 8 - _DIGEST_BYTES, MAX_HEADER_BYTES):
        raise ValueError("it is cut short, or no such file")
    return length


def _told(header: bytes) -> dict[str, Any]:
    try:
        told = json.loads(json.loads(header)[_METADATA][_RECORD])
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("it was not written by ckptcache") from error
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise ValueError("it has another format")
    return told


def _record_of(told: Mapping[str, Any]) -> Record:
    key, config, created_at = told.get("key"), told.get("config"), told.get("created_at")
    if not isinstance(key, str) or not isinstance(config, str) or not isinstance(created_at, float):
        raise ValueError("its record is incomplete")
    return Record(key, config, created_at)


def _decoded(content: bytearray | mmap.mmap) -> tuple[Any, Record]:
    body = 8 + _header_length(bytes(content[:8]), len(content))
    told = _told(bytes(content[8:body]))
    record = _record_of(told)
    if "single" in told:
        return _leaf(content, body, told["single"]), record
    return {name: _leaf(content, body, told["mapping"][name]) for name in told["mapping"]}, record


def _leaf(content: bytearray | mmap.mmap, body: int, told: Mapping[str, Any]) -> Any:
    if told["kind"] == "plain":
        return told["value"]
    shape, start = tuple(told["shape"]), body + told["start"]
    size = _STORED_AS[told["dtype"]][1]
    make = _array if told["kind"] == "array" else _tensor
    return make(content, told["dtype"], shape, start, math.prod(shape) * size)


def _array(content: Any, dtype: str, shape: tuple[int, ...], start: int, nbytes: int) -> "np.ndarray[Any, Any]":
    import numpy as np

    if not nbytes:
        return np.empty(shape, dtype)
    return np.frombuffer(content, np.uint8, nbytes, start).view(dtype).reshape(shape)


def _tensor(content: Any, dtype: str, shape: tuple[int, ...], start: int, nbytes: int) -> "torch.Tensor":
    import torch

    if not nbytes:
        return torch.empty(shape, dtype=getattr(torch, dtype))
    return (
        torch.frombuffer(content, dtype=torch.uint8, count=nbytes, offset=start).view(getattr(torch, dtype)).view(shape)
    )
