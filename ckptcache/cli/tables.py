"""Tables: with a layout by the terminal's width, or plain columns for a pipe."""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ckptcache import words
from ckptcache.cli import output
from ckptcache.contrast import ABSENT

if TYPE_CHECKING:
    from rich.table import Table

ALWAYS = 100
_NARROWEST = 12
"""What a flexible column may shrink to before a table gets wider than the terminal."""


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        cells: what a terminal shows.
        keep: how dear it is; where a terminal is too narrow, the least dear columns go first.
        short: shorter cells, taken before any column goes.
        flexible: if its cells may be broken into lines, how wide it stays at least; else 0.
        style: of rich, on a terminal.
    """

    title: str
    cells: Sequence[str]
    keep: int = ALWAYS
    short: Sequence[str] | None = None
    right: bool = False
    flexible: int = 0
    style: str = ""


def table(columns: Sequence[Column], *, strong: Iterable[int] = (), ends: Iterable[int] = ()) -> list[str]:
    """The lines of a table.

    Args:
        strong: rows that stand out on a terminal.
        ends: rows after which a terminal shows a rule.
    """
    if not columns[0].cells:
        return []
    return _for_terminal(columns, set(strong), set(ends)) if output.is_terminal() else _plain(columns)


def _plain(columns: Sequence[Column]) -> list[str]:
    texts = [[c.title.replace(" ", "_"), *(output.clean(cell) or "-" for cell in c.cells)] for c in columns]
    widths = [max(map(len, cells)) for cells in texts]
    rows = zip(*texts, strict=True)
    return ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def setting_text(value: Any) -> str:
    """A setting's value in a cell; "" where there is none."""
    return "" if value is ABSENT else words.value(value)


# --- on a terminal -------------------------------------------------------------------------------


def _for_terminal(columns: Sequence[Column], strong: set[int], ends: set[int]) -> list[str]:
    room = output.width()
    chosen = fitting(columns, room)
    from rich.console import Console

    target = io.StringIO()
    console = Console(
        file=target,
        force_terminal=True,
        width=max(room, needed_width([replace(c, flexible=min(c.flexible, _NARROWEST)) for c in chosen])),
        color_system="auto" if output.has_colour() else None,
        markup=False,
        emoji=False,
        highlight=False,
        legacy_windows=False,
    )
    console.print(_rich_table(chosen, strong, ends))
    return [line.rstrip() for line in target.getvalue().splitlines()]


def fitting(columns: Sequence[Column], room: int) -> list[Column]:
    """As many of `columns`, the dearest, as fit into `room`; ids short before any goes."""
    if needed_width(columns) <= room:
        return list(columns)
    shortened = [replace(c, cells=c.short) if c.short else c for c in columns]
    chosen: list[Column] = []
    for column in sorted(shortened, key=lambda c: -c.keep):
        # A wide one that doesn't fit leaves its room to narrower, less dear ones.
        if column.keep >= ALWAYS or needed_width([*chosen, column]) <= room:
            chosen.append(column)
    return [column for column in shortened if column in chosen]


def needed_width(columns: Sequence[Column]) -> int:
    """Columns of the terminal that a table takes at least, two between each."""
    return sum(map(_column_width, columns)) + 2 * (len(columns) - 1)


def _column_width(column: Column) -> int:
    widest = max((_cell_width(cell) for cell in column.cells), default=0)
    return max(_cell_width(column.title), min(widest, column.flexible) if column.flexible else widest)


def _cell_width(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(output.clean(text))


def _rich_table(columns: Sequence[Column], strong: set[int], ends: set[int]) -> "Table":
    from rich import box
    from rich.table import Table

    # The box's own separator is one space; a padding of one on the left makes two.
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))
    for column in columns:
        justify: Any = "right" if column.right else "left"
        made.add_column(column.title, justify=justify, no_wrap=not column.flexible, style=column.style)
    for number, cells in enumerate(_rows(columns)):
        made.add_row(*cells, style="bold" if number in strong else "", end_section=number in ends)
    return made


def _rows(columns: Sequence[Column]) -> Iterator[list[Any]]:
    from rich.text import Text

    for cells in zip(*(c.cells for c in columns), strict=True):
        yield [Text(output.clean(cell)) for cell in cells]
