"""A bar while files are verified, compared or copied."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_MANY_FILES = 8
_MANY_BYTES = 500_000_000


@contextmanager
def progress_bar(doing: str = "verifying", *, many: int = _MANY_FILES) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr, if that is a terminal and there is much to read.

    Args:
        many: how many calls are too many to wait for without a bar, however few bytes there are.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task, calls = bar.add_task(doing, total=None), 0

    def progress(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1 and total >= _MANY_BYTES:
            bar.start()
        if calls == many:
            bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield progress
    finally:
        bar.stop()
