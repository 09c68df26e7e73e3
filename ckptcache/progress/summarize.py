"""Making the files anew that are made of the records, in the work tree alone."""

import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ckptcache.errors import CacheDirNotWritable, NotARepository
from ckptcache.progress.derived import available_in, page_file, run_files
from ckptcache.progress.folder import ProgressFolder, Run
from ckptcache.progress.git import Repository
from ckptcache.progress.restore import open_ledger
from ckptcache.progress.views import RunView, view_of
from ckptcache.storage import fs

_MAX_SUMMARY = 1024 * 1024


def summarize(folder: ProgressFolder, runs: Sequence[Run]) -> list[RunView]:
    """Write the page over all runs that are here, and the summaries and charts of `runs`, which are returned.

    Raises IndexDamaged or CacheDirNotWritable.
    """
    views = {run.name: local_view(run) for run in folder.runs()}
    files: dict[Path, bytes] = {}
    for run in runs:
        files |= run_files(run, views[run.name])
    charts = {run.name for run in folder.runs() if run.chart in files or run.chart.exists()}
    write_changed(files | page_file(folder, _name(folder), views.values(), charts))
    return [views[run.name] for run in runs]


def _name(folder: ProgressFolder) -> str:
    """What the folder is called in its repository; outside of one, its own name."""
    try:
        return Repository.around(folder.root).relative(folder.root)
    except NotARepository:
        return folder.root.resolve().name


def local_view(run: Run) -> RunView:
    """A run as it is here. Where none of its files is, those count as kept that its summary says are kept elsewhere."""
    catalog = open_ledger(run).view()
    if catalog.observed.available:
        return RunView(run.name, catalog)
    return view_of(run.name, catalog.index, available_in(_summary(run)), catalog.config)


def _summary(run: Run) -> bytes | None:
    try:
        return fs.read_bytes(run.summary, limit=_MAX_SUMMARY)
    except (OSError, ValueError):
        return None


def write_changed(files: Mapping[Path, bytes]) -> list[Path]:
    """Write those of `files` that aren't there as they should be, durably; returns which they were.

    Raises CacheDirNotWritable.
    """
    changed = [path for path, content in files.items() if not _is_there(path, content)]
    for path in changed:
        try:
            fs.write_atomically(fs.ensure_folder(path.parent) / path.name, files[path], writer=secrets.token_hex(6))
        except OSError as error:
            raise CacheDirNotWritable(path=path.parent, reason=fs.reason_of(error)) from error
    return changed


def _is_there(path: Path, content: bytes) -> bool:
    return path.is_file() and not path.is_symlink() and path.read_bytes() == content


def lines(wanted: Iterable[str]) -> bytes:
    """A file of lines."""
    return "".join(f"{line}\n" for line in wanted).encode()
