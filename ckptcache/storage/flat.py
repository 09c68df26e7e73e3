"""The oldest layout of the index: a flat mapping of id to record, with the configurations inline."""

import logging
from collections.abc import Mapping
from typing import Any

from ckptcache.errors import InvalidValue
from ckptcache.metadata import CheckpointMetadata, is_valid_id
from ckptcache.values import content_hash, jsonable

log = logging.getLogger("ckptcache")
VERSION = 1
_RENAMED = {"checkpoint_id": "id", "timestamp": "created_at", "parent_checkpoint": "parents"}
_KEPT = ("epoch", "train_loss", "val_loss", "metrics", "tags", "notes", "created_at", "quality_score")
_CONFIGS = ("model_config", "training_config", "data_config")
_DROPPED = frozenset({"file_path", "path"})


def upgrade(document: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, CheckpointMetadata], dict[str, Any]]:
    """The records that a flat mapping of id to record amounts to, and the configurations that stood in them, by hash.

    A path in a record is never followed. What this version has no field for stays in `extra`. A record
    whose id can't be one is left out, with a warning, beside others that can.
    Raises ValueError, naming the record, when it isn't that layout.
    """
    checkpoints: dict[str, CheckpointMetadata] = {}
    configs: dict[str, Any] = {}
    records = {key: value for key, value in document.items() if is_valid_id(key)}
    for key in document.keys() - records.keys():
        if not records:
            raise ValueError(f"it has no schema_version, and {key!r} is not a record")
        log.warning("the record %r is left out, since that can't be the id of a checkpoint", key)
    for sequence, (key, flat) in enumerate(sorted(records.items(), key=_age), start=1):
        try:
            checkpoints[key] = _upgrade_record(key, sequence, flat, configs)
        except (ValueError, InvalidValue) as error:
            raise ValueError(f"the record {key!r} cannot be upgraded: {error}") from error
    return checkpoints, configs


def _age(item: tuple[str, Mapping[str, Any]]) -> tuple[str, str]:
    return str(item[1].get("created_at") or item[1].get("timestamp") or ""), item[0]


def _upgrade_record(key: str, sequence: int, flat: Mapping[str, Any], configs: dict[str, Any]) -> CheckpointMetadata:
    record = {_RENAMED.get(k, k): v for k, v in flat.items()}
    found = {name: jsonable(record[name], name) for name in _CONFIGS if record.get(name) is not None}
    named = {name: content_hash(config) for name, config in found.items()}
    configs.update({named[name]: config for name, config in found.items()})
    known = {name: record[name] for name in _KEPT if record.get(name) is not None}
    handled = {*_KEPT, *_DROPPED, *named, "id", "iteration", "learning_rate", "parents"}
    extra = {k: jsonable(v, k) for k, v in record.items() if k not in handled and v not in (None, {}, [])}
    rate, parent = record.get("learning_rate"), record.get("parents")
    return CheckpointMetadata.from_json(
        {
            **known,
            **named,
            "id": key,
            "sequence": sequence,
            "iteration": _whole(record.get("iteration")),
            "learning_rate": [] if rate is None else rate if isinstance(rate, list) else [rate],
            "parents": [parent] if is_valid_id(parent) else [],
            "extra": extra,
        }
    )


def _whole(value: Any) -> Any:
    """Old writers were not particular about 500, 500.0 and "500"."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(value) if isinstance(value, str) and value.isdecimal() else value
