"""Columns of tables in which peers stand below each other."""

from collections.abc import Mapping, Sequence

from bench.cases import Result
from bench.peers import PEERS
from ckptcache.cli import tables


def title(row: Result) -> str:
    """What a row is called."""
    return PEERS[row["name"]].title if row["name"] in PEERS else str(row["name"])


def named(rows: Sequence[Result]) -> tables.Column:
    """What each row is called, or why it has no figures."""
    return tables.Column("peer", [f"{title(row)}{_why_empty(row)}" for row in rows])


def times(rows: Sequence[Result], columns: Mapping[str, str], keep: int = tables.ALWAYS) -> list[tables.Column]:
    """A column of milliseconds for each of `columns`, title to key; the lower `keep`, the sooner one goes."""
    return [
        tables.Column(name, [shown(row.get(key)) for row in rows], keep=keep, right=True)
        for name, key in columns.items()
    ]


def _why_empty(row: Result) -> str:
    if "missing" in row:
        return " (not installed)"
    return f" ({row['failed']})" if "failed" in row else ""


def shown(value: float | None) -> str:
    """Milliseconds, with a digit behind the point where they are few."""
    if value is None:
        return ""
    return f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def best_peer(rows: Sequence[Result], key: str) -> float | None:
    """The lowest figure of those that aren't ckptcache's."""
    found = [row[key] for row in rows if row["name"] in PEERS and not PEERS[row["name"]].is_ours and key in row]
    return min(found, default=None)


def ratios(rows: Sequence[Result], key: str, to: float | None = None) -> list[str]:
    """Each row's figure as a multiple of `to`, or of the best peer's."""
    base = to if to is not None else best_peer(rows, key)
    return [f"{row[key] / base:.2f}" if base and base > 0 and key in row else "" for row in rows]


def yes_no(rows: Sequence[Result], key: str) -> list[str]:
    """What each row promises."""
    return ["" if key not in row else "yes" if row[key] else "no" for row in rows]


def memory_ratios(rows: Sequence[Result]) -> list[str]:
    """The memory that each row took at most, as a multiple of the state."""
    return [f"{row['memory_bytes'] / row['bytes']:.2f}" if row.get("memory_bytes") else "" for row in rows]
