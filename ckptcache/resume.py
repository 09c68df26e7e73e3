"""From which checkpoints a run may resume, in which order: a pure choice over the catalogue."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from ckptcache.catalog import Catalog, Explanation
from ckptcache.errors import AmbiguousId, CheckpointMissing, CheckpointNotFound, Incompatible
from ckptcache.metadata import POLICIES, CheckpointMetadata, SessionRecord
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
    rolled_back_to: str | None = None
    """The checkpoint that comes first because it was rolled back to."""
    warning: str = ""
    """What a user must hear of the choice."""

    def restricted(self, only: Callable[[CheckpointMetadata], bool] | None) -> Self:
        """The same choice among those of which `only` says yes; None: among all."""
        return self if only is None else dataclasses.replace(self, records=list(filter(only, self.records)))


def choose(
    catalog: Catalog, needed: Description, resume: str, *, live: Collection[str], elsewhere: Collection[str] = ()
) -> Choice:
    """The checkpoints to try under the policy `resume`: best, latest, auto, never, or an id or name.

    While a rollback is in force, the checkpoint that was rolled back to comes first under best, latest and auto.

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
    if resume not in POLICIES:
        return _named(catalog, needed, resume)
    explanations = catalog.explain(needed)
    choice = _by_policy(catalog, explanations, resume, live, elsewhere)
    id = catalog.rolled_back_to
    return choice if id is None else _rolled_back(choice, id, {e.record.id: e for e in explanations}.get(id))


def _rolled_back(choice: Choice, id: str, wanted: Explanation | None) -> Choice:
    """`choice` with what was rolled back to before all others; loudly, where it can't be."""
    if wanted is not None and wanted.eligible:
        note = f"rolled back to {id}, as asked by `ckptcache rollback`"
        others = [r for r in choice.records if r.id != id]
        return Choice([wanted.record, *others], notes=(note,), rolled_back_to=id)
    reason = "it was evicted" if wanted is None else wanted.reason
    warning = (
        f"{id} was rolled back to, and can't be resumed from ({reason}); the next that fits is tried, and the "
        f"rollback stays in force (`ckptcache rollback --undo` takes it back)"
    )
    missing = tuple(other for other in choice.missing if other != id)
    return dataclasses.replace(choice, missing=missing, warning=warning)


def _by_policy(
    catalog: Catalog,
    explanations: list[Explanation],
    resume: str,
    live: Collection[str],
    elsewhere: Collection[str],
) -> Choice:
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
    sound = (e for e in explanations if e.score.status != "diverged" and e.record.rolled_back is None)
    fitting = [e for e in sound if e.verdict.kind == "exact"]
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
        f"(iteration {latest.iteration}{_last_known(latest)}): choose that one with resume=latest",
    )


def _last_known(record: CheckpointMetadata) -> str:
    """What is known of a checkpoint that was saved between two evaluations, and ranks below all that were measured."""
    if record.val_loss is not None:
        return ""
    if record.last_val_loss is None or record.last_val_loss_iteration is None:
        return ", not evaluated"
    return f", not evaluated; val_loss was {record.last_val_loss:.4g} at iteration {record.last_val_loss_iteration}"


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
    """The record that `wanted` stands for, as `find` has it; CheckpointMissing where its file isn't there."""
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
