"""Text files as tokens: which are taken, how they are split, and their bytes joined."""

import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from ckptcache.errors import DataNotFound

Tokens = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]

VALIDATION_SHARE = 0.1
STDLIB_BYTES = 8_000_000
# fmt: off
SUFFIXES = frozenset((
    ".adoc", ".bash", ".bib", ".c", ".cc", ".cfg", ".cpp", ".cs", ".css", ".csv", ".cu", ".go", ".h", ".hpp",
    ".htm", ".html", ".ini", ".java", ".jl", ".js", ".json", ".jsonl", ".jsx", ".kt", ".lean", ".lua", ".md",
    ".markdown", ".org", ".php", ".pl", ".proto", ".py", ".pyi", ".r", ".rb", ".rs", ".rst", ".scala", ".sh",
    ".sql", ".swift", ".tex", ".text", ".toml", ".ts", ".tsv", ".tsx", ".txt", ".xml", ".yaml", ".yml",
))
# fmt: on
"""Endings of the names that are taken for text, in lower case."""

# Tests and vendored code differ between distributions; build data differs between machines.
# fmt: off
_NOT_STDLIB = frozenset((
    "test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "ensurepip",
    "__phello__",
))
# fmt: on
_NOT_STDLIB_PREFIXES = ("config-", "_sysconfigdata", "_sysconfig_vars", "_distutils_system", "sitecustomize")


@dataclass(frozen=True)
class TextFile:
    """A regular file below a folder."""

    name: str
    """Path relative to the folder, with "/" between its parts."""
    size: int
    """Bytes."""
    mtime_ns: int


@dataclass(frozen=True)
class SplitText:
    """Text as bytes, each part in order of its files' names."""

    train: Tokens
    val: Tokens
    not_utf8: int
    """Files left out because they aren't UTF-8."""
    unreadable: int
    """Files left out because they could not be read."""
    by_position: bool
    """Whether the text was split at a line end, and not by file."""

    def to_arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """The same as arrays, which a data cache can keep."""
        facts = np.array([self.not_utf8, self.unreadable, self.by_position], dtype=np.int64)
        return {"train": self.train, "val": self.val, "facts": facts}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray[Any, Any]]) -> "SplitText":
        """What `to_arrays` took apart."""
        not_utf8, unreadable, by_position = (int(fact) for fact in arrays["facts"])
        return cls(arrays["train"], arrays["val"], not_utf8, unreadable, bool(by_position))


# --- which files ---------------------------------------------------------------------------------


def text_files(folder: Path) -> list[TextFile]:
    """The regular files below `folder` that are named like text, by name; hidden ones and links are passed over."""
    found = (f for f in _walk(folder) if Path(f.name).suffix.lower() in SUFFIXES)
    return sorted(found, key=lambda f: f.name)


def stdlib_files(folder: Path | None = None) -> list[TextFile]:
    """At most 8 MB of the standard library's source, by name; which files, a hash of their names decides."""
    found = _walk(folder or stdlib_folder(), leave_out=_NOT_STDLIB)
    sources = [f for f in found if f.name.endswith(".py") and not _is_local(f.name)]
    chosen, total = [], 0
    for file in sorted(sources, key=lambda f: _fraction(f"choice:{f.name}")):
        if total + file.size <= STDLIB_BYTES:
            chosen.append(file)
            total += file.size
    return sorted(chosen, key=lambda f: f.name)


def stdlib_folder() -> Path:
    """Where the running Python keeps its standard library."""
    return Path(sysconfig.get_path("stdlib"))


def _is_local(name: str) -> bool:
    return any(part.startswith(_NOT_STDLIB_PREFIXES) for part in name.split("/"))


def _walk(folder: Path, leave_out: frozenset[str] = frozenset()) -> Iterator[TextFile]:
    for root, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in leave_out]
        for name in names:
            if not name.startswith(".") and (file := _regular(Path(root, name), folder)):
                yield file


def _refuse(error: OSError) -> None:
    raise DataNotFound(path=error.filename, reason=f"it cannot be listed ({error.strerror})") from error


def _regular(path: Path, folder: Path) -> TextFile | None:
    try:
        status = path.lstat()
    except OSError:  # gone since it was listed
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return TextFile(path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns)


# --- splitting -----------------------------------------------------------------------------------


def split_by_file(files: Sequence[TextFile], needed: int) -> tuple[list[TextFile], list[TextFile]] | None:
    """Files for training and for validation; None when no split leaves `needed` bytes on both sides.

    A file goes to validation when a hash of its name says so, about one in ten do, and so it stays
    where it is when others are added. Where those hold less than `needed`, the next in the order of
    the hash join them.
    """
    order = sorted(files, key=lambda f: _fraction(f.name))
    count = sum(_fraction(f.name) < VALIDATION_SHARE for f in order)
    while count < len(order) and _total(order[:count]) < needed:
        count += 1
    while count and _total(order[count:]) < needed:
        count -= 1
    if _total(order[:count]) < needed:
        return None
    val = {f.name for f in order[:count]}
    return [f for f in files if f.name not in val], [f for f in files if f.name in val]


def split_by_position(text: bytes, needed: int) -> tuple[bytes, bytes]:
    """The first nine tenths of `text`, up to a line end, and the rest; `needed` bytes or more each where possible."""
    cut = max(0, min(round(len(text) * (1 - VALIDATION_SHARE)), len(text) - needed))
    line_end = text.rfind(b"\n", 0, cut) + 1
    if line_end >= needed:
        cut = line_end
    return text[:cut], text[cut:]


def read_split(folder: Path, files: Sequence[TextFile], needed: int) -> SplitText:
    """The files' bytes, split for training and validation, each part with `needed` bytes where that is possible."""
    texts: dict[str, bytes] = {}
    not_utf8 = unreadable = 0
    for file in files:
        try:
            texts[file.name] = _read_utf8(folder / file.name)
        except UnicodeDecodeError:
            not_utf8 += 1
        except OSError:
            unreadable += 1
    kept = [TextFile(f.name, len(texts[f.name]), f.mtime_ns) for f in files if f.name in texts]
    split = split_by_file(kept, needed) if len(kept) > 1 else None
    if split is None:
        train, val = split_by_position(_joined(texts, kept), needed)
    else:
        train, val = (_joined(texts, part) for part in split)
    return SplitText(_bytes(train), _bytes(val), not_utf8, unreadable, split is None)


def _read_utf8(path: Path) -> bytes:
    data = path.read_bytes()
    data.decode("utf-8")
    return data if data.endswith(b"\n") or not data else data + b"\n"


def _joined(texts: dict[str, bytes], files: Iterable[TextFile]) -> bytes:
    return b"".join(texts[f.name] for f in files)


def _bytes(text: bytes) -> Tokens:
    return np.frombuffer(text, dtype=np.uint8)


def _total(files: Iterable[TextFile]) -> int:
    return sum(f.size for f in files)


def _fraction(name: str) -> float:
    """A number in [0, 1) that depends on `name` alone."""
    return int.from_bytes(blake3(os.fsencode(name)).digest(length=6), "big") / 2**48
