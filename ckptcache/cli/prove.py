"""Proof that a training resumes exactly."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from ckptcache.cli import output
from ckptcache.cli.options import json_option
from ckptcache.errors import ProofFailed


def _iterations(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(",")) if value else ()
    except ValueError:
        raise click.BadParameter(f"{value!r} is not of the form K or K,K,...") from None


@click.command(short_help="Prove that a training resumes exactly.")
@click.option("--kills", type=click.IntRange(min=1), default=3, show_default=True, help="How often to kill it.")
@click.option("--seed", type=int, default=0, show_default=True, help="From which the iterations are drawn.")
@click.option("--at", metavar="K,K", callback=_iterations, help="Kill it at the end of these iterations instead.")
@click.option(
    "--resume",
    type=click.Choice(["latest", "auto", "id"]),
    default="latest",
    show_default=True,
    help="How to resume; `id` names the checkpoint itself.",
)
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), metavar="S", help="Seconds for each run.")
@click.option("--keep", is_flag=True, help="Keep the folder with traces, outputs and caches.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@json_option
def prove(
    kills: int,
    seed: int,
    at: tuple[int, ...],
    resume: str,
    timeout: float | None,
    keep: bool,
    command: tuple[str, ...],
) -> int:
    """Prove that COMMAND, a training, resumes exactly, or name the first thing that differs.

    COMMAND is run once undisturbed; then, several times, it is killed with SIGKILL and resumed. Batches, generators,
    what is logged, and the state of all that is registered with its session are compared bit for bit after each
    iteration. Its caches and summaries go to a scratch folder below TMPDIR, wherever it keeps them otherwise; other
    files that it writes it writes as always. Ends with 0 if everything is identical, with 1 if not.

    \b
    Example:
      ckptcache prove -- python train.py --max_iters 40
      ckptcache prove --kills 5 --resume auto -- python train.py
    """
    from ckptcache.proof.proving import command_launcher
    from ckptcache.proof.proving import prove as run_all

    try:
        with _status() as told:
            verdict = run_all(
                command_launcher(command),
                kills=kills,
                at=at,
                seed=seed,
                resume=resume,
                timeout=timeout,
                keep=keep,
                told=told,
            )
    except ProofFailed as error:
        raise _in_one_line(error) from error
    output.finish(verdict.to_json(), lambda: map(output.clean, verdict.lines()))
    return 0 if verdict.difference is None else 1


def _in_one_line(error: ProofFailed) -> ProofFailed:
    """Shows what the command wrote at last, and leaves the sentence without it."""
    reason, _, written = str(error.fields["reason"]).partition(":\n")
    for line in written.splitlines():
        click.echo(output.clean(line), err=True)
    return ProofFailed(run=error.fields["run"], reason=reason.removesuffix("; it wrote at last"))


@contextmanager
def _status() -> Iterator[Callable[[str, int, int], None]]:
    """What is being run, on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield lambda what, done, total: status.update(f"run {done + 1} of {total}: {what}")
