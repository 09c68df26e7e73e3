"""A corpus of hostile checkpoint files, each of which creates the sentinel, takes gigabytes or is broken."""

import io
import os
import pickle
import struct
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

GIGABYTES = 2**31 - 1


class Calling:
    """Pickles as a call of `function`, as a hostile file would hold it."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.args


def payloads(sentinel: Path) -> dict[str, Any]:
    """Objects whose unpickling creates `sentinel`."""
    code = f"open({str(sentinel)!r}, 'w').close()"
    command = f"touch {sentinel}"
    script = [sys.executable, "-c", code]
    system = Calling(os.system, command)
    hidden = types.SimpleNamespace(payload=system)
    return {
        "os.system": system,
        "exec": Calling(exec, code),
        "eval": Calling(eval, f"__import__('os').system({command!r})"),
        "compile": Calling(exec, Calling(compile, code, "<string>", "exec")),
        "subprocess.run": Calling(subprocess.run, script),
        "subprocess.Popen": Calling(subprocess.Popen, script),
        "subprocess.check_output": Calling(subprocess.check_output, script),
        "os.popen": Calling(os.popen, command),
        "os.mkdir": Calling(os.mkdir, str(sentinel)),
        "open": Calling(open, str(sentinel), "w"),
        "Path.touch": Calling(Path.touch, sentinel),
        "partial": Calling(partial(os.system, command)),
        "partial of partial": Calling(partial(partial(exec), code)),
        "map": Calling(list, Calling(map, os.system, [command])),
        "getattr": Calling(getattr, Path, "touch"),
        "torch.hub": Calling(torch.hub.load, str(sentinel.parent), "entry"),
        "torch.load": Calling(torch.load, str(sentinel.parent / "inner.pt")),
        "torch.utils": Calling(torch.hub.download_url_to_file, f"file://{sentinel.parent}/inner.pt", str(sentinel)),
        "import": Calling(__import__, "antigravity"),
        "in a dict": {"model": {"w": torch.ones(2), "x": [1, (2, system)]}},
        "in an ordered dict": OrderedDict(a=torch.ones(1), b=system),
        "as a key": {"state": {(1, 2): [hidden]}},
        "in a set": {1, 2, hidden.__class__},
        "after a tensor": [torch.ones(3), system],
        "in the header": {"ckptcache": {"format": 1, "record": system}},
        "in the record": {"ckptcache": {"format": 1, "record": {"extra": {"x": [system]}}}, "model": {}},
    }


# --- instructions --------------------------------------------------------------------------------


def stream(*instructions: bytes) -> bytes:
    """A pickle of protocol 2."""
    return b"\x80\x02" + b"".join(instructions) + b"."


def name(full: str) -> bytes:
    module, _, last = full.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def call(function: bytes, *args: bytes) -> bytes:
    return function + b"(" + b"".join(args) + b"tR"


def new(function: bytes, *args: bytes) -> bytes:
    return function + b"(" + b"".join(args) + b"t\x81"


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def part(value: bytes) -> bytes:
    return b"}" + text("model") + value + b"s"


def storage(count: int, *, key: str = "0", kind: str = "torch.FloatStorage") -> bytes:
    return tuple_of(text("storage"), name(kind), text(key), text("cpu"), number(count)) + b"Q"


def tensor(source: bytes, size: int) -> bytes:
    rebuild = name("torch._utils._rebuild_tensor_v2")
    hooks = call(name("collections.OrderedDict"))
    return call(rebuild, source, number(0), tuple_of(number(size)), tuple_of(number(1)), b"\x89", hooks)


def archive(
    pickled: bytes,
    entries: tuple[tuple[str, bytes], ...] = (("archive/data/0", bytes(16)),),
    *,
    compression: int = zipfile.ZIP_STORED,
    pickle_name: str = "archive/data.pkl",
) -> bytes:
    """A zip file laid out as torch does."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr(pickle_name, pickled)
        file.writestr("archive/byteorder", "little")
        for entry, data in entries:
            file.writestr(entry, data)
        file.writestr("archive/version", "3\n")
    return buffer.getvalue()


HONEST = stream(part(tensor(storage(4), 4)))


def greedy() -> dict[str, bytes]:
    """Small files that claim gigabytes, or would read beyond what is there."""
    many = number(GIGABYTES)
    storages = "torch.storage.UntypedStorage"
    qtensor = call(
        name("torch._utils._rebuild_qtensor"),
        *(storage(16, kind="torch.QInt8Storage"), number(0), tuple_of(number(2**30)), tuple_of(number(1))),
        *(tuple_of(name("torch.per_tensor_affine"), b"G" + struct.pack(">d", 0.1), number(0)), b"\x89"),
        call(name("collections.OrderedDict")),
    )
    by_type = call(
        name("torch._tensor._rebuild_from_type_v2"),
        name("builtins.bytearray"),
        name("torch.Tensor"),
        tuple_of(many),
        b"}",
    )
    cases = {
        "bytearray": call(name("builtins.bytearray"), many),
        "bytearray of python 2": call(name("__builtin__.bytearray"), many),
        "bytearray of a long": call(name("builtins.bytearray"), b"\x8a\x05\x00\x00\x00\x00\x01"),
        "bytearray from the memo": b"]" + name("builtins.bytearray") + b"q\x01ah\x01" + tuple_of(many) + b"Ra",
        "bytearray by index": call(name("builtins.bytearray"), tensor(storage(4), 4)),
        "tensor": call(name("torch.Tensor"), many),
        "tensor of a size": call(name("torch.Tensor"), call(name("torch.Size"), tuple_of(many))),
        "float tensor": call(name("torch.FloatTensor"), many),
        "new tensor": new(name("torch.Tensor"), many),
        "storage": call(name(storages), many),
        "storage split elsewhere": call(b"ctorch\nstorage.UntypedStorage\n", many),
        "new storage": new(name(storages), many),
        "storage that can grow": tensor(call(name(storages)), 2**29),
        "typed storage": call(name("torch.storage.TypedStorage"), many),
        "parameter": call(name("torch.nn.parameter.Parameter"), call(name("torch.Tensor"), many)),
        "new parameter": new(name("torch.nn.parameter.Parameter"), tensor(storage(4), 4)),
        "quantised tensor": qtensor,
        "call through a rebuild": by_type,
        "tensor beyond its storage": tensor(storage(4), 2**29),
        "storage beyond its entry": tensor(storage(2**29), 2**29),
        "storage a little beyond its entry": tensor(storage(5), 5),
        "storage without an entry": tensor(storage(4, key="7"), 4),
        "storage by a path": tensor(storage(4, key="../../../etc/passwd"), 4),
        "conversion to another device": call(
            name("torch._utils._rebuild_device_tensor_from_cpu_tensor"),
            *(tensor(storage(4), 4), name("torch.float64"), text("cpu"), b"\x89"),
        ),
    }
    return {label: archive(stream(part(value))) for label, value in cases.items()}


INSIDE_A_STORAGE = archive(stream(part(storage(4) + b"}" + text("dtype") + name("torch.float64") + b"sb")))


def broken() -> dict[str, bytes]:
    """Archives and streams that no honest writer makes."""
    swapped = archive(HONEST, (("archive/data/0", bytes(16)), ("archive/DATA.PKL", HONEST)))
    plain = archive(HONEST)
    return {
        "entry above the folder": archive(HONEST, (("archive/data/0", bytes(16)), ("../../x", b"x"))),
        "entry above the folder inside": archive(HONEST, (("archive/data/0", bytes(16)), ("archive/../../x", b"x"))),
        "absolute entry": archive(HONEST, (("archive/data/0", bytes(16)), ("/tmp/x", b"x"))),
        "second data.pkl": _doubled(HONEST),
        "second data.pkl in capitals": swapped,
        "second folder": archive(HONEST, (("archive/data/0", bytes(16)), ("other/data.pkl", HONEST))),
        "data.pkl elsewhere": archive(HONEST, pickle_name="data.pkl"),
        "torchscript": archive(HONEST, (("archive/constants.pkl", HONEST),)),
        "deflated": archive(HONEST, compression=zipfile.ZIP_DEFLATED),
        "bomb": archive(
            stream(part(tensor(storage(2**26), 2**26))),
            (("archive/data/0", bytes(2**28)),),
            compression=zipfile.ZIP_DEFLATED,
        ),
        "bzip2": archive(HONEST, compression=zipfile.ZIP_BZIP2),
        "lying sizes": plain.replace(struct.pack("<LL", 16, 16), struct.pack("<LL", 2**31, 2**31)),
        "comment": plain[:-2] + struct.pack("<H", 4) + b"abcd",
        "junk behind": plain + bytes(32),
        "junk before": b"junk" * 8 + plain,
        "local header before": plain[:40] + plain,
        "two archives": plain + plain,
        "encrypted": plain.replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00"),
        "wrong checksum": plain.replace(HONEST, HONEST.replace(b"model", b"modem")),
        "no entries": b"PK\x05\x06" + bytes(18),
        "only a magic number": b"PK\x03\x04",
        "memo of nothing": archive(stream(b"h\x05")),
        "stack of nothing": archive(stream(b"R")),
        "tuple across a mark": archive(stream(b"K\x01(K\x02\x86")),
        "endless string": archive(stream(b"X\xff\xff\xff\xff")),
        "no end": archive(b"\x80\x02}"),
        "protocol 4": archive(pickle.dumps({"a": 1}, protocol=4)),
        "protocol 0": archive(pickle.dumps({"a": 1}, protocol=0)),
        "persistent id of text": archive(stream(text("storage"), b"Q")),
        "persistent id of another kind": archive(stream(tuple_of(text("module"), text("x")), b"Q")),
        "not a mapping": archive(stream(b"]")),
        "a number": archive(stream(b"K\x05")),
        "a method of the mapping replaced": archive(
            stream(call(name("collections.OrderedDict")), b"}", text("pop"), b"K\x01", b"sb")
        ),
        "a newer format": archive(
            stream(b"}", text("ckptcache"), b"}(", text("format"), number(2), text("record"), b"}us")
        ),
    }


def _doubled(pickled: bytes) -> bytes:
    """Two entries of one name, which `zipfile` warns of when it writes them."""
    data = archive(pickled, (("archive/data/0", bytes(16)), ("archive/datb.pkl", pickled)))
    return data.replace(b"datb.pkl", b"data.pkl")


def legacy(payload: Any) -> bytes:
    """torch's format before 1.6, a row of pickles."""
    buffer = io.BytesIO()
    torch.save(payload, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def corpus(sentinel: Path) -> Iterator[tuple[str, bytes]]:
    """All of the above as files, by name."""
    for label, payload in payloads(sentinel).items():
        state = payload if isinstance(payload, dict) and "ckptcache" in payload else {"model": payload}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        yield f"saved: {label}", buffer.getvalue()
        yield f"legacy: {label}", legacy(state)
        if isinstance(payload, Calling):
            yield f"stored: {label}", archive(pickle.dumps(state, protocol=2))
            yield f"bare: {label}", pickle.dumps(state, protocol=2)
    yield from ((f"greedy: {label}", data) for label, data in greedy().items())
    yield from ((f"broken: {label}", data) for label, data in broken().items())
