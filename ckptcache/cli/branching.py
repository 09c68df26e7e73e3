"""Branches: how sessions and checkpoints came of each other, and going back to one of them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from ckptcache import words
from ckptcache.cli import output
from ckptcache.cli.options import CheckpointType, common, open_cache, options

if TYPE_CHECKING:
    from ckptcache.cli.lineage import Lineage
    from ckptcache.rollback import Rollback

_LISTED = 10
"""How many ids a person is shown."""


@click.command(short_help="Show how sessions and checkpoints came of each other.")
@click.argument("wanted", metavar="[ID]", type=CheckpointType(), required=False)
@click.option("--all", "everything", is_flag=True, help="Evicted checkpoints that play no part one by one, too.")
@click.option("--mermaid", is_flag=True, help="Print a mermaid flowchart, as GitHub draws it.")
@common
def lineage(wanted: str | None, everything: bool, mermaid: bool) -> None:
    """Show the tree that sessions and checkpoints form: which resumed from which, and what became of them.

    A session that goes on with the line stands below the one before it; what branched off is indented, below the
    checkpoint that it resumed from. With the ID of a checkpoint or a session only what that came from and what came of
    it. Evicted checkpoints that nothing resumed from, and that have no name, are counted only.

    With --json, "nodes" holds sessions and checkpoints, told apart by "kind", and "edges" pairs "from" and "to" with a
    "kind": "resumed" leads from a checkpoint to a session, "saved" from a session to a checkpoint, "parent" from a
    checkpoint to the next one. "best", "latest" and "rollback" are ids of checkpoints, or null.

    \b
    Example:
      ckptcache lineage
      ckptcache lineage best --mermaid
    """
    from ckptcache.cli import lineage as lineages
    from ckptcache.cli import sessionlist

    if mermaid and options().as_json:
        raise click.UsageError("--mermaid and --json exclude each other.")
    cache = open_cache()
    catalog = cache.ledger.view()
    states = sessionlist.states(list(catalog.index.sessions.values()), cache.ledger.layout)
    found = lineages.lineage(catalog, states, wanted, everything=everything)
    if mermaid:
        output.write("".join(f"{line}\n" for line in lineages.drawing(found).splitlines()))
    else:
        output.finish(lineages.to_json(found), lambda: _tree(found))


def _tree(found: "Lineage") -> Iterator[str]:
    from ckptcache.cli import lineagetree

    if found.chosen or found.sessions:
        yield from lineagetree.lines(found)
    elif output.is_terminal():
        yield f"There is nothing in {output.clean(found.catalog.root)} yet."


@click.command(short_help="Let the next session go on from a checkpoint, on a new branch.")
@click.argument("checkpoint", metavar="[ID]", type=CheckpointType(), required=False)
@click.option("--undo", is_flag=True, help="Take the rollback back that nothing has followed yet.")
@click.option("--dry-run", is_flag=True, help="Only say what would be marked.")
@common
def rollback(checkpoint: str | None, undo: bool, dry_run: bool) -> None:
    """Let the next session go on from a checkpoint, weights and history, on a new branch.

    Nothing is deleted. What came after the checkpoint is marked: it can still be named, exported, and resumed from by
    its id, and is never chosen by "best", "latest" or "auto"; where space is needed, it goes first. These three choose
    the checkpoint itself until something that descends from it has been saved. The next session draws other batches
    than those before it did. A session that is running goes on, and what it saves is marked as well.

    A rollback that nothing has followed yet is replaced by the next one, and can be taken back.

    \b
    Example:
      ckptcache rollback ckpt_20260102_030405 --dry-run
      ckptcache rollback ckpt_20260102_030405
      ckptcache rollback --undo
    """
    if (checkpoint is None) != undo:
        raise click.UsageError("Give either the ID of a checkpoint or --undo.")
    cache = open_cache()
    done = cache.undo_rollback(dry_run=dry_run) if undo else cache.rollback(checkpoint or "", dry_run=dry_run)
    found = {"checkpoint": done.checkpoint.to_json(full=True), **done.to_json(), "dry_run": dry_run}
    output.finish(found, lambda: map(output.clean, _lines(done, dry_run)))


def _lines(done: "Rollback", dry_run: bool) -> Iterator[str]:
    is_, are, goes = ("would be", "would be", "would go") if dry_run else ("is", "are", "goes")
    id, iteration = done.checkpoint.id, done.checkpoint.iteration
    if done.undone:
        yield f"The rollback to {id} {is_} taken back."
    else:
        yield f"The next session {goes} on from {id} (iteration {iteration}), on a new branch."
    if done.replaced:
        yield f"The rollback to {done.replaced}, which nothing had followed, {is_} replaced by it."
    yield from _listed(done.marked, are, "marked as rolled back, and can still be named")
    yield from _listed(done.unmarked, are, "no longer marked as rolled back")
    for session in done.live:
        yield f"Session {session} runs and goes on; what it saves {is_} marked too."
    if not done.undone and not dry_run:
        yield "Until something that descends from it is saved, `ckptcache rollback --undo` takes it back."


def _listed(ids: tuple[str, ...], are: str, what: str) -> Iterator[str]:
    if ids:
        yield f"{words.count(len(ids), 'checkpoint')} {'is' if are == 'are' and len(ids) == 1 else are} {what}:"
        yield from (f"  {id}" for id in ids[:_LISTED])
    if len(ids) > _LISTED:
        yield f"  and {len(ids) - _LISTED} more (--json lists all)"
