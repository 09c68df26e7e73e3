"""What is said in a job's summary of a restore and of a commit, as Markdown."""

from collections.abc import Sequence

from ckptcache import words
from ckptcache.errors import CkptCacheError
from ckptcache.progress import page
from ckptcache.progress.commit import Committed
from ckptcache.progress.markdown import prose
from ckptcache.progress.restore import Restored

_LISTED = 20
"""Files and notes that are told of one by one: GitHub takes 1 MiB of a step, or nothing."""


def restored(done: Restored) -> str:
    """What a run goes on from, what was refused, and what was noted."""
    observed = done.view.catalog.observed
    lines = [
        f"### {prose(done.view.name)}: what it goes on from",
        "",
        f"- {words.count(len(observed.available), 'checkpoint')} available and verified, {len(observed.missing)} only "
        f"recorded, {words.count(len(done.view.index.sessions), 'session')}",
        *(f"- **refused** {prose(name)}: {prose(why)}; not read" for name, why in list(done.refused.items())[:_LISTED]),
        *_rest(len(done.refused), "more file", "refused"),
        *_notes(done.notes),
    ]
    return "\n".join(lines) + "\n\n"


def committed(done: Committed) -> str:
    """What was committed where, and how each run stands."""
    notes = [*_where(done), *done.notes]
    reports = [page.job_report(view, notes if number == 0 else ()) for number, view in enumerate(done.views)]
    return "\n".join(reports or ["\n".join(_notes(notes)) + "\n"])


def _where(done: Committed) -> list[str]:
    if done.commit is None:
        return ["nothing was new, and nothing was committed"]
    subject = done.message.splitlines()[0]
    attempts = f" at attempt {done.attempts}" if done.attempts > 1 else ""
    where = f"pushed to {done.pushed_to}{attempts}" if done.pushed_to else "committed, and not pushed"
    return [f"{subject} ({done.commit[:12]}, {where})"]


def failed(what: str, error: CkptCacheError) -> str:
    """An error, where nobody reads the log first."""
    return f"### {what}\n\n{prose(str(error))}\n\n"


def _notes(notes: Sequence[str]) -> list[str]:
    return [*(f"- {prose(note)}" for note in notes[:_LISTED]), *_rest(len(notes), "more note", "left out here")]


def _rest(number: int, what: str, became: str) -> list[str]:
    left = number - _LISTED
    return [f"- {words.count(left, what)} {'was' if left == 1 else 'were'} {became}"] if left > 0 else []
