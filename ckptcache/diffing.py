"""How two checkpoints differ: tensor by tensor, part by part, and in what their records say."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ckptcache import contrast, resume
from ckptcache.cache import TrainingCache
from ckptcache.catalog import Catalog
from ckptcache.difference import Diff, Form, PartDiff, TensorDiff, ValueDiff, by_change
from ckptcache.errors import CheckpointDamaged, CheckpointMissing
from ckptcache.metadata import CheckpointMetadata, Fingerprint
from ckptcache.restoring import read
from ckptcache.state.capture import NDARRAY
from ckptcache.state.measure import measure, same_bits
from ckptcache.state.names import canonical_names
from ckptcache.state.restore import RNG
from ckptcache.storage.layout import Layout

Path = tuple[Any, ...]
"""The keys and positions on the way to a leaf of a part."""
_BRANCHES = (Mapping, list, tuple, torch.Tensor)


@dataclass(frozen=True, slots=True)
class Side:
    """A checkpoint that is compared: its record, the catalogue that it stands in, and its state."""

    catalog: Catalog
    record: CheckpointMetadata
    state: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a checkpoint is found.

    Attributes:
        wanted: an id, a unique prefix of one, a name, "best" or "latest".
        untouched: leave a damaged file where it is, instead of moving it to quarantine.
    """

    cache: TrainingCache
    wanted: str
    untouched: bool = False


def sides(a: Source, b: Source, *, progress: Callable[[int, int], None] | None = None) -> tuple[Side, Side]:
    """Find two checkpoints, and only then read and verify both; the same one is read once.

    Args:
        progress: called with the bytes read so far and the bytes in all.

    Raises CheckpointNotFound, AmbiguousId, CheckpointMissing, CheckpointDamaged, NotACheckpoint or UnsafeCheckpoint.
    """
    catalogs = [source.cache.ledger.view() for source in (a, b)]
    records = [find(catalog, source.wanted) for catalog, source in zip(catalogs, (a, b), strict=True)]
    sizes = [record.size or 0 for record in records]
    states: list[Mapping[str, Any]] = []
    for number, (source, record) in enumerate(zip((a, b), records, strict=True)):
        if progress is not None:
            progress(sum(sizes[:number]), sum(sizes))
        is_same = (
            number == 1 and record.id == records[0].id and catalogs[0].root.resolve() == catalogs[1].root.resolve()
        )
        content = None if is_same else read(source.cache.ledger, record, untouched=source.untouched)
        states.append(states[0] if content is None else content.state)
    first, second = (Side(*each) for each in zip(catalogs, records, states, strict=True))
    return first, second


def side(cache: TrainingCache, wanted: str) -> Side:
    """One checkpoint, read and verified; raises what `sides` raises."""
    catalog = cache.ledger.view()
    record = find(catalog, wanted)
    return Side(catalog, record, read(cache.ledger, record).state)


def find(catalog: Catalog, wanted: str) -> CheckpointMetadata:
    """The record of a checkpoint whose file can be read, under the settings in force.

    Raises CheckpointNotFound, AmbiguousId, CheckpointMissing or CheckpointDamaged.
    """
    record = resume.find(catalog, wanted)
    status, path = catalog.status(record), Layout(catalog.root).locate(record.id)
    if status == "damaged":
        raise CheckpointDamaged(path=path, reason=catalog.observed.damaged[record.id])
    if status != "available":
        detail = record.decision_reason or catalog.observed.missing.get(record.id)
        reason = detail if status == "missing" else f"{status}: {detail}" if detail else status
        raise CheckpointMissing(id=record.id, reason=reason or "its file is gone", path=path)
    return catalog.scored(record)


# --- comparing -----------------------------------------------------------------------------------


def diff(a: Side, b: Side, *, progress: Callable[[int, int], None] | None = None) -> Diff:
    """How the state of `b` differs from that of `a`; the numbers are those of `state.measure.Measure`.

    The model's parts are those that the fingerprints name, its tensors go by canonical names.

    Args:
        progress: called with the bytes compared so far and the bytes in all.
    """
    model = _model_parts(a) | _model_parts(b)
    pairs = {
        part: (_leaves_of(a.state, part, part in model), _leaves_of(b.state, part, part in model))
        for part in dict.fromkeys([*a.state, *b.state])
    }
    tensors: list[TensorDiff] = []
    values: list[ValueDiff] = []
    meter = _Meter(progress, pairs.values())
    for part, (in_a, in_b) in pairs.items():
        tensors += _tensors(part, in_a, in_b, meter)
        values += _values(part, in_a, in_b)
    parts = [_part(name, name in model, a.state, b.state, pairs[name], tensors, values) for name in pairs]
    return Diff(sorted(tensors, key=by_change), values, parts)


def _model_parts(side: Side) -> set[str]:
    known = side.catalog.index.fingerprints.get(side.record.fingerprint or "")
    return model_parts(side.state, known)


def model_parts(state: Mapping[str, Any], known: Fingerprint | None) -> set[str]:
    """The names of the parts that the model is made of, by its fingerprint; without one, "model", or all."""
    if known is not None and known.parameters:
        found = {part for part in state if any(p == part or p.startswith(f"{part}.") for p in known.parameters)}
    else:
        found = {"model"} & set(state) or set(state)
    # Of plain tensors without a module the fingerprint names every one, those of optimizers and generators too.
    return {part for part in found if part != RNG and not _is_optimizer(state[part])} or found


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {"state", "param_groups"}


def _leaves_of(state: Mapping[str, Any], part: str, canonical: bool) -> dict[Path, Any]:
    return dict(_leaves(state[part], canonical)) if part in state else {}


def _leaves(value: Any, canonical: bool, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """What a tree ends in, by its path. An empty mapping is a leaf itself, and so is a list of nothing but values."""
    if isinstance(value, Mapping) and value:
        if set(value) == {NDARRAY}:
            yield path, value[NDARRAY]
            return
        names = canonical_names(value) if canonical and all(isinstance(key, str) for key in value) else {}
        for key, item in value.items():
            yield from _leaves(item, canonical, (*path, names.get(key, key)))
    elif type(value) in (list, tuple) and any(isinstance(item, _BRANCHES) for item in value):
        for position, item in enumerate(value):
            yield from _leaves(item, canonical, (*path, position))
    else:
        yield path, value


class _Meter:
    """Tells of the bytes that were compared."""

    def __init__(self, tell: Callable[[int, int], None] | None, leaves: Iterable[Iterable[Mapping[Path, Any]]]) -> None:
        self._tell = tell
        self._total = sum(_bytes(*side.values()) for pair in leaves for side in pair)
        self._done = 0

    def add(self, *compared: Any) -> None:
        """Count what was compared."""
        self._done += _bytes(*compared)
        if self._tell is not None:
            self._tell(self._done, self._total)


def _bytes(*leaves: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, torch.Tensor))


def _tensors(part: str, a: Mapping[Path, Any], b: Mapping[Path, Any], meter: _Meter) -> Iterator[TensorDiff]:
    for path in dict.fromkeys([*a, *b]):
        x, y = (side[path] if isinstance(side.get(path), torch.Tensor) else None for side in (a, b))
        if x is not None or y is not None:
            yield tensor_diff(part, _dotted(path), x, y)
            meter.add(x, y)


def tensor_diff(part: str, name: str, a: torch.Tensor | None, b: torch.Tensor | None) -> TensorDiff:
    """How one tensor differs; None stands for one that isn't there."""
    if a is None or b is None:
        return TensorDiff(part, name, "only_b" if a is None else "only_a", _form(a), _form(b))
    if a.shape != b.shape:
        return TensorDiff(part, name, "reshaped", _form(a), _form(b))
    found = measure(a, b)
    if found is None:
        return TensorDiff(part, name, "same" if same_bits(a, b) else "unmeasured", _form(a), _form(b))
    return TensorDiff(part, name, "same" if found.identical else "changed", _form(a), _form(b), found)


def _form(tensor: torch.Tensor | None) -> Form | None:
    return None if tensor is None else Form(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


def _values(part: str, a: Mapping[Path, Any], b: Mapping[Path, Any]) -> Iterator[ValueDiff]:
    for path in dict.fromkeys([*a, *b]):
        x, y = _value_at(a, path, b), _value_at(b, path, a)
        if not _is_same(x, y):
            yield ValueDiff(part, _dotted(path), x, y)


def _value_at(leaves: Mapping[Path, Any], path: Path, others: Mapping[Path, Any]) -> Any:
    value = leaves.get(path, contrast.ABSENT)
    # What the other side holds where this one is empty is told by itself.
    is_filled = _is_empty(value) and any(other[: len(path)] == path != other for other in others)
    return contrast.ABSENT if isinstance(value, torch.Tensor) or is_filled else value


def _is_empty(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple) and not value


def _is_same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_is_same, a, b))
    return bool(a == b or (a != a and b != b))


def _part(
    name: str,
    is_model: bool,
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    leaves: Iterable[Mapping[Path, Any]],
    tensors: Iterable[TensorDiff],
    values: Iterable[ValueDiff],
) -> PartDiff:
    own = [tensor for tensor in tensors if tensor.part == name]
    plain = {path for side in leaves for path, leaf in side.items() if not isinstance(leaf, torch.Tensor)}
    return PartDiff(
        name=name,
        is_model=is_model,
        in_a=name in a,
        in_b=name in b,
        tensors=len(own),
        tensors_differing=sum(tensor.status != "same" for tensor in own),
        values=len(plain),
        values_differing=sum(value.part == name for value in values),
    )
