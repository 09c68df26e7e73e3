"""The records: what a checkpoint, a session and a model are, as plain values that JSON can hold.

Everything here is immutable and free of torch. A loss that is NaN has diverged, one that is None is
unknown; JSON holds the one as "nan" and leaves the other out.
"""

import dataclasses
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from typing import Any, Literal, Self

from ckptcache import fields
from ckptcache.errors import InvalidId, InvalidName
from ckptcache.fields import Kind
from ckptcache.values import MAX_COUNT

SCHEMA_VERSION = 2
"""Version 1 is the oldest layout: a flat mapping of id to record."""
MAX_CURVE_POINTS = 200

SaveReason = Literal["improved", "interval", "final", "signal", "manual", "growth"]
Decision = Literal["evicted", "quarantined"]

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
        return fields.to_json(self, full)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises ValueError, naming the field, when `data` is not a record."""
        return cls.all_from_json([data])[0]

    @classmethod
    def all_from_json(cls, documents: Sequence[Mapping[str, Any]]) -> list[Self]:
        """Many at once, in their order, at a fraction of the cost; raises ValueError likewise."""
        return fields.read(cls, documents, _CHECKPOINT_KINDS)

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
        return fields.to_json(self, full)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises ValueError, naming the field, when `data` is not a session."""
        return cls.all_from_json([data])[0]

    @classmethod
    def all_from_json(cls, documents: Sequence[Mapping[str, Any]]) -> list[Self]:
        """Many at once, in their order, at a fraction of the cost; raises ValueError likewise."""
        return fields.read(cls, documents, _SESSION_KINDS)

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
        revision = fields.COUNT.one(data.get("revision", 0), "revision")
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


# --- what their fields hold ----------------------------------------------------------------------


def _id_text(value: Any, key: str) -> str:
    if not is_valid_id(value):
        raise ValueError(f"{key} must be an id, not {value!r}")
    return str(value)


def _ids(value: Any, key: str) -> tuple[str, ...]:
    return tuple([_id_text(v, key) for v in fields.TEXTS.one(value, key)])


def _all_ids(values: Sequence[Any]) -> Sequence[Any] | None:
    return values if fields.TEXT.column(values) and _are_valid(values) else None


def _all_lists_of_ids(values: Sequence[Any]) -> Sequence[Any] | None:
    found = fields.TEXTS.column(values)
    return found if found and _are_valid(chain.from_iterable(found)) else None


def _are_valid(texts: Iterable[str]) -> bool:
    """As `is_valid_id` has it of each; no id holds the character that parts them here."""
    different = {*texts}
    return all(map(_ID.match, different)) and ".." not in "/".join(different)


_ID_TEXT = Kind(_id_text, _all_ids)
_CHECKPOINT_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("id", "session", "rolled_back"), _ID_TEXT),
    **dict.fromkeys(("created_at", "save_reason", "model_config", "training_config"), fields.TEXT),
    **dict.fromkeys(("data_config", "fingerprint", "notes", "decision", "decision_reason", "digest"), fields.TEXT),
    **dict.fromkeys(("sequence", "revision", "iteration", "last_val_loss_iteration", "size"), fields.COUNT),
    **dict.fromkeys(("epoch", "train_loss", "val_loss", "last_val_loss", "quality_score"), fields.NUMBER),
    **dict.fromkeys(("contents", "tags"), fields.TEXTS),
    "parents": Kind(_ids, _all_lists_of_ids),
    **dict.fromkeys(("extra", "environment"), fields.MAPPING),
    "learning_rate": fields.NUMBERS,
    "metrics": fields.MEASURES,
    "pinned": fields.FLAG,
}
_SESSION_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("id", "parent", "best_checkpoint", "rolled_back"), _ID_TEXT),
    **dict.fromkeys(("resume", "config", "started_at", "ended_at", "stop_reason"), fields.TEXT),
    **dict.fromkeys(("sequence", "revision", "start_iteration", "end_iteration"), fields.COUNT),
    **dict.fromkeys(("saved", "evicted", "failed_saves"), fields.COUNT),
    **dict.fromkeys(("first_val_loss", "last_val_loss", "best_val_loss", "seconds"), fields.NUMBER),
    **dict.fromkeys(("reseeded", "warm_start"), fields.FLAG),
    "curves": fields.CURVES,
    "environment": fields.MAPPING,
}


def thin(points: Iterable[tuple[int, float]], limit: int = MAX_CURVE_POINTS) -> tuple[tuple[int, float], ...]:
    """At most `limit` of `points`, evenly spread, the first and the last among them (of one, the last)."""
    items = list(points)
    if len(items) <= limit:
        return tuple(items)
    if limit < 2:
        return tuple(items[len(items) - limit :])
    step = (len(items) - 1) / (limit - 1)
    return tuple(items[round(i * step)] for i in range(limit))
