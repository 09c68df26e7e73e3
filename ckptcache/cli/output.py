"""What the commands print, and where: JSON, plain text for a pipe, something to look at on a terminal.

Only a terminal gets colour, short ids and a layout by its width. What comes from an index is never
trusted to be harmless: control characters are shown, not sent.
"""

import io
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import click

_HARMFUL = {i: f"\\x{i:02x}" for i in (*range(32), *range(127, 160))}
_HARMFUL_IN_JSON = {i: f"\\u{i:04x}" for i in range(127, 160)}


# --- streams -------------------------------------------------------------------------------------


class _Nobody(io.TextIOBase):
    """Stands in for a stdout whose reader has gone."""

    def write(self, text: str) -> int:
        return len(text)


def prepare_streams() -> None:
    """A character that the terminal's encoding doesn't have is no reason to fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def write(text: str) -> None:
    """Write to stdout. A reader that has gone (``| head``) is left in peace, and changes no exit code."""
    try:
        click.echo(text, nl=False)
    except BrokenPipeError:
        _let_go()


def write_json(document: Any) -> None:
    """Write one JSON document to stdout."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    # Names of files may hold bytes that are no UTF-8, which JSON can only hold escaped.
    harmless = f"{text.translate(_HARMFUL_IN_JSON)}\n".encode(errors="backslashreplace")
    try:
        click.echo(harmless, nl=False)
    except BrokenPipeError:
        _let_go()


def _let_go() -> None:
    sys.stdout = _Nobody()


def complain(level: str, message: str) -> None:
    """One line on stderr: ``ckptcache: <level>: <message>``; on a terminal, broken where that ends."""
    line = f"ckptcache: {level}: {clean(message)}"
    if sys.stderr is not None and sys.stderr.isatty():
        line = "\n".join(textwrap.wrap(line, max(width(), 40), subsequent_indent="  ", break_long_words=False))
    with suppress(BrokenPipeError):
        click.echo(line, err=True)


def finish(document: Any, human: Callable[[], Iterable[str]]) -> None:
    """Print `document` if JSON is wanted, otherwise the lines that `human` makes."""
    from ckptcache.cli.options import options

    if options().as_json:
        write_json(document)
    else:
        write("".join(f"{line}\n" for line in human()))


# --- the terminal --------------------------------------------------------------------------------


def is_terminal() -> bool:
    """Whether a person is looking, through something that can show more than ASCII."""
    try:
        encoding = (sys.stdout.encoding or "").lower()
        return sys.stdout.isatty() and encoding.startswith("utf") and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):
        return False


def width() -> int:
    """Columns of the terminal; COLUMNS says otherwise."""
    return shutil.get_terminal_size((100, 24)).columns


def has_colour() -> bool:
    """Whether colour is welcome (NO_COLOR, no-color.org)."""
    return is_terminal() and not os.environ.get("NO_COLOR")


def paint(text: str, **style: Any) -> str:
    """`text` in a style of `click.style`, where colour is welcome."""
    return click.style(text, **style) if has_colour() else text


def wrapped(text: str, indent: str, *, first: str | None = None) -> list[str]:
    """`text` in lines as wide as the terminal, indented; one line when piped. Long words are never broken."""
    start = indent if first is None else first
    if not is_terminal():
        return [start + text]
    room = max(width(), len(indent) + 20)
    lines = textwrap.wrap(text, room, initial_indent=start, subsequent_indent=indent, break_long_words=False)
    return lines or [start.rstrip()]


def clean(text: Any) -> str:
    """`text` with its control characters shown instead of sent to the terminal."""
    return str(text).translate(_HARMFUL)
