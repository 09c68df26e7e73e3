"""From the saved weights of one model into another that is like it in part: what fits is taken, and all is said.

Only modules get anything: a warm start is a new training, whose optimizer, schedule and generators are its own.
"""

import dataclasses
import difflib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ckptcache.errors import CannotWarmStart, CkptCacheError
from ckptcache.state.capture import describe
from ckptcache.state.names import canonical_names
from ckptcache.state.renaming import KeyMap, idle, renamed
from ckptcache.state.restore import apply
from ckptcache.state.warmreport import WarmStartReport

Grow = Callable[[Mapping[str, Tensor], Mapping[str, Any] | None], Mapping[str, Tensor]]
Refusal = Callable[[str], CannotWarmStart]
GROWTH = "grown_state_dict"
"""The method by which a module says how what a smaller one has learned grows into it."""


def warm_start(
    objects: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    id: str,
    donor_config: Mapping[str, Any] | None = None,
    key_map: KeyMap | None = None,
) -> WarmStartReport:
    """Fill the modules among `objects` from what was saved under their names, as far as it fits; all of it, or nothing.

    Args:
        objects: live objects, or trees of them, by name. What is no module is left alone.
        state: a checkpoint's state.
        id: the checkpoint, for messages.
        donor_config: the saved model's configuration, for models that say how they grow.
        key_map: what saved names within a module are read as.

    Raises:
        CannotWarmStart: no parameter fits, or a model's own method failed; every object is as it was before.
        InvalidValue: `key_map` reads two saved names as one.
        NotRestorable: a module refused its state; every object is as it was before.
    """
    pairs = dict(_pairs(objects, state))
    names = {path: renamed(saved, key_map) for path, (_, saved) in pairs.items()}
    parts = {
        path: _part(module, {new: saved[old] for old, new in names[path].items()}, donor_config, _refusal(id, path))
        for path, (module, saved) in pairs.items()
    }
    if not any(_parameters(part.module) & set(part.used) for part in parts.values()):
        raise CannotWarmStart(id=id, reason=_why_nothing(parts))
    targets, filled = {p: part.module for p, part in parts.items()}, {p: part.state() for p, part in parts.items()}
    apply(targets, filled, id=id, rng=False)
    every = [name for _, saved in pairs.values() for name in saved]
    astray = {
        old: new
        for path, renames in names.items()
        for old, new in renames.items()
        if old != new and new not in parts[path].needed
    }
    return dataclasses.replace(_report(parts, pairs, names), idle=idle(every, key_map), astray=astray)


def modules_in(objects: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The modules among `objects`, by their dotted paths, as a fingerprint has them."""
    return {path: module for path, (module, _) in _pairs(objects, {})}


def growth_of(module: nn.Module) -> Grow | None:
    """How a smaller module grows into this one, by what it says itself, or the one that DDP or torch.compile wraps."""
    grower = _grower(module)
    found: Grow | None = None if grower is None else getattr(grower, GROWTH)
    return found


def _grower(module: nn.Module) -> nn.Module | None:
    while not callable(getattr(module, GROWTH, None)):
        inner = getattr(module, "_orig_mod", None) or getattr(module, "module", None)
        if not isinstance(inner, nn.Module):
            return None
        module = inner
    return module


# --- which belongs to which ----------------------------------------------------------------------


def _pairs(live: Any, saved: Any, path: str = "") -> Iterator[tuple[str, tuple[nn.Module, dict[str, Tensor]]]]:
    """Each module with the tensors that were saved in its place, by canonical name."""
    if isinstance(live, nn.Module):
        yield path, (live, _tensors(saved))
    elif isinstance(live, Mapping):
        for key, value in live.items():
            inner = saved.get(key) if isinstance(saved, Mapping) else None
            yield from _pairs(value, inner, f"{path}.{key}" if path else str(key))
    elif type(live) in (list, tuple):
        for position, value in enumerate(live):
            is_there = isinstance(saved, list | tuple) and position < len(saved)
            yield from _pairs(value, saved[position] if is_there else None, f"{path}.{position}")


def _tensors(saved: Any) -> dict[str, Tensor]:
    if not isinstance(saved, Mapping):
        return {}
    names = canonical_names([name for name in saved if isinstance(name, str)])
    return {new: saved[old] for old, new in names.items() if isinstance(saved[old], Tensor)}


@dataclass(frozen=True, slots=True)
class _Part:
    """One module, and what it gets.

    Attributes:
        donor: what was saved, by the names that it is needed under.
        needed: the module's tensors as they are, by canonical name.
        offered: what goes into it, by the same names.
    """

    module: nn.Module
    donor: Mapping[str, Tensor]
    needed: Mapping[str, Tensor]
    offered: Mapping[str, Tensor]

    @property
    def used(self) -> list[str]:
        """Names under which something that was saved goes into the module."""
        return [name for name in self.needed if name in self.offered and name in self.donor]

    def state(self) -> dict[str, Any]:
        """The module's whole state as it is to be."""
        own = self.module.state_dict()
        names = canonical_names(own)
        filled = {name: tensor.detach().to(self.needed[name].dtype) for name, tensor in self.offered.items()}
        return {**{names[name]: value for name, value in own.items()}, **filled}


# --- what goes into a module ---------------------------------------------------------------------


def _part(module: nn.Module, donor: dict[str, Tensor], config: Mapping[str, Any] | None, refusal: Refusal) -> _Part:
    live = module.state_dict()
    names = canonical_names(live)
    needed = {names[name]: value for name, value in live.items() if isinstance(value, Tensor)}
    donor |= _tied(module, names, donor)
    grower = _grower(module)
    offered = {name: tensor for name, tensor in donor.items() if name in needed and _fits(tensor, needed[name])}
    if grower is not None and donor:
        own = set(canonical_names(grower.state_dict()).values())
        # What a wrapper holds beside it, such as the count of an average, fits or doesn't, as everywhere.
        beside = {name: tensor for name, tensor in offered.items() if name not in own}
        offered = beside | _grown(partial(getattr(grower, GROWTH), donor, config), needed, refusal)
    return _Part(module, donor, needed, offered)


def _tied(module: nn.Module, names: Mapping[str, str], donor: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a tensor with two names of which one was saved, the other: else its old value would be put over the new."""
    groups: defaultdict[int, list[str]] = defaultdict(list)
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        if name in names:
            groups[id(tensor)].append(names[name])
    given: dict[str, Tensor] = {}
    for group in groups.values():
        saved = next((donor[name] for name in group if name in donor), None)
        if saved is not None:
            given |= {name: saved for name in group if name not in donor}
    return given


def _fits(saved: Tensor, live: Tensor) -> bool:
    is_castable = saved.dtype == live.dtype or (saved.is_floating_point() and live.is_floating_point())
    return saved.shape == live.shape and is_castable


def _grown(
    grow: Callable[[], Mapping[str, Tensor]], needed: Mapping[str, Tensor], refusal: Refusal
) -> dict[str, Tensor]:
    try:
        with torch.no_grad():
            offered = dict(grow())
    except CkptCacheError:
        raise
    except Exception as error:  # a model's own method may raise anything
        raise refusal(f"failed ({' '.join(str(error).split()) or type(error).__name__})") from error
    for name, tensor in offered.items():
        if name not in needed:
            raise refusal(f"gives {name!r}, which the model doesn't have")
        if not isinstance(tensor, Tensor) or tensor.shape != needed[name].shape:
            raise refusal(f"gives {_said(tensor)} for {name!r}, which is {describe(needed[name])}")
    return offered


def _said(value: Any) -> str:
    return describe(value) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _refusal(id: str, path: str) -> Refusal:
    return lambda reason: CannotWarmStart(id=id, reason=f"{GROWTH} of {path!r} {reason}")


def _parameters(module: nn.Module) -> set[str]:
    names = canonical_names(module.state_dict())
    return {names[name] for name, _ in module.named_parameters(remove_duplicate=False) if name in names}


# --- what is said --------------------------------------------------------------------------------


def _report(
    parts: Mapping[str, _Part],
    pairs: Mapping[str, tuple[nn.Module, Mapping[str, Tensor]]],
    names: Mapping[str, Mapping[str, str]],
) -> WarmStartReport:
    used = {(path, name) for path, part in parts.items() for name in part.used}
    both = [
        (f"{p}.{n}", parts[p].donor[n], live) for p in parts for n, live in parts[p].needed.items() if (p, n) in used
    ]
    return WarmStartReport(
        taken=tuple(name for name, saved, live in both if saved.shape == live.shape),
        resized={name: (tuple(s.shape), tuple(live.shape)) for name, s, live in both if s.shape != live.shape},
        fresh=tuple(f"{p}.{n}" for p, part in parts.items() for n in part.needed if (p, n) not in used),
        unused=tuple(
            f"{p}.{old}" for p, pair in pairs.items() for old in pair[1] if (p, names[p].get(old)) not in used
        ),
        cast={name: (_dtype(saved), _dtype(live)) for name, saved, live in both if saved.dtype != live.dtype},
    )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _why_nothing(parts: Mapping[str, _Part]) -> str:
    """Why no parameter was taken, by the first that looks as if it should have been."""
    if not parts:
        return "no module is registered, and only modules get weights"
    if not any(part.donor for part in parts.values()):
        return f"it holds no tensors of {', '.join(parts)}"
    reason = "it has no parameter that this model has"
    for part in parts.values():
        for name, live in part.needed.items():
            if name in part.donor and part.donor[name].shape != live.shape:
                return f"{reason}: {name} was saved as {describe(part.donor[name])}, and {describe(live)} is needed"
    close = [pair for part in parts.values() for pair in _closest(part)]
    shown = ", ".join(f"{saved!r} for {needed!r}" for saved, needed in close[:_NAMED])
    return f"{reason}; the closest saved names are {shown} (key_map reads one as the other)" if close else reason


_NAMED = 3


def _closest(part: _Part) -> Iterator[tuple[str, str]]:
    """Saved and needed names that are alike, those of the same shape before the others."""
    for name in list(part.needed)[:_NAMED]:
        alike = [saved for saved, tensor in part.donor.items() if tensor.shape == part.needed[name].shape]
        for among in (alike, list(part.donor)):
            if found := difflib.get_close_matches(name, among, n=1, cutoff=0.3):
                yield found[0], name
                break
