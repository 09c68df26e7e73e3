"""Marks: what protects a checkpoint, what it is called, and what is written beside it."""

from typing import TYPE_CHECKING, Any

import click

from ckptcache.cli import output
from ckptcache.cli.options import NameType, checkpoint_argument, common, open_cache

if TYPE_CHECKING:
    from ckptcache.cache import TrainingCache
    from ckptcache.metadata import CheckpointMetadata


def _report(cache: "TrainingCache", record: "CheckpointMetadata", text: str, **more: Any) -> None:
    """Say what was done to a checkpoint, and if that helps nothing, because its file isn't there."""
    from ckptcache.cli.records import to_json

    catalog = cache.ledger.view()
    if (status := catalog.status(record)) != "available":
        output.complain("warning", f"{record.id} is {status}: there is no file to resume from")
    output.finish({"checkpoint": to_json(record, catalog), **more}, lambda: [output.clean(text)])


@click.command()
@checkpoint_argument
@common
def pin(checkpoint: str) -> None:
    """Protect a checkpoint from being evicted.

    \b
    Example:
      ckptcache pin best
    """
    cache = open_cache()
    record = cache.pin(checkpoint)
    _report(cache, record, f"{record.id} is pinned.")


@click.command()
@checkpoint_argument
@common
def unpin(checkpoint: str) -> None:
    """Take a pin off.

    \b
    Example:
      ckptcache unpin ckpt_20260102_030405
    """
    cache = open_cache()
    record = cache.unpin(checkpoint)
    _report(cache, record, f"{record.id} is no longer pinned.")


@click.command(short_help="Give a checkpoint a name, or move one to it.")
@checkpoint_argument
@click.argument("name")
@common
def name(checkpoint: str, name: str) -> None:
    """Let NAME point to a checkpoint, which protects it; a name that is there already moves.

    \b
    Example:
      ckptcache name best release-1
    """
    cache = open_cache()
    held = cache.ledger.view().index.names.get(name)
    before = None if held is None else held.checkpoint
    record = cache.name(checkpoint, name)
    moved = f" It pointed to {before} before." if before not in (None, record.id) else ""
    _report(cache, record, f"{name} is {record.id}.{moved}", name=name, moved_from=before)


@click.command(short_help="Remove a name.")
@click.argument("name", type=NameType())
@common
def unname(name: str) -> None:
    """Remove a name; the checkpoint stays, no longer protected by it.

    \b
    Example:
      ckptcache unname release-1
    """
    id = open_cache().unname(name)
    output.finish({"name": name, "checkpoint": id}, lambda: [output.clean(f"{name} is removed; it pointed to {id}.")])


@click.command(short_help="Add tags to a checkpoint, or remove them.")
@checkpoint_argument
@click.argument("tags", nargs=-1, required=True, metavar="TAG...")
@click.option("--remove", is_flag=True, help="Take the tags off instead.")
@common
def tag(checkpoint: str, tags: tuple[str, ...], remove: bool) -> None:
    """Add tags to a checkpoint.

    \b
    Example:
      ckptcache tag best baseline paper
      ckptcache tag best paper --remove
    """
    if not all(given.strip() for given in tags):
        raise click.UsageError("A tag must not be empty.")
    cache = open_cache()
    record = cache.tag(checkpoint, *tags, remove=remove)
    _report(cache, record, f"{record.id} has {'the tags ' + ', '.join(record.tags) if record.tags else 'no tags'}.")


@click.command(short_help="Write a note beside a checkpoint.")
@checkpoint_argument
@click.argument("text")
@common
def note(checkpoint: str, text: str) -> None:
    """Write a note beside a checkpoint, in place of the one before; an empty TEXT removes it.

    \b
    Example:
      ckptcache note best "before the learning rate was raised"
    """
    cache = open_cache()
    record = cache.note(checkpoint, text)
    _report(cache, record, f"{record.id} has {'a new note' if text else 'no note'}.")
