"""How sessions and checkpoints came of each other: which of them are shown, as JSON, as a drawing, as a tree."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ckptcache import resume
from ckptcache.catalog import Catalog
from ckptcache.metadata import CheckpointMetadata, SessionRecord
from ckptcache.policy import branches


@dataclass(frozen=True)
class Lineage:
    """What is shown of a cache's lineage.

    Attributes:
        catalog: the whole cache.
        states: how each session ended, or that it runs.
        chosen: the checkpoints, in their order.
        sessions: the sessions, in their order.
        everything: whether what was evicted is shown one by one.
    """

    catalog: Catalog
    states: Mapping[str, str]
    chosen: Sequence[CheckpointMetadata]
    sessions: Sequence[SessionRecord]
    everything: bool

    @cached_property
    def tree(self) -> branches.Lineage:
        """Who came of whom, in the whole cache."""
        return branches.lineage(self.catalog.index.checkpoints, self.catalog.index.sessions)

    @cached_property
    def marks(self) -> dict[str, list[str]]:
        """What makes a checkpoint stand out: best, latest, its names, pinned."""
        catalog, found = self.catalog, _Lists(list)
        best = next((r for r in catalog.ranked() if _may_be_best(r, catalog)), None)
        for word, record in (("best", best), ("latest", catalog.latest())):
            if record is not None:
                found[record.id].append(word)
        for name, pointer in sorted(catalog.index.names.items()):
            found[pointer.checkpoint].append(f"={name}")
        for record in self.chosen:
            if record.pinned:
                found[record.id].append("pinned")
        return found

    @cached_property
    def parents(self) -> frozenset[str | None]:
        """The checkpoints that sessions resumed from."""
        return frozenset(s.parent for s in self.catalog.index.sessions.values())

    def is_shown(self, record: CheckpointMetadata) -> bool:
        """Whether a checkpoint has a line of its own: what was evicted has one only if it plays a part."""
        plays_a_part = record.id in self.marks or record.id in self.parents
        return self.everything or record.decision != "evicted" or plays_a_part


_Lists = defaultdict[str, list[str]]


def _may_be_best(record: CheckpointMetadata, catalog: Catalog) -> bool:
    return record.rolled_back is None and catalog.scores[record.id].status != "diverged"


def lineage(catalog: Catalog, states: Mapping[str, str], wanted: str | None, *, everything: bool) -> Lineage:
    """The lineage of a cache, or with `wanted` what that checkpoint or session came from and what came of it.

    Raises CheckpointNotFound or AmbiguousId.
    """
    index = catalog.index
    kept, below = (index.checkpoints.keys(),) * 2 if wanted is None else _related(catalog, wanted)
    chosen = sorted((index.checkpoints[id] for id in kept), key=lambda r: r.order)
    own = {record.session for record in chosen}
    related = [s for s in index.sessions.values() if wanted in (None, s.id) or s.id in own or s.parent in below]
    return Lineage(catalog, states, chosen, sorted(related, key=lambda s: s.order), everything)


def _related(catalog: Catalog, wanted: str) -> tuple[Set[str], Set[str]]:
    """What a checkpoint, or a session's, came from and what came of it; and of these what doesn't lie before it."""
    index = catalog.index
    tree = branches.lineage(index.checkpoints, index.sessions)
    if wanted in index.sessions and wanted not in index.checkpoints:
        own = [r.id for r in index.checkpoints.values() if r.session == wanted]
        parent = index.sessions[wanted].parent
        before = [parent] if parent is not None and parent in index.checkpoints else []
    else:
        own, before = [resume.find(catalog, wanted).id], []
    below = {*own, *tree.descendants(*own)}
    return below | {*before, *tree.ancestors(*own, *before)}, below


# --- JSON ----------------------------------------------------------------------------------------

_NOT_TOLD = frozenset({"curves", "environment", "unknown"})
"""Of a session; all that later versions add to it is told."""
_TOLD = (
    *("id", "sequence", "created_at", "session", "iteration", "val_loss", "save_reason"),
    *("pinned", "rolled_back", "decision_reason"),
)
"""Of a checkpoint; `show` tells the rest."""


def to_json(found: Lineage) -> dict[str, Any]:
    """Nodes and edges, in their order, and the ids that words stand for."""
    catalog = found.catalog
    words = {word: id for id, marks in found.marks.items() for word in marks if word in ("best", "latest")}
    return {
        "nodes": [
            *({"kind": "session", **_session_json(s), "state": found.states[s.id]} for s in found.sessions),
            *({"kind": "checkpoint", **_checkpoint_json(r, found)} for r in found.chosen),
        ],
        "edges": list(_edges(found)),
        "best": words.get("best"),
        "latest": words.get("latest"),
        "rollback": catalog.rolled_back_to,
    }


def _session_json(session: SessionRecord) -> dict[str, Any]:
    return {name: value for name, value in session.to_json(full=True).items() if name not in _NOT_TOLD}


def _checkpoint_json(record: CheckpointMetadata, found: Lineage) -> dict[str, Any]:
    plain = record.to_json(full=True)
    plain = {name: plain[name] for name in _TOLD}
    pointing = [mark.removeprefix("=") for mark in found.marks.get(record.id, []) if mark.startswith("=")]
    return {**plain, "status": found.catalog.status(record), "names": pointing}


def _edges(found: Lineage) -> Iterator[dict[str, str]]:
    """Which checkpoint a session resumed from, which it saved, and after which one each was saved."""
    sessions, checkpoints = {s.id for s in found.sessions}, {r.id for r in found.chosen}
    for session in found.sessions:
        if session.parent in checkpoints and session.parent is not None:
            yield {"from": session.parent, "to": session.id, "kind": "resumed"}
    for record in found.chosen:
        if record.session in sessions and record.session is not None:
            yield {"from": record.session, "to": record.id, "kind": "saved"}
        above = (parent for parent in found.tree.parents[record.id] if parent in checkpoints)
        yield from ({"from": parent, "to": record.id, "kind": "parent"} for parent in above)


def drawing(found: Lineage) -> str:
    """What the tree shows as a mermaid flowchart; "" where there is nothing."""
    from ckptcache.progress.lineage import drawn
    from ckptcache.progress.views import RunView

    view = RunView(found.catalog.root.name, found.catalog)
    return drawn(view, found.sessions, [r for r in found.chosen if found.is_shown(r)])
