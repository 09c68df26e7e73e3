"""Checkpoints to files that others read, and from files that others wrote."""

import math
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from ckptcache.errors import CheckpointMissing, CkptCacheError, ExportFailed
from ckptcache.metadata import CheckpointMetadata, is_valid_id
from ckptcache.storage import fs
from ckptcache.values import decode_float, jsonable

if TYPE_CHECKING:
    import torch

_TAKEN_FROM_FILE = ("iteration", "epoch", "train_loss", "val_loss", "metrics", "model_config", "data_config")


def export(
    state: Mapping[str, Any], record: CheckpointMetadata, path: Path, *, everything: bool, overwrite: bool
) -> Path:
    """Write the model of `state`, or `everything`, to `path`; raises ExportFailed."""
    if path.suffix not in (".pt", ".safetensors"):
        raise ExportFailed(id=record.id, path=path, reason="the file must end in .pt or .safetensors")
    if path.exists() and not overwrite:
        raise ExportFailed(id=record.id, path=path, reason="the file is there already; overwrite it, or name another")
    if not everything and "model" not in state:
        parts = ", ".join(state)
        raise ExportFailed(id=record.id, path=path, reason=f"it has no part 'model', only {parts}; export everything")
    try:
        temp = fs.TempFile(path, f"export-{secrets.token_hex(4)}")
    except OSError as error:
        raise ExportFailed(id=record.id, path=path, reason=fs.reason_of(error)) from error
    try:
        _write(temp, state if everything else state["model"], record, path.suffix, everything)
        temp.sync()
        temp.publish()
        fs.sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):  # a disk that refuses this too is heard of by what it refused first
            temp.discard()
        if isinstance(error, OSError | RuntimeError):
            raise ExportFailed(id=record.id, path=path, reason=fs.reason_behind(error)) from error
        raise
    return path


def _write(
    temp: fs.TempFile, state: Mapping[str, Any], record: CheckpointMetadata, ending: str, everything: bool
) -> None:
    from safetensors.torch import save

    from ckptcache.storage import ptfile

    if ending == ".pt":
        ptfile.write_plain(temp, _without_marks(state))
        return
    tensors = _flat_tensors(_without_marks(state))
    described = orjson.dumps(record.to_json()).decode()
    temp.write(save(tensors, metadata={"format": "pt", "ckptcache": described}))


def _without_marks(tree: Any) -> Any:
    """A saved tree with plain tensors where arrays were saved: others don't know the mark."""
    from ckptcache.state.capture import NDARRAY

    if isinstance(tree, Mapping):
        if set(tree) == {NDARRAY}:
            return tree[NDARRAY]
        return {key: _without_marks(value) for key, value in tree.items()}
    return type(tree)(map(_without_marks, tree)) if type(tree) in (list, tuple) else tree


def _flat_tensors(state: Mapping[str, Any]) -> dict[str, "torch.Tensor"]:
    """Tensors under dotted names; safetensors knows neither shared memory nor strides, so each is a copy."""
    import torch

    from ckptcache.state.capture import walk

    return {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in walk(state)
        if isinstance(value, torch.Tensor)
    }


def read_foreign(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parts of a file that something else wrote, and what it says of itself in the words of `save`.

    Raises CheckpointMissing, NotACheckpoint, UnsafeCheckpoint or CheckpointDamaged.
    """
    from ckptcache.state.restore import RNG, from_plain
    from ckptcache.state.rng import is_rng_state
    from ckptcache.storage import ptfile

    try:
        content = ptfile.read(path)
    except FileNotFoundError as error:
        raise CheckpointMissing(id=path.name, reason="there is no such file", path=path) from error
    described: dict[str, Any] = {"iteration": 0, "tags": ["imported"], "notes": f"imported from {path.name}"}
    source = dict(content.state)
    if content.record is not None:
        source |= _own_record(content.record)
        described["extra"] = source.pop("extra", {})
    elif isinstance(source.get("global_step"), int):
        source.setdefault("iteration", source["global_step"])  # as Lightning calls it
    for name in _TAKEN_FROM_FILE:
        if name in source and _is_usable(name, source[name]):
            described[name] = source[name]
    state = {key: from_plain(value) for key, value in content.state.items()}
    if RNG in state and not is_rng_state(state[RNG]):
        state[f"{RNG}_state"] = state.pop(RNG)  # elsewhere the name means something else
    return state, described


def _own_record(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a file of a cache says of itself: its record, the configurations filled in."""
    records = document.get("checkpoints")
    if not isinstance(records, dict) or len(records) != 1:
        return {}
    (id, record), configs = next(iter(records.items())), document.get("configs")
    if not is_valid_id(id) or not isinstance(record, dict) or not isinstance(configs, dict):
        return {}
    filled = {name: configs.get(record.get(name)) for name in ("model_config", "data_config")}
    return {**record, **filled, "extra": {"imported_from": id}}


def _is_usable(name: str, value: Any) -> bool:
    try:
        if name in ("model_config", "data_config"):
            return isinstance(jsonable(value), dict)
        if name == "metrics":
            return all(math.isfinite(decode_float(number, str(key))) for key, number in value.items())
        decode_float(value, name)
    except (ValueError, TypeError, AttributeError, CkptCacheError):
        return False
    return name != "iteration" or (isinstance(value, int) and value >= 0)
