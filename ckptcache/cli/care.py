"""Care: what a cache holds, what is wrong with it, what goes when it is full, what other weights would change."""

import logging
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from ckptcache import words
from ckptcache.cli import output
from ckptcache.cli.bars import progress_bar
from ckptcache.cli.options import DirectionType, common, open_cache, options
from ckptcache.config import settings_with_sources

if TYPE_CHECKING:
    from ckptcache.catalog import Catalog
    from ckptcache.checkup import Finding, Move, Stats
    from ckptcache.metadata import CheckpointMetadata
    from ckptcache.policy.retention import Plan

log = logging.getLogger("ckptcache")
DAMAGE = 4
_LIMITS = ("max_checkpoints", "max_cache_size_gb")
_DEFAULT = "default"
"""From either on, verifying takes long enough for a progress bar."""


# --- stats ---------------------------------------------------------------------------------------


@click.command(short_help="Count what the cache holds, beside its limits.")
@common
def stats() -> None:
    """Count checkpoints, records, sessions and bytes, beside the limits in force.

    \b
    Example:
      ckptcache stats
    """
    cache = open_cache()
    found = cache.stats()
    document = {"cache_dir": str(cache.cache_dir), **found.to_json()}
    output.finish(document, lambda: _stats_lines(str(cache.cache_dir), found))


def _stats_lines(folder: str, s: "Stats") -> Iterator[str]:
    sources = _limit_sources(())
    others = {"evicted": s.evicted, "missing": s.missing, "damaged": s.damaged, "quarantined": s.quarantined}
    beside = ", ".join(f"{number} {what}" for what, number in others.items() if number)
    lines = {
        "cache": folder,
        "checkpoints": f"{s.checkpoints} (limit {s.max_checkpoints}, {sources['max_checkpoints']})",
        "size": f"{words.size(s.bytes)} (limit {words.size(s.max_cache_bytes)}, {sources['max_cache_size_gb']})",
        "records": f"{s.records}" + (f" ({beside})" if beside else ""),
        "protected": f"{s.named} named, {s.pinned} pinned",
        "groups": f"{s.groups}",
        "sessions": f"{s.sessions}",
        "prepared data": f"{words.count(s.data_entries, 'entry', 'entries')}, {words.size(s.data_bytes)}",
    }
    for label, text in lines.items():
        yield f"{label:<14} {output.clean(text)}"


# --- doctor --------------------------------------------------------------------------------------


@click.command(short_help="Find damage, and repair it.")
@click.option("--repair", is_flag=True, help="Mend what can be mended; damaged files go to quarantine.")
@click.option("--no-verify", is_flag=True, help="Don't read the files to compare their digests, which takes time.")
@common
@click.pass_context
def doctor(ctx: click.Context, repair: bool, no_verify: bool) -> None:
    """Examine the index, the sidecars and every file. Ends with 4 when damage is left.

    With --repair a broken index is set aside and rebuilt, files without a record are taken up, damaged ones go to
    quarantine, and what crashes left behind is removed. No checkpoint is deleted.

    \b
    Example:
      ckptcache doctor
      ckptcache doctor --repair
    """
    with open_cache() as cache, progress_bar() as progress:
        findings = cache.doctor(repair=repair, verify=not no_verify, progress=progress)
    is_damaged = any(f.is_damage and not f.repaired for f in findings)
    document = {"findings": [asdict(f) for f in findings], "damaged": is_damaged, "verified": not no_verify}
    output.finish(document, lambda: _findings(findings, verified=not no_verify))
    ctx.exit(DAMAGE if is_damaged else 0)


def _findings(findings: "Sequence[Finding]", *, verified: bool) -> Iterator[str]:
    for finding in findings:
        outcome, colour = _outcome(finding)
        label = output.paint(f"{outcome:<8}", fg=colour)
        first, *rest = output.wrapped(output.clean(f"{finding.subject}: {finding.message}"), " " * 20)
        yield f"{label} {finding.kind:<10} {first[20:]}"
        yield from rest
    open_damage = sum(f.is_damage and not f.repaired for f in findings)
    if not findings:
        yield "Everything is in order." if verified else "Everything is in order; the files were not read."
    elif open_damage:
        advice = "" if any(f.repaired for f in findings) else "; `ckptcache doctor --repair` mends what can be mended"
        yield from output.wrapped(f"{words.count(open_damage, 'damage', 'damages')} left{advice}.", "  ", first="")
    else:
        yield "No damage is left."


def _outcome(finding: "Finding") -> tuple[str, str]:
    if finding.repaired:
        return "repaired", "green"
    return ("damage", "red") if finding.is_damage else ("untidy", "yellow")


# --- prune ---------------------------------------------------------------------------------------


@click.command(short_help="Evict what is beyond the limits, or say what would go.")
@click.option("--dry-run", is_flag=True, help="Only say what would stay and what would go.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@click.option("--max-checkpoints", type=int, metavar="N", help="Instead of the setting in force.")
@click.option(
    "--max-cache-size-gb", type=float, metavar="GB", help="Instead of the setting in force; GB of 10^9 bytes."
)
@common
def prune(dry_run: bool, yes: bool, **limits: Any) -> None:
    """Evict what is beyond the limits, the lowest of each group first; say of each why.

    Named and pinned checkpoints stay, and so do the best, the latest, and what running sessions stand on. The limits
    are the settings in force here, which need not be those that the training was given; where they are mere defaults,
    a person at a terminal is asked.

    \b
    Example:
      ckptcache prune --dry-run
      ckptcache prune --max-checkpoints 5
    """
    given = {name: value for name, value in limits.items() if value is not None}
    with open_cache(**given) as cache:
        before, sources = cache.ledger.view(), _limit_sources(given)
        if not (dry_run or yes or options().as_json):
            _ask(cache.prune(dry_run=True), sources)
        plan = cache.prune(dry_run=dry_run)
    config = cache.config
    document = {
        "dry_run": dry_run,
        "limits": {"max_checkpoints": config.max_checkpoints, "max_cache_size_gb": config.max_cache_size_gb},
        "kept": dict(plan.kept),
        "evicted": dict(plan.evicted),
        "over_limit": plan.over_limit,
    }
    output.finish(document, lambda: _plan_lines(before, plan, sources, dry_run=dry_run))


def _limit_sources(given: Collection[str]) -> dict[str, str]:
    """Where each limit comes from."""
    found = settings_with_sources(_LIMITS)
    return {n: "given" if n in given else found[n][1] if n in found else _DEFAULT for n in _LIMITS}


def _ask(plan: "Plan", sources: Mapping[str, str]) -> None:
    """Evicting can't be undone, and a training may well have been given other limits than the defaults."""
    has_person = sys.stdin.isatty() and sys.stderr.isatty()
    if has_person and plan.evicted and _DEFAULT in sources.values():
        reason = next(iter(plan.evicted.values()))
        question = f"{words.count(len(plan.evicted), 'checkpoint')} would go ({reason}; a default). Evict?"
        click.confirm(output.clean(question), abort=True, err=True)


def _plan_lines(catalog: "Catalog", plan: "Plan", sources: Mapping[str, str], *, dry_run: bool) -> Iterator[str]:
    from ckptcache.cli.records import id_column
    from ckptcache.cli.tables import Column, table

    reasons = {**plan.kept, **plan.evicted}
    listed = [r for r in catalog.ranked() if r.id in reasons]
    columns = [
        Column("plan", ["go" if r.id in plan.evicted else "stay" for r in listed]),
        id_column(listed, catalog),
        Column("val loss", [words.number(r.val_loss) for r in listed], keep=60, right=True),
        Column("quality", [words.number(r.quality_score) for r in listed], keep=50, right=True),
        Column("size", [words.size(r.size) for r in listed], keep=40, right=True),
        Column("why", [reasons[r.id] for r in listed], flexible=32),
    ]
    yield from table(columns, strong={i for i, r in enumerate(listed) if r.id in plan.evicted})
    if output.is_terminal():
        gone = sum(r.size or 0 for r in listed if r.id in plan.evicted)
        yield ""
        yield from output.wrapped(_plan_summary(catalog, plan, gone, dry_run), "  ", first="")
        yield from output.wrapped(f"Limits: {_limits(catalog, sources)}.", "  ", first="")


def _plan_summary(catalog: "Catalog", plan: "Plan", gone: int, dry_run: bool) -> str:
    verbs = ("would go", "would stay") if dry_run else ("went", "stayed")
    text = (
        f"{words.count(len(plan.evicted), 'checkpoint')} ({words.size(gone)}) {verbs[0]}, {len(plan.kept)} {verbs[1]}"
    )
    return f"{text}; {plan.over_limit}." if dry_run and plan.over_limit else f"{text}."


def _limits(catalog: "Catalog", sources: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {getattr(catalog.config, name):g} ({source})" for name, source in sources.items())


# --- rerank --------------------------------------------------------------------------------------


@click.command(short_help="Show what other weights or metrics would change.")
@click.option("--quality-weight-loss", type=float, metavar="X", help="Weight of the validation loss.")
@click.option("--quality-weight-metrics", type=float, metavar="Y", help="Weight of the mean of the scored metrics.")
@click.option("--quality-weight-progress", type=float, metavar="Z", help="Weight of the progress in iterations.")
@click.option(
    "--quality-metric",
    "quality_metrics",
    type=DirectionType(),
    multiple=True,
    metavar="NAME=max|min",
    help="A metric to score, and whether more or less is better. May be repeated.",
)
@common
def rerank(quality_metrics: tuple[tuple[str, str], ...], **weights: float | None) -> None:
    """Show what would move if quality were scored with other weights or metrics. Changes nothing.

    To keep them, set them in ckptcache.toml or in CKPTCACHE_* variables: scores are computed afresh each time.

    \b
    Example:
      ckptcache rerank --quality-weight-loss 0.2 --quality-weight-metrics 0.8 --quality-metric accuracy=max
    """
    settings: dict[str, Any] = {name: value for name, value in weights.items() if value is not None}
    if quality_metrics:
        settings["quality_metrics"] = dict(quality_metrics)
    if not settings:
        raise click.UsageError("Give at least one weight or metric to rank by.")
    from ckptcache import checkup
    from ckptcache.catalog import Catalog

    # One look for all of it: another process may save meanwhile.
    catalog = open_cache().ledger.view()
    other = Catalog(catalog.root, catalog.index, catalog.observed, replace(catalog.config, **settings))
    _say_absent(catalog, dict(quality_metrics))
    moves = checkup.rerank(catalog, other.config)
    best = [None if found is None else found.id for found in (_best(catalog), _best(other))]
    document = {
        "settings": settings,
        "settings_before": {name: getattr(catalog.config, name) for name in settings},
        "best": dict(zip(("before", "after"), best, strict=True)),
        "moves": [_move_to_json(move, catalog) for move in moves],
    }
    output.finish(document, lambda: _moves(catalog, moves, best))


def _say_absent(catalog: "Catalog", metrics: Collection[str]) -> None:
    known = sorted({name for record in catalog.index.checkpoints.values() for name in record.metrics})
    for name in metrics:
        if name not in known:
            log.warning("no checkpoint has a metric %r; there is %s", name, ", ".join(known) or "none")


def _best(catalog: "Catalog") -> "CheckpointMetadata | None":
    from ckptcache.policy.compatibility import Description

    return catalog.best(Description())


def _move_to_json(move: "Move", catalog: "Catalog") -> dict[str, Any]:
    from ckptcache.cli.records import to_json

    record = to_json(catalog.index.checkpoints[move.id], catalog)
    return {**asdict(move), **{name: record[name] for name in ("group", "iteration", "val_loss", "metrics")}}


def _moves(catalog: "Catalog", moves: "Sequence[Move]", best: "Sequence[str | None]") -> Iterator[str]:
    from ckptcache.cli.records import group_letters, id_column
    from ckptcache.cli.tables import Column, table

    records = [catalog.index.checkpoints[m.id] for m in moves]
    letters = group_letters(records, catalog)
    moved = {i for i, m in enumerate(moves) if m.place_before != m.place_after}
    columns = [
        *([Column("group", [letters[catalog.group(r)] for r in records])] if len(letters) > 1 else []),
        id_column(records, catalog),
        Column("place before", [str(m.place_before) for m in moves], right=True),
        Column("after", [str(m.place_after) for m in moves], right=True),
        Column("quality before", [words.number(m.quality_before) for m in moves], keep=50, right=True),
        Column("quality after", [words.number(m.quality_after) for m in moves], keep=60, right=True),
    ]
    yield from table(columns, strong=moved)
    if output.is_terminal():
        yield ""
        text = f"{len(moved)} of {words.count(len(moves), 'checkpoint')} would move. {_best_line(catalog, best)}"
        yield from output.wrapped(output.clean(f"{text} Nothing was changed."), "  ", first="")


def _best_line(catalog: "Catalog", best: "Sequence[str | None]") -> str:
    ids = [id for id in best if id is not None]
    short = words.short_ids(ids, catalog.index.checkpoints, catalog.index.names)
    if len(ids) < 2:
        return "None could be resumed from." if not ids else f"The best would be {short[ids[0]]}."
    return (
        f"The best stays {short[ids[0]]}."
        if ids[0] == ids[1]
        else f"The best would be {short[ids[1]]}, not {short[ids[0]]}."
    )
