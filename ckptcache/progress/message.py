"""What a commit of records says: how far the training came, and whether it got better."""

from collections.abc import Sequence
from dataclasses import dataclass

from ckptcache import words
from ckptcache.metadata import CheckpointMetadata, SessionRecord
from ckptcache.progress.markdown import printable
from ckptcache.progress.views import RunView

_LINES, _LONGEST_REASON, _LARGE = 20, 40, 1e6
"""Sessions of a run that are told of one by one; characters of why one ended; losses that are written shorter."""


@dataclass(frozen=True, slots=True)
class RunChange:
    """One run before and after.

    Attributes:
        before: as it is at the tip that the commit goes on from.
    """

    before: RunView
    after: RunView

    @property
    def session(self) -> SessionRecord | None:
        """The newest session that the tip doesn't have, or has in another state."""
        known = self.before.index.sessions
        return next((s for s in self.after.sessions if known.get(s.id) != s), None)


def commit_message(changes: Sequence[RunChange]) -> str:
    """A subject that states iteration, val loss, best and whether it improved; below it a line per session."""
    trained = [change for change in changes if change.session is not None]
    if not trained:
        names = ", ".join(change.after.name for change in changes)
        return f"Bring the record of {names} up to date\n" if names else "Bring the training progress up to date\n"
    subject = _subject(trained[0])
    if len(trained) > 1:
        subject += f", and {len(trained) - 1} more"
    return "\n".join([subject, "", *(line for change in trained for line in _body(change)), ""])


def _subject(change: RunChange) -> str:
    session = change.session
    iteration = 0 if session is None else session.end_iteration
    loss = _number(None if session is None else session.last_val_loss)
    return f"Train {change.after.name} to iteration {iteration}: val_loss {loss}, {_best(change)}"


def _best(change: RunChange) -> str:
    """``best 2.1034 (improved from 2.2210)``; of two records without a loss, nothing is better."""
    before, after = _bests(change)
    if after is None:
        return "no best yet"
    text = f"best {_number(after.val_loss)}"
    if before is None:
        return f"{text} (the first{' of its model and data' if change.before.best is not None else ''})"
    if before.id == after.id:
        return f"{text} (not improved)"
    is_lower = None not in (before.val_loss, after.val_loss) and after.val_loss < before.val_loss  # type: ignore[operator]
    return f"{text} ({'improved from' if is_lower else 'was'} {_number(before.val_loss)})"


def _bests(change: RunChange) -> tuple[CheckpointMetadata | None, CheckpointMetadata | None]:
    """The best before and after, among those that the session's losses can be compared with."""
    group = change.after.session_groups()[change.session.id] if change.session is not None else None
    if group is None:
        return change.before.best, change.after.best
    return change.before.best_of(group), change.after.best_of(group)


def _body(change: RunChange) -> list[str]:
    known = change.before.index.sessions
    new = [s for s in change.after.sessions if known.get(s.id) != s]
    left_out = [f"{change.after.name}: and {words.count(len(new) - _LINES, 'older session')}"] * (len(new) > _LINES)
    return left_out + [_session_line(change.after.name, session) for session in reversed(new[:_LINES])]


def _session_line(run: str, session: SessionRecord) -> str:
    origin = f"from {session.parent}" if session.parent else "from a fresh start"
    if session.warm_start:
        origin = f"with the weights of {session.parent or 'another cache'}"
    losses = f"val_loss {_number(session.first_val_loss)} to {_number(session.last_val_loss)}"
    how = printable(session.stop_reason or "unfinished", _LONGEST_REASON)
    return (
        f"{run}: {session.id}, {origin}, iterations {session.start_iteration} to {session.end_iteration}, {losses}, "
        f"{session.saved} saved, {how}"
    )


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}" if abs(value) < _LARGE else f"{value:.4g}"
