"""How the difference between two checkpoints looks."""

import math
from collections.abc import Iterator, Mapping, Sequence

from ckptcache import words
from ckptcache.catalog import Catalog
from ckptcache.cli import output
from ckptcache.cli.tables import Column, setting_text, table
from ckptcache.contrast import Pair, RecordDiff, Relation
from ckptcache.difference import Diff, PartDiff, TensorDiff, totals
from ckptcache.diffing import Side

_LONGEST = 200
"""Characters of a value that a line shows; --json has all."""


def lines(a: Side, b: Side, records: RecordDiff, found: Diff, *, top: int, everything: bool) -> Iterator[str]:
    """All lines of `ckptcache diff`."""
    yield from _heading("A", a, b.catalog)
    yield from _heading("B", b, a.catalog)
    yield from _sentence(_descent(records.relation))
    yield from _set_off(table(_number_columns(records)))
    yield from _set_off(table(_setting_columns(records)))
    yield ""
    yield from _sentence(_summary(found))
    tensors = found.tensors if everything else found.model
    differing = [tensor for tensor in tensors if tensor.status != "same"]
    yield from _set_off(_tensor_lines(differing, top))
    others = [part for part in found.parts if everything or not part.is_model]
    yield from _set_off([line for part in others for line in _part_line(part)])
    if everything:
        yield from _set_off(_value_lines(found, top))


def _set_off(section: Sequence[str]) -> list[str]:
    return ["", *section] if section else []


def _sentence(text: str) -> list[str]:
    return output.wrapped(output.clean(text), "   ", first="")


# --- the records ---------------------------------------------------------------------------------


def _heading(letter: str, side: Side, other: Catalog) -> list[str]:
    record = side.record
    loss = "not evaluated" if record.val_loss is None else f"val loss {words.number(record.val_loss)}"
    where = f", in {side.catalog.root}" if side.catalog.root != other.root else ""
    head = f"{letter}  {output.paint(output.clean(record.id), fg='cyan')}"
    return [head, *output.wrapped(output.clean(f"iteration {record.iteration}, {loss}{where}"), "   ")]


def _descent(relation: Relation) -> str:
    since_a, since_b = relation.since_common or (0, 0)
    apart = words.count(abs(relation.iterations), "iteration")
    if relation.kind == "branches" and relation.common is not None:
        steps = "" if relation.since_common is None else f", A {since_a} and B {since_b} iterations after it"
        return f"A and B are branches from {relation.common}{steps}."
    return {
        "same": "A and B have the same id.",
        "ancestor": f"B was trained on from A, {apart} further.",
        "descendant": f"A was trained on from B; B is {apart} earlier.",
        "unrelated": "A and B have no recorded ancestor in common.",
    }.get(relation.kind, "Whether A and B have an ancestor in common can't be said: a record between is gone.")


def _number_columns(records: RecordDiff) -> list[Column]:
    numbers = {"iteration": records.iteration}
    numbers |= {name.replace("_", " "): pair for name, pair in records.losses.items()} | dict(records.metrics)
    rows = [(name, *_pair_cells(pair)) for name, pair in numbers.items()]
    rates = [", ".join(f"{rate:g}" for rate in rates) for rates in records.learning_rate]
    rows += [("learning rate", rates[0], rates[1], _rate_change(records))] if any(rates) else []
    titles = ("number", "A", "B", "change")
    cells = [_cropped(column) for column in zip(*rows, strict=True)]
    return [Column(t, c, right=t != "number", flexible=16) for t, c in zip(titles, cells, strict=True)]


def _pair_cells(pair: Pair) -> tuple[str, str, str]:
    change = pair.change
    sign = "" if change is None else "+" if change > 0 else "-" if change < 0 else ""
    number = _whole if {type(pair.a), type(pair.b)} == {int} else words.number
    return number(pair.a), number(pair.b), "" if change is None else f"{sign}{number(abs(change))}"


def _whole(value: float | None) -> str:
    return f"{value:.0f}"


def _rate_change(records: RecordDiff) -> str:
    a, b = records.learning_rate
    return "" if a == b else _pair_cells(Pair(a[0], b[0]))[2] if len(a) == len(b) == 1 else "differs"


def _setting_columns(records: RecordDiff) -> list[Column]:
    rows = {**records.configs, **{f"environment.{key}": pair for key, pair in records.environment.items()}}
    columns = [list(rows), *([setting_text(pair[side]) for pair in rows.values()] for side in (0, 1))]
    titles = ("setting", "A", "B")
    return [Column(t, _cropped(c), flexible=20) for t, c in zip(titles, columns, strict=True)]


def _cropped(cells: Sequence[str]) -> list[str]:
    return [cell if len(cell) <= _LONGEST else f"{cell[: _LONGEST - 3]}..." for cell in cells]


# --- the states ----------------------------------------------------------------------------------


def _summary(found: Diff) -> str:
    if found.identical:
        tensors, values = (sum(getattr(part, name) for part in found.parts) for name in ("tensors", "values"))
        return f"Identical: all {words.count(tensors, 'tensor')} and {words.count(values, 'value')} are the same."
    model = totals(found.model)
    counts: Mapping[str, int] = model.counts
    names = {
        "same": "the same",
        "changed": "changed",
        "reshaped": "of another shape",
        "unmeasured": "changed in bits without numbers",
        "only_a": "only in A",
        "only_b": "only in B",
    }
    counted = ", ".join(f"{counts[status]} {name}" for status, name in names.items() if counts[status])
    text = f"Model: {words.count(model.tensors, 'tensor')}{', ' if counted else ''}{counted}"
    floating = totals(found.floating)
    if not floating.counts["changed"]:
        return f"{text}."
    cosine = "" if floating.cosine is None else f", cosine {_cosine(floating.cosine)}"
    of = f"{words.number(floating.relative)} of ||A||{cosine}"
    return f"{text}; of its real numbers ||B - A|| is {words.number(floating.change)}, {of}."


def _tensor_lines(differing: Sequence[TensorDiff], top: int) -> list[str]:
    shown = differing[:top] if top else differing
    measures = [tensor.measure for tensor in shown]
    columns = [
        Column("tensor", [_name(t, differing) for t in shown], flexible=24, style="cyan"),
        Column("form", [_form(t) for t in shown], keep=60, flexible=16),
        Column("change", ["" if m is None else words.number(m.change) for m in measures], keep=80, right=True),
        Column("relative", [_STATUS.get(t.status) or _relative(t) for t in shown], right=True),
        Column("cosine", ["" if m is None else _cosine(m.cosine) for m in measures], keep=90, right=True),
    ]
    more = len(differing) - len(shown)
    return [*table(columns), *([f"and {more} more (--top {len(differing)}, or --json)"] if more else [])]


_STATUS = {"only_a": "only in A", "only_b": "only in B", "reshaped": "reshaped", "unmeasured": "bits"}


def _name(tensor: TensorDiff, differing: Sequence[TensorDiff]) -> str:
    alone = len({other.part for other in differing}) == 1
    return tensor.name if alone and tensor.name else tensor.path


def _form(tensor: TensorDiff) -> str:
    a, b = tensor.a or tensor.b, tensor.b or tensor.a
    return str(a) if a == b else f"{a} -> {b}"


def _relative(tensor: TensorDiff) -> str:
    return "" if tensor.measure is None else words.number(tensor.measure.relative)


def _cosine(value: float | None) -> str:
    """Six digits, but never 1 for what isn't: most of the news is in the last ones."""
    if value is None or not math.isfinite(value):
        return "" if value is None else str(value)
    return f"{value:.6f}" if abs(value) < 0.999999 or abs(value) == 1 else f"{value:.9f}"


def _part_line(part: PartDiff) -> list[str]:
    return output.wrapped(output.clean(f"{part.name}: {_standing(part)}"), "   ", first="")


def _standing(part: PartDiff) -> str:
    if not (part.in_a and part.in_b):
        return f"only in {'A' if part.in_a else 'B'}"
    if part.identical:
        return "identical"
    tensors = f"{part.tensors_differing} of {words.count(part.tensors, 'tensor')}" if part.tensors_differing else ""
    values = f"{part.values_differing} of {words.count(part.values, 'value')}" if part.values_differing else ""
    verb = "differs" if (tensors or values).startswith("1 ") and not (tensors and values) else "differ"
    return f"{' and '.join(text for text in (tensors, values) if text)} {verb}"


def _value_lines(found: Diff, top: int) -> list[str]:
    shown = found.values[:top] if top else found.values
    columns = [
        Column("value", [value.path for value in shown], flexible=24, style="cyan"),
        Column("A", _cropped([setting_text(value.a) for value in shown]), flexible=16),
        Column("B", _cropped([setting_text(value.b) for value in shown]), flexible=16),
    ]
    more = len(found.values) - len(shown)
    return [*table(columns), *([f"and {more} more (--top 0, or --json)"] if more else [])]
