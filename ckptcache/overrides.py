"""Settings of an optimizer that the program insists on, whatever a checkpoint says."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ckptcache.errors import InvalidValue
from ckptcache.values import as_float

_COURSE = {"max_lr", "min_lr", "swa_lr"}
"""Rates that a group is led to: OneCycleLR and SWALR keep theirs there."""


def optimizers_in(objects: Mapping[str, Any]) -> dict[str, Optimizer]:
    """The optimizers among registered objects, by name."""
    return {name: value for name, value in objects.items() if isinstance(value, Optimizer)}


def schedulers_of(optimizer: Optimizer, objects: Mapping[str, Any]) -> list[Any]:
    """The registered schedulers that drive `optimizer`, those within others too."""
    return [s for value in objects.values() for s in _nested(value) if getattr(s, "optimizer", None) is optimizer]


def _nested(value: Any) -> Iterator[Any]:
    yield value
    for inner in getattr(value, "_schedulers", ()):  # SequentialLR and ChainedScheduler keep theirs there
        yield from _nested(inner)


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The settings of each parameter group, as plain values."""
    return [{k: _plain(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def note_starting_rates(objects: Mapping[str, Any]) -> None:
    """Let each group under a ReduceLROnPlateau know the rate that it started from, as under torch's other schedulers.

    It doesn't say itself, and a rate that it has lowered could not be told from one that was set so.
    """
    for optimizer in optimizers_in(objects).values():
        if any(isinstance(s, ReduceLROnPlateau) for s in schedulers_of(optimizer, objects)):
            for group in optimizer.param_groups:
                if "lr" in group and "initial_lr" not in group:
                    rate = group["lr"]
                    group["initial_lr"] = rate.clone() if isinstance(rate, torch.Tensor) else rate


def check_overrides(overrides: Mapping[str, Any], objects: Mapping[str, Any]) -> None:
    """InvalidValue for what names no optimizer that is registered, or no setting that all its groups have."""
    optimizers = optimizers_in(objects)
    for name, settings in _by_optimizer(overrides, optimizers):
        groups = optimizers[name].param_groups
        for setting in settings:
            if setting == "params" or not all(setting in group for group in groups):
                known = ", ".join(sorted({key for group in groups for key in group if key != "params"}))
                raise InvalidValue(name="overrides", value=setting, reason=f"{name} has only {known}")


def _by_optimizer(overrides: Mapping[str, Any], optimizers: Mapping[str, Optimizer]) -> Iterator[tuple[str, Any]]:
    """``{"lr": x}`` is meant for every optimizer, ``{"optimizer": {"lr": x}}`` for one."""
    everywhere = {key: value for key, value in overrides.items() if not isinstance(value, Mapping)}
    if overrides and not optimizers:
        raise InvalidValue(name="overrides", value=dict(overrides), reason="no optimizer is registered")
    for name, settings in overrides.items():
        if isinstance(settings, Mapping) and name not in optimizers:
            reason = f"no optimizer of that name is registered, only {', '.join(optimizers)}"
            raise InvalidValue(name="overrides", value=name, reason=reason)
    for name in optimizers:
        if own := {**everywhere, **overrides.get(name, {})}:
            yield name, own


def apply_overrides(overrides: Mapping[str, Any], objects: Mapping[str, Any]) -> list[str]:
    """Put `overrides` into the registered optimizers; returns a line for each setting that was another.

    Where a scheduler drives the optimizer, ``lr`` is what the schedule starts from: the present rate changes in
    proportion, so that the schedule keeps its course.
    """
    lines = []
    optimizers = optimizers_in(objects)
    for name, settings in _by_optimizer(overrides, optimizers):
        before = settings_of(optimizers[name])
        for setting, value in settings.items():
            for number, group in enumerate(optimizers[name].param_groups):
                _set(group, setting, value, schedulers_of(optimizers[name], objects), number)
            was = [group.get("initial_lr", group["lr"]) if setting == "lr" else group[setting] for group in before]
            if any(old != value for old in was):
                lines.append(f"{name}: {setting} is {value}, as the program asks; saved was {_listed(was)}")
    return lines


def _set(group: dict[str, Any], setting: str, value: Any, schedulers: list[Any], number: int) -> None:
    if setting != "lr":
        group[setting] = value
        return
    base = float(group.get("initial_lr", group["lr"]))
    share = float(group["lr"]) / base if schedulers and base else 1.0
    value = as_float(value, "overrides.lr")
    _set_base(group, schedulers, number, value)
    _set_rate(group, "lr", value * share)


def _set_base(group: dict[str, Any], schedulers: list[Any], number: int, value: float) -> None:
    """Let the schedules of a group start from `value`; the other rates that they go through move in proportion."""
    base = float(group.get("initial_lr", group["lr"]))
    share = value / base if base else 1.0
    if "initial_lr" in group:
        _set_rate(group, "initial_lr", value)
    for key in _COURSE & group.keys() if schedulers else ():
        _set_rate(group, key, float(group[key]) * share)
    for scheduler in schedulers:
        if len(getattr(scheduler, "base_lrs", ())) > number:
            scheduler.base_lrs[number] = value
        if len(getattr(scheduler, "max_lrs", ())) > number:  # CyclicLR goes between the two
            scheduler.max_lrs[number] = float(scheduler.max_lrs[number]) * share


def _set_rate(group: dict[str, Any], key: str, value: float) -> None:
    # A rate that is a tensor is read by compiled or captured steps, and must stay the same tensor.
    if isinstance(group[key], torch.Tensor):
        group[key].fill_(value)
    else:
        group[key] = value


def scale_learning_rate(objects: Mapping[str, Any], factor: float) -> None:
    """Multiply the learning rate of every registered optimizer, and what its schedulers start from."""
    for optimizer in optimizers_in(objects).values():
        schedulers = schedulers_of(optimizer, objects)
        for number, group in enumerate(optimizer.param_groups):
            if "lr" in group:
                base = float(group.get("initial_lr", group["lr"]))
                _set_base(group, schedulers, number, base * factor)
                _set_rate(group, "lr", float(group["lr"]) * factor)


def lowered(overrides: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """`overrides` with each learning rate multiplied."""
    return {
        key: lowered(value, factor) if isinstance(value, Mapping) else value * factor if key == "lr" else value
        for key, value in overrides.items()
    }


def differences(
    given: Mapping[str, list[dict[str, Any]]], objects: Mapping[str, Any], overrides: Mapping[str, Any]
) -> list[str]:
    """A line for each setting that the program gave an optimizer, and that a checkpoint gave another value.

    Args:
        given: `settings_of` each optimizer before the restore, by name.
        overrides: what needs no such line, since it is put right.
    """
    lines = []
    insisted = dict(_by_optimizer(overrides, optimizers_in(objects)))
    for name, optimizer in optimizers_in(objects).items():
        now, before = settings_of(optimizer), given.get(name, [])
        # A scheduled rate moves: what the schedule starts from is what was set.
        rate = "initial_lr" if schedulers_of(optimizer, objects) else "lr"
        for key in dict.fromkeys(key for group in now for key in group if key == rate or not key.endswith("lr")):
            saved, asked = ([group.get(key) for group in groups] for groups in (now, before))
            if len(saved) == len(asked) and any(map(_differ, asked, saved)):
                setting = "lr" if key == rate else key
                if setting in insisted.get(name, {}):
                    continue
                lines.append(
                    f"{name}: {setting} is {_listed(saved)}, as saved, where the program gave {_listed(asked)} "
                    f'(overrides={{"{setting}": ...}} lets the program win)'
                )
    return lines


def _differ(asked: Any, saved: Any) -> bool:
    if isinstance(asked, tuple | list) and isinstance(saved, tuple | list):
        return list(asked) != list(saved)
    return type(asked) in (int, float, bool) and type(saved) in (int, float, bool) and asked != saved


def _listed(values: list[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values))
