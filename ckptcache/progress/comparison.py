"""The newest session beside the one before it."""

from collections.abc import Sequence

from ckptcache import words
from ckptcache.contrast import Pair, rate, relative_change, steps
from ckptcache.metadata import SessionRecord
from ckptcache.progress.labels import Labels, ending, iterations
from ckptcache.progress.markdown import code, table, unbroken, word
from ckptcache.progress.views import RunView


def comparison(view: RunView, labels: Labels) -> list[str]:
    """The lines of a table: what the newest session reached, what the one before it did, and the change.

    With one session only, it stands alone; there must be one.
    """
    last, *before = view.sessions[:2]
    if not before:
        return table(("", "last"), ([name, new] for name, new, _, _ in _rows(last, last, labels)), right=("last",))
    titles, right = ("", "last", "before", "change"), ("last", "before", "change")
    lines = table(titles, _rows(last, before[0], labels), right=right)
    if None not in (last.config, before[0].config) and last.config != before[0].config:
        lines += ["", "The two were configured differently."]
    return lines


def _rows(new: SessionRecord, old: SessionRecord, labels: Labels) -> list[Sequence[str]]:
    return [
        ("session", code(labels.short(new.id)), code(labels.short(old.id)), ""),
        ("went on from", _parent(new, labels), _parent(old, labels), ""),
        (
            "iterations",
            unbroken(iterations(new)),
            unbroken(iterations(old)),
            unbroken(f"{steps(new) - steps(old):+d} steps"),
        ),
        _loss_row("first val loss", new.first_val_loss, old.first_val_loss),
        _loss_row("last val loss", new.last_val_loss, old.last_val_loss),
        _loss_row("best val loss", new.best_val_loss, old.best_val_loss),
        ("seconds", _seconds(new.seconds), _seconds(old.seconds), change(new.seconds, old.seconds)),
        ("iterations per second", _seconds(rate(new)), _seconds(rate(old)), change(rate(new), rate(old))),
        ("ended", word(ending(new)), word(ending(old)), ""),
    ]


def _loss_row(name: str, new: float | None, old: float | None) -> Sequence[str]:
    difference = Pair(old, new).change
    amount = "" if difference is None else f"{'+' if difference >= 0 else '-'}{words.number(abs(difference))}"
    return name, words.number(new), words.number(old), unbroken(f"{amount} {_relative(new, old)}".strip())


def change(new: float | None, old: float | None) -> str:
    """``-12.5 %``; "" where that means nothing."""
    return _relative(new, old).strip("()")


def _relative(new: float | None, old: float | None) -> str:
    amount = relative_change(new, old)
    return "" if amount is None else unbroken(f"({amount * 100:+.1f} %)")


def _parent(session: SessionRecord, labels: Labels) -> str:
    if session.warm_start and not session.parent:
        return "weights of another cache"
    weights = " (weights)" if session.warm_start else ""
    return f"{code(labels.short(session.parent))}{weights}" if session.parent else "a fresh start"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
