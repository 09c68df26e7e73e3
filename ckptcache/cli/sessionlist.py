"""How the list of sessions looks."""

from collections.abc import Iterator, Mapping, Sequence

from ckptcache import words
from ckptcache.catalog import Catalog
from ckptcache.cli import output
from ckptcache.cli.tables import Column, table
from ckptcache.metadata import SessionRecord
from ckptcache.storage.layout import Layout
from ckptcache.storage.reconcile import leases


def states(sessions: Sequence[SessionRecord], layout: Layout) -> dict[str, str]:
    """How each session stands: its stop reason; without one "running", "cut short", or "unknown" elsewhere."""
    held = leases(layout)
    words_for = {"live": "running", "unknown": "unknown"}
    return {s.id: s.stop_reason or words_for.get(held.get(s.id, "dead"), "cut short") for s in sessions}


def lines(sessions: Sequence[SessionRecord], states: Mapping[str, str], catalog: Catalog) -> Iterator[str]:
    """All lines of `ckptcache sessions`."""
    yield from table(_columns(sessions, states, catalog))
    if not sessions and output.is_terminal():
        yield f"There is no session in {output.clean(catalog.root)} yet."


def _columns(sessions: Sequence[SessionRecord], states: Mapping[str, str], catalog: Catalog) -> list[Column]:
    ids = [s.id for s in sessions]
    parents = [s.parent or "" for s in sessions]
    short = words.short_ids(ids, catalog.index.sessions)
    parent_short = words.short_ids([p for p in parents if p], catalog.index.checkpoints, catalog.index.names)
    return [
        Column("id", ids, short=[short[id] for id in ids], style="cyan"),
        Column("parent", parents, short=[parent_short.get(p, "") for p in parents], keep=60),
        Column("iterations", [f"{s.start_iteration}-{s.end_iteration}" for s in sessions], keep=95),
        Column("first", [words.number(s.first_val_loss) for s in sessions], keep=40, right=True),
        Column("best", [words.number(s.best_val_loss) for s in sessions], keep=90, right=True),
        Column("last", [words.number(s.last_val_loss) for s in sessions], keep=55, right=True),
        Column("saved", [str(s.saved) for s in sessions], keep=30, right=True),
        Column("ended", [states[s.id] for s in sessions], keep=80),
        *([_curves(sessions)] if output.is_terminal() else []),
    ]


def _curves(sessions: Sequence[SessionRecord]) -> Column:
    curves = [[value for _, value in s.curves.get("val_loss", ())] for s in sessions]
    wide, narrow = ([words.sparkline(curve, most) for curve in curves] for most in (24, 8))
    return Column("val loss", wide, short=narrow, keep=50)
