"""Completion by the shell."""

import click
from click.shell_completion import get_completion_class

from ckptcache.cli import output


@click.command(short_help="Print a script for completion by the shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script with which the shell completes commands, options, ids and names.

    \b
    Example:
      eval "$(ckptcache completion bash)"                 in ~/.bashrc
      eval "$(ckptcache completion zsh)"                  in ~/.zshrc
      ckptcache completion fish > ~/.config/fish/completions/ckptcache.fish
    """
    made = get_completion_class(shell)
    if made is None:
        raise click.UsageError(f"There is no completion for {shell}.")
    output.write(made(ctx.find_root().command, {}, "ckptcache", "_CKPTCACHE_COMPLETE").source() + "\n")
