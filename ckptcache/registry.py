"""What a session saves and restores: live objects by name, and plain values beside them."""

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ckptcache.errors import DuplicateName, InvalidValue
from ckptcache.overrides import optimizers_in
from ckptcache.state.capture import capture
from ckptcache.state.restore import RNG, check_fillable, from_plain, is_fillable
from ckptcache.storage.ptfile import HEADER

VALUES = "values"
"""The part that holds plain values."""
_UNCHANGING = (type(None), bool, int, float, complex, str, bytes, np.generic, torch.Size, torch.dtype, torch.device)
_NEARLY = 0.9
"""From this similarity on, by `difflib`, a name is taken for a misspelt option: one letter off, of six or more."""
_TAKEN = (RNG, HEADER, VALUES)


class Registry:
    """Registered objects, and the plain values that have no identity of their own.

    Attributes:
        objects: what is filled in place at a restore, by name.
        values: plain values by name; saved as they stand.
        without_state: loaders that can't say where they are: name to class.
    """

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        self.without_state: dict[str, str] = {}
        self._names: set[str] = set()

    def add(self, name: str, value: Any) -> Any:
        """Register `value`; returns it, or for a plain value what is kept under that name, which may be a saved one.

        Raises DuplicateName. Nothing is judged yet: see `check`.
        """
        self.check_name(name)
        self._names.add(name)
        if _is_loader_without_state(name, value):
            self.without_state[name] = type(value).__name__
        elif is_plain(value):
            return self.values.setdefault(name, value)
        else:
            self.objects[name] = value
        return value

    def check_name(self, name: str) -> None:
        """DuplicateName where a name is taken."""
        if name in self._names or name in _TAKEN:
            raise DuplicateName(name=name)

    def check(self, *, names: Iterable[str] | None = None) -> None:
        """Refuse now what could not be saved or restored after hours.

        Raises:
            NotSavable: what could not be read back.
            InvalidValue: what could not be restored, or a scheduler of an optimizer that isn't registered.
        """
        chosen = self.objects if names is None else {name: self.objects[name] for name in names if name in self.objects}
        capture({**chosen, VALUES: self.values})
        check_fillable(chosen)
        for name, value in chosen.items():
            _check_scheduler(name, value, self.objects)

    def forget(self, name: str) -> None:
        """Undo `add`."""
        self._names.discard(name)
        for held in (self.objects, self.values, self.without_state):
            held.pop(name, None)

    def state(self) -> dict[str, Any]:
        """What is saved, by part."""
        return {**self.objects, VALUES: self.values} if self.values else dict(self.objects)

    def all(self) -> Mapping[str, Any]:
        """A view of what is saved, which changes as that does."""
        return _Everything(self)

    def take_values(self, state: Mapping[str, Any]) -> None:
        """Take over the plain values that a checkpoint holds; those that it doesn't stay as the program gave them."""
        saved = state.get(VALUES)
        if isinstance(saved, Mapping):
            self.values.update(from_plain(saved))


class _Everything(Mapping[str, Any]):
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def __getitem__(self, name: str) -> Any:
        return self._registry.state()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._registry.state())

    def __len__(self) -> int:
        return len(self._registry.state())


def check_spelling(objects: Mapping[str, Any], options: Iterable[str]) -> None:
    """Refuse a value under a name that is nearly an option's: the option would stay at its default without a word.

    Raises InvalidValue.
    """
    for name, value in objects.items():
        near = [] if hasattr(value, "state_dict") else get_close_matches(name, options, n=1, cutoff=_NEARLY)
        if near:
            reason = f"there is no such option, but there is {near[0]}; a value of that name takes session.register"
            raise InvalidValue(name=name, value=value, reason=reason)


def stray_tensors(objects: Mapping[str, Any]) -> dict[str, int]:
    """How many tensors each optimizer changes that belong to no registered object, so that nothing saves them.

    Nothing is said where an object with a state of its own kind is registered: it may hold them.
    """
    optimizers = optimizers_in(objects)
    held, others = set[int](), [value for name, value in objects.items() if name not in optimizers]
    if any(map(_may_hold_anything, others)):
        return {}
    for value in others:
        held.update(map(id, _tensors_in(value)))
    strays = {
        name: sum(id(tensor) not in held for group in optimizer.param_groups for tensor in group["params"])
        for name, optimizer in optimizers.items()
    }
    return {name: number for name, number in strays.items() if number}


def _may_hold_anything(value: Any) -> bool:
    known = (torch.nn.Module, LRScheduler, torch.amp.GradScaler)
    return hasattr(value, "state_dict") and not isinstance(value, known) and not hasattr(value, "__iter__")


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, torch.nn.Module):
        yield from value.parameters()
        yield from value.buffers()
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(item)


def is_plain(value: Any) -> bool:
    """Whether a value never changes, so that it can be kept by itself: a number, text, a tuple of such."""
    if type(value) is tuple:
        return all(map(is_plain, value))
    return isinstance(value, _UNCHANGING)


def _is_loader_without_state(name: str, value: Any) -> bool:
    has_state = hasattr(value, "state_dict") and hasattr(value, "load_state_dict")
    is_loader = isinstance(value, torch.utils.data.DataLoader) or (name == "loader" and not is_fillable(value))
    return is_loader and hasattr(value, "__iter__") and not has_state and not is_plain(value)


def _check_scheduler(name: str, value: Any, objects: Mapping[str, Any]) -> None:
    driven = getattr(value, "optimizer", None)
    known = optimizers_in(objects)
    is_scheduler = isinstance(value, LRScheduler)
    if is_scheduler and isinstance(driven, Optimizer) and known and not any(driven is each for each in known.values()):
        reason = f"it drives an optimizer that isn't registered; registered are {', '.join(known)}"
        raise InvalidValue(name=name, value=type(value).__name__, reason=reason)
