"""From a saved tree back into live objects: all of it, or nothing.

Small fallible objects go first with their old state kept, parameters after them, the global random
number generators at the very end; any failure puts everything back.
"""

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from ckptcache.errors import CkptCacheError, InvalidValue, NotRestorable
from ckptcache.state.capture import NDARRAY, describe, rebuilt, tensors_in, versions_in
from ckptcache.state.exchange import Exchange, exchange_of
from ckptcache.state.names import canonical_names, canonical_prefix
from ckptcache.state.rng import capture_rng, generator_access, restore_rng

log = logging.getLogger("ckptcache")
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
        if set(value) == {NDARRAY} and isinstance(value[NDARRAY], torch.Tensor):
            return value[NDARRAY].numpy()
        return rebuilt(value, {key: from_plain(item) for key, item in value.items()})
    if type(value) in (list, tuple):
        return type(value)(from_plain(item) for item in value)
    return value


def apply(
    targets: Mapping[str, Any], state: Mapping[str, Any], *, id: str, rng: bool = True, uses_up: bool = False
) -> RestoreReport:
    """Restore each of `targets` from the part of `state` with its name; `id` is for messages.

    Tensors, arrays, mappings and lists are filled in place. With `rng`, the global generators are
    restored from the part "rng", last.

    Args:
        uses_up: whether nobody needs the parts of `state` any more that are restored; what they hold afterwards is
            then anything.

    Raises:
        NotRestorable: a part doesn't fit its object; every object is as it was before.
    """
    pairs = sorted(((key, targets[key]) for key in targets if key in state), key=lambda pair: _order(pair[1]))
    undo: list[Callable[[], None]] = []
    try:
        for key, target in pairs:
            _guarded(key, id, partial(_restore_kept, target, state, key, undo, uses_up))
        if rng and RNG in state:
            generators = capture_rng()
            undo.append(lambda: restore_rng(generators))
            _guarded(RNG, id, lambda: restore_rng(from_plain(state[RNG])))
    except BaseException:
        _put_all_back(undo)
        raise
    restored = {key for key, _ in pairs} | ({RNG} if rng and RNG in state else set())
    return RestoreReport(
        restored=tuple(key for key in state if key in restored),
        fresh=tuple(key for key in targets if key not in state),
        unused=tuple(key for key in state if key not in restored),
    )


def _order(target: Any) -> int:
    return 2 if isinstance(target, nn.Module) else 1 if isinstance(target, torch.optim.Optimizer) else 0


def _exchange(target: Any, key: str, state: Mapping[str, Any]) -> Exchange | None:
    """What restores a module without a copy of what it held; None where it takes one."""
    if not isinstance(target, nn.Module) or not isinstance(state[key], Mapping):
        return None
    others = [tensor for part in state if part != key for tensor in tensors_in(state[part])]
    if _may_share_memory(tensors_in(state[key]), others):
        return None  # another part would get what the module held
    return exchange_of(target, _under_own_names(target, state[key]))


def _may_share_memory(tensors: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    """Whether one of `others` lies in the memory of one of `tensors`; a sparse one, which has several, may."""
    if any(tensor.layout is not torch.strided for tensor in chain(tensors, others)):
        return True
    storages = {tensor.untyped_storage()._cdata for tensor in others}
    return any(tensor.untyped_storage()._cdata in storages for tensor in tensors)


def _restore_kept(
    target: Any, state: Mapping[str, Any], key: str, undo: list[Callable[[], None]], uses_up: bool
) -> None:
    if uses_up and (exchange := _exchange(target, key, state)) is not None:
        undo.append(exchange.undo)
        exchange.run()
        return
    undo.append(_kept(target))
    _restore_one(target, state[key], key)


def _put_all_back(undo: list[Callable[[], None]]) -> None:
    for put_back in reversed(undo):
        try:
            put_back()
        except Exception:  # one object that refuses its own state must not keep the others from theirs
            log.exception("an object could not be put back to what it was before the failed restore")


def _restore_one(target: Any, saved: Any, key: str) -> None:
    """Fill one object, or each object in a tree of them."""
    if isinstance(target, nn.Module):
        _load_module(target, saved)
    elif (access := generator_access(target)) is not None:
        access[1](from_plain(saved))
    elif isinstance(target, torch.optim.Optimizer):
        _load_optimizer(target, from_plain(saved))
    elif hasattr(target, "load_state_dict"):
        _check_scheduler(target, saved, key)
        target.load_state_dict(from_plain(saved))
    elif isinstance(target, dict) and isinstance(saved, Mapping):
        _restore_mapping(target, saved, key)
    elif isinstance(target, list | tuple) and any(_is_filled(item) for item in target):
        _restore_sequence(target, saved, key)
    else:
        _fill(target, from_plain(saved), key)


def _check_scheduler(target: Any, saved: Any, key: str) -> None:
    """ValueError for the state of a scheduler of another kind: torch's own would take anything for attributes."""
    if not isinstance(target, torch.optim.lr_scheduler.LRScheduler) or not isinstance(saved, Mapping):
        return
    own = target.state_dict()
    if missing := own.keys() - saved.keys():
        raise ValueError(f"{key} is a {type(target).__name__}, whose {sorted(missing)[0]} was not saved")
    counts = len(own.get("base_lrs", ())), len(saved.get("base_lrs", ()))
    if counts[0] != counts[1]:
        raise ValueError(f"{key} was saved for {counts[1]} parameter groups, and its optimizer has {counts[0]}")


def _is_filled(value: Any) -> bool:
    """Whether a value in a tree is changed in place, and not replaced by what was saved."""
    if isinstance(value, torch.Tensor | np.ndarray | dict | list) or hasattr(value, "load_state_dict"):
        return True
    return generator_access(value) is not None or (isinstance(value, tuple) and any(_is_filled(v) for v in value))


def check_fillable(targets: Mapping[str, Any]) -> None:
    """InvalidValue for a value that nothing can be restored into, since its owner would keep the old one."""
    for name, value in targets.items():
        if value is not None and not is_fillable(value):
            kind = type(value).__name__
            reason = (
                f"a value of type {kind} can't be changed in place, and so never be restored: keep it in a dict, "
                "give its class load_state_dict, or pass it to checkpoint(extra=...)"
            )
            raise InvalidValue(name=name, value=value, reason=reason)


def is_fillable(value: Any) -> bool:
    """Whether a restore can change `value` itself; a tuple, if it can all that is in it."""
    return all(is_fillable(item) for item in value) and bool(value) if isinstance(value, tuple) else _is_filled(value)


def _restore_mapping(target: dict[Any, Any], saved: Mapping[Any, Any], key: str) -> None:
    for name in [name for name in target if name not in saved]:
        if _is_live(target[name]):
            raise ValueError(f"{key}.{name} was not saved")
        del target[name]
    for name, value in saved.items():
        if _is_filled(target.get(name)):
            _restore_one(target[name], value, f"{key}.{name}")
        else:
            target[name] = from_plain(value)


def _restore_sequence(target: list[Any] | tuple[Any, ...], saved: Any, key: str) -> None:
    plain = isinstance(target, list) and not any(_holds_object(item) for item in target)
    if plain and isinstance(saved, list | tuple):
        target[:] = from_plain(saved)  # type: ignore[index]
        return
    if not isinstance(saved, list | tuple) or len(saved) != len(target):
        raise ValueError(f"{key} needs {len(target)} entries")
    for position, (item, value) in enumerate(zip(target, saved, strict=True)):
        if _is_filled(item):
            _restore_one(item, value, f"{key}[{position}]")
        elif isinstance(target, list):
            target[position] = from_plain(value)


def _holds_object(value: Any) -> bool:
    """Whether a value is, or holds, an object that what was saved of it can't replace."""
    if isinstance(value, dict):
        return any(_holds_object(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_object(item) for item in value)
    return hasattr(value, "load_state_dict") or generator_access(value) is not None


def _is_live(value: Any) -> bool:
    """Whether a value is, or holds, what its owner may hold on to: an object, a tensor or an array."""
    if isinstance(value, dict | list | tuple):
        return any(_is_live(item) for item in (value.values() if isinstance(value, dict) else value))
    return _is_filled(value)


def _guarded(key: str, id: str, restore: Callable[[], Any]) -> None:
    try:
        restore()
    except CkptCacheError:
        raise
    except Exception as error:  # an object's own load_state_dict may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NotRestorable(key=key, id=id, reason=reason[:500].rstrip(".")) from error


# --- modules -------------------------------------------------------------------------------------


def _under_own_names(module: nn.Module, saved: Mapping[str, Any]) -> dict[str, Any]:
    """What was saved, under the names that the module has for it: it may be wrapped now, or not be any more."""
    actual = {canonical: name for name, canonical in canonical_names(module.state_dict()).items()}
    return {actual.get(name, name): from_plain(saved[key]) for key, name in canonical_names(saved).items()}


def _load_module(module: nn.Module, saved: Mapping[str, Any]) -> None:
    state = _under_own_names(module, saved)
    for name, tensor in module.state_dict().items():
        found = state.get(name)
        if isinstance(tensor, torch.Tensor) and isinstance(found, torch.Tensor) and found.dtype != tensor.dtype:
            # torch would cast without a word.
            raise ValueError(f"{name} was saved as {describe(found)}, and the model has {describe(tensor)}")
    module.load_state_dict(_with_versions(state, module, saved), strict=True)


def _with_versions(state: dict[str, Any], module: nn.Module, saved: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """With the versions of what was saved, by which modules tell whether older code has saved them."""
    versions = {canonical_prefix(name): version for name, version in versions_in(saved).items()}
    dated, names = OrderedDict(state), [name for name, _ in module.named_modules(remove_duplicate=False)]
    found = OrderedDict((n, versions[canonical_prefix(n)]) for n in names if canonical_prefix(n) in versions)
    if found:
        dated._metadata = found  # type: ignore[attr-defined]
    return dated


# --- optimizers ----------------------------------------------------------------------------------


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Load, and undo what torch does on the way: it casts the state to the dtype of its parameter, which loses bits."""
    optimizer.load_state_dict(dict(saved))
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in saved["state"]:
            optimizer.state[parameter] = _uncast(optimizer.state[parameter], saved["state"][number])


def _uncast(loaded: Any, saved: Any) -> Any:
    """`loaded`, with each tensor whose dtype differs from what was saved replaced by a copy of that."""
    if isinstance(loaded, torch.Tensor) and isinstance(saved, torch.Tensor):
        is_cast = loaded.dtype != saved.dtype and loaded.shape == saved.shape
        return saved.detach().to(loaded.device, copy=True) if is_cast else loaded
    if isinstance(loaded, dict) and isinstance(saved, Mapping):
        loaded.update({name: _uncast(item, saved[name]) for name, item in loaded.items() if name in saved})
        return loaded
    if type(loaded) in (list, tuple) and isinstance(saved, list | tuple) and len(loaded) == len(saved):
        return type(loaded)(_uncast(item, was) for item, was in zip(loaded, saved, strict=True))
    return loaded


# --- plain values --------------------------------------------------------------------------------


def _fill(target: Any, saved: Any, key: str) -> None:
    if isinstance(target, torch.Tensor):
        if not isinstance(saved, torch.Tensor) or describe(saved) != describe(target):
            raise ValueError(f"{key} needs {describe(target)}, and {_said(saved)} was saved")
        with torch.no_grad():
            target.copy_(saved)
    elif isinstance(target, np.ndarray):
        # copyto alone would broadcast, and cast.
        if not isinstance(saved, np.ndarray) or saved.shape != target.shape:
            raise ValueError(f"{key} needs an array of shape {list(target.shape)}, and {_said(saved)} was saved")
        np.copyto(target, saved, casting="equiv")
    elif isinstance(target, list) and isinstance(saved, list | tuple):
        target[:] = saved
    elif type(target) is not type(saved) or target != saved:
        raise ValueError(f"a {type(target).__name__} can't be changed in place: keep it in a dict, or use load()")


def _said(saved: Any) -> str:
    if isinstance(saved, torch.Tensor):
        return describe(saved)
    if isinstance(saved, np.ndarray):
        return f"an array of {saved.dtype} of shape {list(saved.shape)}"
    return f"a {type(saved).__name__}"


# --- putting back --------------------------------------------------------------------------------


def _kept(target: Any) -> Callable[[], None]:
    """A function that gives `target`, and every object in it, the state that it has now."""
    if (access := generator_access(target)) is not None:
        before = copy.deepcopy(access[0]())
        return lambda: access[1](before)
    if isinstance(target, torch.optim.Optimizer):
        optimizer_state = _kept_optimizer(target)
        return lambda: _load_optimizer(target, optimizer_state)
    if callable(getattr(target, "load_state_dict", None)) and callable(getattr(target, "state_dict", None)):
        state = copy.deepcopy(target.state_dict())
        return lambda: _discard(target.load_state_dict(state))
    if isinstance(target, torch.Tensor):
        values = target.detach().clone()
        return lambda: _fill(target, values, "state")
    if isinstance(target, np.ndarray):
        array = target.copy()
        return lambda: np.copyto(target, array)
    if isinstance(target, dict):
        return _kept_mapping(target)
    return _kept_sequence(target) if isinstance(target, list | tuple) else lambda: None


def _kept_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = optimizer.state_dict()
    hooks = (optimizer._optimizer_load_state_dict_pre_hooks, optimizer._optimizer_load_state_dict_post_hooks)
    if type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict or any(hooks):
        return copy.deepcopy(state)
    # torch's own puts other tensors in their places, and leaves these as they are; whatever has another kind of key
    # than a parameter it takes as it is, too.
    held = {key: dict(each) if isinstance(each, dict) else copy.deepcopy(each) for key, each in state["state"].items()}
    return {**copy.deepcopy({**state, "state": {}}), "state": held}


def _kept_mapping(target: dict[Any, Any]) -> Callable[[], None]:
    items, inner = dict(target), [_kept(value) for value in target.values()]

    def put_back() -> None:
        target.clear()
        target.update(items)
        for restore in inner:
            restore()

    return put_back


def _kept_sequence(target: list[Any] | tuple[Any, ...]) -> Callable[[], None]:
    items, inner = list(target), [_kept(value) for value in target]

    def put_back() -> None:
        if isinstance(target, list):
            target[:] = items
        for restore in inner:
            restore()

    return put_back


def _discard(_: object) -> None:
    """`load_state_dict` may return a report; it was judged when it was given."""
