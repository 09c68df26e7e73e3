"""What records say of how checkpoints and sessions differ: settings, numbers, descent. Pure; without torch."""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ckptcache.metadata import CheckpointMetadata, SessionRecord
from ckptcache.storage.index import Index
from ckptcache.values import encode_float

_LOSSES = ("train_loss", "val_loss", "last_val_loss")
CONFIGS = ("model_config", "training_config", "data_config")


class _Absent:
    def __repr__(self) -> str:
        return "-"


ABSENT = _Absent()
"""Stands where one of several mappings lacks a key that another has."""


# --- settings ------------------------------------------------------------------------------------


def varying(mappings: Sequence[Any]) -> dict[str, tuple[Any, ...]]:
    """The keys in which mappings differ, each with its value in every one of them, or `ABSENT`.

    Mappings within them are taken apart, their keys joined by dots. What is no mapping counts as empty.
    """
    flat = [dict(_flattened(m)) if isinstance(m, Mapping) else {} for m in mappings]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = {key: tuple(one.get(key, ABSENT) for one in flat) for key in keys}
    return {key: row for key, row in rows.items() if not all(_is_same(row[0], value) for value in row[1:])}


def _flattened(mapping: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _flattened(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _is_same(a: Any, b: Any) -> bool:
    # In Python True is 1, in a configuration it is not.
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def configs_of(index: Index, holder: CheckpointMetadata | SessionRecord) -> dict[str, Any]:
    """A checkpoint's or session's model's, training's and data's configuration, as far as they are known.

    A session that didn't say is known by its newest checkpoint.
    """
    if isinstance(holder, CheckpointMetadata):
        return {name: index.configs[hash] for name in CONFIGS if (hash := getattr(holder, name)) in index.configs}
    declared = index.configs.get(holder.config or "")
    if isinstance(declared, Mapping):
        return {name: declared[name] for name in CONFIGS if name in declared}
    own = [r for r in index.checkpoints.values() if r.session == holder.id]
    return configs_of(index, max(own, key=lambda r: r.order)) if own else {}


# --- numbers -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pair:
    """A number in both of two records; None where one lacks it."""

    a: float | None
    b: float | None

    @property
    def change(self) -> float | None:
        """``b - a``; None where that means nothing."""
        if self.a is None or self.b is None or not math.isfinite(self.b - self.a):
            return None
        return self.b - self.a

    def to_json(self) -> dict[str, Any]:
        """The two, and the change."""
        return {name: jsonable_number(value) for name, value in (("a", self.a), ("b", self.b), ("change", self.change))}


def jsonable_number(value: float | None) -> Any:
    """A number as JSON can hold it."""
    return encode_float(value) if isinstance(value, float) else value


def relative_change(new: float | None, old: float | None) -> float | None:
    """``new / old - 1``; None where that means nothing."""
    if new is None or old is None or not old > 0 or not math.isfinite(new / old):
        return None
    return new / old - 1


def steps(session: SessionRecord) -> int:
    """Iterations that a session took."""
    return session.end_iteration - session.start_iteration


def rate(session: SessionRecord) -> float | None:
    """A session's iterations per second; None where its time isn't known."""
    return steps(session) / session.seconds if session.seconds > 0 else None


# --- descent -------------------------------------------------------------------------------------

Kin = Literal["same", "ancestor", "descendant", "branches", "unrelated", "unknown"]


@dataclass(frozen=True, slots=True)
class Relation:
    """How checkpoint b stands to checkpoint a.

    Attributes:
        kind: "ancestor" where a is one of b, "descendant" where a descends from b, "branches" where both descend from
            `common`, "unrelated" where they descend from different fresh starts, "unknown" where a record on the way
            is gone.
        common: the latest checkpoint that both descend from, or that one of them is.
        iterations: b's less a's.
        since_common: iterations of a and of b since `common`; None without one, or where its record is gone.
    """

    kind: Kin
    common: str | None
    iterations: int
    since_common: tuple[int, int] | None

    def to_json(self) -> dict[str, Any]:
        """As `ckptcache diff --json` prints it."""
        a, b = self.since_common or (None, None)
        return {
            "relation": self.kind,
            "common_ancestor": self.common,
            "iterations": self.iterations,
            "since_common": {"a": a, "b": b},
        }


def relation(a: CheckpointMetadata, b: CheckpointMetadata, records: Mapping[str, CheckpointMetadata]) -> Relation:
    """How `b` stands to `a` by the parents that `records` name; those may be of two caches."""
    known = {**records, a.id: a, b.id: b}
    of_a, gap_a = _line(a, known)
    of_b, gap_b = _line(b, known)
    apart = b.iteration - a.iteration
    # An id sorts before the records that are known, so that it is named only where no record is left.
    common = max(of_a & of_b, key=lambda id: known[id].order if id in known else (-1, id), default=None)
    if common is None:
        return Relation("unknown" if gap_a or gap_b else "unrelated", None, apart, None)
    start = known[common].iteration if common in known else None
    since = None if start is None else (a.iteration - start, b.iteration - start)
    return Relation(_kind(a, b, of_a, of_b), common, apart, since)


def _kind(a: CheckpointMetadata, b: CheckpointMetadata, of_a: set[str], of_b: set[str]) -> Kin:
    if a.id == b.id:
        return "same"
    return "ancestor" if a.id in of_b else "descendant" if b.id in of_a else "branches"


def _line(start: CheckpointMetadata, records: Mapping[str, CheckpointMetadata]) -> tuple[set[str], bool]:
    """A checkpoint and all that it descends from, and whether the record of one of these is gone."""
    seen, waiting, has_gap = {start.id}, deque([start]), False
    while waiting:
        for parent in waiting.popleft().parents:
            if parent in seen:
                continue
            seen.add(parent)
            if parent in records:
                waiting.append(records[parent])
            else:
                has_gap = True
    return seen, has_gap


# --- two records ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RecordDiff:
    """How the records of two checkpoints differ.

    Attributes:
        iteration: both, and how many lie between.
        losses, metrics: those that one of them has.
        configs, environment: keys that differ, each with both values, or `ABSENT`.
    """

    relation: Relation
    iteration: Pair
    losses: Mapping[str, Pair]
    metrics: Mapping[str, Pair]
    learning_rate: tuple[tuple[float, ...], tuple[float, ...]]
    configs: Mapping[str, tuple[Any, ...]]
    environment: Mapping[str, tuple[Any, ...]]

    def to_json(self) -> dict[str, Any]:
        """As `ckptcache diff --json` prints it."""
        rates = ([encode_float(rate) for rate in one] for one in self.learning_rate)
        return {
            "lineage": self.relation.to_json(),
            "iteration": self.iteration.to_json(),
            "losses": {name: pair.to_json() for name, pair in self.losses.items()},
            "metrics": {name: pair.to_json() for name, pair in self.metrics.items()},
            "learning_rate": dict(zip("ab", rates, strict=True)),
            "configs": [_setting(key, values) for key, values in self.configs.items()],
            "environment": [_setting(key, values) for key, values in self.environment.items()],
        }


def _setting(key: str, values: tuple[Any, ...]) -> dict[str, Any]:
    pairs = zip("ab", values, strict=True)
    return {"key": key, **{side: value for side, value in pairs if value is not ABSENT}}


def record_diff(a: CheckpointMetadata, b: CheckpointMetadata, index_a: Index, index_b: Index) -> RecordDiff:
    """How the record of `b` differs from that of `a`, each in its own index, or both in the same."""
    return RecordDiff(
        relation=relation(a, b, {**index_a.checkpoints, **index_b.checkpoints}),
        iteration=Pair(a.iteration, b.iteration),
        losses=_pairs(*({name: getattr(r, name) for name in _LOSSES} for r in (a, b))),
        metrics=_pairs(a.metrics, b.metrics),
        learning_rate=(a.learning_rate, b.learning_rate),
        configs=varying([configs_of(index_a, a), configs_of(index_b, b)]),
        environment=varying([a.environment, b.environment]),
    )


def _pairs(a: Mapping[str, float | None], b: Mapping[str, float | None]) -> dict[str, Pair]:
    found = {name: Pair(a.get(name), b.get(name)) for name in dict.fromkeys([*a, *b])}
    return {name: pair for name, pair in found.items() if (pair.a, pair.b) != (None, None)}
