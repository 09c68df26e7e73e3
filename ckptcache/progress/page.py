"""`.training-progress/README.md`, and the report of a job: what a repository shows of its trainings."""

from collections.abc import Collection, Iterator, Sequence

from ckptcache import words
from ckptcache.metadata import CheckpointMetadata, SessionRecord, is_valid_id
from ckptcache.progress import chart, lineage
from ckptcache.progress.comparison import comparison
from ckptcache.progress.folder import CHART_NAME, DEFAULT_FOLDER
from ckptcache.progress.labels import Labels, ending, iterations
from ckptcache.progress.markdown import code, fence, folded, prose, table, unbroken, word
from ckptcache.progress.views import RunView

_ROWS, _REPORT_ROWS = 20, 10
_PREAMBLE = (
    "What was trained in this repository, written by `ckptcache progress`. A checkpoint is *available* if its file "
    + "is kept in the cache of the run that wrote this page; of the others only the record is left."
)
_LONG = 4
"""Sessions from which on the lineage is folded away."""


def readme(views: Sequence[RunView], *, charts: Collection[str] | None = None, folder: str = DEFAULT_FOLDER) -> str:
    """The page over all runs.

    Args:
        charts: names of the runs whose picture was written; None for all that have something to draw. The others that
            have show it as a mermaid chart.
        folder: where the page lies in its repository.
    """
    lines = ["# Training progress", "", _PREAMBLE, ""]
    labelled = [Labels(view) for view in views]
    lines += _overview(labelled) if views else ["There is no run yet."]
    for labels in labelled:
        has_picture = charts is None or labels.view.name in charts
        lines += ["", *_section(labels, folder, has_picture)]
    return "\n".join(lines) + "\n"


def job_report(view: RunView, notes: Sequence[str] = ()) -> str:
    """What a job's summary says of the run it trained: Markdown with a mermaid chart, no files.

    Args:
        notes: sentences on what happened, such as what was restored and where from.
    """
    labels = Labels(view)
    lines = [f"## Training: {_title(view.name)}", ""]
    if notes:
        lines += [*(f"- {prose(note)}" for note in notes), ""]
    lines += _going_on(labels, None)
    if block := chart.xychart(view):
        lines += ["", *fence("mermaid", block)]
    lines += _comparison(view, labels)
    lines += _tables(labels, _REPORT_ROWS)
    return "\n".join(lines) + "\n"


# --- the page's parts ----------------------------------------------------------------------------


def _overview(labelled: Sequence[Labels]) -> list[str]:
    titles = ("run", "sessions", "iterations", "best checkpoint", "kept", "recorded")
    return table(titles, map(_overview_row, labelled), right=("sessions", "iterations", "kept", "recorded"))


def _overview_row(labels: Labels) -> list[str]:
    view = labels.view
    return [
        f"[{_title(view.name)}](#{_anchor(view.name)})",
        str(len(view.sessions)),
        str(_reached(view)),
        "" if labels.best is None else _loss_and_place(labels.best),
        str(len(view.available)),
        str(len(view.index.checkpoints)),
    ]


def _reached(view: RunView) -> int:
    ends = (*(s.end_iteration for s in view.sessions), *(r.iteration for r in view.index.checkpoints.values()))
    return max(ends, default=0)


def _loss_and_place(record: CheckpointMetadata) -> str:
    return f"val loss {words.number(record.val_loss)} at iteration {record.iteration}"


def _title(name: str) -> str:
    return name if name.replace("-", "").isalnum() and name.isascii() else code(name)


def _anchor(name: str) -> str:
    """As GitHub makes it from a heading."""
    return "".join(c for c in name.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _section(labels: Labels, folder: str, has_picture: bool) -> list[str]:
    view = labels.view
    lines = [f"## {_title(view.name)}", "", *_going_on(labels, folder)]
    if chart.is_drawable(view):
        lines += ["", *_picture(view, has_picture)]
    lines += _comparison(view, labels)
    lines += _tables(labels, _ROWS)
    return lines + _lineage(labels)


def _picture(view: RunView, has_picture: bool) -> list[str]:
    if has_picture:
        return [f"![Validation loss of all sessions of {view.name}]({view.name}/{CHART_NAME})"]
    block = chart.xychart(view)
    return fence("mermaid", block) if block else []


def _lineage(labels: Labels) -> list[str]:
    sessions = len(labels.view.sessions)
    if not sessions:
        return []
    block = fence("mermaid", lineage.mermaid(labels.view, labels=labels))
    title = "Which session went on from which checkpoint"
    return ["", *(folded(title, block) if sessions > _LONG else [f"### {title}", "", *block])]


# --- how to go on --------------------------------------------------------------------------------


def _going_on(labels: Labels, folder: str | None) -> list[str]:
    view, best = labels.view, labels.best
    if not view.index.checkpoints:
        return ["No checkpoint has been saved yet."]
    told = "No checkpoint has a finite validation loss yet."
    if best is not None:
        told = f"**Best: {_loss_and_place(best)}** ({code(labels.short(best.id))}, {labels.status(best)})."
    session = "The next session" if folder is None else f"A training whose cache is `{folder}/{view.name}/cache`"
    lines = [f"{told} {session} {_next(labels)}"]
    if folder is None:
        return lines
    return [*lines, "To look closer, in any clone:", "", *fence("sh", _commands(f"{folder}/{view.name}/cache", best))]


def _next(labels: Labels) -> str:
    next_one = labels.view.catalog.best(labels.view.catalog.prevailing()[0])
    if next_one is None:
        return "starts afresh: no file that fits is kept."
    if labels.best is not None and next_one.id == labels.best.id:
        return "goes on from it."
    loss = "not evaluated" if next_one.val_loss is None else f"val loss {words.number(next_one.val_loss)}"
    what = f"{code(labels.short(next_one.id))} (iteration {next_one.iteration}, {loss})"
    return f"goes on from {what}, the best that is kept and fits."


def _commands(cache_dir: str, best: CheckpointMetadata | None) -> str:
    command = f"ckptcache --cache-dir {cache_dir}"
    shown = [f"{command} show {best.id}"] if best is not None and is_valid_id(best.id) else []
    return "\n".join([f"{command} ls --all", f"{command} sessions", *shown])


# --- the tables ----------------------------------------------------------------------------------


def _comparison(view: RunView, labels: Labels) -> list[str]:
    if not view.sessions:
        return []
    title = "The last session, and the one before" if len(view.sessions) > 1 else "The last session"
    return ["", f"### {title}", "", *comparison(view, labels)]


def _tables(labels: Labels, most: int) -> list[str]:
    view = labels.view
    lines: list[str] = []
    if sessions := view.sessions:
        lines += ["", "### Sessions, newest first", "", *_session_table(sessions[:most], labels)]
        lines += _rest(len(sessions) - most, "older session")
    if ranked := view.catalog.ranked(everything=True):
        lines += ["", "### Checkpoints, best first", "", *_checkpoint_table(ranked[:most], labels)]
        lines += _rest(len(ranked) - most, "more checkpoint")
    return lines


def _rest(count: int, what: str) -> list[str]:
    return ["", f"And {words.count(count, what)}."] if count > 0 else []


def _session_table(sessions: Sequence[SessionRecord], labels: Labels) -> list[str]:
    titles = ("session", "iterations", "first loss", "last loss", "best loss", "ended", "went on from")
    rows = (
        [
            code(labels.short(s.id)),
            unbroken(iterations(s)),
            *(words.number(loss) for loss in (s.first_val_loss, s.last_val_loss, s.best_val_loss)),
            unbroken(word(ending(s))),
            f"{code(labels.short(s.parent))}{' (weights)' * s.warm_start}" if s.parent else "",
        ]
        for s in sessions
    )
    return table(titles, rows, right=("iterations", "first loss", "last loss", "best loss"))


def _checkpoint_table(records: Sequence[CheckpointMetadata], labels: Labels) -> list[str]:
    titles = ("checkpoint", "iteration", "val loss", "quality", "status", "marks", "saved", "size")
    sizes = labels.view.catalog.observed.available
    rows = (
        [
            code(labels.short(r.id)),
            str(r.iteration),
            _loss(r),
            words.number(r.quality_score),
            unbroken(labels.status(r)),
            ", ".join(_marks(r, labels)),
            word(r.save_reason),
            unbroken(words.size(sizes.get(r.id) or r.size)),
        ]
        for r in records
    )
    return table(titles, rows, right=("iteration", "val loss", "quality", "size"))


def _loss(record: CheckpointMetadata) -> str:
    return "-" if record.val_loss is None else words.number(record.val_loss)


def _marks(record: CheckpointMetadata, labels: Labels) -> Iterator[str]:
    for mark in labels.marks(record):
        yield f"**{mark}**" if mark == "best" else mark if mark == "pinned" else code(mark)
