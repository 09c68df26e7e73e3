"""The checkpoints of a cache as they stand: grouped, scored, ranked, judged. Reads; decides nothing itself.

It joins what the storage wing observed with what the policy wing answers, without torch, so that
listings are quick.
"""

import dataclasses
import heapq
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from ckptcache.config import CacheConfig
from ckptcache.metadata import ROLLBACK, CheckpointMetadata, Fingerprint, SessionRecord
from ckptcache.policy import quality, retention
from ckptcache.policy.compatibility import Description, Group, Verdict, group_of, judge
from ckptcache.policy.quality import Scale, Score
from ckptcache.storage.index import Index
from ckptcache.storage.reconcile import Observed

Status = Literal["available", "missing", "damaged", "evicted", "quarantined"]
_ORDER: Callable[[CheckpointMetadata | SessionRecord], tuple[int, str]] = attrgetter("sequence", "id")
"""Its `order`."""
_DESCRIBED: Callable[[CheckpointMetadata], tuple[str | None, ...]] = attrgetter(
    "fingerprint", "model_config", "data_config"
)
"""The names of all that its `description` is made of."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a checkpoint would or would not be resumed from."""

    record: CheckpointMetadata
    status: Status
    score: Score
    verdict: Verdict
    eligible: bool
    """Whether it may be resumed from at all."""
    chosen: bool
    """Whether it is the one that "best" resumes from."""
    reason: str

    def to_json(self) -> dict[str, Any]:
        """As `ckptcache explain --json` prints it."""
        return {
            "id": self.record.id,
            "iteration": self.record.iteration,
            "val_loss": self.record.to_json(full=True)["val_loss"],
            "status": self.status,
            "quality_score": self.score.quality,
            "score_status": self.score.status,
            "score": dict(self.score.parts),
            "score_reason": self.score.reason,
            "verdict": self.verdict.kind,
            "comparable": self.verdict.comparable,
            "differences": [dataclasses.asdict(d) for d in self.verdict.differences],
            "rolled_back": self.record.rolled_back,
            "eligible": self.eligible,
            "chosen": self.chosen,
            "reason": self.reason,
        }


class Catalog:
    """A view of one index and of what was observed on the disk; neither may change meanwhile."""

    def __init__(self, root: Path, index: Index, observed: Observed, config: CacheConfig) -> None:
        self.root = root
        self.index = index
        self.observed = observed
        self.config = config
        self._group_memo: dict[tuple[str | None, ...], Group] = {}
        self._verdicts: dict[int, tuple[Description, dict[tuple[str | None, ...], Verdict]]] = {}

    # --- groups and scores -----------------------------------------------------------------------

    def description(self, record: CheckpointMetadata) -> Description:
        """What is known of the model and data of a checkpoint."""
        return Description(
            fingerprint=self.index.fingerprints.get(record.fingerprint or ""),
            model_config=_mapping(self.index.configs.get(record.model_config or "")),
            data_config=_mapping(self.index.configs.get(record.data_config or "")),
        )

    def group(self, record: CheckpointMetadata) -> Group:
        """The group that a checkpoint is ranked in."""
        key = _DESCRIBED(record)
        if key not in self._group_memo:
            self._group_memo[key] = group_of(self.description(record), self.config.critical_params)
        return self._group_memo[key]

    @cached_property
    def groups(self) -> dict[Group, list[CheckpointMetadata]]:
        """Every record by group, with or without a file, so that losing a file changes no score."""
        groups: dict[Group, list[CheckpointMetadata]] = {}
        members: dict[tuple[str | None, ...], list[CheckpointMetadata]] = {}
        records = self.index.checkpoints.values()
        for key, record in zip(map(_DESCRIBED, records), records, strict=True):
            if key not in members:
                members[key] = groups.setdefault(self.group(record), [])
            members[key].append(record)
        return groups

    @cached_property
    def scores(self) -> Mapping[str, Score]:
        """The score of every record, under the settings in force; each is made when it is asked for."""
        return _Scores(self)

    @cached_property
    def scales(self) -> dict[Group, Scale]:
        """What the scores of each group have in common."""
        return {group: quality.scale_of(members, self.config) for group, members in self.groups.items()}

    def unscored_metrics(self) -> tuple[str, ...]:
        """Metrics that are recorded and, with none declared, don't count."""
        if self.config.quality_metrics is not None or self.config.best_fn is not None:
            return ()
        return tuple(sorted({name for scale in self.scales.values() for name in scale.unscored}))

    def scored(self, record: CheckpointMetadata) -> CheckpointMetadata:
        """The record with the quality that it has under the settings in force."""
        return dataclasses.replace(record, quality_score=self.scores[record.id].quality)

    @cached_property
    def last_used(self) -> dict[Group, tuple[int, str]]:
        """When a checkpoint of each group was last saved or resumed from."""
        used = {group: max(map(_ORDER, members)) for group, members in self.groups.items()}
        for session in self.index.sessions.values():
            parent = self.index.checkpoints.get(session.parent or "")
            if parent is not None:
                group = self.group(parent)
                used[group] = max(used[group], session.order)
        return used

    def status(self, record: CheckpointMetadata) -> Status:
        """Whether a checkpoint can be read, and if not, why."""
        if record.decision is not None:
            return "evicted" if record.decision == "evicted" else "quarantined"
        if record.id in self.observed.available:
            return "available"
        return "damaged" if record.id in self.observed.damaged else "missing"

    @cached_property
    def rolled_back_to(self) -> str | None:
        """The checkpoint that the next session is to go on from, by a rollback that is in force."""
        pointer = self.index.names.get(ROLLBACK)
        return None if pointer is None or pointer.checkpoint not in self.index.checkpoints else pointer.checkpoint

    def left_behind(self, record: CheckpointMetadata) -> bool:
        """Whether a checkpoint was rolled back, so that it is resumed from only where it is named."""
        return record.rolled_back is not None and record.id != self.rolled_back_to

    # --- listings --------------------------------------------------------------------------------

    def ranked(self, *, everything: bool = False) -> list[CheckpointMetadata]:
        """Checkpoints best first within each group, the groups by when they were last used."""
        ranked: list[CheckpointMetadata] = []
        for group in sorted(self.groups, key=lambda g: self.last_used[g], reverse=True):
            members = [r for r in self.groups[group] if everything or r.id in self.observed.available]
            ranked += map(self.scored, quality.rank(members, self.scores))
        return ranked

    def latest(self) -> CheckpointMetadata | None:
        """The latest checkpoint whose file is there, and that wasn't rolled back."""
        available = (self.index.checkpoints[id] for id in self.observed.available)
        return max((r for r in available if not self.left_behind(r)), key=_ORDER, default=None)

    def best_of(self, group: Group, *, without: str | None = None) -> CheckpointMetadata | None:
        """The best available checkpoint of a group."""
        members = [r for r in self.groups.get(group, []) if r.id in self.observed.available and r.id != without]
        return quality.best(members, self.scores)

    # --- what fits -------------------------------------------------------------------------------

    def judge(self, record: CheckpointMetadata, needed: Description) -> Verdict:
        """How a checkpoint fits; parts of it for which nothing is needed are not compared."""
        key = _DESCRIBED(record)
        verdicts = self._verdicts.setdefault(id(needed), (needed, {}))[1]
        if key not in verdicts:
            verdicts[key] = self._judge(record, needed)
        return verdicts[key]

    def _judge(self, record: CheckpointMetadata, needed: Description) -> Verdict:
        saved = self.description(record)
        if saved.fingerprint is not None and needed.fingerprint is not None:
            saved = dataclasses.replace(saved, fingerprint=_restricted(saved.fingerprint, needed.fingerprint))
        return judge(saved, needed, self.config.critical_params)

    def explain(self, needed: Description) -> list[Explanation]:
        """Every checkpoint that wasn't evicted: first those that "best" would try, in that order."""
        records = [r for r in self.index.checkpoints.values() if r.decision != "evicted"]
        verdicts = {r.id: self.judge(r, needed) for r in records}
        ordered = self._resume_order(records, verdicts)
        chosen = next((r.id for r in ordered if self._eligible(r, verdicts[r.id])), None)
        return [self._explanation(r, verdicts[r.id], r.id == chosen) for r in ordered]

    def prevailing(self) -> tuple[Description, SessionRecord | CheckpointMetadata | None]:
        """What the next run would need, as far as the index can tell, and from what that is known.

        The newest session's own checkpoints tell most; a session without any is known by its configuration, or by
        the checkpoint that it resumed from. Without a session, the newest checkpoint tells.
        """
        sessions = (s for s in self.index.sessions.values() if s.rolled_back is None)
        for session in sorted(sessions, key=_ORDER, reverse=True)[:1]:
            described = self._trained_by(session)
            if described is not None:
                return described, session
        newest = max(self.index.checkpoints.values(), key=lambda r: (not self.left_behind(r), r.order), default=None)
        return (Description(), None) if newest is None else (self.description(newest), newest)

    def _trained_by(self, session: SessionRecord) -> Description | None:
        own = [r for r in self.index.checkpoints.values() if r.session == session.id]
        if own:
            return self.description(max(own, key=_ORDER))
        declared = self.index.configs.get(session.config or "")
        if isinstance(declared, Mapping) and ("model_config" in declared or "data_config" in declared):
            return Description(None, _mapping(declared.get("model_config")), _mapping(declared.get("data_config")))
        parent = self.index.checkpoints.get(session.parent or "")
        return None if parent is None or session.warm_start else self.description(parent)

    def candidates(self, needed: Description) -> list[CheckpointMetadata]:
        """What "best" would try, in that order."""
        available = [self.index.checkpoints[id] for id in self.observed.available]
        verdicts = {r.id: self.judge(r, needed) for r in available}
        # Only these: to place all that ever was among them would take most of the time.
        return self._resume_order([r for r in available if self._eligible(r, verdicts[r.id])], verdicts)

    def best(self, needed: Description) -> CheckpointMetadata | None:
        """The first of `candidates`, with its quality; None where nothing fits."""
        first = next(iter(self.candidates(needed)), None)
        return None if first is None else self.scored(first)

    def _eligible(self, record: CheckpointMetadata, verdict: Verdict) -> bool:
        # Who rolls back to a checkpoint wants that one, as who names it does.
        is_sound = record.id == self.rolled_back_to or self.scores[record.id].status != "diverged"
        is_sound = is_sound and not self.left_behind(record)
        return is_sound and verdict.kind == "exact" and self.status(record) == "available"

    def _resume_order(
        self, records: Collection[CheckpointMetadata], verdicts: Mapping[str, Verdict]
    ) -> list[CheckpointMetadata]:
        by_rank = quality.rank(records, self.scores)
        # Losses on other validation data can't be compared: such groups come whole, after those that can.
        by_group = sorted(
            by_rank, key=lambda r: (verdicts[r.id].comparable, self.last_used[self.group(r)]), reverse=True
        )
        return sorted(by_group, key=lambda r: (not self._eligible(r, verdicts[r.id]), r.id != self.rolled_back_to))

    def _explanation(self, record: CheckpointMetadata, verdict: Verdict, is_chosen: bool) -> Explanation:
        status, score = self.status(record), self.scores[record.id]
        reason = verdict.reason
        if status != "available":
            detail = self.observed.missing | self.observed.damaged
            reason = f"{status}: {record.decision_reason or detail.get(record.id, '')}"
        elif self.left_behind(record):
            fits = verdict.kind == "exact"
            reason = f"rolled back to {record.rolled_back}" + ("" if fits else f"; {reason}")
        elif score.status != "known":
            reason = f"{score.reason}; {reason}"
        eligible = self._eligible(record, verdict)
        if eligible and record.id == self.rolled_back_to:
            reason = f"rolled back to, as asked by `ckptcache rollback`; {reason}"
        return Explanation(record, status, score, verdict, eligible, is_chosen, reason)

    # --- what stays ------------------------------------------------------------------------------

    def retention_plan(self, current: CheckpointMetadata | None, live_sessions: Collection[str]) -> retention.Plan:
        """What stays and what goes, seen from `current`, whose group's best is protected."""
        candidates = self._retention_candidates()
        protected = retention.protections(
            candidates,
            names={name: pointer.checkpoint for name, pointer in self.index.names.items()},
            current_group=self.group(current) if current is not None else None,
            live_sessions=live_sessions,
            live_parents=self._live_parents(live_sessions),
            keep_latest=self.config.keep_latest,
            diverged={c.id for c in candidates if self.scores[c.id].status == "diverged"},
        )
        return retention.plan(
            candidates,
            protected,
            max_checkpoints=self.config.max_checkpoints,
            max_bytes=self.config.max_cache_bytes,
        )

    def _retention_candidates(self) -> list[retention.Candidate]:
        available = self.observed.available
        return [
            retention.Candidate(record, available[record.id], group, rank, self.last_used[group])
            for group, members in self.groups.items()
            for rank, record in enumerate(quality.rank([r for r in members if r.id in available], self.scores))
        ]

    def _live_parents(self, live_sessions: Collection[str]) -> dict[str, str]:
        have_saved = {r.session for r in self.index.checkpoints.values() if r.decision is None}
        sessions = (self.index.sessions[id] for id in live_sessions if id in self.index.sessions)
        return {s.parent: s.id for s in sessions if s.parent is not None and s.id not in have_saved}

    def surplus_records(self) -> list[str]:
        """Records beyond `max_records` that go: those without a file, the lowest first, of those the oldest."""
        excess = len(self.index.checkpoints) - self.config.max_records
        if excess <= 0:
            return []
        named = {pointer.checkpoint for pointer in self.index.names.values()}
        available = self.observed.available
        # Each is scored, and none of the scores is kept: with thousands, keeping them takes longer than making them.
        gone = (
            (_known_quality(quality.score(r, scale)), r.order)
            for members, scale in zip(self.groups.values(), self.scales.values(), strict=True)
            for r in members
            if r.id not in available and r.id not in named and not r.pinned
        )
        return [id for _, (_, id) in heapq.nsmallest(excess, gone)]


class _Scores(Mapping[str, Score]):
    """The scores of a catalog's records by id."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._made: dict[str, Score] = {}

    def __getitem__(self, id: str) -> Score:
        if id not in self._made:
            record = self._catalog.index.checkpoints[id]
            self._made[id] = quality.score(record, self._catalog.scales[self._catalog.group(record)])
        return self._made[id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._catalog.index.checkpoints)

    def __len__(self) -> int:
        return len(self._catalog.index.checkpoints)


def _mapping(config: Any) -> Mapping[str, Any] | None:
    """`config`, unless an index from elsewhere holds something that can't be compared: that declares nothing."""
    return config if isinstance(config, Mapping) else None


def _known_quality(score: Score) -> float:
    return float("-inf") if score.quality is None else score.quality


def _restricted(saved: Fingerprint, needed: Fingerprint) -> Fingerprint:
    """What was saved, without the parts that nothing is needed of: an EMA beside the model, say."""
    parts = {name.split(".", 1)[0] for name in needed.parameters}
    parameters = {name: spec for name, spec in saved.parameters.items() if name.split(".", 1)[0] in parts}
    return Fingerprint(parameters=parameters, optimizers=saved.optimizers)
