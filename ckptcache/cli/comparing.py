"""Comparing: two checkpoints tensor by tensor, sessions side by side, of this cache or of others."""

from typing import TYPE_CHECKING, Any

import click

from ckptcache.cli import output
from ckptcache.cli.bars import progress_bar
from ckptcache.cli.elsewhere import open_place
from ckptcache.cli.options import CheckpointType, common
from ckptcache.elsewhere import place

if TYPE_CHECKING:
    from ckptcache.diffing import Side, Source

_NEVER = -1
"""However many tensors there are: only bytes take long."""


@click.command(short_help="Show how two checkpoints differ, tensor by tensor.")
@click.argument("a", metavar="A", type=CheckpointType())
@click.argument("b", metavar="B", type=CheckpointType())
@click.option(
    "--top", type=click.IntRange(min=0), default=20, metavar="N", help="Tensors to list (20); 0 lists all that differ."
)
@click.option("--all", "everything", is_flag=True, help="List the optimizer's and all other parts' differences too.")
@common
def diff(a: str, b: str, top: int, everything: bool) -> None:
    """Show how checkpoint B differs from A: weights, configurations, losses, environment, and how the two descend.

    Each is an id, the beginning of one, a name, "best" or "latest", or DIR:ID for one of the cache in DIR, in which
    nothing is changed. Of each tensor are shown ||B - A||, that in relation to ||A||, and the cosine of A and B, the
    greatest relative change first; --json has everything. Both files are verified, and held in memory meanwhile. Ends
    with 0 whether they differ or not.

    \b
    Example:
      ckptcache diff best latest
      ckptcache diff ../elsewhere/cache:best latest --top 50
    """
    from ckptcache import contrast, diffing
    from ckptcache.cli import diffview

    sources = _source(a), _source(b)
    with progress_bar("reading", many=_NEVER) as progress:
        one, other = diffing.sides(*sources, progress=progress)
    with progress_bar("comparing", many=_NEVER) as progress:
        found = diffing.diff(one, other, progress=progress)
    records = contrast.record_diff(one.record, other.record, one.catalog.index, other.catalog.index)
    document = {"a": _side_to_json(one), "b": _side_to_json(other), **records.to_json(), **found.to_json()}
    output.finish(document, lambda: diffview.lines(one, other, records, found, top=top, everything=everything))


def _source(argument: str) -> "Source":
    from ckptcache.diffing import Source

    where = place(argument)
    return Source(open_place(where), where.wanted, untouched=where.is_elsewhere)


def _side_to_json(side: "Side") -> dict[str, Any]:
    from ckptcache.cli import records

    return {"cache_dir": str(side.catalog.root), "checkpoint": records.to_json(side.record, side.catalog)}


@click.command(short_help="Show sessions side by side.")
@click.argument("sessions", metavar="SESSION...", nargs=-1, required=True)
@common
def compare(sessions: tuple[str, ...]) -> None:
    """Show sessions side by side: where each came from, how far and how fast it got, what it was configured with.

    Each is an id, the beginning of one, or "latest" for the newest; a checkpoint's id or name, or "best", stands for
    the session that saved it; DIR:SESSION is one of the cache in DIR, in which nothing is changed. Of the
    configurations, the keys that differ among them are shown. The curves of their validation losses share one scale.

    \b
    Example:
      ckptcache compare latest
      ckptcache compare sess_20260102 latest ../elsewhere/cache:latest
    """
    from ckptcache.cli import compareview

    found = [compareview.entry(place(argument)) for argument in sessions]
    output.finish(compareview.to_json(found), lambda: compareview.lines(found))
