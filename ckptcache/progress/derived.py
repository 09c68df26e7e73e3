"""The files that are made from the records: the page, and each run's summary and chart."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import orjson

from ckptcache.metadata import is_valid_id
from ckptcache.progress import chart, page
from ckptcache.progress.folder import ProgressFolder, Run
from ckptcache.progress.views import RunView
from ckptcache.tally import summary_of

AVAILABLE = "available"
"""In a summary: ids of the checkpoints whose files are kept where it was written."""


def page_file(folder: ProgressFolder, name: str, views: Iterable[RunView], charts: set[str]) -> dict[Path, bytes]:
    """`README.md` over all runs.

    Args:
        name: what the folder is called in its repository.
        charts: the runs whose chart is there.
    """
    ordered = sorted(views, key=lambda v: v.name)
    return {folder.page: page.readme(ordered, charts=charts, folder=name).encode()}


def run_files(run: Run, view: RunView) -> dict[Path, bytes]:
    """A run's `training_summary.json`, which is that of its newest session, and its chart, where there is one."""
    files = {}
    if view.sessions:
        files[run.summary] = summary_bytes(run, view)
    if (drawn := chart.svg(view)) is not None:
        files[run.chart] = drawn
    return files


def summary_bytes(run: Run, view: RunView) -> bytes:
    """The summary as git holds it: paths as they are in the repository, and which files are kept."""
    cache_dir = run.cache_dir.relative_to(run.root.parent.parent)
    summary = {**summary_of(view.sessions[0], cache_dir), AVAILABLE: sorted(view.available)}
    return orjson.dumps(summary, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def available_in(summary: bytes | None) -> frozenset[str]:
    """Which files a summary says are kept; none, if it can't be read."""
    try:
        found: Any = orjson.loads(summary or b"{}")
    except orjson.JSONDecodeError:
        return frozenset()
    ids = found.get(AVAILABLE) if isinstance(found, Mapping) else None
    return frozenset(id for id in ids if is_valid_id(id)) if isinstance(ids, list) else frozenset()
