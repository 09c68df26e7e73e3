"""``DIR:ID``: a checkpoint or session of a cache that lies elsewhere, in which nothing is changed."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ckptcache.cache import TrainingCache


@dataclass(frozen=True, slots=True)
class Place:
    """What an argument names.

    Attributes:
        folder: of the cache; None for the one that the command is about.
        wanted: an id, the beginning of one, a name, "best" or "latest".
    """

    folder: str | None
    wanted: str

    @property
    def is_elsewhere(self) -> bool:
        """Whether the argument named the folder."""
        return self.folder is not None


def place(text: str, *, windows: bool = os.name == "nt") -> Place:
    """``runs/a:best`` is "best" in runs/a: neither an id nor a name holds a colon, so that the last one parts the two.

    Raises click.BadParameter where the folder or the id is missing, as in ``C:\\\\runs\\\\cache``.
    """
    folder, colon, wanted = text.rpartition(":")
    is_drive = windows and len(folder) == 1 and folder.isalpha()
    if not colon or (is_drive and wanted and not _is_path(wanted)):
        return Place(None, text)
    if not (folder and wanted) or is_drive or _is_path(wanted):
        raise click.BadParameter(f"{text!r} names no checkpoint or session of a folder: write DIR:ID.")
    return Place(folder, wanted)


def _is_path(text: str) -> bool:
    return "/" in text or "\\" in text


def open_place(where: Place) -> "TrainingCache":
    """The cache that an argument is about. Raises what `find_cache` raises."""
    from ckptcache.cache import TrainingCache
    from ckptcache.cli.find import find_cache
    from ckptcache.cli.options import open_cache

    return open_cache() if where.folder is None else TrainingCache(find_cache(where.folder))
