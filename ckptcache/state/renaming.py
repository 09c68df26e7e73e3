"""Names of saved tensors, read as those that a model has by now."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ckptcache.errors import InvalidValue

KeyMap = Mapping[str, str | None] | Callable[[str], str | None]
"""Saved name to needed name, None to leave the tensor out: of exact names and beginnings, or a function."""
_NAMED = 5


def check_key_map(key_map: Any) -> None:
    """InvalidValue unless it is a mapping of text to text or None, or can be called."""
    if isinstance(key_map, Mapping):
        for old, new in key_map.items():
            if not isinstance(old, str) or not (new is None or isinstance(new, str)):
                raise _invalid(key_map, f"it must map text to text or None, and maps {old!r} to {new!r}")
    elif not callable(key_map):
        raise _invalid(key_map, "it must be a mapping, or a function of a name")


def renamed(names: Iterable[str], key_map: KeyMap | None) -> dict[str, str]:
    """Each of `names` to what `key_map` makes of it; those that it leaves out are left out.

    In a mapping an exact name counts before a beginning, a longer beginning before a shorter one. A beginning ends
    at a dot: "encoder" and "encoder." both stand for all below `encoder`; "" stands for every name.

    Raises:
        InvalidValue: two names become one, or a function gives no text.
    """
    found = {name: new for name in names if (new := _renamed(name, key_map)) is not None}
    origins: defaultdict[str, list[str]] = defaultdict(list)
    for old, new in found.items():
        origins[new].append(old)
    for new, olds in origins.items():
        if len(olds) > 1:
            raise _invalid(key_map, f"{' and '.join(map(repr, olds[:_NAMED]))} would both become {new!r}")
    return found


def idle(names: Iterable[str], key_map: KeyMap | None) -> tuple[str, ...]:
    """Entries of a mapping that no name is, or begins with; a typing error is found here."""
    known = list(names)
    if not isinstance(key_map, Mapping):
        return ()
    return tuple(old for old in key_map if not any(_is_meant(name, old) for name in known))


def _renamed(name: str, key_map: KeyMap | None) -> str | None:
    if key_map is None:
        return name
    if isinstance(key_map, Mapping):
        return _mapped(name, key_map)
    new: Any = key_map(name)
    if new is not None and not isinstance(new, str):
        raise _invalid(key_map, f"of {name!r} it makes {new!r}, which is neither text nor None")
    return new


def _mapped(name: str, key_map: Mapping[str, str | None]) -> str | None:
    if name in key_map:
        return key_map[name]
    longest = max((old for old in key_map if _is_meant(name, old)), key=len, default=None)
    if longest is None:
        return name
    new = key_map[longest]
    return None if new is None else new + name[len(longest) :]


def _is_meant(name: str, old: str) -> bool:
    return name == old or name.startswith(old if old.endswith(".") or not old else f"{old}.")


def _invalid(key_map: Any, reason: str) -> InvalidValue:
    shown = dict(key_map) if isinstance(key_map, Mapping) else getattr(key_map, "__name__", type(key_map).__name__)
    return InvalidValue(name="key_map", value=shown, reason=reason)
