"""The records: what a checkpoint, a session and a model are, as plain values that JSON can hold.

Everything here is immutable and free of torch. A loss that is NaN has diverged, one that is None is
unknown; JSON holds the one as "nan" and leaves the other out.
"""

import dataclasses
import functools
import operator
import re
import secrets
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import repeat
from typing import Any, Literal, Self, TypeVar

from ckptcache.errors import InvalidId, InvalidName
from ckptcache.values import check_depth, decode_float, encode_float

SCHEMA_VERSION = 2
"""Version 1 is the oldest layout: a flat mapping of id to record."""
MAX_CURVE_POINTS = 200
MAX_COUNT = 2**53
"""Whole numbers up to here are the same in every reader of JSON."""

SaveReason = Literal["improved", "interval", "final", "signal", "manual", "growth"]
Decision = Literal["evicted", "quarantined"]
R = TypeVar("R")

_ID = re.compile(r"\A[a-z0-9][a-z0-9._-]{0,127}\Z")
_NAME = re.compile(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
POLICIES = frozenset({"best", "latest", "auto", "never"})
"""What `resume` may be beside an id or a name."""
ROLLBACK = "rollback"
"""The name that points to the checkpoint that was rolled back to, while that is in force."""
RESERVED_NAMES = POLICIES | {ROLLBACK}
"""No user's to give."""


# --- ids and names --------------------------------------------------------------------------


def new_checkpoint_id(iteration: int, architecture: str, *, now: datetime | None = None) -> str:
    """``ckpt_<UTC date>_<time>_<iteration>_<architecture>_<random>``; never used for ordering."""
    moment = (now or datetime.now(UTC)).strftime("%Y%m%d_%H%M%S")
    return f"ckpt_{moment}_{iteration:08d}_{architecture[:8]}_{secrets.token_hex(2)}"


def new_session_id(*, now: datetime | None = None) -> str:
    """``sess_<UTC date>_<time>_<random>``."""
    moment = (now or datetime.now(UTC)).strftime("%Y%m%d_%H%M%S")
    return f"sess_{moment}_{secrets.token_hex(4)}"


def is_valid_id(text: object) -> bool:
    """Whether `text` may be an id, and so may become a file name."""
    return isinstance(text, str) and _ID.match(text) is not None and ".." not in text


def check_id(text: str) -> str:
    """`text`, or InvalidId."""
    if not is_valid_id(text):
        raise InvalidId(id=text)
    return text


def check_name(text: str) -> str:
    """`text`, or InvalidName when it could be taken for an id or a resume policy."""
    if not isinstance(text, str) or not _NAME.match(text):
        raise InvalidName(name=text, reason="names hold only letters, digits, '.', '_' and '-', at most 64")
    if text in RESERVED_NAMES or text.startswith("ckpt_"):
        raise InvalidName(name=text, reason="that word means something else already")
    return text


def utc_now() -> str:
    """The time as it stands in records: ISO 8601, UTC, whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# --- records -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointMetadata:
    """What is known of one checkpoint: the record that the index, its sidecar and its file hold.

    Order is by (`sequence`, `id`), the sequence being Lamport's clock (Lamport, "Time, Clocks, and
    the Ordering of Events in a Distributed System", 1978): one more than the greatest seen.
    """

    id: str
    sequence: int = 0
    revision: int = 0
    """Raised at every change of a mutable field; the higher one wins a merge."""
    created_at: str = ""
    session: str | None = None
    parents: tuple[str, ...] = ()
    iteration: int = 0
    """Optimizer steps taken when it was saved."""
    epoch: float | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    """Loss on the validation data at this iteration. None: not evaluated. NaN or infinite: diverged."""
    last_val_loss: float | None = None
    """For a save made between evaluations: the last validation loss before it."""
    last_val_loss_iteration: int | None = None
    learning_rate: tuple[float, ...] = ()
    """One per parameter group."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    quality_score: float | None = None
    """The quality at the time of saving; listings give it afresh under the settings in force."""
    save_reason: str = "manual"
    model_config: str | None = None
    """Hash under which the index holds the model's configuration; likewise the next three."""
    training_config: str | None = None
    data_config: str | None = None
    fingerprint: str | None = None
    contents: tuple[str, ...] = ()
    """Names of the parts of the state that can be restored."""
    tags: tuple[str, ...] = ()
    notes: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    pinned: bool = False
    decision: str | None = None
    """"evicted" or "quarantined"; None while nothing was decided against it."""
    decision_reason: str | None = None
    rolled_back: str | None = None
    """The checkpoint that was rolled back to, past this one; None where this one was not left behind so."""
    size: int | None = None
    """Bytes of the file."""
    digest: str | None = None
    """``blake3:<hex>``, what `b3sum` prints for the file."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    unknown: Mapping[str, Any] = field(default_factory=dict)
    """Fields that a later version wrote; kept as they are."""

    @property
    def order(self) -> tuple[int, str]:
        """What "earlier" and "later" mean: (sequence, id)."""
        return self.sequence, self.id

    def to_json(self, *, full: bool = False) -> dict[str, Any]:
        """The record as JSON holds it; empty fields are left out unless `full`."""
        return _to_json(self, full)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises ValueError, naming the field, when `data` is not a record."""
        return cls.all_from_json([data])[0]

    @classmethod
    def all_from_json(cls, documents: Sequence[Mapping[str, Any]]) -> list[Self]:
        """Many at once, in their order, at a fraction of the cost; raises ValueError likewise."""
        return _read(cls, documents, _CHECKPOINT_READERS)

    def changed(self, **fields: Any) -> Self:
        """A copy with `fields` replaced and the revision raised."""
        return dataclasses.replace(self, revision=min(self.revision + 1, MAX_COUNT), **fields)


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionRecord:
    """One process's stretch of training, as the index keeps it."""

    id: str
    sequence: int = 0
    revision: int = 0
    parent: str | None = None
    """The checkpoint that it resumed from, or that gave it its weights; None for a fresh start."""
    resume: str = "best"
    reseeded: bool = False
    warm_start: bool = False
    """Whether it only took weights, of `parent` or of a checkpoint of another cache, and began at iteration 0."""
    config: str | None = None
    """Hash of the model's, training's and data's configuration together."""
    started_at: str = ""
    ended_at: str | None = None
    start_iteration: int = 0
    end_iteration: int = 0
    first_val_loss: float | None = None
    last_val_loss: float | None = None
    best_val_loss: float | None = None
    best_checkpoint: str | None = None
    saved: int = 0
    evicted: int = 0
    failed_saves: int = 0
    seconds: float = 0.0
    stop_reason: str | None = None
    """finished | max_seconds | signal | diverged | nothing_to_do | error; None while it runs or was cut short."""
    rolled_back: str | None = None
    """The checkpoint that was rolled back to, past what this session did; what it saves from then on is marked too."""
    curves: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    """Per quantity, at most `MAX_CURVE_POINTS` pairs of iteration and value."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    unknown: Mapping[str, Any] = field(default_factory=dict)

    @property
    def order(self) -> tuple[int, str]:
        """What "earlier" and "later" mean: (sequence, id)."""
        return self.sequence, self.id

    def to_json(self, *, full: bool = False) -> dict[str, Any]:
        """The record as JSON holds it; empty fields are left out unless `full`."""
        return _to_json(self, full)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises ValueError, naming the field, when `data` is not a session."""
        return cls.all_from_json([data])[0]

    @classmethod
    def all_from_json(cls, documents: Sequence[Mapping[str, Any]]) -> list[Self]:
        """Many at once, in their order, at a fraction of the cost; raises ValueError likewise."""
        return _read(cls, documents, _SESSION_READERS)

    def changed(self, **fields: Any) -> Self:
        """A copy with `fields` replaced and the revision raised."""
        return dataclasses.replace(self, revision=min(self.revision + 1, MAX_COUNT), **fields)


@dataclass(frozen=True, kw_only=True, slots=True)
class NamePointer:
    """A movable pointer to a checkpoint; what it points to is protected."""

    checkpoint: str
    revision: int = 0
    before: Mapping[str, str | None] = field(default_factory=dict)
    """Of the pointer `rollback`: the `rolled_back` that each record which it changed had before, for undoing it."""

    def to_json(self) -> dict[str, Any]:
        plain = {"checkpoint": self.checkpoint, "revision": self.revision}
        return {**plain, "before": dict(self.before)} if self.before else plain

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises ValueError when `data` is not a pointer."""
        if not isinstance(data, Mapping) or not is_valid_id(data.get("checkpoint")):
            raise ValueError(f"{data!r} is not a pointer to a checkpoint")
        before = data.get("before", {})
        if not isinstance(before, dict) or not all(v is None or is_valid_id(v) for v in before.values()):
            raise ValueError("a pointer's before must map ids to ids or null")
        revision = _count(data.get("revision", 0), "revision")
        return cls(checkpoint=data["checkpoint"], revision=revision, before=before)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """What a model is, computed from it and not declared.

    Attributes:
        parameters: canonical name of each tensor of the model's state to its dtype and shape,
            written like ``float32[256, 64]``.
        optimizers: name of each optimizer to its class and the number of parameters per group.
    """

    parameters: Mapping[str, str] = field(default_factory=dict)
    optimizers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "parameters": dict(self.parameters),
            "optimizers": {k: dict(v) for k, v in self.optimizers.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises ValueError when `data` is not a fingerprint."""
        if not isinstance(data, Mapping):
            raise ValueError(f"a fingerprint must be a mapping, not {data!r}")
        parameters, optimizers = data.get("parameters", {}), data.get("optimizers", {})
        if not isinstance(parameters, dict) or not all(isinstance(v, str) for v in parameters.values()):
            raise ValueError("a fingerprint's parameters must map names to text")
        if not isinstance(optimizers, dict) or not all(isinstance(v, dict) for v in optimizers.values()):
            raise ValueError("a fingerprint's optimizers must map names to mappings")
        return cls(parameters=parameters, optimizers=optimizers)


# --- reading and writing records -----------------------------------------------------------------


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} must be text, not {value!r}")
    return value


def _id_text(value: Any, key: str) -> str:
    if not is_valid_id(value):
        raise ValueError(f"{key} must be an id, not {value!r}")
    return str(value)


def _ids(value: Any, key: str) -> tuple[str, ...]:
    return tuple([_id_text(v, key) for v in _texts(value, key)])


def _count(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
        raise ValueError(f"{key} must be a whole number of at least 0 and at most 2**53, not {value!r}")
    return value


def _flag(value: Any, key: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, not {value!r}")
    return value


_ONLY_TEXT = frozenset({str})


def _texts(value: Any, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not _ONLY_TEXT.issuperset(map(type, value)):
        raise ValueError(f"{key} must be a list of texts, not {value!r}")
    return tuple(value)


def _floats(value: Any, key: str) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{key} must be a list of numbers, not {value!r}")
    return tuple([v if type(v) is float else decode_float(v, key) for v in value])


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be a mapping, not {value!r}")
    check_depth(value, key)
    return value


def _metrics(value: Any, key: str) -> Mapping[str, float]:
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be a mapping, not {value!r}")
    return {k: v if type(v) is float else decode_float(v, f"{key}.{k}") for k, v in value.items()}


def _curves(value: Any, key: str) -> Mapping[str, tuple[tuple[int, float], ...]]:
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be a mapping, not {value!r}")
    return {name: _points(points, f"{key}.{name}") for name, points in value.items()}


def _points(points: Any, label: str) -> tuple[tuple[int, float], ...]:
    if points == []:
        return ()
    if not isinstance(points, list) or {*map(type, points)} != {list} or {*map(len, points)} != {2}:
        raise ValueError(f"{label} must be a list of pairs")
    iterations, values = zip(*points, strict=True)
    # So it is of almost every curve, and of thousands of points it is quickly seen for all of a curve at once.
    if {*map(type, iterations)} == {int} and {*map(type, values)} == {float}:
        _count(min(iterations), label)
        _count(max(iterations), label)
        return tuple(map(tuple, points))
    return tuple([(_count(i, label), decode_float(v, label)) for i, v in points])


_CHECKPOINT_READERS: dict[str, Any] = {
    **dict.fromkeys(("id", "session", "rolled_back"), _id_text),
    **dict.fromkeys(("created_at", "save_reason", "model_config", "training_config"), _text),
    **dict.fromkeys(("data_config", "fingerprint", "notes", "decision", "decision_reason", "digest"), _text),
    **dict.fromkeys(("sequence", "revision", "iteration", "last_val_loss_iteration", "size"), _count),
    **dict.fromkeys(("epoch", "train_loss", "val_loss", "last_val_loss", "quality_score"), decode_float),
    **dict.fromkeys(("contents", "tags"), _texts),
    "parents": _ids,
    **dict.fromkeys(("extra", "environment"), _mapping),
    "learning_rate": _floats,
    "metrics": _metrics,
    "pinned": _flag,
}
_SESSION_READERS: dict[str, Any] = {
    **dict.fromkeys(("id", "parent", "best_checkpoint", "rolled_back"), _id_text),
    **dict.fromkeys(("resume", "config", "started_at", "ended_at", "stop_reason"), _text),
    **dict.fromkeys(("sequence", "revision", "start_iteration", "end_iteration"), _count),
    **dict.fromkeys(("saved", "evicted", "failed_saves"), _count),
    **dict.fromkeys(("first_val_loss", "last_val_loss", "best_val_loss", "seconds"), decode_float),
    **dict.fromkeys(("reseeded", "warm_start"), _flag),
    "curves": _curves,
    "environment": _mapping,
}


_AS_IT_STANDS: Mapping[Any, type] = {_text: str, decode_float: float, _count: int}
"""The type of JSON value that a reader returns unchanged, a number within its range."""


def _read(cls: type[R], documents: Sequence[Any], readers: Mapping[str, Any]) -> list[R]:
    """Records from their JSON, field by field instead of one by one.

    The records of an index mostly have the same fields, and with thousands of them it is the loop over the fields
    of each that costs: of a whole column, most checks are one call.
    """
    alike: defaultdict[tuple[str, ...], list[tuple[R, dict[str, Any]]]] = defaultdict(list)
    records = [object.__new__(cls) for _ in documents]
    for record, data in zip(records, documents, strict=True):
        if not isinstance(data, dict) or data.get("id") is None:
            raise ValueError(f"a {cls.__name__} must be a mapping with an id")
        alike[tuple(data)].append((record, data))
    for keys, pairs in alike.items():
        _fill(cls, keys, [record for record, _ in pairs], [data for _, data in pairs], readers)
    return records


def _fill(
    cls: type[R], keys: tuple[str, ...], records: Sequence[R], documents: Sequence[dict[str, Any]], readers: Any
) -> None:
    """Set the fields of records whose JSON has the same keys, past the frozen class, for which nothing is set yet."""
    columns = dict(zip(keys, zip(*[data.values() for data in documents], strict=True), strict=True))
    kind: Any = cls
    for name, put, defaults in _slots(kind):
        values: Iterable[Any]
        if name in columns and name in readers:
            values = _column(columns[name], name, readers[name], defaults)
        elif name == "unknown" and not readers.keys() >= columns.keys():
            values = [_unknown(data, readers) for data in documents]
        else:
            values = defaults(len(documents))
        deque(map(put, records, values), maxlen=0)  # the quickest way to go through a map


def _column(
    values: tuple[Any, ...], name: str, reader: Callable[[Any, str], Any], defaults: Callable[[int], Iterable[Any]]
) -> Iterable[Any]:
    """One field of many records, read; null is as good as absent."""
    types, plain = {*map(type, values)}, _AS_IT_STANDS.get(reader)
    if types == {plain} and (plain is not int or (min(values) >= 0 and max(values) <= MAX_COUNT)):
        return values
    fresh = iter(defaults(len(values)))
    return [next(fresh) if value is None else reader(value, name) for value in values]


def _unknown(data: Mapping[str, Any], readers: Mapping[str, Any]) -> dict[str, Any]:
    unknown = {key: value for key, value in data.items() if key not in readers}
    check_depth(unknown, "a record")
    return unknown


@functools.cache
def _slots(cls: type[Any]) -> list[tuple[str, Callable[[Any, Any], None], Callable[[int], Iterable[Any]]]]:
    """The fields in their order, what sets each, and what makes so many defaults."""
    return [(f.name, getattr(cls, f.name).__set__, _defaults_of(f)) for f in dataclasses.fields(cls)]


def _defaults_of(field: "dataclasses.Field[Any]") -> Callable[[int], Iterable[Any]]:
    if field.default_factory is dataclasses.MISSING:
        return lambda count: repeat(field.default, count)
    make = field.default_factory
    return lambda count: [make() for _ in range(count)]


_ATOMS = frozenset({str, int, bool, type(None)})


def _plain(value: Any) -> Any:
    if type(value) in _ATOMS:
        return value
    if isinstance(value, float):
        return encode_float(value)
    if isinstance(value, tuple | list):
        return list(value) if _ATOMS.issuperset(map(type, value)) else [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return dict(value) if _ATOMS.issuperset(map(type, value.values())) else {k: _plain(v) for k, v in value.items()}
    return value


def _to_json(record: Any, full: bool) -> dict[str, Any]:
    kind: Any = type(record)
    fields, values = _field_names(kind)
    data = dict(record.unknown)
    for (name, droppable), value in zip(fields, values(record), strict=True):
        if value or full or not droppable or (value is not False and value not in _EMPTY):
            data[name] = value if type(value) in _ATOMS else _plain(value)
    return data


_EMPTY: tuple[Any, ...] = (None, "", (), {})


@functools.cache
def _field_names(cls: type[Any]) -> tuple[tuple[tuple[str, bool], ...], Callable[[Any], tuple[Any, ...]]]:
    """The fields in their order, whether an empty one can be left out, and what gets all their values."""
    fields = [f for f in dataclasses.fields(cls) if f.name != "unknown"]
    droppable = [f.default is dataclasses.MISSING or f.default is False or f.default in _EMPTY for f in fields]
    names = [f.name for f in fields]
    return tuple(zip(names, droppable, strict=True)), operator.attrgetter(*names)


def thin(points: Iterable[tuple[int, float]], limit: int = MAX_CURVE_POINTS) -> tuple[tuple[int, float], ...]:
    """At most `limit` of `points`, evenly spread, the first and the last among them (of one, the last)."""
    items = list(points)
    if len(items) <= limit:
        return tuple(items)
    if limit < 2:
        return tuple(items[len(items) - limit :])
    step = (len(items) - 1) / (limit - 1)
    return tuple(items[round(i * step)] for i in range(limit))
