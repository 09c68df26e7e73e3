"""What pages and graphs call a run's checkpoints and sessions, and what they say of them."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from ckptcache.metadata import CheckpointMetadata, SessionRecord
from ckptcache.progress.views import RunView

CUT_SHORT = "cut short"
_STATUS = {"missing": "only recorded"}


class Labels:
    """Short ids, marks and standings of one run; costly to find, so found once."""

    def __init__(self, view: RunView) -> None:
        self.view = view
        self.best = view.best
        self._names = _names(view)
        parents = {s.parent for s in view.sessions if s.parent}
        self._short = _short_ids(view.index.sessions) | _short_ids({*view.index.checkpoints, *parents})

    def short(self, id: str) -> str:
        """A beginning of a checkpoint's or session's id that no other has."""
        return self._short.get(id, id)

    def marks(self, record: CheckpointMetadata) -> list[str]:
        """ "best", "rolled back", "pinned", and the names that point to it: what makes a checkpoint stand out."""
        is_best = self.best is not None and record.id == self.best.id
        flags = {"best": is_best, "rolled back": record.rolled_back is not None, "pinned": record.pinned}
        return [*(word for word, is_so in flags.items() if is_so), *self._names.get(record.id, [])]

    def status(self, record: CheckpointMetadata) -> str:
        """``available``, ``only recorded``, ``damaged``, ``evicted`` or ``quarantined``."""
        status = self.view.catalog.status(record)
        return _STATUS.get(status, status)


def _short_ids(ids: Iterable[str]) -> dict[str, str]:
    """For each id as many of its parts as no other id begins with; those of the same moment stand there in full."""
    every = sorted(ids)
    beginnings = Counter(beginning for id in every for beginning in _beginnings(id))
    return {id: next((b for b in _beginnings(id) if beginnings[b] == 1), id) for id in every}


def _beginnings(id: str) -> Iterator[str]:
    """Of ``ckpt_20260102_030405_00000500_...`` those that end after the time, the iteration, ..."""
    parts = id.split("_")
    return ("_".join(parts[:end]) for end in range(3, len(parts) + 1))


def _names(view: RunView) -> dict[str, list[str]]:
    names: defaultdict[str, list[str]] = defaultdict(list)
    for name, pointer in sorted(view.index.names.items()):
        names[pointer.checkpoint].append(name)
    return dict(names)


def iterations(session: SessionRecord) -> str:
    """``60 to 120``."""
    return f"{session.start_iteration} to {session.end_iteration}"


def ending(session: SessionRecord) -> str:
    """Why a session ended, as it stands in the record."""
    return CUT_SHORT if session.stop_reason is None else session.stop_reason
