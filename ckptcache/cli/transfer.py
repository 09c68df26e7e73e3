"""To and from elsewhere: checkpoints as files of their own."""

from pathlib import Path
from typing import Any

import click

from ckptcache import words
from ckptcache.cli import output
from ckptcache.cli.options import checkpoint_argument, common, model_config_option, open_cache


@click.command(short_help="Write a checkpoint's model to a file.")
@checkpoint_argument
@click.argument("file", type=click.Path(readable=False, path_type=Path))
@click.option("--optimizer", is_flag=True, help="Write the optimizer and all other parts too.")
@click.option("--overwrite", is_flag=True, help="Replace FILE if it is there.")
@common
def export(checkpoint: str, file: Path, optimizer: bool, overwrite: bool) -> None:
    """Write a checkpoint's model to FILE, which ends in .pt or .safetensors.

    The checkpoint is verified against its digest before anything is written.

    \b
    Example:
      ckptcache export best model.safetensors
      ckptcache export best whole.pt --optimizer
    """
    from ckptcache import resume

    with open_cache() as cache:
        record = resume.find(cache.ledger.view(), checkpoint)
        path = cache.export(record.id, file, optimizer=optimizer, overwrite=overwrite)
    size = path.stat().st_size
    text = f"wrote {path} ({words.size(size)}) from {record.id}"
    output.finish({"checkpoint": record.id, "path": str(path), "bytes": size}, lambda: [output.clean(text)])


@click.command("import", short_help="Take up a .pt file that something else wrote.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--iteration", type=click.IntRange(min=0), metavar="N", help="Optimizer steps it was trained for.")
@click.option("--val-loss", type=float, metavar="X", help="Its loss on the validation data.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="A tag beside `imported`. May be repeated.")
@model_config_option
@common
def import_(file: Path, tags: tuple[str, ...], **described: Any) -> None:
    """Take up a .pt file that something else wrote; FILE itself is left alone.

    What no option gives is taken from the file where it holds it. Nothing is evicted to make room. A folder that
    --cache-dir names is made a cache if it isn't one.

    \b
    Example:
      ckptcache import model.pt --iteration 5000 --val-loss 1.92 --model-config gpt.json
    """
    from ckptcache.cli.records import to_json

    given = {name: value for name, value in described.items() if value is not None}
    if tags:
        given["tags"] = ["imported", *tags]
    with open_cache(create=True, auto_cleanup=False) as cache:
        record = cache.import_(file, **given)
        catalog = cache.ledger.view()
    if (count := len(catalog.observed.available)) > catalog.config.max_checkpoints:
        output.complain("warning", f"{count} checkpoints exceed max_checkpoints {catalog.config.max_checkpoints}")
    text = f"{file} is now {record.id}"
    output.finish({"checkpoint": to_json(record, catalog)}, lambda: [output.clean(text)])
