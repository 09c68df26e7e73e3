"""What a difference between two checkpoints is: of one tensor, of one value, of a part, of all."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ckptcache import contrast
from ckptcache.contrast import jsonable_number
from ckptcache.state.measure import Measure, cosine, relative
from ckptcache.values import encode_float

Status = Literal["same", "changed", "reshaped", "unmeasured", "only_a", "only_b"]
_LONGEST = 200
"""Characters that are shown of a value that JSON can't hold."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a tensor is, but for its values."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"

    @property
    def is_floating(self) -> bool:
        """Whether it holds real or complex numbers, and not counters, masks or bits."""
        return "float" in self.dtype or "complex" in self.dtype

    @property
    def elements(self) -> int:
        """How many it has."""
        return math.prod(self.shape)

    def to_json(self) -> dict[str, Any]:
        """Dtype and shape."""
        return {"dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """One tensor in both checkpoints.

    Attributes:
        part: the part of the state that it belongs to, such as "model".
        name: canonical, within the part; "" where the part is the tensor.
        status: "reshaped" where the shapes differ, "unmeasured" where bits differ that mean no numbers.
        a, b: what it is in each; None where it isn't there.
        measure: None unless it is there in both, in the same shape, and has numbers.
    """

    part: str
    name: str
    status: Status
    a: Form | None
    b: Form | None
    measure: Measure | None = None

    @property
    def path(self) -> str:
        """Part and name."""
        return f"{self.part}.{self.name}" if self.name else self.part

    def to_json(self) -> dict[str, Any]:
        """As `ckptcache diff --json` prints it."""
        m = self.measure
        return {
            "part": self.part,
            "name": self.name,
            "status": self.status,
            "a": None if self.a is None else self.a.to_json(),
            "b": None if self.b is None else self.b.to_json(),
            "change": None if m is None else encode_float(m.change),
            "relative": None if m is None else encode_float(m.relative),
            "cosine": None if m is None else jsonable_number(m.cosine),
            "norm_a": None if m is None else encode_float(m.norm_a),
            "norm_b": None if m is None else encode_float(m.norm_b),
            "elements_changed": None if m is None else m.changed,
        }


@dataclass(frozen=True, slots=True)
class ValueDiff:
    """A value that is no tensor and differs: a step count, a learning rate. An absent one is `contrast.ABSENT`."""

    part: str
    name: str
    a: Any
    b: Any

    @property
    def path(self) -> str:
        """Part and name."""
        return f"{self.part}.{self.name}" if self.name else self.part

    def to_json(self) -> dict[str, Any]:
        """Part, name, and each value that is there; text stands for what JSON can't hold."""
        pairs = (("a", self.a), ("b", self.b))
        return {
            "part": self.part,
            "name": self.name,
            **{side: _shown(value) for side, value in pairs if value is not contrast.ABSENT},
        }


@dataclass(frozen=True, slots=True)
class PartDiff:
    """One part of the state: the model, the optimizer, the random number generators."""

    name: str
    is_model: bool
    in_a: bool
    in_b: bool
    tensors: int
    tensors_differing: int
    values: int
    values_differing: int

    @property
    def identical(self) -> bool:
        """Whether every tensor is the same to the bit, and every value."""
        return self.in_a and self.in_b and not self.tensors_differing and not self.values_differing

    def to_json(self) -> dict[str, Any]:
        """As `ckptcache diff --json` prints it."""
        names = ("name", "is_model", "in_a", "in_b", "tensors", "tensors_differing", "values", "values_differing")
        return {**{name: getattr(self, name) for name in names}, "identical": self.identical}


@dataclass(frozen=True, slots=True)
class Totals:
    """Over many tensors: how many stand how; norms and cosine over all that were measured, taken as one vector."""

    tensors: int
    counts: Mapping[str, int]
    elements: int
    """Of those that were measured."""
    elements_changed: int
    norm_a: float
    norm_b: float
    change: float
    relative: float
    cosine: float | None

    def to_json(self) -> dict[str, Any]:
        """As `ckptcache diff --json` prints it."""
        numbers = {name: encode_float(getattr(self, name)) for name in ("norm_a", "norm_b", "change", "relative")}
        counted = {"elements": self.elements, "elements_changed": self.elements_changed}
        return {"tensors": self.tensors, **self.counts, **counted, **numbers, "cosine": jsonable_number(self.cosine)}


@dataclass(frozen=True, slots=True)
class Diff:
    """How two states differ."""

    tensors: Sequence[TensorDiff]
    """Of all parts. First those that only one side has or whose shapes differ, then by relative change, the greatest
    (NaN above all) first, those that are the same last."""
    values: Sequence[ValueDiff]
    parts: Sequence[PartDiff]

    @property
    def identical(self) -> bool:
        """Whether the two states are the same to the bit."""
        return all(part.identical for part in self.parts)

    @property
    def model(self) -> list[TensorDiff]:
        """The model's tensors."""
        names = {part.name for part in self.parts if part.is_model}
        return [tensor for tensor in self.tensors if tensor.part in names]

    @property
    def floating(self) -> list[TensorDiff]:
        """The model's tensors of real and complex numbers: beside a counter of batches weights would not show."""
        return [t for t in self.model if all(form is None or form.is_floating for form in (t.a, t.b))]

    def to_json(self) -> dict[str, Any]:
        """Everything."""
        return {
            "identical": self.identical,
            "model_totals": totals(self.model).to_json(),
            "model_floating_totals": totals(self.floating).to_json(),
            "totals": totals(self.tensors).to_json(),
            "parts": [part.to_json() for part in self.parts],
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "values": [value.to_json() for value in self.values],
        }


def _shown(value: Any) -> Any:
    if isinstance(value, float):
        return encode_float(value)
    if value is None or isinstance(value, bool | str) or (isinstance(value, int) and abs(value) < 2**53):
        return value
    text = repr(value) if value.__class__.__module__ == "builtins" else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


# --- order and sums -------------------------------------------------------------------------------

STATUSES: Mapping[Status, int] = {"only_a": 0, "only_b": 1, "reshaped": 2, "unmeasured": 3, "changed": 4, "same": 5}


def by_change(tensor: TensorDiff) -> tuple[Any, ...]:
    amount = tensor.measure.relative if tensor.measure is not None else 0.0
    return STATUSES[tensor.status], not math.isnan(amount), 0.0 if math.isnan(amount) else -amount


def totals(tensors: Sequence[TensorDiff]) -> Totals:
    """What many tensors come to; one that stands under two names counts twice."""
    counts = Counter(tensor.status for tensor in tensors)
    measured = [(t.measure, t.a.elements) for t in tensors if t.measure is not None and t.a is not None]
    measures = [m for m, _ in measured]
    norm_a = math.hypot(*(m.norm_a for m in measures))
    norm_b = math.hypot(*(m.norm_b for m in measures))
    change = math.hypot(*(m.change for m in measures))
    return Totals(
        tensors=len(tensors),
        counts={status: counts[status] for status in STATUSES},
        elements=sum(elements for _, elements in measured),
        elements_changed=sum(m.changed for m in measures),
        norm_a=norm_a,
        norm_b=norm_b,
        change=change,
        relative=relative(change, norm_a),
        cosine=_joint_cosine(measures, norm_a, norm_b),
    )


def _joint_cosine(measures: Iterable[Measure], norm_a: float, norm_b: float) -> float | None:
    """Of all tensors as one vector: each cosine counts by its share of the norms."""
    if not (math.isfinite(norm_a) and math.isfinite(norm_b)) or not (norm_a and norm_b):
        return cosine(0.0, norm_a, norm_b)
    shares = ((m.cosine or 0.0) * (m.norm_a / norm_a) * (m.norm_b / norm_b) for m in measures)
    return cosine(sum(shares), 1.0, 1.0)
