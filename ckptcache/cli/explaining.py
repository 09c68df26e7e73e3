"""How explanations look: a block for each candidate on a terminal, a row of a table in a pipe."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from ckptcache import words
from ckptcache.catalog import Catalog, Explanation
from ckptcache.cli import output
from ckptcache.cli.tables import Column, table
from ckptcache.config import CacheConfig
from ckptcache.policy.compatibility import Description

_COLOURS = {"exact": "green", "other_data": "yellow", "partial": "yellow", "incompatible": "red"}
_INDENT = "     "


def weights(config: CacheConfig) -> dict[str, float]:
    """The weights of the parts of the quality."""
    return {
        "loss": config.quality_weight_loss,
        "metrics": config.quality_weight_metrics,
        "progress": config.quality_weight_progress,
    }


def lines(
    catalog: Catalog, explanations: Sequence[Explanation], needed: Description, source: str, evicted: int
) -> Iterator[str]:
    """All lines of `ckptcache explain`."""
    yield from output.wrapped(output.clean(f"Judged by {source}{_settings(needed, catalog)}."), "  ", first="")
    if output.is_terminal():
        yield from _blocks(catalog, explanations)
    else:
        yield from table(_columns(explanations))
    yield from _ending(explanations, evicted)


def _settings(needed: Description, catalog: Catalog) -> str:
    critical = catalog.config.critical_params
    config: Mapping[str, Any] = needed.model_config or {}
    text = words.settings({k: v for k, v in config.items() if critical == "all" or k in critical} or config)
    return f" ({text})" if text else ""


def _ending(explanations: Sequence[Explanation], evicted: int) -> Iterator[str]:
    if not explanations:
        yield "There is no checkpoint to judge."
    elif not any(e.chosen for e in explanations):
        yield "None can be resumed from: a run would start fresh."
    if evicted:
        yield f"{words.count(evicted, 'evicted checkpoint')} not listed (`ckptcache ls --all`)."


# --- on a terminal -------------------------------------------------------------------------------


def _blocks(catalog: Catalog, explanations: Sequence[Explanation]) -> Iterator[str]:
    ids = words.short_ids([e.record.id for e in explanations], catalog.index.checkpoints, catalog.index.names)
    longest = max(map(len, ids.values()), default=0)
    for number, explanation in enumerate(explanations, start=1):
        yield ""
        yield from _block(number, explanation, ids[explanation.record.id], longest)
    if explanations:
        yield ""


def _block(number: int, explanation: Explanation, id: str, longest: int) -> Iterator[str]:
    head, why = _head(number, explanation, id, longest), output.clean(_why(explanation))
    if len(click.unstyle(head)) + 2 + len(why) <= output.width():
        yield f"{head}  {why}"
    else:
        yield head
        yield from output.wrapped(why, _INDENT)
    if explanation.score.status == "known":
        yield from output.wrapped(f"= {_terms(explanation)}", f"{_INDENT}  ", first=_INDENT)


def _head(number: int, explanation: Explanation, id: str, longest: int) -> str:
    mark = output.paint("→", fg="green", bold=True) if explanation.chosen else " "
    quality = words.number(explanation.score.quality) or explanation.score.status
    shown = output.paint(f"{output.clean(id):<{longest}}", fg="cyan", bold=explanation.chosen)
    verdict = output.paint(f"{explanation.verdict.kind:<12}", fg=_COLOURS[explanation.verdict.kind])
    return f"{mark}{number:>3} {shown}  {explanation.status:<11}  quality {quality:<8}  {verdict}".rstrip()


def _why(explanation: Explanation) -> str:
    return f"chosen: {explanation.reason}" if explanation.chosen else explanation.reason


def _terms(explanation: Explanation) -> str:
    """The sum that the quality is."""
    return output.clean(explanation.score.reason.partition(" = ")[2] or explanation.score.reason)


# --- in a pipe -----------------------------------------------------------------------------------


def _columns(explanations: Sequence[Explanation]) -> list[Column]:
    return [
        Column("chosen", ["chosen" if e.chosen else "" for e in explanations]),
        Column("id", [e.record.id for e in explanations]),
        Column("status", [e.status for e in explanations]),
        Column("verdict", [e.verdict.kind for e in explanations]),
        Column("quality", [words.number(e.score.quality) for e in explanations]),
        Column("score", [_terms(e) if e.score.status == "known" else "" for e in explanations]),
        Column("reason", [e.reason for e in explanations]),
    ]
