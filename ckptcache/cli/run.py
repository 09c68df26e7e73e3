"""How a command runs and ends: errors in one line, warnings on stderr, exit codes, and no traceback for what can go
wrong outside of the program."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from ckptcache.cli import output
from ckptcache.errors import CkptCacheError

INTERRUPTED = 130


class CommandLine(click.Group):
    """A click group whose commands stand in sections, and whose errors are those of ckptcache."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._sections: dict[str, list[str]] = {}

    def add_section(self, title: str, commands: Sequence[click.Command]) -> None:
        """Add commands that the help lists together under `title`."""
        for command in commands:
            self.add_command(command)
        self._sections[title] = [command.name or "" for command in commands]

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in the order of their sections."""
        return [name for names in self._sections.values() for name in names]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections."""
        for title, names in self._sections.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(limit=80)) for name in names])

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **settings: Any) -> Any:  # type: ignore[override]
        """Run, and end the process with the exit code; `standalone_mode=False` only runs."""
        if not settings.pop("standalone_mode", True):
            return super().main(args, prog_name, standalone_mode=False, **settings)
        given = list(sys.argv[1:] if args is None else args)
        output.prepare_streams()
        with _warnings_on_stderr():
            sys.exit(self._exit_code(given, prog_name, **settings))

    def _exit_code(self, args: Sequence[str], prog_name: str | None, **settings: Any) -> int:
        as_json = "--json" in args
        try:
            code = super().main(args, prog_name, standalone_mode=False, **settings)
            return code if isinstance(code, int) else 0
        except CkptCacheError as error:
            return _fail(type(error).__name__, str(error), error.exit_code, as_json)
        except click.ClickException as error:
            error.show()
            return _fail(type(error).__name__, error.format_message(), error.exit_code, as_json, said=True)
        except click.Abort as error:
            interrupted = isinstance(error.__cause__, KeyboardInterrupt)
            return _fail("Interrupted", "interrupted", INTERRUPTED if interrupted else 1, as_json)
        except OSError as error:
            # What the layers below expect of the disk they name themselves; this is the rest, such as a folder
            # that can't be listed.
            what = f"{error.filename}: " if error.filename else ""
            return _fail("OSError", f"{what}{(error.strerror or str(error)).lower()}", 1, as_json)


def _fail(kind: str, message: str, code: int, as_json: bool, *, said: bool = False) -> int:
    if not said:
        output.complain("error", message)
    if as_json:
        output.write_json({"error": {"type": kind, "message": message}})
    return code


class _OnStderr(logging.Handler):
    """Each message once: every look at a cache may find the same again."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._said:
            self._said.add(message)
            output.complain(record.levelname.lower(), message)


@contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    logger, handler = logging.getLogger("ckptcache"), _OnStderr()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
