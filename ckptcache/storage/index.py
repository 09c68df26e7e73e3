"""`metadata.json`, the index: what it holds, how it is read, merged and committed.

A checkpoint counts from the moment the index that names it is durable. The index holds decisions;
what is on the disk is observed (`reconcile`), so that the file never changes by being looked at.
"""

import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import orjson
from blake3 import blake3

from ckptcache.errors import IndexDamaged, IndexTooNew, IndexUnreadable, InvalidName, InvalidValue, NotACheckpoint
from ckptcache.metadata import (
    ROLLBACK,
    SCHEMA_VERSION,
    CheckpointMetadata,
    Fingerprint,
    NamePointer,
    SessionRecord,
    check_name,
)
from ckptcache.storage import flat, fs, locks
from ckptcache.values import MAX_COUNT, check_depth, content_hash, encode_float, jsonable

INDEX_NAME = "metadata.json"
MAX_INDEX_BYTES = 256 * 1024 * 1024
_SORTED = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS
PARTS = ("checkpoints", "sessions", "names", "configs", "fingerprints")
BY_CONTENT = ("configs", "fingerprints")
"""Those parts whose keys are hashes of what they name."""

T = TypeVar("T")


@dataclass(slots=True)
class Index:
    """Everything that `metadata.json` holds. The records are immutable, the mappings are not."""

    checkpoints: dict[str, CheckpointMetadata] = field(default_factory=dict)
    sessions: dict[str, SessionRecord] = field(default_factory=dict)
    names: dict[str, NamePointer] = field(default_factory=dict)
    configs: dict[str, Any] = field(default_factory=dict)
    """Configurations by the hash of their content, stored once however many records name them."""
    fingerprints: dict[str, Fingerprint] = field(default_factory=dict)
    unknown: dict[str, Any] = field(default_factory=dict)
    """Top-level fields that a later version wrote; kept as they are."""

    @property
    def sequence(self) -> int:
        """The greatest sequence seen; the next record gets one more, which must be readable too."""
        checkpoints = max((r.sequence for r in self.checkpoints.values()), default=0)
        sessions = max((s.sequence for s in self.sessions.values()), default=0)
        return min(max(checkpoints, sessions), MAX_COUNT - 1)

    def copy(self) -> "Index":
        """An index whose mappings can be changed without changing these."""
        return Index(**{name: dict(getattr(self, name)) for name in (*PARTS, "unknown")})

    def store_config(self, config: Any) -> str | None:
        """Keep a JSON-plain configuration and return the hash that names it; None for none."""
        if config is None:
            return None
        name = content_hash(config)
        self.configs[name] = config
        return name

    def store_fingerprint(self, fingerprint: Fingerprint | None) -> str | None:
        """Keep a fingerprint and return the hash that names it; None for none."""
        if fingerprint is None:
            return None
        name = content_hash(fingerprint.to_json())
        self.fingerprints[name] = fingerprint
        return name


# --- reading -------------------------------------------------------------------------------------


def parse(data: bytes, path: Path) -> Index:
    """The index in `data`, older versions upgraded; `path` is for the message only.

    Raises:
        IndexDamaged: it isn't JSON, holds NaN, or something in it is of the wrong kind.
        IndexTooNew: a later version wrote it.
    """
    try:
        with _without_collection():
            # In a function of its own, so that the document is gone before the collector comes and looks through it.
            return _parsed(data, path)
    except ValueError as error:
        raise IndexDamaged(path=path, reason=error) from error


def _parsed(data: bytes, path: Path) -> Index:
    document = _loads(data)
    if "schema_version" not in document:
        return upgrade_flat(document)
    _check_version(document["schema_version"], path)
    return _read(document)


@contextmanager
def _without_collection() -> Iterator[None]:
    """JSON holds no cycles, and looking for them while a large index is read takes half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _loads(data: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        document = _oldest_with_nan(data)
        if document is None:
            raise ValueError(f"it isn't JSON ({error})") from error
    if not isinstance(document, dict):
        raise ValueError("it isn't a mapping")
    return document


def _oldest_with_nan(data: bytes) -> Any:
    """The oldest layout was written by `json.dump`, which writes NaN for a diverged loss; nothing later was."""
    try:
        document = json.loads(data)
        if not isinstance(document, dict) or "schema_version" in document:
            return None
        # It also wrote half a surrogate pair, which comes from a file name that isn't UTF-8 and has no place here.
        whole = json.dumps(document, ensure_ascii=False).encode(errors="replace")
        return jsonable(json.loads(whole))
    except (ValueError, RecursionError, InvalidValue):
        return None


def upgrade_flat(document: Mapping[str, Any]) -> Index:
    """The index that the oldest layout amounts to; ValueError, naming the record, when it isn't that layout."""
    for key, value in document.items():
        if key in PARTS or not isinstance(value, dict):
            raise ValueError(f"it has no schema_version, and {key!r} is not a record")
    checkpoints, configs = flat.upgrade(document)
    return Index(checkpoints=checkpoints, configs=configs)


def _check_version(version: Any, path: Path) -> None:
    if isinstance(version, bool) or not isinstance(version, int) or version <= flat.VERSION:
        raise ValueError(f"schema_version {version!r} is not a version")
    if version > SCHEMA_VERSION:
        raise IndexTooNew(path=path, found=version, known=SCHEMA_VERSION)


def _read(document: Mapping[str, Any]) -> Index:
    # All parts are always written: one that is missing was lost, and with it what it protected.
    if absent := [part for part in PARTS if part not in document]:
        raise ValueError(f"it has no {', '.join(absent)}")
    unknown = {k: v for k, v in document.items() if k not in (*PARTS, "schema_version")}
    check_depth(unknown, "it")
    return Index(
        checkpoints=_records(document, "checkpoints", CheckpointMetadata.all_from_json),
        sessions=_records(document, "sessions", SessionRecord.all_from_json),
        names={_checked_name(name): pointer for name, pointer in _values(document, "names", NamePointer.from_json)},
        configs=dict(_values(document, "configs", _config)),
        fingerprints=dict(_values(document, "fingerprints", Fingerprint.from_json)),
        unknown=unknown,
    )


def _values(document: Mapping[str, Any], part: str, read: Callable[[Any], T]) -> Iterator[tuple[str, T]]:
    for key, value in _mappings(document, part).items():
        yield key, read(value)


def _mappings(document: Mapping[str, Any], part: str) -> dict[str, Any]:
    values = document[part]
    if not isinstance(values, dict) or (part != "configs" and not all(isinstance(v, dict) for v in values.values())):
        raise ValueError(f"{part} must be a mapping of mappings")
    return values


def _records(document: Mapping[str, Any], part: str, read: Callable[[list[Any]], list[T]]) -> dict[str, T]:
    found = _mappings(document, part)
    for key, value in found.items():
        value["id"] = key
    return dict(zip(found, read(list(found.values())), strict=True))


def _checked_name(name: str) -> str:
    try:
        return name if name == ROLLBACK else check_name(name)
    except InvalidName as error:
        raise ValueError(str(error)) from error


def _config(config: Any) -> Any:
    check_depth(config, "a configuration")
    return config


# --- writing -------------------------------------------------------------------------------------


class Pieces:
    """The records that were written last, each with its JSON: at a commit all but a few are the same as before."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, tuple[CheckpointMetadata | SessionRecord, orjson.Fragment]]] = {}

    def of(self, part: str, records: Mapping[str, CheckpointMetadata | SessionRecord]) -> dict[str, orjson.Fragment]:
        """The JSON of every record of a part of the index. What is no longer among them is forgotten."""
        before, now = self._known.get(part, {}), {}
        for key, record in records.items():
            known = before.get(key)
            # Records are immutable, and a known one is held here, so that no other can have come by its identity.
            if known is None or known[0] is not record:
                known = record, _fragment(record)
            now[key] = known
        self._known[part] = now
        return {key: fragment for key, (_, fragment) in now.items()}


def _fragment(record: CheckpointMetadata | SessionRecord) -> orjson.Fragment:
    """A record's JSON as it stands in the index, two levels deep; a line break within a text is escaped there."""
    data = _with_short_curves(record) if isinstance(record, SessionRecord) else _without_id(record)
    return orjson.Fragment(orjson.dumps(data, option=_SORTED).replace(b"\n", b"\n    "))


def serialise(index: Index, pieces: Pieces | None = None) -> bytes:
    """The index as JSON: sorted and indented, so that git shows what changed; unused configurations dropped.

    Args:
        pieces: what is known of the records from the last time, and is brought up to date.

    Raises:
        InvalidValue: something in it has no JSON form, and the record is named; or it is too long to be read again.
    """
    used = _references(index)
    try:
        pieces = Pieces() if pieces is None else pieces
        document = {
            **index.unknown,
            "schema_version": SCHEMA_VERSION,
            "checkpoints": pieces.of("checkpoints", index.checkpoints),
            "sessions": pieces.of("sessions", index.sessions),
            "names": {key: name.to_json() for key, name in index.names.items()},
            "configs": {key: value for key, value in index.configs.items() if key in used},
            "fingerprints": {key: value.to_json() for key, value in index.fingerprints.items() if key in used},
        }
        data = orjson.dumps(document, option=_SORTED | orjson.OPT_APPEND_NEWLINE)
    except TypeError as error:
        raise InvalidValue(name="the index", value=_not_json(index), reason=str(error)) from error
    if len(data) > MAX_INDEX_BYTES:
        reason = f"no more than {MAX_INDEX_BYTES} are read again; lower max_records, or keep less in `extra` and notes"
        raise InvalidValue(name="the index", value=f"{len(data)} bytes", reason=reason)
    return data


def _not_json(index: Index) -> str:
    """Which entry of the index has no JSON form."""
    for part in PARTS:
        for key, entry in getattr(index, part).items():
            try:
                orjson.dumps({key: orjson.Fragment(content_of(entry))})
            except TypeError:
                return f"{part}/{key}"
    return "what it was given"


def _without_id(record: CheckpointMetadata | SessionRecord) -> dict[str, Any]:
    data = record.to_json()
    del data["id"]
    return data


def _with_short_curves(session: SessionRecord) -> dict[str, Any]:
    """A session as the index writes it: hundreds of points are one line per curve, not four lines per point."""
    data = _without_id(replace(session, curves={}))
    if session.curves:
        data["curves"] = {name: _line(points) for name, points in session.curves.items()}
    return data


def _line(points: Sequence[tuple[int, float]]) -> orjson.Fragment:
    """The points of a curve in one line."""
    line = orjson.dumps(points)
    # orjson writes null for what isn't finite, and only for that, since each value of a curve is a number.
    if b"null" in line:
        line = orjson.dumps([(iteration, encode_float(value)) for iteration, value in points])
    return orjson.Fragment(line)


def _references(index: Index) -> set[str | None]:
    used: set[str | None] = {session.config for session in index.sessions.values()}
    for record in index.checkpoints.values():
        used.update((record.model_config, record.training_config, record.data_config, record.fingerprint))
    return used


def content_of(entry: Any) -> bytes:
    """An entry of the index in bytes: the same for two that say the same."""
    plain = entry.to_json() if hasattr(entry, "to_json") else entry
    return orjson.dumps(plain, option=orjson.OPT_SORT_KEYS)


def check_readable(index: Index, known: Index) -> None:
    """InvalidValue for what is in `index`, is not in `known`, and would be refused when the index is read again."""
    for part, key, entry in _changed_entries(index, known):
        try:
            _read_back(part, key, entry)
        except ValueError as error:
            raise InvalidValue(name=f"{part}/{key}", value=type(entry).__name__, reason=str(error)) from error


def _changed_entries(index: Index, known: Index) -> Iterator[tuple[str, str, Any]]:
    for part in PARTS:
        before = getattr(known, part)
        yield from ((part, key, entry) for key, entry in getattr(index, part).items() if before.get(key) is not entry)


def _read_back(part: str, key: str, entry: Any) -> None:
    if part == "configs":
        check_depth(entry, "a configuration")
        return
    plain = entry.to_json()
    if plain.get("id", key) != key:
        raise ValueError(f"it calls itself {plain['id']!r}")
    type(entry).from_json(plain)
    if part == "names":
        _checked_name(key)


# --- the file ------------------------------------------------------------------------------------


class IndexFile:
    """`metadata.json` in its folder: read without a lock, changed under one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / INDEX_NAME
        self.previous = root / f"{INDEX_NAME}.prev"
        self.lock = root / f"{INDEX_NAME}.lock"
        self._seen: tuple[bytes, Index] | None = None
        self._pieces = Pieces()

    def read(self) -> Index | None:
        """The committed index; None where there is none yet. The result must not be changed.

        Raises IndexDamaged, IndexTooNew or IndexUnreadable.
        """
        try:
            data = read_index_bytes(self.path)
        except FileNotFoundError:
            return None
        # Told apart by content: inode, time and size can all be the same again after two quick commits.
        digest, seen = blake3(data).digest(), self._seen
        if seen is None or seen[0] != digest:
            seen = self._seen = (digest, parse(data, self.path))
        # Not self._seen: another thread may have put an older look there meanwhile.
        return seen[1]

    def stamp(self) -> tuple[int, ...] | None:
        """What all but surely differs after a commit, and costs nothing to get; None where there is no index.

        Not enough to trust a parsed index by (see `read`), and enough to notice that one was replaced just now.
        """
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    @contextmanager
    def held(self, *, timeout: float = locks.LOCK_TIMEOUT) -> Iterator[None]:
        """Hold the lock; whatever is read inside stays true until it is left."""
        fs.ensure_folder(self.root)
        with locks.locked(self.lock, timeout=timeout):
            yield

    def commit(self, index: Index, *, writer: str) -> None:
        """Make `index` the committed one, durably, and the present one `.prev`; the lock must be held.

        Raises InvalidValue for an entry that could not be read again; nothing is written then.
        """
        check_readable(index, Index() if self._seen is None else self._seen[1])
        data = serialise(index, self._pieces)
        fs.keep_generation(self.path, self.previous, writer=writer)
        fs.write_atomically(self.path, data, writer=writer)
        self._seen = (blake3(data).digest(), index.copy())


def read_index_bytes(path: Path) -> bytes:
    """The bytes of the index file `path`; raises IndexDamaged, IndexUnreadable or FileNotFoundError."""
    try:
        return fs.read_bytes(path, limit=MAX_INDEX_BYTES)
    except FileNotFoundError:
        raise
    except NotACheckpoint as error:
        raise IndexDamaged(path=path, reason=error.fields["reason"]) from error
    except ValueError as error:
        raise IndexDamaged(path=path, reason=error) from error
    except OSError as error:
        # Too many open files, or a permission: taking that for damage would replace a good index.
        raise IndexUnreadable(path=path, reason=fs.reason_of(error)) from error
