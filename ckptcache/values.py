"""Plain values: what JSON can hold, and how the rest is turned into it.

Numbers that JSON can't hold (NaN, infinity) are written as the strings "nan", "inf" and "-inf".
"""

import argparse
import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import orjson
from blake3 import blake3

from ckptcache.errors import InvalidValue

MAX_JSON_DEPTH = 64
MAX_CONFIG_DEPTH = MAX_JSON_DEPTH - 2
"""A session's configurations are kept together in one mapping, which must be readable too."""
MAX_COUNT = 2**53
"""Whole numbers up to here are the same in every reader of JSON."""
_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def content_hash(value: Any) -> str:
    """16 hex digits of BLAKE3 over the canonical JSON of `value`: the name under which it is stored."""
    return blake3(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def jsonable(value: Any, key: str = "value", depth: int = 0, *, limit: int = MAX_JSON_DEPTH) -> Any:
    """`value` as JSON can hold it: dataclasses, namespaces, tuples, paths and NumPy scalars converted.

    Raises:
        InvalidValue: something in it has no JSON form, or is nested too deeply; its key is named.
    """
    if depth > limit:
        raise InvalidValue(name=key, value="...", reason=f"it is nested more than {limit} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _plain_text(value, key)
    if isinstance(value, int | float):
        return _plain_number(value, key)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    elif isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        names = [_plain_text(str(name), f"a key of {key}") for name in value]
        inner = zip(names, value.values(), strict=True)
        return {name: jsonable(item, f"{key}.{name}", depth + 1, limit=limit) for name, item in inner}
    if isinstance(value, list | tuple | set | frozenset):
        items = _sorted(value) if isinstance(value, set | frozenset) else value
        return [jsonable(v, f"{key}[{i}]", depth + 1, limit=limit) for i, v in enumerate(items)]
    return _converted(value, key, depth, limit)


def plain_config(value: Any, name: str) -> Any:
    """A configuration as JSON can hold it, alone and among a session's; raises InvalidValue like `jsonable`."""
    return jsonable(value, name, limit=MAX_CONFIG_DEPTH)


def _plain_text(value: str, key: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidValue(name=key, value=value, reason="it holds characters that UTF-8 cannot") from error
    # Not str(value), which for a member of a text enumeration is its name in the code.
    return str.__str__(value)


def _plain_number(value: int | float, key: str) -> Any:
    if isinstance(value, float):
        return encode_float(float(value))
    if not -(2**63) <= value < 2**64:
        raise InvalidValue(name=key, value=value, reason="JSON holds whole numbers of at most 64 bits")
    return int(value)


def _sorted(values: Iterable[Any]) -> list[Any]:
    items = list(values)
    # What can't be compared still needs an order that is the same in every process.
    alike = len({type(item) for item in items}) == 1 and isinstance(items[0], str | int | float)
    return sorted(items, key=None if alike else repr)


def _converted(value: Any, key: str, depth: int, limit: int) -> Any:
    if isinstance(value, os.PathLike):
        return jsonable(os.fspath(value), key, depth + 1, limit=limit)
    if callable(item := getattr(value, "item", None)):
        if _element_count(value) == 1:
            return jsonable(item(), key, depth + 1, limit=limit)
    elif type(value).__module__ == "torch":
        return str(value)  # a dtype, a device, a layout
    raise InvalidValue(
        name=key,
        value=value,
        reason="only numbers, text, true, false, None, lists and mappings of them are kept",
    )


def _element_count(value: Any) -> Any:
    """How many elements an array (by `size`) or a tensor (by `numel()`) has; 1 for a bare scalar."""
    numel = getattr(value, "numel", None)
    return numel() if callable(numel) else getattr(value, "size", 1)


def encode_float(value: float) -> float | str:
    """`value`, or "nan", "inf", "-inf"."""
    if math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")


def decode_float(value: Any, key: str) -> float:
    """The float that `encode_float` wrote; ValueError naming `key` for anything else."""
    if isinstance(value, str) and value in _NONFINITE:
        return _NONFINITE[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} must be a number, not {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{key} is too large for a number") from None


def as_float(value: Any, name: str) -> float:
    """A Python float of anything with one value: int, NumPy scalar, one-element tensor."""
    try:
        item = getattr(value, "item", None)
        return float(item() if callable(item) else value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InvalidValue(name=name, value=value, reason="it is not a number") from error


def text(value: Any, name: str) -> str:
    """`value`, or InvalidValue when it isn't text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise InvalidValue(name=name, value=value, reason="it must be text")
    return _plain_text(value, name)


def texts(values: Any, name: str) -> tuple[str, ...]:
    """`values` as a tuple of texts, or InvalidValue; a text alone is refused, for it would count letter by letter."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InvalidValue(name=name, value=values, reason="it must be a list of texts")
    return tuple(text(value, f"{name}[{position}]") for position, value in enumerate(values))


def check_depth(value: Any, key: str, depth: int = 0) -> None:
    """ValueError when parsed JSON is nested deeper than what `jsonable` makes: it could not be written again."""
    if depth > MAX_JSON_DEPTH:
        raise ValueError(f"{key} is nested more than {MAX_JSON_DEPTH} deep")
    for item in value.values() if type(value) is dict else value if type(value) is list else ():
        if type(item) is dict or type(item) is list:
            check_depth(item, key, depth + 1)
