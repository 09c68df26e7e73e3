"""Taking old records out of the history, which git would otherwise keep growing for years."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

from ckptcache.errors import GitFailed, NotARepository
from ckptcache.metadata import CheckpointMetadata, SessionRecord
from ckptcache.policy import quality
from ckptcache.progress.derived import available_in
from ckptcache.progress.folder import Run
from ckptcache.progress.git import Repository
from ckptcache.progress.removed import note_removed
from ckptcache.progress.restore import open_ledger
from ckptcache.progress.summarize import local_view
from ckptcache.progress.views import RunView


@dataclass(frozen=True, slots=True)
class Cleaning:
    """What goes and what stays of a run's record.

    Attributes:
        checkpoints: id of each record that goes, with the reason.
        sessions: likewise.
        kept: id of each record that is old or beyond the limit and stays all the same, with the reason.
    """

    run: str
    checkpoints: Mapping[str, str]
    sessions: Mapping[str, str]
    kept: Mapping[str, str]


def plan(
    view: RunView,
    *,
    older_than_days: float | None,
    max_records: int | None,
    now: datetime,
    elsewhere: frozenset[str] = frozenset(),
) -> Cleaning:
    """Which records are older than so many days, or beyond the newest so many.

    What stays in any case: a checkpoint whose file is kept, is pinned or named, the best and the latest of its
    group; the newest session, and every session that a checkpoint or a session which stays came from.

    Args:
        elsewhere: ids of the checkpoints whose files are kept by others.
    """
    checkpoints = _excess(view.index.checkpoints, "created_at", older_than_days, max_records, now)
    needed = {**dict.fromkeys(elsewhere, "its file is kept elsewhere"), **_needed_checkpoints(view)}
    gone = {id: reason for id, reason in checkpoints.items() if id not in needed}
    sessions = _excess(view.index.sessions, "started_at", older_than_days, max_records, now)
    needed_sessions = _needed_sessions(view, set(view.index.checkpoints) - gone.keys(), set(sessions))
    kept = {id: needed[id] for id in checkpoints.keys() & needed.keys()}
    kept |= {id: needed_sessions[id] for id in sessions.keys() & needed_sessions.keys()}
    return Cleaning(view.name, gone, {id: r for id, r in sessions.items() if id not in needed_sessions}, kept)


def clean(
    run: Run, *, older_than_days: float | None, max_records: int | None, now: datetime | None = None, dry_run: bool
) -> Cleaning:
    """Take records out, or with `dry_run` only say which; files are not touched.

    Raises CacheDirNotWritable.
    """
    planned = partial(
        plan,
        older_than_days=older_than_days,
        max_records=max_records,
        now=now or datetime.now(UTC),
        elsewhere=_kept_elsewhere(run),
    )
    if dry_run:
        return planned(local_view(run))
    ledger = open_ledger(run)
    with ledger.change() as change:
        cleaning = planned(local_view(run))
        if gone := [*cleaning.checkpoints, *cleaning.sessions]:
            note_removed(run.cache_dir, gone)
        for id in cleaning.checkpoints:
            change.index.checkpoints.pop(id, None)
        for id in cleaning.sessions:
            change.index.sessions.pop(id, None)
        change.is_dirty |= bool(gone)
    return cleaning


def _kept_elsewhere(run: Run) -> frozenset[str]:
    """Which files the committed summary says are kept; one that a training has written here can't tell."""
    try:
        repository = Repository.around(run.root)
        head = repository.head()
        return available_in(repository.read(head, repository.relative(run.summary)) if head else None)
    except (NotARepository, GitFailed):
        return frozenset()


# --- deciding ------------------------------------------------------------------------------------


def _excess(
    records: Mapping[str, CheckpointMetadata | SessionRecord],
    time_field: str,
    days: float | None,
    most: int | None,
    now: datetime,
) -> dict[str, str]:
    """Ids of what is too old or too many, in their order, with the reason."""
    newest = sorted(records.values(), key=lambda r: r.order, reverse=True)
    found = {}
    for place, record in enumerate(newest, start=1):
        if most is not None and place > most:
            found[record.id] = f"beyond the newest {most}"
        elif days is not None and _is_older(getattr(record, time_field), now - timedelta(days=days)):
            found[record.id] = f"older than {days:g} days"
    return found


def _is_older(written: str, limit: datetime) -> bool:
    """Whether a record's time is before `limit`; one that can't be read is not."""
    try:
        then = datetime.fromisoformat(written)
    except ValueError:
        return False
    return (then if then.tzinfo else then.replace(tzinfo=UTC)) < limit


def _needed_checkpoints(view: RunView) -> dict[str, str]:
    found: dict[str, str] = {}
    for members in view.catalog.groups.values():
        found[max(members, key=lambda r: r.order).id] = "the latest of its group"
        best = quality.best(members, view.catalog.scores)
        if best is not None:
            found[best.id] = "the best of its group"
    found |= {r.id: "it is pinned" for r in view.index.checkpoints.values() if r.pinned}
    found |= {p.checkpoint: f"it is named {n}" for n, p in view.index.names.items()}
    return found | dict.fromkeys(view.available, "its file is kept")


def _needed_sessions(view: RunView, checkpoints: set[str], candidates: set[str]) -> dict[str, str]:
    newest = view.sessions[:1]
    found = {s.id: "the newest session" for s in newest}
    records = view.index.checkpoints
    found |= {s: "a checkpoint that stays came from it" for id in checkpoints if (s := records[id].session)}
    staying = [s for s in view.sessions if s.id in found or s.id not in candidates]
    parents = {records[s.parent].session for s in staying if s.parent in records}
    return {**{p: "a session that stays came from it" for p in parents if p}, **found}
