"""What pages, charts and reports are made of: each run's record, and which of its files are kept."""

from dataclasses import dataclass
from pathlib import Path

from ckptcache.catalog import Catalog
from ckptcache.config import CacheConfig
from ckptcache.metadata import CheckpointMetadata, SessionRecord
from ckptcache.policy import quality
from ckptcache.policy.compatibility import Group
from ckptcache.storage.index import Index
from ckptcache.storage.reconcile import Observed


@dataclass(frozen=True, slots=True)
class RunView:
    """One run as a page shows it.

    Attributes:
        name: like ``nanecho-cached-ci``.
        catalog: its checkpoints; `catalog.observed.available` are those whose files are kept.
    """

    name: str
    catalog: Catalog

    @property
    def index(self) -> Index:
        """The record."""
        return self.catalog.index

    @property
    def available(self) -> frozenset[str]:
        """Ids of the checkpoints whose files are kept; of the others only the record is left."""
        return frozenset(self.catalog.observed.available)

    @property
    def sessions(self) -> list[SessionRecord]:
        """All sessions, the newest first."""
        return sorted(self.index.sessions.values(), key=lambda s: s.order, reverse=True)

    @property
    def best(self) -> CheckpointMetadata | None:
        """The best checkpoint of the group in use, whether its file is kept or not; None without a finite loss."""
        return next(filter(self._is_known, self.catalog.ranked(everything=True)), None)

    def best_of(self, group: Group) -> CheckpointMetadata | None:
        """The best checkpoint of a group, whether its file is kept or not; None without a finite loss."""
        return quality.best(filter(self._is_known, self.catalog.groups.get(group, [])), self.catalog.scores)

    def session_groups(self) -> dict[str, Group | None]:
        """The group of each session: its last checkpoint's, or that of the one it went on from; None for neither."""
        own = {r.session: r for r in sorted(self.index.checkpoints.values(), key=lambda r: r.order)}
        groups: dict[str, Group | None] = {}
        for session in self.sessions:
            witness = own.get(session.id) or self.index.checkpoints.get(session.parent or "")
            groups[session.id] = None if witness is None else self.catalog.group(witness)
        return groups

    def _is_known(self, record: CheckpointMetadata) -> bool:
        return self.catalog.scores[record.id].status == "known" and record.rolled_back is None


def view_of(name: str, index: Index, available: frozenset[str], config: CacheConfig | None = None) -> RunView:
    """A view of a record, wherever its files are kept: what isn't among `available` counts as missing."""
    observed = Observed()
    for id, record in index.checkpoints.items():
        if id in available and record.decision is None:
            observed.available[id] = record.size or 0
        elif record.decision is None:
            observed.missing[id] = "its file is gone"
    return RunView(name, Catalog(Path(name), index, observed, config or CacheConfig()))
