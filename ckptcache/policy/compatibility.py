"""Whether a checkpoint fits the model and the data at hand, and in what it differs.

Values are compared as JSON holds them: 4 and 4.0 are the same number, 1 and true are not the same value.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from ckptcache.metadata import Fingerprint
from ckptcache.values import content_hash

Kind = Literal["exact", "other_data", "partial", "incompatible"]
What = Literal["parameter", "model_config", "data_config", "optimizer"]
CriticalParams = Collection[str] | Literal["all"]

# Keys of data_config that don't say what the data means. Where it lies, how much is taken at a time and by how
# many workers changes no token; the digests and counts say which bytes there are, and new bytes alone never reject
# (those of the validation data decide `comparable` instead).
NOT_IDENTITY = frozenset(
    {
        *("data_dir", "num_workers", "pin_memory", "persistent_workers", "prefetch_factor"),
        *("batch_size", "eval_batch_size", "micro_batch_size", "gradient_accumulation_steps"),
        *("train_digest", "train_tokens", "val_digest", "val_tokens"),
    }
)

_ABSENT = "absent"
_NAMED = 3
_MAX_TEXT = 80
_EXACT_INTEGERS = 2**53


# --- what is compared, and what comes of it ------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Description:
    """A model and its data, as they were saved or as they are needed; None is what nobody declared.

    Attributes:
        fingerprint: what was computed from the model.
        model_config: the declared configuration of the model, in values that JSON can hold.
        data_config: likewise of the data.
    """

    fingerprint: Fingerprint | None = None
    model_config: Mapping[str, Any] | None = None
    data_config: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that differs; `rejects` where it keeps the verdict from being "exact"."""

    what: What
    name: str
    saved: str
    needed: str
    rejects: bool

    def __str__(self) -> str:
        prefix = {"data_config": "data ", "optimizer": "optimizer "}.get(self.what, "")
        return f"{prefix}{self.name}: saved {self.saved}, needed {self.needed}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a checkpoint fits.

    Attributes:
        kind: "exact" can be resumed; "other_data" fits the model only; "partial" gives some weights, or
            all but no optimizer; "incompatible" gives nothing.
        comparable: whether losses were measured on the same validation bytes.
        differences: those that reject first.
        checked: False where neither the fingerprint nor a critical parameter is known on both sides, so that
            nothing speaks against the checkpoint and nothing for it.
    """

    kind: Kind
    comparable: bool
    differences: tuple[Difference, ...] = ()
    checked: bool = True

    @property
    def reason(self) -> str:
        """One sentence: what it comes to, the first few differences, and how many more there are."""
        rejecting = [d for d in self.differences if d.rejects]
        minor = [d for d in self.differences if not d.rejects]
        if rejecting:
            return f"{_OPENINGS[self.kind]}: {_listed(rejecting)}"
        return self._opening() + (f"; what differs does no harm: {_listed(minor)}" if minor else "")

    def _opening(self) -> str:
        if not self.checked:
            return "taken to fit: neither the fingerprint nor the critical parameters are known on both sides"
        return _OPENINGS[self.kind] + ("" if self.comparable else ", on other validation data")


_OPENINGS: dict[Kind, str] = {
    "exact": "fits",
    "other_data": "fits the model, but not the data",
    "partial": "fits only in part",
    "incompatible": "does not fit",
}


def _listed(differences: list[Difference]) -> str:
    text = "; ".join(str(d) for d in differences[:_NAMED])
    more = len(differences) - _NAMED
    return f"{text}; and {more} more" if more > 0 else text


# --- the verdict ---------------------------------------------------------------------------------


def judge(saved: Description, needed: Description, critical_params: CriticalParams) -> Verdict:
    """How what was saved fits what is needed; a part that one side doesn't declare is not compared."""
    config = _config_differences(saved.model_config, needed.model_config, critical_params)
    tensors = _tensor_differences(saved.fingerprint, needed.fingerprint)
    optimizers = _optimizer_differences(saved.fingerprint, needed.fingerprint)
    data = _data_differences(saved.data_config, needed.data_config)
    every = [*config, *tensors, *optimizers, *data]
    if tensors or _rejecting(config):
        kind: Kind = "partial" if _shares_a_tensor(saved.fingerprint, needed.fingerprint) else "incompatible"
    elif optimizers:
        kind = "partial"
    else:
        kind = "other_data" if _rejecting(data) else "exact"
    return Verdict(
        kind=kind,
        comparable=not _rejecting(data) and _same(_val_digest(saved), _val_digest(needed)),
        differences=tuple(sorted(every, key=lambda d: not d.rejects)),
        checked=_is_checked(saved, needed, critical_params),
    )


def _rejecting(differences: list[Difference]) -> bool:
    return any(d.rejects for d in differences)


def _config_differences(
    saved: Mapping[str, Any] | None, needed: Mapping[str, Any] | None, critical: CriticalParams
) -> list[Difference]:
    if saved is None or needed is None:
        return []
    return [
        Difference("model_config", key, _text(saved, key), _text(needed, key), critical == "all" or key in critical)
        for key in _differing(saved, needed)
    ]


def _tensor_differences(saved: Fingerprint | None, needed: Fingerprint | None) -> list[Difference]:
    if saved is None or needed is None or saved.parameters == needed.parameters:
        return []
    ours, theirs = saved.parameters, needed.parameters
    return [
        Difference("parameter", name, ours.get(name, _ABSENT), theirs.get(name, _ABSENT), True)
        for name in dict.fromkeys((*theirs, *ours))
        if ours.get(name) != theirs.get(name)
    ]


def _optimizer_differences(saved: Fingerprint | None, needed: Fingerprint | None) -> list[Difference]:
    # What was saved beyond what is needed stays unread, and is no difference.
    if saved is None or needed is None:
        return []
    ours, theirs = saved.optimizers, needed.optimizers
    return [
        Difference("optimizer", name, _text(ours, name), _text(theirs, name), True)
        for name in theirs
        if name not in ours or _differ_where_known(ours[name], theirs[name])
    ]


def _differ_where_known(saved: Mapping[str, Any], needed: Mapping[str, Any]) -> bool:
    # A bare state_dict tells the sizes of an optimizer's groups, and not its class.
    return any(not _same(saved[key], needed[key]) for key in saved.keys() & needed.keys())


def _data_differences(saved: Mapping[str, Any] | None, needed: Mapping[str, Any] | None) -> list[Difference]:
    if saved is None or needed is None:
        return []
    return [
        Difference("data_config", key, _text(saved, key), _text(needed, key), key not in NOT_IDENTITY)
        for key in _differing(saved, needed)
    ]


def _shares_a_tensor(saved: Fingerprint | None, needed: Fingerprint | None) -> bool:
    if saved is None or needed is None:
        return False
    return any(needed.parameters.get(name) == spec for name, spec in saved.parameters.items())


def _is_checked(saved: Description, needed: Description, critical: CriticalParams) -> bool:
    if saved.fingerprint is not None and needed.fingerprint is not None:
        return True
    if saved.model_config is None or needed.model_config is None:
        return False
    return bool(_critical(saved.model_config, critical) or _critical(needed.model_config, critical))


def _val_digest(description: Description) -> Any:
    return (description.data_config or {}).get("val_digest")


# --- groups --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Group:
    """Checkpoints that may be ranked against each other: one architecture, the same validation data."""

    architecture: str
    validation: str | None


def group_of(description: Description, critical_params: CriticalParams) -> Group:
    """The group that a checkpoint of this description belongs to."""
    return Group(architecture_key(description, critical_params), validation_key(description.data_config))


def architecture_key(description: Description, critical_params: CriticalParams) -> str:
    """16 hex digits: the same for two descriptions whose tensors and critical parameters agree.

    Unlike in `judge`, what is not declared counts as a value of its own: "fits as far as is known" is not
    transitive, and could not divide checkpoints into groups.
    """
    fingerprint = description.fingerprint
    return content_hash(
        {
            "parameters": None if fingerprint is None else dict(fingerprint.parameters),
            "critical": _canonical_value(_critical(description.model_config or {}, critical_params)),
        }
    )


def validation_key(data_config: Mapping[str, Any] | None) -> str | None:
    """16 hex digits: the same where losses are comparable; None where nothing says what the data is."""
    declared = data_config or {}
    identity = {key: value for key, value in declared.items() if key not in NOT_IDENTITY}
    digest = declared.get("val_digest")
    if not identity and digest is None:
        return None
    return content_hash({"identity": _canonical_value(identity), "val_digest": _canonical_value(digest)})


def _critical(config: Mapping[str, Any], critical: CriticalParams) -> dict[str, Any]:
    return {key: value for key, value in config.items() if critical == "all" or key in critical}


# --- values --------------------------------------------------------------------------------------


def _differing(saved: Mapping[str, Any], needed: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys((*needed, *saved)):
        if (key in saved) != (key in needed) or not _same(saved.get(key), needed.get(key)):
            yield key


def _same(a: Any, b: Any) -> bool:
    return a is b or _json(a) == _json(b)


def _json(value: Any) -> bytes:
    return orjson.dumps(_canonical_value(value), option=orjson.OPT_SORT_KEYS)


def _canonical_value(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT_INTEGERS:
        return int(value)
    if isinstance(value, Mapping):
        return {key: _canonical_value(v) for key, v in value.items()}
    return [_canonical_value(v) for v in value] if isinstance(value, list | tuple) else value


def _text(values: Mapping[str, Any], key: str) -> str:
    text = repr(values[key]) if key in values else _ABSENT
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 3]}..."
