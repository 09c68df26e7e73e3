"""Checkpoints as the commands show them: as JSON, as rows of a table, as a page about one."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ckptcache import words
from ckptcache.catalog import Catalog
from ckptcache.cli import output
from ckptcache.cli.tables import Column
from ckptcache.metadata import CheckpointMetadata
from ckptcache.policy.compatibility import Group

_INDENT = " " * 16


# --- JSON ----------------------------------------------------------------------------------------


def to_json(record: CheckpointMetadata, catalog: Catalog) -> dict[str, Any]:
    """The full record under the settings in force, with its status, its names, and the group it is ranked in."""
    group = catalog.group(record)
    return {
        **catalog.scored(record).to_json(full=True),
        "status": catalog.status(record),
        "names": names_of(record.id, catalog),
        "group": f"{group.architecture[:8]}-{(group.validation or 'none')[:8]}",
    }


def names_of(id: str, catalog: Catalog) -> list[str]:
    """The names that point to a checkpoint."""
    return sorted(name for name, pointer in catalog.index.names.items() if pointer.checkpoint == id)


# --- groups --------------------------------------------------------------------------------------


def group_letters(records: Iterable[CheckpointMetadata], catalog: Catalog) -> dict[Group, str]:
    """A letter for each group, in the order in which they come."""
    groups = dict.fromkeys(catalog.group(r) for r in records)
    return {group: _letter(number) for number, group in enumerate(groups)}


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else f"G{number + 1}"


def group_legend(letters: Mapping[Group, str], catalog: Catalog) -> str:
    """What tells the groups apart, in one line."""
    described = {g: catalog.description(catalog.groups[g][0]) for g in letters}
    configs = {g: dict(d.model_config or {}) for g, d in described.items()}
    critical = catalog.config.critical_params
    keys = [k for k in dict.fromkeys(k for c in configs.values() for k in c) if critical == "all" or k in critical]
    telling = [k for k in keys if len({repr(c.get(k)) for c in configs.values()}) > 1]
    return "; ".join(f"{letter}: {_telling(g, configs[g], telling)}" for g, letter in letters.items())


def _telling(group: Group, config: Mapping[str, Any], keys: Sequence[str]) -> str:
    parts = [words.settings({k: config[k] for k in keys if k in config})] if keys else []
    parts += [] if parts and parts[0] else [f"architecture {group.architecture[:8]}"]
    parts += [f"validation data {group.validation[:8]}"] if group.validation else []
    return ", ".join(part for part in parts if part)


# --- rows ----------------------------------------------------------------------------------------


def rows(records: Sequence[CheckpointMetadata], catalog: Catalog) -> list[Column]:
    """The columns of a listing; a pipe gets all of them, with plain values."""
    return _terminal_rows(records, catalog) if output.is_terminal() else _plain_rows(records, catalog)


def places(records: Sequence[CheckpointMetadata], catalog: Catalog) -> list[str]:
    """For each record its place in its group as listed, from 1."""
    counted: dict[Group, int] = {}
    found = []
    for record in records:
        group = catalog.group(record)
        counted[group] = counted.get(group, 0) + 1
        found.append(str(counted[group]))
    return found


def id_column(records: Sequence[CheckpointMetadata], catalog: Catalog) -> Column:
    """Ids, as short as they can be typed where there is little room."""
    ids = [r.id for r in records]
    short = words.short_ids(ids, catalog.index.checkpoints, catalog.index.names)
    return Column("id", ids, short=[short[id] for id in ids], style="cyan")


def _terminal_rows(records: Sequence[CheckpointMetadata], catalog: Catalog) -> list[Column]:
    letters = group_letters(records, catalog)
    groups = [letters[catalog.group(r)] for r in records] if len(letters) > 1 else []
    statuses = [catalog.status(r) for r in records]
    columns = [
        *([Column("group", groups, keep=80)] if groups else []),
        Column("#", places(records, catalog), keep=60, right=True),
        id_column(records, catalog),
        Column("iteration", [str(r.iteration) for r in records], keep=70, right=True),
        Column("val loss", [words.number(r.val_loss) for r in records], keep=95, right=True),
        Column("quality", [words.number(r.quality_score) for r in records], keep=75, right=True),
        *([Column("status", statuses, keep=90)] if set(statuses) - {"available"} else []),
        Column("saved", [words.age(r.created_at) for r in records], keep=30),
        Column("why", [r.save_reason for r in records], keep=20),
        Column("size", [words.size(r.size) for r in records], keep=40, right=True),
    ]
    marks = [_marks(r, catalog) for r in records]
    return [*columns, Column("marks", marks, keep=50, flexible=16)] if any(marks) else columns


def _marks(record: CheckpointMetadata, catalog: Catalog) -> str:
    pinned = ["pinned"] if record.pinned else []
    pinned += ["rolled back"] if record.rolled_back is not None else []
    return ", ".join([*(f"={name}" for name in names_of(record.id, catalog)), *pinned, *record.tags])


def _plain_rows(records: Sequence[CheckpointMetadata], catalog: Catalog) -> list[Column]:
    letters = group_letters(records, catalog)
    texts: dict[str, list[str]] = {
        "group": [letters[catalog.group(r)] for r in records],
        "rank": places(records, catalog),
        "id": [r.id for r in records],
        "iteration": [str(r.iteration) for r in records],
        "val_loss": [_exact(r.val_loss) for r in records],
        "quality": [_exact(r.quality_score) for r in records],
        "status": [catalog.status(r) for r in records],
        "saved": [r.created_at for r in records],
        "reason": [r.save_reason for r in records],
        "bytes": [_exact(r.size) for r in records],
        "pinned": ["pinned" if r.pinned else "" for r in records],
        "rolled_back": ["rolled_back" if r.rolled_back is not None else "" for r in records],
        "names": [",".join(names_of(r.id, catalog)) for r in records],
        "tags": [",".join(r.tags) for r in records],
    }
    return [Column(title, cells) for title, cells in texts.items()]


def _exact(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


# --- a page about one ----------------------------------------------------------------------------


def heading(record: CheckpointMetadata, catalog: Catalog) -> list[str]:
    """The lines that say the most about a checkpoint."""
    score = catalog.scores[record.id]
    return [
        output.paint(output.clean(record.id), bold=True),
        *line("status", _status(record, catalog)),
        *line("file", _file(record, catalog)),
        *line("iteration", _iteration(record)),
        *line("val_loss", _losses(record)),
        *line("quality", score.reason.removeprefix("quality ")),
        *line("saved", _saved(record)),
        *line("names", ", ".join(names_of(record.id, catalog))),
        *line("tags", ", ".join(record.tags)),
        *line("notes", record.notes),
    ]


def line(label: str, text: str) -> list[str]:
    """A labelled line, broken where the terminal ends; none where there is nothing to say."""
    return output.wrapped(output.clean(text), _INDENT, first=f"  {label:<13} ") if text else []


def _status(record: CheckpointMetadata, catalog: Catalog) -> str:
    observed = catalog.observed.missing | catalog.observed.damaged
    detail = record.decision_reason or observed.get(record.id, "")
    status = catalog.status(record) + (f": {detail}" if detail else "")
    status += f", rolled back to {record.rolled_back}" if record.rolled_back is not None else ""
    return f"{status}, pinned" if record.pinned else status


def _file(record: CheckpointMetadata, catalog: Catalog) -> str:
    if catalog.status(record) not in ("available", "damaged"):
        return ""
    return f"{path_of(record, catalog)} ({words.size(catalog.observed.available.get(record.id, record.size))})"


def path_of(record: CheckpointMetadata, catalog: Catalog) -> str:
    """Where the file of a checkpoint is, or would be."""
    from ckptcache.storage.layout import Layout

    return str(Layout(catalog.root).locate(record.id))


def _iteration(record: CheckpointMetadata) -> str:
    return f"{record.iteration}" + (f" (epoch {record.epoch:g})" if record.epoch is not None else "")


def _losses(record: CheckpointMetadata) -> str:
    train = "" if record.train_loss is None else f"train_loss {words.number(record.train_loss)}"
    if record.val_loss is not None:
        return words.number(record.val_loss) + (f" ({train})" if train else "")
    last = words.number(record.last_val_loss)
    known = f"last {last} at iteration {record.last_val_loss_iteration}" if last else ""
    return f"not evaluated ({'; '.join(t for t in (known, train) if t)})" if known or train else "not evaluated"


def _saved(record: CheckpointMetadata) -> str:
    when = f"{record.created_at} ({words.age(record.created_at)})" if output.is_terminal() else record.created_at
    return f"{when}, {record.save_reason}" if when else record.save_reason
