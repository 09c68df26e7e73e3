"""Looking: which checkpoints there are, what one holds, which is best and why, and how the sessions went."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import click

from ckptcache import words
from ckptcache.cli import output
from ckptcache.cli.options import (
    CheckpointType,
    checkpoint_argument,
    common,
    model_config_option,
    open_cache,
)

NOTHING_SUITABLE = 3


@click.command()
@click.option("--all", "everything", is_flag=True, help="Evicted, missing and quarantined ones too.")
@common
def ls(everything: bool) -> None:
    """List the checkpoints, best first.

    Those of another architecture or other validation data can't be ranked against each other: they stand in groups, the
    one used last first.

    \b
    Example:
      ckptcache ls
      ckptcache ls --all --json
    """
    from ckptcache.cli import records

    catalog = open_cache().view()
    listed = catalog.ranked(everything=everything)

    def human() -> Iterator[str]:
        from ckptcache.cli.tables import table

        groups = [catalog.group(r) for r in listed]
        ends = [i for i, (a, b) in enumerate(pairwise(groups)) if a != b]
        strong = {groups.index(g) for g in groups}
        yield from table(records.rows(listed, catalog), strong=strong, ends=ends)
        if output.is_terminal():
            yield from _below_listing(catalog, listed)

    output.finish({"checkpoints": [records.to_json(r, catalog) for r in listed]}, human)


def _below_listing(catalog: Any, listed: list[Any]) -> Iterator[str]:
    from ckptcache.cli import records

    letters = records.group_letters(listed, catalog)
    if listed:
        yield ""
    if len(letters) > 1:
        yield from output.wrapped(f"Groups: {output.clean(records.group_legend(letters, catalog))}.", "  ", first="")
    shown = {r.id for r in listed}
    hidden = [catalog.status(r) for id, r in catalog.index.checkpoints.items() if id not in shown]
    others = [f"{hidden.count(status)} {status}" for status in sorted(set(hidden))]
    text = f"{words.count(len(catalog.observed.available), 'checkpoint')} in {catalog.root}, {_room(catalog)}"
    yield from output.wrapped(output.clean(text + (f"; {', '.join(others)} (--all)" if others else "")), "  ", first="")


def _room(catalog: Any) -> str:
    used = sum(catalog.observed.available.values())
    return (
        f"{words.size(used)} (limits {catalog.config.max_checkpoints} and {words.size(catalog.config.max_cache_bytes)})"
    )


@click.command(short_help="Show all that is known of a checkpoint.")
@checkpoint_argument
@common
def show(checkpoint: str) -> None:
    """Show all that is known of a checkpoint: its file, score, configurations, parents and children.

    \b
    Example:
      ckptcache show latest
      ckptcache show ckpt_20260102_030405 --json
    """
    from ckptcache import resume
    from ckptcache.cli import records

    catalog = open_cache().ledger.view()
    record = catalog.scored(resume.find(catalog, checkpoint))
    names = ("model_config", "data_config", "training_config")
    configs = {name: catalog.index.configs.get(getattr(record, name) or "") for name in names}
    session = catalog.index.sessions.get(record.session or "")
    children = {
        "sessions": [
            s.id for s in sorted(catalog.index.sessions.values(), key=lambda s: s.order) if s.parent == record.id
        ],
        "checkpoints": [r.id for r in catalog.index.checkpoints.values() if record.id in r.parents],
    }
    document = {
        "checkpoint": records.to_json(record, catalog),
        "path": records.path_of(record, catalog),
        "configs": configs,
        "score": {"reason": catalog.scores[record.id].reason, **catalog.scores[record.id].parts},
        "session": None if session is None else session.to_json(full=True),
        "children": children,
    }

    def human() -> Iterator[str]:
        yield from records.heading(record, catalog)
        for label, text in _details(record, configs, session, children):
            yield from records.line(label, text)

    output.finish(document, human)


def _details(
    record: Any, configs: dict[str, Any], session: Any, children: dict[str, list[str]]
) -> Iterator[tuple[str, str]]:
    yield "metrics", words.settings(record.metrics)
    yield "learning_rate", ", ".join(f"{rate:g}" for rate in record.learning_rate)
    how = "took its weights" if session is not None and session.warm_start else "resumed"
    resumed = f", which {how} from {session.parent}" if session is not None and session.parent else ""
    yield "session", f"{record.session}{resumed}" if record.session else ""
    yield "parents", ", ".join(record.parents)
    yield "children", ", ".join([*children["sessions"], *children["checkpoints"]])
    yield "contents", ", ".join(record.contents)
    for name, config in configs.items():
        yield name, words.settings(config) if isinstance(config, dict) else str(config or "")
    yield "extra", words.settings(record.extra)
    yield "environment", words.settings(record.environment)
    yield "digest", record.digest or ""


@click.command(short_help="Show the checkpoint that a run would resume from.")
@click.option("--like", metavar="ID", type=CheckpointType(), help="Only what fits where this checkpoint fits.")
@model_config_option
@common
@click.pass_context
def best(ctx: click.Context, like: str | None, model_config: dict[str, Any] | None) -> None:
    """Show the checkpoint that a run would resume from. Ends with 3 when there is none.

    \b
    Example:
      ckptcache best
      ckptcache best --model-config gpt.json --json
    """
    from ckptcache.cli import records

    catalog = open_cache().view()
    needed = _needed(catalog, like, model_config)[0] if like or model_config else _anything()
    found = catalog.best(needed)

    def human() -> Iterator[str]:
        if found is not None:
            yield from records.heading(found, catalog)

    output.finish({"checkpoint": None if found is None else records.to_json(found, catalog)}, human)
    if found is None:
        count = words.count(len(catalog.index.checkpoints), "record")
        output.complain("note", f"there is no checkpoint to resume from among {count}; `ckptcache explain` says why")
        ctx.exit(NOTHING_SUITABLE)


def _anything() -> Any:
    from ckptcache.policy.compatibility import Description

    return Description()


def _needed(catalog: Any, like: str | None, model_config: dict[str, Any] | None) -> tuple[Any, str]:
    """What checkpoints are judged by, and a line that says it."""
    from ckptcache import resume
    from ckptcache.metadata import CheckpointMetadata
    from ckptcache.policy.compatibility import Description
    from ckptcache.values import jsonable

    if like and model_config is not None:
        raise click.UsageError("--like and --model-config exclude each other.")
    if model_config is not None:
        return Description(model_config=jsonable(model_config, "model_config")), "the given configuration"
    if like:
        record = resume.find(catalog, like)
        return catalog.description(record), f"what {record.id} was saved for"
    needed, source = catalog.prevailing()
    if source is None:
        return needed, "nothing: the cache is empty"
    kind = "checkpoint" if isinstance(source, CheckpointMetadata) else "session"
    return needed, f"what the newest {kind}, {source.id}, trained"


@click.command(short_help="Say why each would or would not be resumed from.")
@click.option("--like", metavar="ID", type=CheckpointType(), help="Judge by what this checkpoint was saved for.")
@model_config_option
@common
def explain(like: str | None, model_config: dict[str, Any] | None) -> None:
    """Say of each checkpoint why it would or would not be resumed from, its score taken apart.

    They stand in the order in which `resume="best"` tries them. Without an option they are judged by what the newest
    session trained, and without sessions by the newest checkpoint; a run itself also compares its live model.

    \b
    Example:
      ckptcache explain
      ckptcache explain --like latest
      ckptcache explain --model-config gpt.json
    """
    from ckptcache.cli import explaining

    catalog = open_cache().view()
    needed, source = _needed(catalog, like, model_config)
    explanations = catalog.explain(needed)
    evicted = sum(r.decision == "evicted" for r in catalog.index.checkpoints.values())
    document = {
        "judged_by": source,
        "model_config": needed.model_config,
        "data_config": needed.data_config,
        "weights": explaining.weights(catalog.config),
        "checkpoints": [e.to_json() for e in explanations],
        "evicted": evicted,
    }
    output.finish(document, lambda: explaining.lines(catalog, explanations, needed, source, evicted))


@click.command(short_help="List the sessions, and how they went.")
@common
def sessions() -> None:
    """List the sessions, oldest first: where each came from, how far it got, how its loss went.

    A session that runs is "running"; one that ended without saying so was "cut short"; of another machine it can't be
    known.

    \b
    Example:
      ckptcache sessions
    """
    from ckptcache.cli import sessionlist

    cache = open_cache()
    catalog = cache.ledger.view()
    found = sorted(catalog.index.sessions.values(), key=lambda s: s.order)
    states = sessionlist.states(found, cache.ledger.layout)
    document = {"sessions": [{**s.to_json(full=True), "state": states[s.id]} for s in found]}
    output.finish(document, lambda: sessionlist.lines(found, states, catalog))
