"""The training data: token files, a folder of text, or the source of Python's own standard library."""

import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson
from blake3 import blake3

from ckptcache.errors import DataNotFound, DataTooSmall, InvalidTokenFile, TokenOutOfRange
from ckptcache.nanecho import text as textfiles
from ckptcache.nanecho.text import SplitText, TextFile, Tokens

BYTE_VOCABULARY = 256
_CHUNK_TOKENS = 8 * 1024 * 1024
_LAYOUT = 1
"""Raised when what is cached changes its form."""

Arrays = dict[str, np.ndarray[Any, Any]]


class ArrayCache(Protocol):
    """What builds arrays once and keeps them; `ckptcache.storage.datacache.DataCache` is one."""

    def get(self, key: str, build: Callable[[], Arrays], /, *, config: dict[str, Any]) -> Arrays:
        """The arrays of `key` under `config`, from `build` where they are not kept yet."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokens to train on and tokens to validate on, 1-d arrays of uint8 or uint16, memory-mapped where from a file."""

    train: Tokens
    val: Tokens
    vocab_size: int
    largest_token: int
    name: str
    """What the data is, for people."""
    data_config: dict[str, Any]
    """What the data is, for the cache: kind, tokenisation, digests and lengths of both parts."""
    notes: tuple[str, ...] = ()
    """What a user should be told: what was left out, how it was split."""


def load_corpus(
    data_dir: Path | None,
    data_cache: ArrayCache | None = None,
    *,
    block_size: int,
    vocab_size: int | None = None,
) -> Corpus:
    """The data in `data_dir`, or the standard library's source without one.

    A folder that holds ``train.bin`` or ``val.bin`` holds tokens: both files, uint16 little-endian,
    beside a ``meta.json`` that gives ``vocab_size`` and may give ``tokenisation``, the tokeniser's
    name. Any other is text: its UTF-8 files, bytes as tokens.

    Args:
        data_cache: keeps what was prepared; None prepares it each time.
        block_size: length of a block; each part must hold one, and a token to follow it.
        vocab_size: the model's vocabulary, where it is settled; None takes the data's.

    Raises:
        DataNotFound: there is no such folder, it is a file, or nothing in it can be used.
        DataTooSmall: a part holds less than one block.
        TokenOutOfRange: a token is beyond the vocabulary.
        InvalidTokenFile: a token file or ``meta.json`` is malformed.
    """
    if data_dir is None:
        corpus = _load_stdlib(data_cache, block_size)
    else:
        _check_folder(data_dir)
        if any((data_dir / name).exists() for name in ("train.bin", "val.bin")):
            corpus = _load_tokens(data_dir, data_cache, vocab_size)
        else:
            corpus = _load_text(data_dir, data_cache, block_size)
    _check_sizes(corpus, block_size)
    return corpus if vocab_size is None else _with_vocabulary(corpus, vocab_size)


def _check_folder(path: Path) -> None:
    if not path.exists():
        raise DataNotFound(path=path, reason="there is no such folder. Name one that exists, or leave --data_dir out")
    if not path.is_dir():
        raise DataNotFound(path=path, reason="it is a file, and a folder is needed. Name the folder that it is in")


def _check_sizes(corpus: Corpus, block_size: int) -> None:
    for part, tokens in (("training", corpus.train), ("validation", corpus.val)):
        if len(tokens) < block_size + 1:
            raise DataTooSmall(path=f"The {part} part of {corpus.name}", tokens=len(tokens), needed=block_size + 1)


def _with_vocabulary(corpus: Corpus, vocab_size: int) -> Corpus:
    _check_token(corpus.name, corpus.largest_token, vocab_size)
    return replace(corpus, vocab_size=vocab_size)


def _check_token(path: object, token: int, vocab_size: int) -> None:
    if token >= vocab_size:
        raise TokenOutOfRange(path=path, token=token, last=vocab_size - 1, needed=token + 1)


# --- one pass over tokens ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scan:
    digest: str
    """``blake3:<hex>`` of the tokens' bytes, little-endian."""
    largest: int


def _scan(tokens: Tokens) -> _Scan:
    hasher, largest = blake3(), -1
    for first in range(0, len(tokens), _CHUNK_TOKENS):
        chunk = np.ascontiguousarray(tokens[first : first + _CHUNK_TOKENS])
        hasher.update(chunk.view(np.uint8).data)
        largest = max(largest, int(chunk.max()))
    return _Scan(f"blake3:{hasher.hexdigest()}", largest)


def _data_config(
    kind: str, tokenisation: str, train: Tokens, val: Tokens, scans: tuple[_Scan, _Scan]
) -> dict[str, Any]:
    return {
        "kind": kind,
        "tokenisation": tokenisation,
        "train_digest": scans[0].digest,
        "val_digest": scans[1].digest,
        "train_tokens": len(train),
        "val_tokens": len(val),
    }


# --- text ----------------------------------------------------------------------------------------


def _load_stdlib(data_cache: ArrayCache | None, block_size: int) -> Corpus:
    folder, version = textfiles.stdlib_folder(), platform.python_version()
    files = textfiles.stdlib_files(folder)
    if not files:
        reason = "this Python comes without the source of its standard library. Name a folder of text with --data_dir"
        raise DataNotFound(path=folder, reason=reason)
    config = {"python": version, "folder": str(folder), "block_size": block_size}
    split = _cached_split(data_cache, "stdlib", folder, files, config, block_size)
    return _text_corpus(split, "stdlib", f"the standard library of Python {version}", folder)


def _load_text(folder: Path, data_cache: ArrayCache | None, block_size: int) -> Corpus:
    files = textfiles.text_files(folder)
    if not files:
        reason = "it has no train.bin and val.bin, and no text files (*.txt, *.md, *.py, ...). Put some there"
        raise DataNotFound(path=folder, reason=reason)
    config = {"folder": str(folder.resolve()), "block_size": block_size}
    split = _cached_split(data_cache, "text", folder, files, config, block_size)
    return _text_corpus(split, "text", f"the text in {folder}", folder)


def _cached_split(
    data_cache: ArrayCache | None,
    key: str,
    folder: Path,
    files: list[TextFile],
    config: dict[str, Any],
    block_size: int,
) -> SplitText:
    def build() -> Arrays:
        return textfiles.read_split(folder, files, needed=block_size + 1).to_arrays()

    if data_cache is None:
        return SplitText.from_arrays(build())
    listing = blake3(orjson.dumps([(f.name, f.size, f.mtime_ns) for f in files])).hexdigest()
    config = {**config, "files": len(files), "listing": f"blake3:{listing}", "layout": _LAYOUT}
    return SplitText.from_arrays(data_cache.get(key, build, config=config))


def _text_corpus(split: SplitText, kind: str, name: str, folder: Path) -> Corpus:
    if not len(split.train) + len(split.val) and split.not_utf8 + split.unreadable:
        reason = "none of its text files can be read as UTF-8. Convert them, or choose another folder"
        raise DataNotFound(path=folder, reason=reason)
    scans = _scan(split.train), _scan(split.val)
    return Corpus(
        train=split.train,
        val=split.val,
        vocab_size=BYTE_VOCABULARY,
        largest_token=max(scan.largest for scan in scans),
        name=name,
        data_config=_data_config(kind, "bytes", split.train, split.val, scans),
        notes=tuple(_text_notes(split)),
    )


def _text_notes(split: SplitText) -> Iterator[str]:
    if split.not_utf8:
        yield f"{split.not_utf8} files were left out, because they are not UTF-8"
    if split.unreadable:
        yield f"{split.unreadable} files were left out, because they could not be read"
    if split.by_position:
        yield "too few files to split by file: the last tenth of the text, from a line end on, is for validation"


# --- tokens --------------------------------------------------------------------------------------


def _load_tokens(folder: Path, data_cache: ArrayCache | None, wanted_vocab_size: int | None) -> Corpus:
    paths = folder / "train.bin", folder / "val.bin"
    train, val = (_map_tokens(path) for path in paths)
    scans = _cached_scan(paths[0], train, data_cache), _cached_scan(paths[1], val, data_cache)
    largest = max(scan.largest for scan in scans)
    vocab_size, tokenisation = _read_meta(folder / "meta.json", largest, wanted_vocab_size)
    for path, scan in zip(paths, scans, strict=True):
        _check_token(path, scan.largest, vocab_size)
    return Corpus(
        train=train,
        val=val,
        vocab_size=vocab_size,
        largest_token=largest,
        name=f"the tokens in {folder}",
        data_config=_data_config("tokens", tokenisation, train, val, scans),
    )


def _map_tokens(path: Path) -> Tokens:
    if not path.is_file():
        other = "val.bin" if path.name == "train.bin" else "train.bin"
        raise DataNotFound(path=path.parent, reason=f"{other} is there, and {path.name} is not. Both are needed")
    size = path.stat().st_size
    if size % 2:
        raise InvalidTokenFile(path=path, reason=f"it has {size} bytes, and a token takes two")
    if size == 0:  # nothing can be mapped of an empty file
        return np.zeros(0, dtype="<u2")
    try:
        return np.memmap(path, dtype="<u2", mode="r")
    except OSError as error:
        raise InvalidTokenFile(path=path, reason=error.strerror or str(error)) from error


def _cached_scan(path: Path, tokens: Tokens, data_cache: ArrayCache | None) -> _Scan:
    """The scan of `tokens`, which are in `path`; kept, because the pass takes minutes over a large file."""

    def build() -> Arrays:
        scan = _scan(tokens)
        digest = np.frombuffer(bytes.fromhex(scan.digest.removeprefix("blake3:")), dtype=np.uint8)
        return {"digest": digest, "largest": np.array([scan.largest], dtype=np.int64)}

    if data_cache is None:
        return _scan(tokens)
    status = path.stat()
    config = {"file": str(path.resolve()), "size": status.st_size, "mtime_ns": status.st_mtime_ns, "layout": _LAYOUT}
    arrays = data_cache.get("tokens-scan", build, config=config)
    return _Scan(f"blake3:{arrays['digest'].tobytes().hex()}", int(arrays["largest"][0]))


def _read_meta(path: Path, largest: int, wanted_vocab_size: int | None) -> tuple[int, str]:
    """The vocabulary's size and the tokeniser's name."""
    if not path.exists():
        return wanted_vocab_size or _guess_vocabulary(path, largest), "uint16"
    try:
        meta = orjson.loads(path.read_bytes())
    except OSError as error:
        raise InvalidTokenFile(path=path, reason=error.strerror or str(error)) from error
    except ValueError as error:
        raise InvalidTokenFile(path=path, reason=f"it is not JSON ({error})") from error
    if not isinstance(meta, dict):
        raise InvalidTokenFile(path=path, reason="it must be a mapping with a vocab_size")
    vocab_size, tokenisation = meta.get("vocab_size"), meta.get("tokenisation", "uint16")
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 1:
        raise InvalidTokenFile(path=path, reason=f"vocab_size must be a whole number above 0, not {vocab_size!r}")
    if not isinstance(tokenisation, str):
        raise InvalidTokenFile(path=path, reason=f"tokenisation must be text, not {tokenisation!r}")
    return vocab_size, tokenisation


def _guess_vocabulary(path: Path, largest: int) -> int:
    # At least a byte's worth, so that a rare token in new data doesn't make another model of it.
    guess = max(BYTE_VOCABULARY, largest + 1)
    pickled = " (meta.pkl is not read: a pickle can run code)" if path.with_suffix(".pkl").exists() else ""
    message = f"{path} is missing{pickled}: vocab_size is taken to be {guess}, from the largest token"
    warnings.warn(f'{message}. Write {{"vocab_size": {guess}}} there to settle it', stacklevel=5)
    return guess
