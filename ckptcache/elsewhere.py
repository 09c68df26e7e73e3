"""``DIR:ID``: a checkpoint or session of a cache that lies elsewhere."""

import os
from dataclasses import dataclass

from ckptcache.errors import InvalidValue


@dataclass(frozen=True, slots=True)
class Place:
    """What a text names.

    Attributes:
        folder: of the cache; None for the one that is at hand.
        wanted: an id, the beginning of one, a name, "best" or "latest".
    """

    folder: str | None
    wanted: str

    @property
    def is_elsewhere(self) -> bool:
        """Whether the text names the folder."""
        return self.folder is not None


def place(text: str, *, windows: bool = os.name == "nt") -> Place:
    """``runs/a:best`` is "best" in runs/a: neither an id nor a name holds a colon, so that the last one parts the two.

    Raises InvalidValue where the folder or the id is missing, as in ``C:\\\\runs\\\\cache``.
    """
    folder, colon, wanted = text.rpartition(":")
    is_drive = windows and len(folder) == 1 and folder.isalpha()
    if not colon or (is_drive and wanted and not _is_path(wanted)):
        return Place(None, text)
    if not (folder and wanted) or is_drive or _is_path(wanted):
        reason = "it names no checkpoint or session of a folder: write DIR:ID"
        raise InvalidValue(name="a place", value=text, reason=reason)
    return Place(folder, wanted)


def _is_path(text: str) -> bool:
    return "/" in text or "\\" in text
