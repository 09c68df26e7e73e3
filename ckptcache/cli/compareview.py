"""Sessions side by side: found, as JSON, and as they look."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptcache import contrast, resume, words
from ckptcache.catalog import Catalog
from ckptcache.cli import output, sessionlist
from ckptcache.cli.elsewhere import open_place
from ckptcache.cli.sketch import ASCII, BARS, sketch
from ckptcache.cli.tables import Column, needed_width, setting_text, table
from ckptcache.elsewhere import Place
from ckptcache.errors import AmbiguousSession, CheckpointNotFound, SessionNotFound
from ckptcache.metadata import SessionRecord
from ckptcache.progress.losses import points

_CURVE = 60
"""Characters of a curve where nobody says how wide the terminal is."""
_IDS = ("resumed from", "best checkpoint")
_CELL = 20
"""What a session's column may be narrowed to."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A session to compare.

    Attributes:
        state: how it stands: its stop reason, "running", "cut short" or "unknown".
    """

    catalog: Catalog
    session: SessionRecord
    state: str

    @property
    def configs(self) -> dict[str, Any]:
        """Its configurations, as far as they are known."""
        return contrast.configs_of(self.catalog.index, self.session)


def entry(where: Place) -> Entry:
    """Find a session. Raises SessionNotFound, AmbiguousSession or AmbiguousId."""
    ledger = open_place(where).ledger
    catalog = ledger.view()
    session = find(catalog, where.wanted)
    return Entry(catalog, session, sessionlist.states([session], ledger.layout)[session.id])


def find(catalog: Catalog, wanted: str) -> SessionRecord:
    """The session that an id, a unique prefix of one, or "latest" stands for, or that saved such a checkpoint.

    Raises SessionNotFound, AmbiguousSession or AmbiguousId.
    """
    sessions = catalog.index.sessions
    if wanted in sessions:
        return sessions[wanted]
    if wanted == "latest" and sessions:
        return max(sessions.values(), key=lambda s: s.order)
    matches = [] if wanted in catalog.index.names else sorted(id for id in sessions if id.startswith(wanted))
    if len(matches) > 1:
        raise AmbiguousSession(prefix=wanted, count=len(matches), examples=", ".join(matches[:3]))
    return sessions[matches[0]] if matches else _saver(catalog, wanted)


def _saver(catalog: Catalog, wanted: str) -> SessionRecord:
    try:
        record = resume.find(catalog, wanted)
    except CheckpointNotFound as error:
        raise SessionNotFound(id=wanted, path=catalog.root) from error
    if record.session not in catalog.index.sessions:
        raise SessionNotFound(id=record.session or f"that saved {record.id}", path=catalog.root)
    return catalog.index.sessions[record.session]


# --- JSON ----------------------------------------------------------------------------------------


def to_json(entries: Sequence[Entry]) -> dict[str, Any]:
    """As `ckptcache compare --json` prints it."""
    return {
        "sessions": [_entry_to_json(e) for e in entries],
        "differing": [_row_to_json(key, values) for key, values in _differing(entries).items()],
    }


def _entry_to_json(e: Entry) -> dict[str, Any]:
    return {
        "cache_dir": str(e.catalog.root),
        "session": e.session.to_json(full=True),
        "state": e.state,
        "iterations": contrast.steps(e.session),
        "iterations_per_second": contrast.jsonable_number(contrast.rate(e.session)),
        "configs": e.configs,
    }


def _row_to_json(key: str, values: Sequence[Any]) -> dict[str, Any]:
    given = [value is not contrast.ABSENT for value in values]
    return {
        "key": key,
        "values": [v if known else None for v, known in zip(values, given, strict=True)],
        "given": given,
    }


def _differing(entries: Sequence[Entry]) -> dict[str, tuple[Any, ...]]:
    return contrast.varying([e.configs for e in entries])


# --- lines ---------------------------------------------------------------------------------------


def lines(entries: Sequence[Entry]) -> Iterator[str]:
    """All lines of `ckptcache compare`: as many sessions beside each other as the terminal has room for."""
    rows = {**_rows(entries), **{key: list(map(setting_text, row)) for key, row in _differing(entries).items()}}
    rows = {label: cells for label, cells in rows.items() if any(cells)}
    titles = _titles(entries)
    for number, some in enumerate(_parted(len(entries), _beside(rows, titles))):
        yield from [""] if number else []
        yield from table(_columns(rows, titles, some))
    yield from _curve_lines(entries, titles)


def _titles(entries: Sequence[Entry]) -> list[str]:
    if not output.is_terminal():
        return [e.session.id for e in entries]
    every = {id for e in entries for id in e.catalog.index.sessions}
    short = words.short_ids([e.session.id for e in entries], every)
    return [short[e.session.id] for e in entries]


def _columns(rows: Mapping[str, Sequence[str]], titles: Sequence[str], some: Sequence[int]) -> list[Column]:
    # An id that was cut could not be typed.
    least = max([_CELL, *(len(cell) for label in _IDS for cell in rows.get(label, ()))])
    of_sessions = [Column(titles[i], [cells[i] for cells in rows.values()], flexible=least) for i in some]
    return [Column("session", list(rows), style="cyan"), *of_sessions]


def _beside(rows: Mapping[str, Sequence[str]], titles: Sequence[str]) -> int:
    """How many sessions fit beside each other; all of them in a pipe."""
    counts = range(len(titles), 1, -1) if output.is_terminal() else range(0)
    fitting = (n for n in counts if _width(rows, titles, n) <= output.width())
    return next(fitting, 1) if output.is_terminal() else len(titles)


def _width(rows: Mapping[str, Sequence[str]], titles: Sequence[str], count: int) -> int:
    return max(needed_width(_columns(rows, titles, some)) for some in _parted(len(titles), count))


def _parted(number: int, most: int) -> list[range]:
    return [range(start, min(start + most, number)) for start in range(0, number, most)]


def _rows(entries: Sequence[Entry]) -> dict[str, list[str]]:
    several = len({e.catalog.root for e in entries}) > 1
    columns: dict[str, Callable[[Entry], str]] = {
        **({"cache": lambda e: str(e.catalog.root)} if several else {}),
        "resumed from": _parent,
        "policy": lambda e: f"{e.session.resume}, reseeded" if e.session.reseeded else e.session.resume,
        "started": lambda e: e.session.started_at,
        "iterations": lambda e: f"{e.session.start_iteration}-{e.session.end_iteration}",
        "first val loss": lambda e: words.number(e.session.first_val_loss),
        "best val loss": lambda e: words.number(e.session.best_val_loss),
        "last val loss": lambda e: words.number(e.session.last_val_loss),
        "best checkpoint": lambda e: _short(e, e.session.best_checkpoint),
        "seconds": lambda e: f"{e.session.seconds:.4g}" if e.session.seconds else "",
        "it/s": lambda e: _rate(contrast.rate(e.session)),
        "saves": _saves,
        "ended": lambda e: e.state,
        **{f"{key}": _environment(key) for key in _environment_keys(entries)},
    }
    return {label: [cell(e) for e in entries] for label, cell in columns.items()}


def _parent(e: Entry) -> str:
    if e.session.warm_start:
        return f"{_short(e, e.session.parent)} (weights)" if e.session.parent else "weights of another cache"
    return _short(e, e.session.parent) if e.session.parent else "a fresh start"


def _short(e: Entry, id: str | None) -> str:
    if id is None or not output.is_terminal():
        return id or ""
    return words.short_ids([id], e.catalog.index.checkpoints, e.catalog.index.names)[id]


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _saves(e: Entry) -> str:
    s = e.session
    failed = f", {s.failed_saves} failed" if s.failed_saves else ""
    return f"{s.saved}, {s.evicted} evicted{failed}"


def _environment_keys(entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(key for e in entries for key in e.session.environment))


def _environment(key: str) -> Callable[[Entry], str]:
    return lambda e: setting_text(e.session.environment.get(key, contrast.ABSENT))


# --- curves --------------------------------------------------------------------------------------


def _curve_lines(entries: Sequence[Entry], titles: Sequence[str]) -> Iterator[str]:
    curves = [points(e.session) for e in entries]
    found = [point for curve in curves for point in curve]
    if len(found) < 2:
        return
    label = max(map(len, titles))
    levels = BARS if output.is_terminal() else ASCII
    room = max(10, min(_CURVE, output.width() - label - 2)) if output.is_terminal() else _CURVE
    iterations = [i for i, _ in found]
    low, high = min(v for _, v in found), max(v for _, v in found)
    scale = f"{levels[0]} {words.number(low)} to {levels[-1]} {words.number(high)}"
    yield ""
    yield from output.wrapped(
        f"val loss over iterations {min(iterations)} to {max(iterations)}, {scale}", "  ", first=""
    )
    for title, drawn in zip(titles, sketch(curves, room, levels), strict=True):
        yield f"{output.clean(title):<{label}}  {drawn}".rstrip()
