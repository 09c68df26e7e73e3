"""`ckptcache progress`: training that lives in a repository."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ckptcache import words
from ckptcache.cli import output
from ckptcache.cli.bars import progress_bar
from ckptcache.cli.options import json_option

if TYPE_CHECKING:
    from ckptcache.progress.clean import Cleaning
    from ckptcache.progress.commit import Committed
    from ckptcache.progress.folder import ProgressFolder
    from ckptcache.progress.restore import Restored
    from ckptcache.progress.setup import Prepared
    from ckptcache.progress.views import RunView

F = TypeVar("F", bound=Callable[..., Any])


class _Group(click.Group):
    """Its commands in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Group, short_help="Keep the record of trainings in a git repository.")
@click.option(
    "--progress-dir",
    metavar="DIR",
    default=".training-progress",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder in the repository.",
)
@json_option
@click.pass_context
def progress(ctx: click.Context, progress_dir: Path) -> None:
    """Keep the record of trainings in a git repository, and the big files out of it.

    Git holds each run's index, summary and a page to look at; the checkpoints stay out of it. A training leaves its
    record here if its cache is DIR/RUN/cache. RUN is a name of your choice.

    \b
    Example:
      ckptcache progress init
      ckptcache progress restore my-run
      CKPTCACHE_DIR=.training-progress/my-run/cache python train.py
      ckptcache progress commit my-run
      ckptcache --cache-dir .training-progress/my-run/cache ls --all
    """
    from ckptcache.progress.folder import ProgressFolder

    ctx.meta["ckptcache.progress_folder"] = ProgressFolder(progress_dir)


def _folder() -> "ProgressFolder":
    folder: ProgressFolder = click.get_current_context().meta["ckptcache.progress_folder"]
    return folder


# --- options -------------------------------------------------------------------------------------


def _where(command: F) -> F:
    """Add --remote and --branch."""
    command = click.option(
        "--branch", metavar="NAME", help="The branch that holds the record (default: the one that is checked out)."
    )(command)
    return click.option(
        "--remote",
        metavar="NAME",
        help="A remote, or the URL or path of a repository (default: the branch's own, or origin).",
    )(command)


_report = click.option(
    "--report",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help='Append what came of it, as Markdown, to FILE, such as "$GITHUB_STEP_SUMMARY".',
)
_runs = click.argument("runs", metavar="[RUN...]", nargs=-1)


def _append(report: Path | None, text: str) -> None:
    from ckptcache.storage import fs

    if report is not None:
        fs.append(report, text.encode(errors="backslashreplace"))


# --- init ----------------------------------------------------------------------------------------


@progress.command(short_help="Make the folder, and tell git how to merge records.")
@json_option
def init() -> None:
    """Make the folder with its page, keep big files out of git, and tell this clone how to merge records.

    May be run again at any time. The merge driver is for people who merge branches: `commit` merges by itself.
    """
    from ckptcache.progress.setup import prepare

    prepared = prepare(_folder())
    document = {
        "progress_dir": str(_folder().root),
        "written": [str(path) for path in prepared.written],
        "merge_driver": prepared.driver,
        "notes": prepared.notes,
    }
    output.finish(document, lambda: _prepared_lines(prepared))


def _prepared_lines(prepared: "Prepared") -> Iterator[str]:
    for path in prepared.written:
        yield f"wrote {output.clean(path)}"
    if not prepared.written:
        yield f"{output.clean(_folder().root)} is there already, and complete"
    if prepared.driver is not None:
        yield f"git merges records by `{output.clean(prepared.driver)}` in this clone"
    for note in prepared.notes:
        yield from output.wrapped(output.clean(note), "  ", first="")


# --- restore -------------------------------------------------------------------------------------


@progress.command(short_help="Bring the committed record and the cached files together.")
@click.argument("run")
@_where
@click.option("--adopt", is_flag=True, help="Take up files that the record doesn't name, if their own sidecars do.")
@click.option("--offline", is_flag=True, help="Don't fetch the branch first.")
@_report
@json_option
def restore(run: str, remote: str | None, branch: str | None, adopt: bool, offline: bool, report: Path | None) -> None:
    """Merge in the record that the branch has by now, and verify every checkpoint file against it.

    What the record vouches for by its digest becomes available. A file that differs, or that the record doesn't name,
    goes to quarantine and is not read. Ends with 0 also when nothing is available: a training then starts fresh, and
    the record goes on.
    """
    from ckptcache.progress import report as texts
    from ckptcache.progress.restore import restore as bring_together

    with progress_bar() as shown:
        restored = bring_together(
            _folder(), run, remote=remote, branch=branch, adopt=adopt, offline=offline, progress=shown
        )
    _append(report, texts.restored(restored))
    output.finish(restored.to_json(), lambda: _restored_lines(restored))


def _restored_lines(restored: "Restored") -> Iterator[str]:
    view = restored.view
    for note in restored.notes:
        yield from output.wrapped(output.clean(note), "  ", first="")
    for name, reason in restored.refused.items():
        line = f"refused {output.clean(name)}: {output.clean(reason)}; it is in quarantine"
        yield from output.wrapped(output.paint(line, fg="red"), "  ", first="")
    observed = view.catalog.observed
    yield (
        f"{view.name}: {words.count(len(observed.available), 'checkpoint')} available and verified, "
        f"{len(observed.missing)} only recorded, {words.count(len(view.index.sessions), 'session')}"
    )


# --- summarize -----------------------------------------------------------------------------------


@progress.command(short_help="Make the page, the summaries and the charts anew.")
@_runs
@_report
@json_option
def summarize(runs: tuple[str, ...], report: Path | None) -> None:
    """Make the page, the summaries and the charts anew from the records that are here. Commits nothing.

    Without RUN, those of all runs.
    """
    from ckptcache.progress import page
    from ckptcache.progress.commit import chosen_runs
    from ckptcache.progress.summarize import summarize as make_anew

    views = make_anew(_folder(), chosen_runs(_folder(), runs))
    _append(report, "\n".join(page.job_report(view) for view in views))
    document = {"page": str(_folder().page), "runs": [_view_json(view) for view in views]}
    output.finish(document, lambda: [*_run_lines(views), f"wrote {output.clean(_folder().page)}"])


def _view_json(view: "RunView") -> dict[str, Any]:
    best = view.best
    return {
        "run": view.name,
        "sessions": len(view.index.sessions),
        "records": len(view.index.checkpoints),
        "available": sorted(view.available),
        "best": None if best is None else best.to_json(full=True),
    }


def _run_lines(views: "Sequence[RunView]") -> Iterator[str]:
    from ckptcache.cli.tables import Column, table

    if not views:
        return
    newest = [view.sessions[0] if view.sessions else None for view in views]
    best = [view.best for view in views]
    yield from table(
        [
            Column("run", [view.name for view in views], style="cyan"),
            Column("sessions", [str(len(view.index.sessions)) for view in views], keep=60, right=True),
            Column("iteration", [str(s.end_iteration) if s else "" for s in newest], keep=80, right=True),
            Column("last", [words.number(s.last_val_loss) if s else "" for s in newest], keep=70, right=True),
            Column("best", [words.number(b.val_loss) if b else "" for b in best], keep=90, right=True),
            Column("kept", [str(len(view.available)) for view in views], keep=50, right=True),
            Column("recorded", [str(len(view.index.checkpoints)) for view in views], keep=40, right=True),
        ]
    )


# --- commit --------------------------------------------------------------------------------------


@progress.command(short_help="Merge, commit and push the records.")
@_runs
@_where
@click.option("--no-push", is_flag=True, help="Commit to the branch of this clone only.")
@_report
@json_option
def commit(runs: tuple[str, ...], remote: str | None, branch: str | None, no_push: bool, report: Path | None) -> None:
    """Merge the records with those that others have pushed, make what is made of them anew, commit and push.

    Never forces, and commits nothing outside of the folder. The branch that is checked out follows what was pushed, as
    with `git pull --ff-only`, if nothing here is in its way. When the branch can't be pushed to, the commit is left in
    a bundle beside the records, and the command ends with 1. Without RUN, the records of all runs that are here.
    """
    from ckptcache.errors import CkptCacheError
    from ckptcache.progress import report as texts
    from ckptcache.progress.commit import commit as merge_and_push

    try:
        done = merge_and_push(_folder(), runs, remote=remote, branch=branch, push=not no_push)
    except CkptCacheError as error:
        _append(report, texts.failed("The record was not committed", error))
        raise
    _append(report, texts.committed(done))
    output.finish(done.to_json(), lambda: _committed_lines(done))


def _committed_lines(done: "Committed") -> Iterator[str]:
    for note in done.notes:
        yield from output.wrapped(output.clean(note), "  ", first="")
    if done.commit is None:
        yield "Nothing is new; there is nothing to commit."
        return
    attempts = f", at attempt {done.attempts}" if done.attempts > 1 else ""
    where = f"pushed to {done.pushed_to}{attempts}" if done.pushed_to else "committed here, and not pushed"
    yield output.clean(done.message.splitlines()[0])
    yield output.clean(f"{done.commit[:12]} {where}")


# --- clean ---------------------------------------------------------------------------------------


@progress.command(short_help="Take old records out, or say which would go.")
@_runs
@click.option("--older-than", type=click.FloatRange(min=0), metavar="DAYS", help="Records older than so many days.")
@click.option(
    "--max-records", type=click.IntRange(min=0), metavar="N", help="Records beyond the newest N of each kind."
)
@click.option("--yes", is_flag=True, help="Do it; without this, only say what would go.")
@json_option
def clean(runs: tuple[str, ...], older_than: float | None, max_records: int | None, yes: bool) -> None:
    """Take the records of old checkpoints and sessions out; without --yes, only say which would go.

    What stays in any case: checkpoints whose files are kept, the pinned and the named, the best and the latest of each
    group, the newest session, and the sessions that any of these came from. No file is removed. `commit` makes it
    count; what git has of older commits stays in its history.

    \b
    Example:
      ckptcache progress clean --older-than 90
      ckptcache progress clean --max-records 200 --yes
    """
    from ckptcache.progress import clean as cleaning
    from ckptcache.progress.commit import chosen_runs

    if older_than is None and max_records is None:
        raise click.UsageError("Give --older-than or --max-records.")
    done = [
        cleaning.clean(run, older_than_days=older_than, max_records=max_records, dry_run=not yes)
        for run in chosen_runs(_folder(), runs)
    ]
    document = {
        "dry_run": not yes,
        "runs": [
            {"run": c.run, "checkpoints": dict(c.checkpoints), "sessions": dict(c.sessions), "kept": dict(c.kept)}
            for c in done
        ],
    }
    output.finish(document, lambda: _cleaning_lines(done, dry_run=not yes))


def _cleaning_lines(done: "Sequence[Cleaning]", *, dry_run: bool) -> Iterator[str]:
    for cleaning in done:
        for id, reason in {**cleaning.checkpoints, **cleaning.sessions}.items():
            yield f"{'would go' if dry_run else 'gone':<9} {id}  {reason}"
        for id, reason in sorted(cleaning.kept.items()):
            yield f"{'stays':<9} {id}  {reason}"
        checkpoints, sessions = words.count(len(cleaning.checkpoints), "checkpoint"), len(cleaning.sessions)
        outcome = "would go; --yes takes them out" if dry_run else "are gone"
        yield f"{cleaning.run}: the records of {checkpoints} and {words.count(sessions, 'session')} {outcome}."


# --- merge-driver --------------------------------------------------------------------------------


@progress.command("merge-driver", short_help="What git calls to merge two records.")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("ours", type=click.Path(path_type=Path))
@click.argument("theirs", type=click.Path(path_type=Path))
@json_option
def merge_driver(base: Path, ours: Path, theirs: Path) -> None:
    """Merge two versions of a metadata.json by record, and leave the result in OURS. Git calls this: see `init`.

    Ends with 1, and leaves OURS as it is, when a version can't be read; git then reports a conflict.
    """
    from ckptcache.progress.setup import merge_files

    merged = merge_files(base, ours, theirs)
    document = {"records": len(merged.checkpoints), "sessions": len(merged.sessions)}
    output.finish(document, list)
