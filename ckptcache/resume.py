"""From which checkpoints a run may resume, in which order: a pure choice over the catalogue."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptcache.catalog import Catalog, Explanation
from ckptcache.errors import AmbiguousId, CheckpointMissing, CheckpointNotFound, Incompatible
from ckptcache.metadata import RESERVED_NAMES, CheckpointMetadata, SessionRecord
from ckptcache.policy.compatibility import Description

UNFINISHED = (None, "signal", "error", "max_seconds")
"""Stop reasons of a session that "auto" continues."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The checkpoints to try, in order, and whether the user named the only one."""

    records: list[CheckpointMetadata]
    is_named: bool = False
    notes: tuple[str, ...] = ()
    """What a user should know of the choice, one sentence each."""
    damaged: Mapping[str, str] = field(default_factory=dict)
    """Those that fit and can be seen to be damaged without reading them, with the reason."""
    missing: tuple[str, ...] = ()
    """Those that would have come before `records`, and whose files are gone."""


def choose(
    catalog: Catalog, needed: Description, resume: str, *, live: Collection[str], elsewhere: Collection[str] = ()
) -> Choice:
    """The checkpoints to try under the policy `resume`: best, latest, auto, never, or an id or name.

    Args:
        live: sessions that run, which "auto" leaves alone.
        elsewhere: sessions of other machines, of which nothing more can be known from here.

    Raises:
        CheckpointNotFound, AmbiguousId: `resume` names none, or several.
        CheckpointMissing: the one that it names has no file.
        Incompatible: the one that it names doesn't fit.
    """
    if resume == "never":
        return Choice([])
    if resume not in RESERVED_NAMES:
        return _named(catalog, needed, resume)
    explanations = catalog.explain(needed)
    eligible = [e.record for e in explanations if e.eligible]
    by_age = sorted(eligible, key=lambda r: r.order, reverse=True)
    if resume == "latest":
        return Choice(by_age, **_lost(explanations, by_age, lambda e: e.record.order))
    if resume == "auto":
        session = _interrupted(catalog, eligible, live)
        if session is not None:
            own = [r for r in by_age if r.session == session.id]
            note = _goes_on(session, is_elsewhere=session.id in elsewhere)
            return Choice([*own, *(r for r in eligible if r.session != session.id)], notes=(note,))
    return Choice(eligible, notes=_passed_by(catalog, eligible), **_lost(explanations, eligible, _quality))


def _goes_on(session: SessionRecord, *, is_elsewhere: bool) -> str:
    if is_elsewhere and session.stop_reason is None:
        return (
            f"session {session.id} ran on another machine, where it may still run, and has not ended; "
            f"it is taken for cut short, and goes on from its latest"
        )
    return f"session {session.id} was cut short ({session.stop_reason or 'killed'}); it goes on from its latest"


def _lost(
    explanations: list[Explanation], tried: list[CheckpointMetadata], worth: Callable[[Explanation], Any]
) -> dict[str, Any]:
    """What would have been tried, had its file been whole; `worth` is what the policy goes by."""
    fitting = [e for e in explanations if e.verdict.kind == "exact" and e.score.status != "diverged"]
    first = next((e for e in fitting if tried and e.record.id == tried[0].id), None)
    better = [e for e in fitting if first is None or (e.verdict.comparable and worth(e) > worth(first))]
    return {
        "damaged": {e.record.id: e.reason for e in fitting if e.status == "damaged"},
        "missing": tuple(e.record.id for e in better if e.status == "missing"),
    }


def _quality(explanation: Explanation) -> float:
    return -math.inf if explanation.score.quality is None else explanation.score.quality


def _named(catalog: Catalog, needed: Description, wanted: str) -> Choice:
    record = find_available(catalog, wanted)
    verdict = catalog.judge(record, needed)
    if verdict.kind != "exact":
        raise Incompatible(id=record.id, reason=verdict.reason)
    return Choice([record], is_named=True)


def _interrupted(catalog: Catalog, eligible: list[CheckpointMetadata], live: Collection[str]) -> SessionRecord | None:
    """The newest session that left a checkpoint that fits, if it was cut short."""
    sessions = {r.session for r in eligible if r.session is not None}
    known = [catalog.index.sessions[id] for id in sessions if id in catalog.index.sessions]
    newest = max(known, key=lambda s: s.order, default=None)
    if newest is None or newest.id in live or newest.stop_reason not in UNFINISHED:
        return None
    return newest


def _passed_by(catalog: Catalog, eligible: list[CheckpointMetadata]) -> tuple[str, ...]:
    """Best is not the latest: people who meant to go on must hear of it, and how."""
    if not eligible:
        return ()
    chosen, latest = eligible[0], max(eligible, key=lambda r: r.order)
    if latest.id == chosen.id or latest.iteration <= chosen.iteration:
        return ()
    return (
        f"the best, {chosen.id} (iteration {chosen.iteration}), is older than the latest, {latest.id} "
        f"(iteration {latest.iteration}): choose that one with resume=latest",
    )


def find(catalog: Catalog, wanted: str) -> CheckpointMetadata:
    """The record that an id, a unique prefix of one, a name, "best" or "latest" stands for.

    Raises CheckpointNotFound or AmbiguousId.
    """
    records = catalog.index.checkpoints
    pointer = catalog.index.names.get(wanted)
    # Words and names first: a file that was taken up from elsewhere may be called anything.
    if wanted in ("best", "latest"):
        found = catalog.latest() if wanted == "latest" else next(iter(catalog.candidates(Description())), None)
        if found is not None:
            return records[found.id]
    if pointer is not None and pointer.checkpoint in records:
        return records[pointer.checkpoint]
    if wanted in records:
        return records[wanted]
    matches = sorted(id for id in records if wanted and id.startswith(wanted))
    if len(matches) > 1:
        raise AmbiguousId(prefix=wanted, count=len(matches), examples=", ".join(matches[:3]))
    if not matches:
        raise CheckpointNotFound(id=wanted, path=catalog.root)
    return records[matches[0]]


def find_available(catalog: Catalog, wanted: str) -> CheckpointMetadata:
    """What `find` gives, if its file is there; raises CheckpointMissing too."""
    record = find(catalog, wanted)
    if catalog.status(record) != "available":
        observed = catalog.observed.missing | catalog.observed.damaged
        reason = record.decision_reason or observed.get(record.id, catalog.status(record))
        raise CheckpointMissing(id=record.id, reason=reason, path=catalog.root / "checkpoints")
    return record


def why_not(explanations: list[Explanation], limit: int = 10) -> list[str]:
    """For each checkpoint that can't be resumed from a line that says why; a reason is spelled out once."""
    rejected = [e for e in explanations if not e.eligible]
    lines: list[str] = []
    seen: set[str] = set()
    for e in rejected[:limit]:
        lines.append(f"{e.record.id}: {'likewise' if e.reason in seen else e.reason}")
        seen = {e.reason}
    more = len(rejected) - limit
    return [*lines, f"and {more} more (`ckptcache explain` lists all)"] if more > 0 else lines
