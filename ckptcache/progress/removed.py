"""What was taken out of a record here on purpose, which a clone can otherwise not tell from what it merely lacks."""

import secrets
from collections.abc import Iterable
from pathlib import Path

from ckptcache.errors import CkptCacheError
from ckptcache.metadata import is_valid_id
from ckptcache.storage import fs
from ckptcache.storage.index import INDEX_NAME

REMOVED_NAME = f"{INDEX_NAME}.removed"
"""Private to the clone, and ignored by git."""
_MOST, _LONGEST = 20_000, 130
"""Ids that are kept, the newest, and bytes of the longest with its line's end."""


def removed_from(cache_dir: Path) -> frozenset[str]:
    """Ids of the checkpoints and sessions that were taken out here; none where nothing tells."""
    return frozenset(_noted(cache_dir))


def note_removed(cache_dir: Path, ids: Iterable[str]) -> None:
    """Note, durably, what is about to be taken out; the index's lock must be held."""
    every = [*dict.fromkeys([*_noted(cache_dir), *ids])][-_MOST:]
    fs.write_atomically(
        cache_dir / REMOVED_NAME, "".join(f"{id}\n" for id in every).encode(), writer=secrets.token_hex(6)
    )


def _noted(cache_dir: Path) -> list[str]:
    try:
        text = fs.read_bytes(cache_dir / REMOVED_NAME, limit=_MOST * _LONGEST).decode("ascii")
    except (OSError, ValueError, CkptCacheError):
        # Without it nothing is lost: what was taken out comes back with the next merge.
        return []
    return [line for line in text.splitlines() if is_valid_id(line)]
