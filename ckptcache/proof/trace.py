"""What a session leaves behind for `ckptcache prove`: a line for each iteration, with digests of all that it holds.

Off unless the environment names an instruction. Each line is with the system before the next step begins, so that
SIGKILL loses none.
"""

import gc
import itertools
import logging
import os
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ckptcache.proof.moments import (
    GENERATOR,
    LOADER,
    MODEL,
    OPTIMIZER,
    OTHER,
    UNREGISTERED,
    VARIABLE,
    Instruction,
)
from ckptcache.startup import Startup
from ckptcache.state.capture import to_plain, walk
from ckptcache.state.digests import digest, leaf_digests
from ckptcache.state.names import canonical_names
from ckptcache.state.rng import capture_rng, generator_access
from ckptcache.storage import fs
from ckptcache.values import as_float

log = logging.getLogger("ckptcache")
_MAX_INSTRUCTION = 1_000_000
_NUMBERS: dict[str, Iterator[int]] = {}
"""By instruction, the numbers of the sessions that this process opens."""


class Trace:
    """Records nothing: what a session has outside of a proof."""

    def policy(self, asked: str) -> str:
        """The resume policy in place of the one that the program asked for."""
        return asked

    def opened(self, objects: Mapping[str, Any], startup: Startup) -> None:
        """The session has resumed, or not; `objects` are looked at anew after each iteration."""

    def begin(self) -> None:
        """The body of an iteration begins."""

    def log(self, values: Mapping[str, Any]) -> None:
        """Something was logged, or evaluated."""

    def step(
        self, iteration: int, *, save: Callable[[], Any], settle: Callable[[], object], stop: Callable[[], object]
    ) -> None:
        """An iteration is over; does then what the instruction says of it."""

    def diverged(self) -> None:
        """The training has diverged, and is back at an earlier iteration, with other batches."""

    def end(self, iteration: int, stop_reason: str | None) -> None:
        """The session is over."""


def from_environment() -> Trace:
    """A trace, where the environment names an instruction; otherwise one that records nothing."""
    path = os.environ.get(VARIABLE)
    if not path:
        return Trace()
    instruction = Instruction.from_bytes(fs.read_bytes(Path(path), limit=_MAX_INSTRUCTION))
    return Recorder(instruction, next(_NUMBERS.setdefault(path, itertools.count(1))))


class Recorder(Trace):
    """Records one session of this process; its forked children, such as a loader's workers, record nothing."""

    def __init__(self, instruction: Instruction, number: int) -> None:
        self._instruction, self._number = instruction, number
        self._owner = os.getpid()
        self._objects: Mapping[str, Any] = {}
        self._hooks: dict[str, Any] = {}
        self._batches: list[tuple[str, str]] = []
        self._logged: dict[str, str] = {}
        self._leaves: list[tuple[str, int]] = []
        self._strangers: Strangers | None = None

    def policy(self, asked: str) -> str:
        given = self._instruction.policy(self._number, asked)
        if given != asked:
            log.warning("ckptcache prove decides how this session resumes: %s, in place of %s", given, asked)
        return given

    def opened(self, objects: Mapping[str, Any], startup: Startup) -> None:
        self._objects = objects
        self._watch()
        contents = () if startup.record is None else startup.record.contents
        opened = {
            "from": None if startup.record is None else startup.record.id,
            "iteration": startup.iteration,
            "parts": ["rng", *objects],
            "restored": [name for name in objects if name in contents],
            "fresh": [name for name in objects if name not in contents],
            "unused": [name for name in contents if name not in objects],
            "loaders": [name for name, value in objects.items() if kind_of(value) == LOADER],
            "messages": startup.messages,
        }
        # A loader that is asked for its state before its first batch may begin an epoch, and draw for that.
        still = {name: value for name, value in objects.items() if kind_of(value) != LOADER}
        self._write("start", opened=opened, **self._moment(still))

    def begin(self) -> None:
        self._watch()
        self._batches, self._logged = [], {}

    def log(self, values: Mapping[str, Any]) -> None:
        self._logged |= {name: as_float(value, name).hex() for name, value in values.items()}

    def step(
        self, iteration: int, *, save: Callable[[], Any], settle: Callable[[], object], stop: Callable[[], object]
    ) -> None:
        if self._strangers is None:
            self._strangers = Strangers(self._objects)
        self._write("step", iteration=iteration, **self._moment(self._objects))
        self._batches, self._logged = [], {}
        kill = self._instruction.kill
        if kill is not None and kill.session == self._number:
            if iteration == kill.save and (record := save()) is not None:
                self._write("saved", saved={"id": record.id, "iteration": record.iteration})
            if iteration == kill.at:
                settle()
                os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
        if iteration >= self._instruction.until.get(self._number, iteration + 1):
            stop()

    def diverged(self) -> None:
        self._append(kind="diverged", session=self._number)

    def end(self, iteration: int, stop_reason: str | None) -> None:
        for hook in self._hooks.values():
            hook.remove()
        is_whole = stop_reason not in ("error", "signal")
        ended = {"iteration": iteration, "stop_reason": stop_reason}
        self._write("end", ended=ended, **self._moment(self._objects if is_whole else {}))

    # --- what a moment holds ---------------------------------------------------------------------

    def _watch(self) -> None:
        """Listen to every registered model that is new."""
        for name, value in walk(self._objects):
            if isinstance(value, nn.Module) and name not in self._hooks:
                self._hooks[name] = value.register_forward_pre_hook(_Hook(self, name), with_kwargs=True)

    def called(self, name: str, given: Any) -> None:
        """A registered model was called in training mode."""
        self._batches.append((name, digest(given)))

    def _moment(self, objects: Mapping[str, Any]) -> dict[str, Any]:
        found = list(_leaves(objects))
        if self._strangers is not None and objects:
            found += self._strangers.leaves(objects)
        leaves = [(name, kind) for name, kind, _ in found]
        if leaves != self._leaves:
            self._leaves = leaves
            self._append(kind="leaves", names=[name for name, _ in leaves], kinds=[kind for _, kind in leaves])
        return {"batches": self._batches, "logged": self._logged, "state": "".join(d for _, _, d in found)}

    def _write(self, kind: str, **values: Any) -> None:
        self._append(kind=kind, session=self._number, **values)

    def _append(self, **line: Any) -> None:
        if os.getpid() != self._owner:
            return
        data = orjson.dumps({**line, "process": os.getpid()}, option=orjson.OPT_APPEND_NEWLINE)
        fs.append(Path(self._instruction.trace), data)


class _Hook:
    """Tells of each call of a model in training mode; a copy of the model, such as an average, brings none along."""

    def __init__(self, trace: Recorder | None = None, name: str = "") -> None:
        self._trace, self._name = trace, name

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        # A hook that compiled code ran into would break it up.
        if self._trace is not None and not torch.compiler.is_compiling() and module.training:
            self._trace.called(self._name, (args, kwargs))

    def __deepcopy__(self, _: Any) -> "_Hook":
        return _Hook()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Hook, ())


def kind_of(value: Any) -> int:
    """What an object is to a training: one of `GENERATOR` to `MODEL`."""
    if isinstance(value, nn.Module):
        return MODEL
    if isinstance(value, Optimizer):
        return OPTIMIZER
    if generator_access(value) is not None:
        return GENERATOR
    is_plain = isinstance(value, Mapping | list | tuple | set | str | torch.Tensor | np.ndarray)
    iterates = any(hasattr(value, name) for name in ("__iter__", "__next__", "next_batch"))
    return LOADER if iterates and not is_plain else OTHER


def _leaves(objects: Mapping[str, Any]) -> Iterator[tuple[str, int, str]]:
    for name, state in capture_rng().items():
        yield f"rng.{name}", GENERATOR, digest(state)
    named = _parameter_names(objects)
    for name, value in objects.items():
        kind = kind_of(value)
        if kind == GENERATOR:
            yield name, kind, digest(to_plain(value, name))
            continue
        for leaf, found in leaf_digests(to_plain(value, name), name):
            yield _with_parameter(leaf, named) if kind == OPTIMIZER else leaf, kind, found


def _parameter_names(objects: Mapping[str, Any]) -> dict[str, str]:
    """The parameter behind each number in an optimizer's state: ``optimizer.state.3`` is ``model.out.weight``."""
    by_id: dict[int, str] = {}
    for name, value in walk(objects):
        if isinstance(value, nn.Module):
            parameters = dict(value.named_parameters())
            canonical = canonical_names(parameters)
            by_id |= {id(parameter): f"{name}.{canonical[own]}" for own, parameter in parameters.items()}
    found = {}
    for name, value in objects.items():
        if isinstance(value, Optimizer):
            parameters_in_order = (p for group in value.param_groups for p in group["params"])
            for number, parameter in enumerate(parameters_in_order):
                if id(parameter) in by_id:
                    found[f"{name}.state.{number}"] = by_id[id(parameter)]
    return found


def _with_parameter(leaf: str, named: Mapping[str, str]) -> str:
    owner, _, _ = leaf.rpartition(".")
    return f"{leaf} ({named[owner]})" if owner in named else leaf


# --- what nobody registered ----------------------------------------------------------------------

_SOUGHT = (nn.Module, Optimizer, LRScheduler, torch.amp.GradScaler)


class Strangers:
    """Objects with a state of their own that live beside the registered ones, and so are not restored.

    Models that hold tensors of their own, optimizers, schedulers and scalers; and the generators that registered
    models keep as attributes. They are watched only as long as the program keeps them.
    """

    def __init__(self, registered: Mapping[str, Any]) -> None:
        self._found: dict[str, Any] = {}
        for value in _living(registered):
            base = type(value).__name__
            number = sum(name.partition("-")[0] == base for name in self._found) + 1
            self._found[base if number == 1 else f"{base}-{number}"] = weakref.ref(value)

    def leaves(self, registered: Mapping[str, Any]) -> Iterator[tuple[str, int, str]]:
        """Name, kind and digest of each leaf of their state."""
        known = {id(value) for _, value in walk(registered)}
        for name, reference in self._found.items():
            value = reference()
            if value is not None and id(value) not in known:
                for leaf, found in leaf_digests(value.state_dict(), f"{name}{UNREGISTERED}"):
                    yield leaf, kind_of(value), found
        for name, generator in _attributes(registered):
            if id(generator) not in known:
                yield f"{name}{UNREGISTERED}", GENERATOR, digest(generator_access(generator)[0]())  # type: ignore[index]


def _living(registered: Mapping[str, Any]) -> list[Any]:
    # By class, for isinstance would ask proxies, which may import half a library to answer.
    found = [value for value in gc.get_objects() if issubclass(type(value), _SOUGHT)]
    modules = [value for value in found if isinstance(value, nn.Module)]
    known = {id(value) for _, value in walk(registered)}
    known |= {id(part) for _, value in walk(registered) if isinstance(value, nn.Module) for part in value.modules()}
    inner = {id(part) for module in modules for part in module.modules() if part is not module}
    tensors = set(_tensor_ids(value for _, value in walk(registered) if isinstance(value, nn.Module)))
    return [
        value
        for value in found
        if id(value) not in known | inner
        and (not isinstance(value, nn.Module) or not tensors.issuperset(_tensor_ids([value])))
    ]


def _tensor_ids(modules: Iterable[nn.Module]) -> Iterator[int]:
    for module in modules:
        yield from (id(tensor) for tensor in itertools.chain(module.parameters(), module.buffers()))


def _attributes(registered: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The generators among the attributes of registered models."""
    for name, value in walk(registered):
        for path, part in value.named_modules() if isinstance(value, nn.Module) else ():
            for attribute, held in vars(part).items():
                if generator_access(held) is not None:
                    yield ".".join(filter(None, (name, path, attribute))), held
