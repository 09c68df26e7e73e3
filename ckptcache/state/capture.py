"""From live objects to a tree of tensors and plain values, and what that tree says about the model.

What `torch.load(weights_only=True)` could not read back is refused here, by its key, before anything
is written: a checkpoint that can be saved and never be read is worse than none.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ckptcache.errors import NotSavable
from ckptcache.metadata import Fingerprint
from ckptcache.state.names import canonical_names, canonical_prefix
from ckptcache.state.rng import generator_access

NDARRAY = "__ndarray__"
"""Marks a tensor that was a NumPy array, so that it comes back as one."""
_PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device))
_PLAIN_ALWAYS = frozenset((float, str, bool))
_KEYS = frozenset((str, int, float, bool, type(None)))
_TENSORS = frozenset((torch.Tensor, nn.Parameter, nn.Buffer))
_MAX_INT_BITS = 255 * 8
"""torch's restricted unpickler knows no longer ones."""
_REMEDY = "save its values as tensors, numbers, text, lists or mappings, or give it a state_dict()"


@dataclass(frozen=True, slots=True)
class Captured:
    """The state of some objects at one instant; its tensors still share memory with the objects."""

    state: dict[str, Any]
    fingerprint: Fingerprint
    learning_rate: tuple[float, ...]
    """One per parameter group of the first optimizer; empty without one."""

    @property
    def contents(self) -> tuple[str, ...]:
        """Names of the parts."""
        return tuple(self.state)


def capture(objects: Mapping[str, Any]) -> Captured:
    """The state of `objects`: anything with `state_dict`, generators, tensors, arrays, plain values, trees of these.

    Raises:
        NotSavable: something in it could not be read back; its key is named.
    """
    if not isinstance(objects, Mapping) or not all(isinstance(key, str) for key in objects):
        raise NotSavable(key="state", kind=f"a {type(objects).__name__}", remedy='pass a mapping: {"model": model}')
    state = {key: _part(value, key) for key, value in objects.items()}
    return Captured(state, fingerprint(objects, state), learning_rates(objects))


def _part(value: Any, key: str) -> Any:
    try:
        return to_plain(value, key)
    except RecursionError as error:
        kind = "a value that holds itself, or is nested too deeply"
        raise NotSavable(key=key, kind=kind, remedy=_REMEDY) from error


# --- values --------------------------------------------------------------------------------------


def to_plain(value: Any, key: str) -> Any:
    """`value` as tensors and plain values; raises NotSavable with the `key` of what can't be."""
    if type(value) in _PLAIN:
        return _plain_value(value, key)
    if isinstance(value, torch.Tensor):
        return _plain_tensor(value, key)
    if isinstance(value, np.ndarray):
        return {NDARRAY: _plain_array(value, key)}
    if isinstance(value, np.generic):
        return _plain_scalar(value, key)
    if isinstance(value, nn.Module):
        return module_state(value, key)
    if (access := generator_access(value)) is not None:
        return to_plain(access[0](), key)
    if callable(getattr(value, "state_dict", None)) and not isinstance(value, type):
        return to_plain(value.state_dict(), key)
    return _plain_container(value, key)


def _plain_value(value: Any, key: str) -> Any:
    if type(value) is int and value.bit_length() >= _MAX_INT_BITS:
        raise NotSavable(key=key, kind=f"a whole number of more than {_MAX_INT_BITS} bits", remedy="save it as text")
    if value == b"" and type(value) is bytes:
        raise NotSavable(key=key, kind="an empty bytes object", remedy="leave it out, or save it as text or a tensor")
    return value


def _plain_scalar(value: np.generic, key: str) -> Any:
    plain = value.item()
    if isinstance(plain, np.generic):  # Python has no number as long as numpy.longdouble
        raise NotSavable(key=key, kind=f"a NumPy {value.dtype}", remedy="save it as numpy.float64, or as text")
    return to_plain(plain, key)


def _is_plain_key(name: Any) -> bool:
    return type(name) in _KEYS or (type(name) is tuple and all(_is_plain_key(part) for part in name))


def _plain_container(value: Any, key: str) -> Any:
    if type(value) in (dict, OrderedDict, Counter):
        for name in value:
            if not _is_plain_key(name):
                raise NotSavable(key=key, kind=f"a mapping with the key {name!r}", remedy=_REMEDY)
        if set(value) == {NDARRAY}:
            raise NotSavable(
                key=key, kind=f"a mapping with {NDARRAY!r} alone", remedy="that key marks arrays: rename it"
            )
        return rebuilt(value, {name: to_plain(item, f"{key}.{name}") for name, item in value.items()})
    if type(value) in (list, tuple, set):
        return type(value)(
            item if type(item) in _PLAIN_ALWAYS else to_plain(item, f"{key}[{position}]")
            for position, item in enumerate(value)
        )
    raise NotSavable(key=key, kind=f"a {type(value).__module__}.{type(value).__qualname__}", remedy=_REMEDY)


def rebuilt(mapping: Any, items: Mapping[Any, Any]) -> Any:
    """A mapping of the same kind with other `items`, and the versions of modules that a `state_dict` carries along.

    By those `nn.Module.load_state_dict` tells whether a module was saved by older code, and has to be converted.
    """
    made = type(mapping)(items)
    if versions := versions_in(mapping):
        made._metadata = versions
    return made


def versions_in(state: Any) -> OrderedDict[str, dict[str, Any]]:
    """The version of each module in a `state_dict`, by the module's name; empty where it has none."""
    carried = getattr(state, "_metadata", None)
    return OrderedDict(
        (name, {"version": each["version"]})
        for name, each in (carried.items() if isinstance(carried, dict) else ())
        if type(name) is str and type(each) is dict and type(each.get("version")) in (int, float, str)
    )


def _plain_tensor(value: torch.Tensor, key: str) -> torch.Tensor:
    if type(value) not in _TENSORS:
        raise _foreign_tensor(value, key)
    if value.is_nested:
        raise NotSavable(key=key, kind="a nested tensor", remedy="save its parts as a list: unbind()")
    if value.is_meta:
        raise NotSavable(
            key=key, kind="a tensor on the meta device, which has no values", remedy="materialise it first"
        )
    return value.detach()


def _foreign_tensor(value: torch.Tensor, key: str) -> NotSavable:
    name = type(value).__name__
    if name == "DTensor":
        kind, remedy = "a DTensor, one shard of a distributed state", "gather it first, e.g. full_tensor()"
        return NotSavable(key=key, kind=kind, remedy=remedy)
    return NotSavable(key=key, kind=f"a tensor of class {name}", remedy="save a plain torch.Tensor")


def _plain_array(value: np.ndarray[Any, Any], key: str) -> torch.Tensor:
    if isinstance(value, np.ma.MaskedArray):
        raise NotSavable(key=key, kind="a masked NumPy array", remedy="save its data and its mask as two arrays")
    native = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("="))
    try:
        return torch.from_numpy(native.reshape(value.shape).copy())
    except TypeError as error:
        raise NotSavable(key=key, kind=f"a NumPy array of {value.dtype}", remedy="save it as numbers") from error


def module_state(module: nn.Module, key: str) -> OrderedDict[str, Any]:
    """A module's `state_dict` under canonical names: the same whether it is compiled, wrapped or plain."""
    saved = module.state_dict()
    canonical = canonical_names(saved)
    plain = OrderedDict((canonical[name], to_plain(value, f"{key}.{name}")) for name, value in saved.items())
    if versions := versions_in(saved):
        # Those of what wraps a module come before the module's own, which replace them.
        plain._metadata = OrderedDict((canonical_prefix(name), each) for name, each in versions.items())  # type: ignore[attr-defined]
    return plain


# --- what the model is ---------------------------------------------------------------------------


def fingerprint(objects: Mapping[str, Any], state: Mapping[str, Any] | None = None) -> Fingerprint:
    """Names, shapes and dtypes of the model in `objects`, and its optimizers.

    The model is every `nn.Module` in the tree; failing that, the tensors under "model"; failing
    that, every tensor. `state` is what was captured of `objects`, where that was done already.
    """
    plain = state if state is not None else {key: to_plain(value, key) for key, value in objects.items()}
    tensors = _model_tensors(objects, plain)
    optimizers = {name: value for name, value in walk_objects(objects) if isinstance(value, torch.optim.Optimizer)}
    return Fingerprint(
        parameters={name: describe(value) for name, value in tensors.items() if isinstance(value, torch.Tensor)},
        optimizers={
            **{key: found for key, value in plain.items() if (found := _optimizer_like(value)) is not None},
            **{name: _describe_optimizer(value) for name, value in optimizers.items()},
        },
    )


def _model_tensors(objects: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    modules = list(_states_of_modules(objects, plain))
    if modules:
        return {f"{name}.{k}": v for name, state in modules for k, v in state.items()}
    model = plain.get("model")
    if isinstance(model, Mapping) and all(isinstance(name, str) for name in model):
        return {f"model.{canonical}": model[name] for name, canonical in canonical_names(model).items()}
    return dict(walk_objects(plain))


def _states_of_modules(tree: Any, plain: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The path of every module in a tree, as `walk_objects` names it, and what was captured of it."""
    if isinstance(tree, nn.Module):
        yield path, plain
    for name, value in _items(tree):
        if type(value) not in _PLAIN:
            yield from _states_of_modules(value, plain[name], f"{path}.{name}" if path else str(name))


def _optimizer_like(value: Any) -> dict[str, Any] | None:
    """An optimizer's state_dict is known by its two keys; its class is not in it."""
    if not isinstance(value, Mapping) or set(value) != {"state", "param_groups"}:
        return None
    return {"param_groups": [len(group.get("params", ())) for group in value["param_groups"]]}


def describe(tensor: torch.Tensor) -> str:
    """Dtype and shape, like ``float32[256, 64]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _describe_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    return {"class": type(optimizer).__name__, "param_groups": sizes}


def learning_rates(objects: Mapping[str, Any]) -> tuple[float, ...]:
    """The learning rate of each parameter group of the first optimizer in the tree; of groups that have one."""
    for _, value in walk_objects(objects):
        if isinstance(value, torch.optim.Optimizer):
            return tuple(float(group["lr"]) for group in value.param_groups if "lr" in group)
    return ()


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors of a tree of mappings, lists, tuples and sets, in order."""
    found: list[torch.Tensor] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[torch.Tensor]) -> None:
    if isinstance(tree, torch.Tensor):
        found.append(tree)
    elif isinstance(tree, dict):
        for value in tree.values():
            _collect(value, found)
    elif type(tree) in (list, tuple, set):
        for value in tree:
            _collect(value, found)


def walk(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a tree of mappings, lists and tuples, with their dotted paths."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from walk(value, f"{path}.{key}" if path else str(key))
    elif type(tree) in (list, tuple):
        for position, value in enumerate(tree):
            yield from walk(value, f"{path}.{position}")
    else:
        yield path, tree


def walk_objects(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves that `walk` gives, but for plain values: of those there may be a million, each with a path to make."""
    if not isinstance(tree, Mapping) and type(tree) not in (list, tuple):
        yield path, tree
    for name, value in _items(tree):
        if type(value) not in _PLAIN:
            yield from walk_objects(value, f"{path}.{name}" if path else str(name))


def _items(tree: Any) -> Iterable[tuple[Any, Any]]:
    """What a mapping, list or tuple holds, by key or position; nothing of anything else."""
    if isinstance(tree, Mapping):
        return tree.items()
    return enumerate(tree) if type(tree) in (list, tuple) else ()
