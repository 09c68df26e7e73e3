"""Describing a checkpoint before it is written: what it holds, what was measured, what the model is."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import orjson
import torch

from ckptcache.catalog import Catalog
from ckptcache.environment import environment
from ckptcache.errors import InvalidValue, NotSavable
from ckptcache.metadata import CheckpointMetadata, SaveReason, SessionRecord, check_id, new_checkpoint_id, utc_now
from ckptcache.policy import quality
from ckptcache.policy.compatibility import CriticalParams, Description, architecture_key
from ckptcache.state.capture import Captured, capture
from ckptcache.state.restore import RNG
from ckptcache.state.rng import is_rng_state
from ckptcache.state.staging import storages_of
from ckptcache.storage import ptfile
from ckptcache.storage.index import Index
from ckptcache.storage.reconcile import Observed, sidecar_bytes
from ckptcache.values import as_float, plain_config, text, texts

_OVERHEAD = 1 << 20
"""Bytes that a file takes beyond its tensors."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A checkpoint that is captured and described, and not yet written."""

    state: Mapping[str, Any]
    record: CheckpointMetadata
    piece: Index
    """The configurations and the fingerprint that the record names."""
    session: SessionRecord | None = None
    architecture: str = ""
    """What stands for the model in the id."""


def describe(
    state: Mapping[str, Any],
    measured: Mapping[str, Any],
    configs: Mapping[str, Any],
    described: Mapping[str, Any],
    session: SessionRecord | None,
    critical_params: CriticalParams,
) -> Draft:
    """Capture and describe; raises NotSavable or InvalidValue before anything is written."""
    _check_names(state)
    captured = capture(state)
    piece, names = _named(captured, configs)
    model_config = piece.configs.get(names["model_config"] or "")
    architecture = architecture_key(Description(captured.fingerprint, model_config), critical_params)
    numbers = _measured(measured, captured)
    record = CheckpointMetadata(
        id=new_checkpoint_id(numbers["iteration"], architecture),
        created_at=utc_now(),
        session=None if session is None else session.id,
        contents=captured.contents,
        environment=environment(),
        **names,
        **numbers,
        **_described(described),
    )
    return Draft(captured.state, record, piece, session, architecture)


def _check_names(state: Mapping[str, Any]) -> None:
    if isinstance(state, Mapping) and ptfile.HEADER in state:
        raise NotSavable(key=ptfile.HEADER, kind="named like the file's own header", remedy="give it another name")
    if isinstance(state, Mapping) and RNG in state and not is_rng_state(state[RNG]):
        kind = "named like the part for the global generators"
        raise NotSavable(key=RNG, kind=kind, remedy="give it another name, or save what capture_rng() gives")


def _named(captured: Captured, configs: Mapping[str, Any]) -> tuple[Index, dict[str, Any]]:
    """The configurations and the fingerprint as an index holds them, and their names there."""
    piece = Index()
    names: dict[str, Any] = {
        name: piece.store_config(None if value is None else _config(value, name)) for name, value in configs.items()
    }
    names["fingerprint"] = piece.store_fingerprint(captured.fingerprint)
    return piece, names


def with_new_id(draft: Draft) -> Draft:
    """The same under another id."""
    record = dataclasses.replace(draft.record, id=new_checkpoint_id(draft.record.iteration, draft.architecture))
    return dataclasses.replace(draft, record=record)


def embedded(draft: Draft) -> dict[str, Any]:
    """What stands inside the file: a sidecar without size and digest, which nobody knows before it is written."""
    document: dict[str, Any] = orjson.loads(sidecar_bytes(draft.record, draft.piece))
    return document


def file_size(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that a file of so many tensors will take, generously."""
    return sum(storage.nbytes() for storage in storages_of(tensors).values()) + _OVERHEAD


def improves(catalog: Catalog, draft: Draft) -> bool:
    """Whether the quality of a draft is better than the best available of its group by the threshold, or the first."""
    record, piece, index = draft.record, draft.piece, catalog.index.copy()
    index.checkpoints[record.id] = record
    index.configs |= piece.configs
    index.fingerprints |= piece.fingerprints
    observed = Observed(available={**catalog.observed.available, record.id: 0})
    after = Catalog(catalog.root, index, observed, catalog.config)
    best = after.best_of(after.group(record), without=record.id)
    best_quality = None if best is None else after.scores[best.id].quality
    if after.scores[record.id].status == "diverged":
        return False
    return quality.improves(after.scores[record.id].quality, best_quality, catalog.config.min_improvement_threshold)


def _measured(given: Mapping[str, Any], captured: Captured) -> dict[str, Any]:
    numbers = {
        name: None if given[name] is None else as_float(given[name], name)
        for name in ("epoch", "train_loss", "val_loss", "last_val_loss")
    }
    return {
        **numbers,
        "iteration": _iteration(given["iteration"]),
        "last_val_loss_iteration": None
        if given["last_val_loss_iteration"] is None
        else _iteration(given["last_val_loss_iteration"], "last_val_loss_iteration"),
        "metrics": {
            text(str(name), "a name in metrics"): as_float(value, f"metrics.{name}")
            for name, value in given["metrics"].items()
        },
        "learning_rate": _rates(given["learning_rate"]) or captured.learning_rate,
    }


def _iteration(value: Any, name: str = "iteration") -> int:
    try:
        number = int(value)
        is_whole = number == value and not isinstance(value, bool) and 0 <= number < 2**53
    except (TypeError, ValueError, OverflowError, RuntimeError):
        is_whole = False
    if not is_whole:
        raise InvalidValue(name=name, value=value, reason="it must be a whole number of at least 0")
    return number


def _config(value: Any, name: str) -> Mapping[str, Any]:
    plain = plain_config(value, name)
    if not isinstance(plain, dict):
        raise InvalidValue(name=name, value=value, reason="it must be a mapping, a dataclass or a namespace")
    return plain


def _described(given: Mapping[str, Any]) -> dict[str, Any]:
    """The words of a record; anything but text would make an index that can't be read again."""
    return {
        **given,
        "tags": texts(given["tags"], "tags"),
        "parents": tuple(check_id(parent) for parent in texts(given["parents"], "parents")),
        "notes": text(given["notes"], "notes"),
        "save_reason": _reason(given["save_reason"]),
    }


def _reason(given: Any) -> str:
    known = get_args(SaveReason)
    if given not in known:
        raise InvalidValue(name="save_reason", value=given, reason=f"it must be one of {', '.join(known)}")
    return str(given)


def _rates(given: float | Iterable[float] | None) -> tuple[float, ...]:
    if given is None:
        return ()
    rates = given if isinstance(given, Iterable) else (given,)
    return tuple(as_float(rate, "learning_rate") for rate in rates)
