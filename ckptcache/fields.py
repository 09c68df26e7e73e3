"""The fields of a record: read from JSON, strictly and a whole column at a time, and written again.

The records of an index mostly have the same fields, and with thousands of them it is the loop over the fields of
each that costs: of a whole column, most checks are one call.
"""

import dataclasses
import functools
import operator
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Any, TypeVar

from ckptcache.values import MAX_COUNT, check_depth, decode_float, encode_float

_AT_ONCE = 256
"""Records whose columns are read together: beyond that they don't fit the processor's cache, and take twice as long."""

R = TypeVar("R")
Points = tuple[tuple[int, float], ...]
"""Pairs of iteration and value."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a field holds, and how it is read from JSON.

    Attributes:
        one: reads one value; ValueError, naming the field, where it is of another kind.
        column: reads a column, if that can be done at once; None where each value has to be looked at alone.
    """

    one: Callable[[Any, str], Any]
    column: Callable[[Sequence[Any]], Sequence[Any] | None]


# --- one value -----------------------------------------------------------------------------------


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} must be text, not {value!r}")
    return value


def _count(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
        raise ValueError(f"{key} must be a whole number of at least 0 and at most 2**53, not {value!r}")
    return value


def _flag(value: Any, key: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, not {value!r}")
    return value


def _texts(value: Any, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not _ONLY_TEXT.issuperset(map(type, value)):
        raise ValueError(f"{key} must be a list of texts, not {value!r}")
    return tuple(value)


def _numbers(value: Any, key: str) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{key} must be a list of numbers, not {value!r}")
    return tuple([decode_float(v, key) for v in value])


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be a mapping, not {value!r}")
    check_depth(value, key)
    return value


def _measures(value: Any, key: str) -> Mapping[str, float]:
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be a mapping, not {value!r}")
    return {k: decode_float(v, f"{key}.{k}") for k, v in value.items()}


def _curves(value: Any, key: str) -> Mapping[str, Points]:
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be a mapping, not {value!r}")
    # A curve that diverged must not make those of all other records slow.
    if (whole := _all_curves([value])) is not None:
        return whole[0]
    return {name: _points(points, f"{key}.{name}") for name, points in value.items()}


def _points(points: Any, label: str) -> Points:
    if not isinstance(points, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in points):
        raise ValueError(f"{label} must be a list of pairs")
    return tuple([(_count(i, label), decode_float(v, label)) for i, v in points])


# --- a column at once ----------------------------------------------------------------------------

_ONLY_TEXT = frozenset({str})
_ONLY_NUMBERS = frozenset({float})
_ONLY_LISTS = frozenset({list})
_NESTED = frozenset({dict, list})


def _all_of(kind: type) -> Callable[[Sequence[Any]], Sequence[Any] | None]:
    """What gives a column back as it stands where all of its values are exactly of this type."""
    return lambda values: values if {*map(type, values)} == {kind} else None


def _all_counts(values: Sequence[Any]) -> Sequence[int] | None:
    return values if {*map(type, values)} == {int} and min(values) >= 0 and max(values) <= MAX_COUNT else None


def _all_lists(items: frozenset[type]) -> Callable[[Sequence[Any]], Sequence[Any] | None]:
    def read(values: Sequence[Any]) -> Sequence[Any] | None:
        if {*map(type, values)} != {list} or not items.issuperset(map(type, chain.from_iterable(values))):
            return None
        return [*map(tuple, values)]

    return read


def _all_flat(values: Sequence[Any]) -> Sequence[Any] | None:
    """Mappings that hold no others are nested no deeper than anything may be."""
    is_flat = {*map(type, values)} == {dict} and _NESTED.isdisjoint(map(type, _inner(values)))
    return values if is_flat else None


def _all_measures(values: Sequence[Any]) -> Sequence[Any] | None:
    is_plain = {*map(type, values)} == {dict} and _ONLY_NUMBERS.issuperset(map(type, _inner(values)))
    return values if is_plain else None


def _all_curves(values: Sequence[Any]) -> Sequence[Mapping[str, Points]] | None:
    if {*map(type, values)} != {dict} or not _ONLY_LISTS.issuperset(map(type, curves := [*_inner(values)])):
        return None
    try:
        iterations, numbers = zip(*chain.from_iterable(curves), strict=True)
    except (TypeError, ValueError):  # no pairs, or none at all
        return None
    # Only a list can hold a whole number and another: a text and a mapping give texts.
    if _all_counts(iterations) is None or not _ONLY_NUMBERS.issuperset(map(type, numbers)):
        return None
    pairs = zip(iterations, numbers, strict=True)
    return [{name: tuple(islice(pairs, len(curve))) for name, curve in curves.items()} for curves in values]


def _inner(mappings: Iterable[dict[str, Any]]) -> Iterable[Any]:
    return chain.from_iterable(map(dict.values, mappings))


TEXT = Kind(_text, _all_of(str))
COUNT = Kind(_count, _all_counts)
NUMBER = Kind(decode_float, _all_of(float))
FLAG = Kind(_flag, _all_of(bool))
TEXTS = Kind(_texts, _all_lists(_ONLY_TEXT))
NUMBERS = Kind(_numbers, _all_lists(_ONLY_NUMBERS))
MEASURES = Kind(_measures, _all_measures)
MAPPING = Kind(_mapping, _all_flat)
CURVES = Kind(_curves, _all_curves)


# --- records -------------------------------------------------------------------------------------


def read(cls: type[R], documents: Sequence[Any], kinds: Mapping[str, Kind]) -> list[R]:
    """Records from their JSON, in its order; ValueError, naming the field, for the first that is not one."""
    if not all(isinstance(data, dict) and data.get("id") is not None for data in documents):
        raise ValueError(f"a {cls.__name__} must be a mapping with an id")
    records = [object.__new__(cls) for _ in documents]
    alike: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for position, keys in enumerate(map(tuple, documents)):
        alike[keys].append(position)
    for keys, positions in alike.items():
        for start in range(0, len(positions), _AT_ONCE):
            some = positions[start : start + _AT_ONCE]
            _fill(cls, keys, [records[p] for p in some], [documents[p] for p in some], kinds)
    return records


def _fill(
    cls: type[R],
    keys: tuple[str, ...],
    records: Sequence[R],
    documents: Sequence[dict[str, Any]],
    kinds: Mapping[str, Kind],
) -> None:
    """Set the fields of records whose JSON has the same keys, past the frozen class, for which nothing is set yet."""
    columns = dict(zip(keys, zip(*[data.values() for data in documents], strict=True), strict=True))
    kind: Any = cls
    for name, put, defaults in _slots(kind):
        values: Iterable[Any]
        if name in columns and name in kinds:
            values = _column(columns[name], name, kinds[name], defaults)
        elif name == "unknown" and not kinds.keys() >= columns.keys():
            values = [_unknown(data, kinds) for data in documents]
        else:
            values = defaults(len(documents))
        deque(map(put, records, values), maxlen=0)  # the quickest way to go through a map


def _column(values: tuple[Any, ...], name: str, kind: Kind, defaults: Callable[[int], Iterable[Any]]) -> Iterable[Any]:
    """One field of many records, read; null is as good as absent."""
    whole = kind.column(values)
    if whole is not None:
        return whole
    fresh = iter(defaults(len(values)))
    return [next(fresh) if value is None else kind.one(value, name) for value in values]


def _unknown(data: Mapping[str, Any], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    unknown = {key: value for key, value in data.items() if key not in kinds}
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


def to_json(record: Any, full: bool) -> dict[str, Any]:
    """A record as JSON holds it; empty fields are left out unless `full`."""
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
