"""What was taken out of a record here on purpose, which a clone can otherwise not tell from what it merely lacks."""

import secrets
from collections.abc import Iterable

from ckptcache.errors import CkptCacheError
from ckptcache.metadata import is_valid_id
from ckptcache.progress.folder import Run
from ckptcache.storage import fs

_MOST, _LONGEST = 20_000, 130
"""Ids that are kept, the newest, and bytes of the longest with its line's end."""


def removed_from(run: Run) -> frozenset[str]:
    """Ids of the checkpoints and sessions that were taken out here; none where nothing tells."""
    return frozenset(_noted(run))


def note_removed(run: Run, ids: Iterable[str]) -> None:
    """Note, durably, what is about to be taken out; the index's lock must be held."""
    every = [*dict.fromkeys([*_noted(run), *ids])][-_MOST:]
    fs.write_atomically(run.removed, "".join(f"{id}\n" for id in every).encode(), writer=secrets.token_hex(6))


def _noted(run: Run) -> list[str]:
    try:
        text = fs.read_bytes(run.removed, limit=_MOST * _LONGEST).decode("ascii")
    except (OSError, ValueError, CkptCacheError):
        # Without it nothing is lost: what was taken out comes back with the next merge.
        return []
    return [line for line in text.splitlines() if is_valid_id(line)]
