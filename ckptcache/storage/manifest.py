"""What a backup holds, as it says itself at its beginning."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import orjson
from blake3 import blake3

from ckptcache.metadata import is_valid_id
from ckptcache.storage.index import INDEX_NAME
from ckptcache.values import MAX_COUNT

FORMAT = 1
_DIGEST = re.compile(r"\Ablake3:[0-9a-f]{64}\Z")
Kind = Literal["index", "sidecar", "checkpoint"]


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a backup."""

    kind: Kind
    name: str
    size: int
    digest: str

    @property
    def id(self) -> str:
        """The checkpoint that it belongs to; "" for the index."""
        return "" if self.kind == "index" else Path(self.name).stem


def name_of(kind: Kind, id: str = "") -> str:
    """Where a file of that kind lies in a cache, and in a backup."""
    return {"index": INDEX_NAME, "sidecar": f"checkpoints/{id}.json", "checkpoint": f"checkpoints/{id}.pt"}[kind]


def described(kind: Kind, data: bytes, id: str = "") -> Member:
    """The member that holds `data`."""
    return Member(kind, name_of(kind, id), len(data), _digest(data))


def _digest(data: bytes) -> str:
    return f"blake3:{blake3(data).hexdigest()}"


@dataclass(frozen=True)
class Manifest:
    """All that is in a backup, in its order.

    Attributes:
        made_at: when, in seconds since 1970; the time of every member.
        made_by: the program.
        left_out: ids of the checkpoints that the cache had and the backup hasn't, with the reason.
    """

    members: tuple[Member, ...]
    made_at: int
    made_by: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def data(self) -> bytes:
        """As it stands in the backup."""
        document = {
            "format": FORMAT,
            "made_by": self.made_by,
            "members": [{"kind": m.kind, "name": m.name, "size": m.size, "digest": m.digest} for m in self.members],
            "left_out": dict(self.left_out),
        }
        return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)

    @classmethod
    def parse(cls, data: bytes, made_at: int) -> Self:
        """Raises ValueError for what can't be one, and `LaterFormat`."""
        document = orjson.loads(data)
        if not isinstance(document, dict):
            raise ValueError("its manifest isn't a mapping")
        _check_format(document.get("format"))
        members = _list_of_mappings(document.get("members"))
        left_out = document.get("left_out")
        if not isinstance(left_out, dict) or not all(
            isinstance(v, str) and is_valid_id(k) for k, v in left_out.items()
        ):
            raise ValueError("its manifest says in no known way what was left out")
        manifest = cls(tuple(map(_member, members)), made_at, str(document.get("made_by", "")), left_out)
        _check_members(manifest.members)
        return manifest


class LaterFormat(Exception):
    """A format that this version doesn't know."""


def _check_format(found: Any) -> None:
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ValueError(f"its format {found!r} is none")
    if found > FORMAT:
        raise LaterFormat(found)


def _list_of_mappings(found: Any) -> list[dict[str, Any]]:
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise ValueError("its manifest lists no members")
    return found


def _member(item: Mapping[str, Any]) -> Member:
    kind, name, size, digest = (item.get(key) for key in ("kind", "name", "size", "digest"))
    if kind not in get_args(Kind) or not isinstance(name, str):
        raise ValueError(f"its manifest names {name!r} of the unknown kind {kind!r}")
    known = cast(Kind, kind)
    id = Path(name).stem if kind != "index" else ""
    if name != name_of(known, id) or (kind != "index" and not is_valid_id(id)):
        raise ValueError(f"its manifest names {name!r}, which has no place in a cache")
    if isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= MAX_COUNT:
        raise ValueError(f"{size!r} is not the size of {name}")
    if not isinstance(digest, str) or not _DIGEST.match(digest):
        raise ValueError(f"{digest!r} is not the digest of {name}")
    return Member(known, name, size, digest)


def _check_members(members: Collection[Member]) -> None:
    if [m.kind for m in members].count("index") != 1 or next(iter(members)).kind != "index":
        raise ValueError("its manifest does not begin with one index")
    if len({m.name for m in members}) < len(members):
        raise ValueError("its manifest names a file twice")
    of = {kind: {m.id for m in members if m.kind == kind} for kind in get_args(Kind)}
    if of["checkpoint"] != of["sidecar"]:
        raise ValueError("its manifest has a checkpoint without sidecar, or the other way round")
