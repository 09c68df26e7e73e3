"""Markdown of text that anybody may have written: an index comes out of git, and is edited there."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

_MOST = 80
_HARMLESS = re.compile(r"\A[A-Za-z0-9]+(?:[ ._-][A-Za-z0-9]+)*\Z")


def printable(text: str, most: int = _MOST) -> str:
    """`text` in one line of at most `most` characters, without any that are not seen or that turn the line around."""
    seen = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in text[: 4 * most])
    line = " ".join(seen.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def code(text: str) -> str:
    """`text` in the type of code, where nothing in it is a link, a mention or markup."""
    line = printable(text)
    if _HARMLESS.match(line):
        return f"`{line}`"
    return f"<code>{_entities(line)}</code>" if line else ""


def word(text: str) -> str:
    """A word of ours, such as ``finished``, as it is; anything else as code."""
    return text if text.replace("_", "").replace(" ", "").isalpha() and text.isascii() else code(text)


def _entities(line: str) -> str:
    """Markdown and HTML read an entity as a character that means nothing."""
    return "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in line)


def prose(text: str) -> str:
    """A sentence of ours that may quote strangers: one paragraph without markup, links or HTML."""
    return "".join(c if c.isalnum() or c in " ,:()/'-" else _prose_character(c) for c in printable(text, 2000))


def _prose_character(character: str) -> str:
    return character if character in ".;%=+?" else f"&#{ord(character)};"


def unbroken(text: str) -> str:
    """`text` on one line of a cell, however narrow the page: a number stays with its unit."""
    return text.replace(" ", "\u00a0")


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[str] = ()) -> list[str]:
    """The lines of a table; cells are Markdown already.

    Args:
        right: titles of the columns that hold numbers.
    """
    aligned = set(right)
    rule = ["---:" if title in aligned else "---" for title in titles]
    return [f"| {' | '.join(cells)} |" for cells in (titles, rule, *rows)]


def fence(language: str, text: str) -> list[str]:
    """A block of code; `text` is ours, and holds no fence."""
    return [f"```{language}", *text.splitlines(), "```"]


def folded(summary: str, lines: Iterable[str]) -> list[str]:
    """Lines that a reader opens with a click."""
    return ["<details>", f"<summary>{summary}</summary>", "", *lines, "", "</details>"]
