"""From a saved tree back into live objects: all of it, or nothing.

Small fallible objects go first with their old state kept, parameters after them, the global random
number generators at the very end; any failure puts everything back.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ckptcache.errors import CkptCacheError, NotRestorable
from ckptcache.state.capture import NDARRAY, describe
from ckptcache.state.names import canonical_names
from ckptcache.state.rng import capture_rng, generator_access, restore_rng

RNG = "rng"
"""The part that holds the global random number generators."""


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What a restore did, part by part."""

    restored: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    """Objects for which the checkpoint holds nothing; they are as they were."""
    unused: tuple[str, ...] = ()
    """Parts of the checkpoint for which no object was given."""


def from_plain(value: Any) -> Any:
    """A saved tree with NumPy arrays where arrays were saved."""
    if isinstance(value, Mapping):
        if set(value) == {NDARRAY}:
            return value[NDARRAY].numpy()
        return type(value)((key, from_plain(item)) for key, item in value.items())  # type: ignore[call-arg]
    if type(value) in (list, tuple):
        return type(value)(from_plain(item) for item in value)
    return value


def apply(targets: Mapping[str, Any], state: Mapping[str, Any], *, id: str, rng: bool = True) -> RestoreReport:
    """Restore each of `targets` from the part of `state` with its name; `id` is for messages.

    Tensors, arrays, mappings and lists are filled in place. With `rng`, the global generators are
    restored from the part "rng", last.

    Raises:
        NotRestorable: a part doesn't fit its object; every object is as it was before.
    """
    pairs = sorted(((key, targets[key]) for key in targets if key in state), key=lambda pair: _order(pair[1]))
    undo: list[Callable[[], None]] = []
    try:
        for key, target in pairs:
            undo.append(_kept(target))
            _restore_one(key, target, state[key], id)
        if rng and RNG in state:
            generators = capture_rng()
            undo.append(lambda: restore_rng(generators))
            _guarded(RNG, id, lambda: restore_rng(from_plain(state[RNG])))
    except BaseException:
        for put_back in reversed(undo):
            put_back()
        raise
    restored = {key for key, _ in pairs} | ({RNG} if rng and RNG in state else set())
    return RestoreReport(
        restored=tuple(key for key in state if key in restored),
        fresh=tuple(key for key in targets if key not in state),
        unused=tuple(key for key in state if key not in restored),
    )


def _order(target: Any) -> int:
    return 2 if isinstance(target, nn.Module) else 1 if isinstance(target, torch.optim.Optimizer) else 0


def _restore_one(key: str, target: Any, saved: Any, id: str) -> None:
    if isinstance(target, nn.Module):
        _guarded(key, id, lambda: _load_module(target, saved))
    elif (access := generator_access(target)) is not None:
        _guarded(key, id, lambda: access[1](from_plain(saved)))
    elif hasattr(target, "load_state_dict"):
        _guarded(key, id, lambda: target.load_state_dict(from_plain(saved)))
    else:
        _guarded(key, id, lambda: _fill(target, from_plain(saved), key))


def _guarded(key: str, id: str, restore: Callable[[], Any]) -> None:
    try:
        restore()
    except CkptCacheError:
        raise
    except Exception as error:  # an object's own load_state_dict may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NotRestorable(key=key, id=id, reason=reason[:500].rstrip(".")) from error


# --- modules -------------------------------------------------------------------------------------


def _load_module(module: nn.Module, saved: Mapping[str, Any]) -> None:
    actual = {canonical: name for name, canonical in canonical_names(module.state_dict()).items()}
    state = {actual.get(name, name): from_plain(saved[key]) for key, name in canonical_names(saved).items()}
    for name, tensor in module.state_dict().items():
        found = state.get(name)
        if isinstance(tensor, torch.Tensor) and isinstance(found, torch.Tensor) and found.dtype != tensor.dtype:
            # torch would cast without a word.
            raise ValueError(f"{name} was saved as {describe(found)}, and the model has {describe(tensor)}")
    module.load_state_dict(state, strict=True)


# --- plain values --------------------------------------------------------------------------------


def _fill(target: Any, saved: Any, key: str) -> None:
    if isinstance(target, torch.Tensor):
        if not isinstance(saved, torch.Tensor) or saved.shape != target.shape:
            raise ValueError(f"{key} needs a tensor of shape {list(target.shape)}")
        with torch.no_grad():
            target.copy_(saved)
    elif isinstance(target, np.ndarray):
        np.copyto(target, np.asarray(saved))
    elif isinstance(target, dict) and isinstance(saved, Mapping):
        _fill_mapping(target, saved, key)
    elif isinstance(target, list) and isinstance(saved, list | tuple):
        target[:] = saved
    elif type(target) is not type(saved) or target != saved:
        raise ValueError(f"a {type(target).__name__} can't be changed in place: keep it in a dict, or use load()")


def _fill_mapping(target: dict[Any, Any], saved: Mapping[Any, Any], key: str) -> None:
    for name, value in saved.items():
        held = target.get(name)
        if isinstance(held, torch.Tensor | np.ndarray | dict | list):
            _fill(held, value, f"{key}.{name}")
        elif held is not None and hasattr(held, "load_state_dict"):
            held.load_state_dict(value)
        else:
            target[name] = value


# --- putting back --------------------------------------------------------------------------------


def _kept(target: Any) -> Callable[[], None]:
    """A function that gives `target` the state that it has now."""
    if (access := generator_access(target)) is not None:
        before = copy.deepcopy(access[0]())
        return lambda: access[1](before)
    if callable(getattr(target, "load_state_dict", None)) and callable(getattr(target, "state_dict", None)):
        state = copy.deepcopy(target.state_dict())
        return lambda: _discard(target.load_state_dict(state))
    held = copy.deepcopy(target)
    return lambda: _put_back(target, held)


def _put_back(target: Any, held: Any) -> None:
    if isinstance(target, dict):
        for name in [name for name in target if name not in held]:
            del target[name]
    _fill(target, held, "state")


def _discard(_: object) -> None:
    """`load_state_dict` may return a report; it was judged when it was given."""
