"""A whole cache to one file, and back."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from ckptcache import words
from ckptcache.cli import output
from ckptcache.cli.bars import progress_bar
from ckptcache.cli.options import common, open_cache

if TYPE_CHECKING:
    from ckptcache.backup import Backup
    from ckptcache.unpacking import Unpacked

DAMAGE = 4
TERMINATED = 143


@click.command(short_help="Write the whole cache to one file.")
@click.argument("file", type=click.Path(readable=False, path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace FILE if it is there.")
@common
@click.pass_context
def backup(ctx: click.Context, file: Path, overwrite: bool) -> None:
    """Write the whole cache to FILE, a plain tar: its index and every checkpoint that is there. Sessions may run on.

    Every checkpoint is verified on the way. One that is damaged is left out, its record stays in as one whose file is
    missing, and the command ends with 4. Prepared data and the quarantine are no part of a backup.

    \b
    Example:
      ckptcache backup /mnt/disk/gpt.tar
      ckptcache backup nightly.tar --overwrite
    """
    with _ending_tidily() as ends, open_cache() as cache, progress_bar("copying") as progress:
        made = cache.backup(file, overwrite=overwrite, progress=ends(progress))
    output.finish(made.to_json(), lambda: _made(made))
    ctx.exit(DAMAGE if made.damaged else 0)


def _made(made: "Backup") -> Iterator[str]:
    held = words.count(len(made.checkpoints), "checkpoint")
    yield output.clean(f"wrote {made.path} ({words.size(made.bytes)}): {held}, {words.count(made.records, 'record')}")
    if made.damaged:
        yield f"{words.count(len(made.damaged), 'checkpoint')} left out, since damaged; see `ckptcache doctor`"


@click.command(short_help="Restore a backup into another folder.")
@click.argument("file", type=click.Path(readable=False, path_type=Path))
@click.option("--merge", is_flag=True, help="Add what is missing to a cache that holds checkpoints of its own.")
@common
def restore(file: Path, merge: bool) -> None:
    """Restore a backup into the folder that --cache-dir names, which need not be there.

    All of FILE is verified before anything is written, and all of it counts at one instant, or nothing does. A restore
    that was interrupted is simply run again.

    With --merge the folder may hold checkpoints of its own. Those that it lacks are added; what was evicted there stays
    so, what was quarantined there comes back; names that both have stay where they are there.

    \b
    Example:
      ckptcache restore /mnt/disk/gpt.tar --cache-dir runs/cache
      ckptcache restore /mnt/disk/gpt.tar --merge
    """
    with _ending_tidily() as ends, open_cache(create=True) as cache, progress_bar("restoring") as progress:
        done = cache.restore_backup(file, merge=merge, progress=ends(progress))
    output.finish({"path": str(file), **done.to_json()}, lambda: _restored(done))


def _restored(done: "Unpacked") -> Iterator[str]:
    beside = {"there already": len(done.present), "evicted here": len(done.kept_out), "not in it": len(done.left_out)}
    more = "".join(f", {number} {what}" for what, number in beside.items() if number)
    held = f"{words.count(done.records, 'record')}, {words.count(done.sessions, 'session')}"
    yield output.clean(f"restored {words.count(len(done.added), 'checkpoint')} to {done.folder}{more}; now {held}")
    for id, reason in done.left_out.items():
        yield output.clean(f"the backup lacks {id}: {reason}")
    if done.rolled_back_to is not None:
        yield output.clean(f"a rollback is in force: the next session goes on from {done.rolled_back_to}")


Progress = Callable[[int, int], None]


@contextmanager
def _ending_tidily() -> Iterator[Callable[[Progress | None], Progress]]:
    """On SIGTERM and SIGINT, end between two blocks, and remove half a file; a second SIGINT interrupts at once.

    An exception out of a handler could come while two threads hand a block over, and leave one waiting for ever.
    """
    asked: list[int] = []

    def notice(number: int, frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        asked.append(number)

    def ends(progress: Progress | None) -> Progress:
        def told(done: int, total: int) -> None:
            if asked:
                raise KeyboardInterrupt if asked[0] == signal.SIGINT else SystemExit(TERMINATED)
            if progress is not None:
                progress(done, total)

        return told

    is_main = threading.current_thread() is threading.main_thread()
    before = {s: signal.signal(s, notice) for s in (signal.SIGTERM, signal.SIGINT) if is_main}
    try:
        yield ends
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
