"""The command line: one file per group of commands, none of which imports torch to list or to mark."""

import click

from ckptcache import __version__
from ckptcache.cli import backup, branching, care, comparing, completion, listing, marks, progress, prove, transfer
from ckptcache.cli.options import common
from ckptcache.cli.run import CommandLine


@click.group(
    cls=CommandLine,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done; 1 failed, for the reason printed; 2 wrong usage; 3 nothing suitable found; "
    "4 damage found; 130 interrupted.",
)
@common
@click.version_option(__version__, prog_name="ckptcache", message="%(prog)s %(version)s")
def main() -> None:
    """Look at a cache of training checkpoints, and look after it.

    The cache is the folder that --cache-dir, CKPTCACHE_DIR or the settings file names; without them, the nearest one
    at or below the current folder; of several equally near, the one that holds checkpoints. A checkpoint is named by
    its id, by the beginning of its id as far as only one begins so, by a name given to it, or by "best" or "latest".

    Limits and weights come from CKPTCACHE_* variables and from ckptcache.toml or [tool.ckptcache] in
    pyproject.toml, as they do in training.

    \b
    Example:
      ckptcache ls
      ckptcache --cache-dir runs/cache explain
    """


main.add_section("Looking", [listing.ls, listing.show, listing.best, listing.explain, listing.sessions])
main.add_section("Comparing", [comparing.diff, comparing.compare])
main.add_section("Care", [care.stats, care.doctor, care.prune, care.rerank])
main.add_section("Branches", [branching.lineage, branching.rollback])
main.add_section("Proof", [prove.prove])
main.add_section("Marks", [marks.pin, marks.unpin, marks.name, marks.unname, marks.tag, marks.note])
main.add_section("To and from elsewhere", [transfer.export, transfer.import_, backup.backup, backup.restore])
main.add_section("In a repository", [progress.progress])
main.add_section("The shell", [completion.completion])
