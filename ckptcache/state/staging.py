"""Copying state out of the training loop's way, so that the loop goes on while the file is written.

What a forward pass may change is copied at the call. Parameters, and an optimizer's own tensors, change when the
optimizer steps: they are copied by another thread, and a hook before every optimizer's step waits for the rest of
it. Whoever changes them elsewhere waits by `Staging.settle` first. Whoever forgets to is found out by the version
that torch counts in every tensor; then the state is read again, while the loop stands still.

A write through `.data`, or through memory that torch doesn't know of, counts no version and escapes that, and so does
the replay of a CUDA graph that holds the optimizer's step, which calls no hook either.
"""

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch._compile import _disable_dynamo  # torch.compiler.disable takes a second to import what it needs
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ckptcache.state.capture import rebuilt, tensors_in, walk_objects
from ckptcache.state.pieces import Placed, Work, beside, pieces, side_streams

log = logging.getLogger("ckptcache")
AT_ONCE = 16 << 20
"""Bytes that are copied at the call where a forward pass may change them: milliseconds."""
_SMALL = 1 / 8
"""Of that, what a whole state may take to be copied at the call: for less, planning the file would take longer."""
_LOOK_SECONDS = 0.05
_NO_STORAGE = 0
"""The key of a tensor that has none, such as a sparse one."""
_ATTEMPTS = 3
R = TypeVar("R")


class TakenAgain(Exception):
    """The live tensors were changed while they were copied; what was copied is of no use."""


class Staging:
    """One captured state on its way out of live tensors.

    The thread that saves makes it; another thread lays it out, copies it, and confirms that what it copied is good;
    before anything changes the live tensors, `settle` is called in the thread that would.

    It goes from planned (the pieces are known) to copied to settled: what was copied is good, or has changed. If it
    has, whoever settles is held until the live tensors were read again. `end` lets everybody go, at whatever point.

    Args:
        state: a tree as `capture` gives it, sharing memory with the live objects.
        objects: the live objects; their optimizers tell which tensors may be copied later.
    """

    def __init__(self, state: Mapping[str, Any], objects: Mapping[str, Any]) -> None:
        tensors = [(tensor, _key(tensor)) for tensor in tensors_in(state) if _is_dense(tensor)]
        storages = {key: tensor.untyped_storage() for tensor, key in tensors}
        at_once = _to_copy_at_once(storages, objects)
        self.must_settle_at_once = _total(at_once.values()) > AT_ONCE
        """Whether too much of it is anybody's to change: then the copy has to be complete when the call returns."""
        copies = {} if self.must_settle_at_once else {key: _clone(storage) for key, storage in at_once.items()}
        self.state = _moved(state, copies)
        """The same tree; what was copied at once shares nothing with the live objects any more."""
        self._live = [(tensor, _version(tensor)) for tensor, key in tensors if key not in copies]
        self._streams = side_streams(storages.values())
        self._device = torch.cuda.current_device() if self._streams else None
        self.caller = threading.current_thread()
        """The thread that saves, and is taken to be the one that changes the tensors."""
        self._work = Work()
        self._lock = threading.Lock()
        self._is_settled = not self._live
        self._must_repeat = False
        self._planned, self._copied = threading.Event(), threading.Event()
        self._held, self._repeated = threading.Event(), threading.Event()
        if not self._is_settled:
            _unsettled.add(self)

    @property
    def is_settled(self) -> bool:
        """Whether nothing of the live tensors is needed any more."""
        return self._is_settled

    @property
    def is_on_cuda(self) -> bool:
        """Whether some of it is copied from a CUDA device."""
        return bool(self._streams)

    # --- in the thread that changes tensors ------------------------------------------------------

    def settle(self) -> None:
        """Wait until the live tensors may be changed, lending a hand with what is left to copy.

        Where they were changed already, what was copied is taken again, all of it, before this returns.
        """
        if not self._is_settled:
            self._wait_for_copy()
            self._judge()
        if self._must_repeat:
            self._held.set()
            self._repeated.wait()

    def _wait_for_copy(self) -> None:
        self._planned.wait()
        with beside(self._streams):
            error = self._work.help()
        self._copied.wait()
        if error is not None and self._work.is_done:
            raise error  # of a signal's handler, then: the piece itself could be copied

    def _judge(self) -> None:
        with self._lock:
            if self._is_settled:
                return  # by another thread, or nobody reads any more
            self._must_repeat = self._has_changed()
            self._is_settled = True
        if not self._must_repeat:
            _unsettled.discard(self)
            return
        log.warning(
            "parameters were changed outside of an optimizer's step while they were saved, and are read again: "
            "call session.staged() before such a change"
        )

    # --- in the thread that saves ----------------------------------------------------------------

    def begin(self) -> None:
        """Go on with the device that was current at the call: a new thread's is the first, where others may train."""
        if self._device is not None:
            torch.cuda.set_device(self._device)

    def copy_into(self, image: memoryview, between: Iterable[tuple[int, bytes]], placed: Iterable[Placed]) -> None:
        """Fill the image of a file: `between` by offset, and each of `placed` in its place.

        Raises RuntimeError where a storage was resized since it was laid out.
        """
        for offset, content in between:
            image[offset : offset + len(content)] = content
        self._work.share(pieces(image, placed))
        self._planned.set()
        with beside(self._streams):
            self._work.finish()
        self._copied.set()

    def wait_for_device(self) -> None:
        """Wait until the training's devices have done what came before the call; what comes after changes nothing."""
        for stream in self._streams:
            stream.synchronize()

    def copied_elsewhere(self) -> None:
        """All has been read from where it is, as where there is no memory to copy it to; `end` says so of a failure."""
        self._planned.set()
        self._copied.set()

    def raise_if_changed(self) -> None:
        """Raises TakenAgain as soon as it is known that what was copied is of no use."""
        if self._must_repeat:
            raise TakenAgain

    def confirm(self) -> None:
        """Decide that what was copied is what was there at the call; raises TakenAgain if it isn't."""
        with self._lock:
            is_good = self._is_settled or not self._has_changed()
            self._is_settled = self._is_settled or is_good
        self.raise_if_changed()
        if not is_good:
            raise TakenAgain
        _unsettled.discard(self)

    @contextmanager
    def held_still(self) -> Iterator[None]:
        """After TakenAgain: wait until the thread that changes tensors stands still, or is no more; then let it go."""
        while not self._held.wait(_LOOK_SECONDS):
            # One that isn't Python's own counts as alive for ever, and a daemon may never come by again.
            if not (self.caller.is_alive() and threading.main_thread().is_alive()):
                break
        for stream in self._streams:
            torch.cuda.synchronize(stream.device)
        try:
            yield
        finally:
            self.end()

    def read_unchanged(self, read: Callable[[], R]) -> R:
        """What `read` returns, called anew where another thread has changed the tensors meanwhile.

        Raises RuntimeError where that goes on.
        """
        for _ in range(_ATTEMPTS):
            self._live = [(tensor, _version(tensor)) for tensor, _ in self._live]
            result = read()
            if not self._has_changed():
                return result
        raise RuntimeError("another thread changes the parameters without a pause: save from the one that trains")

    def end(self) -> None:
        """Nothing is read any more, whatever came of it; nobody may wait for it from here on."""
        self._is_settled = True
        _unsettled.discard(self)
        for event in (self._planned, self._copied, self._repeated):
            event.set()

    def _has_changed(self) -> bool:
        return any(_version(tensor) != version for tensor, version in self._live)


# --- before every step ---------------------------------------------------------------------------

_unsettled: set[Staging] = set()


def _before_step(*_: object) -> None:
    if _unsettled:
        _settle_all()


@_disable_dynamo
def _settle_all() -> None:
    """Not for `torch.compile`, which would trace the copying where it compiles an optimizer's step."""
    # One's own first: those of other threads may wait for this one.
    own, found = threading.current_thread(), tuple(_unsettled)
    for staging in sorted(found, key=lambda staging: staging.caller is not own):
        staging.settle()


# Of every optimizer: which of them changes what is being copied, nobody has to say. It stays for good, since a hook
# that goes while another thread runs through them would make that thread's step fail.
register_optimizer_step_pre_hook(_before_step)


# In a forked child nobody copies: its optimizers have nothing to wait for.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unsettled.clear)


# --- which tensors change when -------------------------------------------------------------------


def changed_by_steps_only(objects: Mapping[str, Any]) -> set[int]:
    """The storages that nothing but an optimizer's step is expected to change.

    Those are what the optimizers among `objects` step, their own tensors, and the frozen parameters of a module that
    one of them trains; nothing that is a module's buffer, which a forward pass may write.
    """
    found = [value for _, value in walk_objects(objects)]
    optimizers = [value for value in found if isinstance(value, Optimizer)]
    modules = [value for value in found if isinstance(value, nn.Module)]
    trained = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    kept = [t for optimizer in optimizers for state in optimizer.state.values() for t in tensors_in(state)]
    ids = {id(parameter) for parameter in trained}
    beside = [p for module in modules for p in _parameters_beside(module, ids)]
    buffers = {_key(buffer) for module in modules for buffer in module.buffers()}
    return {_key(t) for t in (*trained, *kept, *beside) if not t.is_inference()} - buffers - {_NO_STORAGE}


def tensors_of(objects: Mapping[str, Any]) -> list[torch.Tensor]:
    """What the modules and optimizers among `objects` hold; nobody's `state_dict` is called for it."""
    found = [value for _, value in walk_objects(objects)]
    modules = [value for value in found if isinstance(value, nn.Module)]
    optimizers = [value for value in found if isinstance(value, Optimizer)]
    held = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return held + [t for optimizer in optimizers for state in optimizer.state.values() for t in tensors_in(state)]


def is_small(size: int) -> bool:
    """Whether a state of `size` bytes is copied at the call, whatever changes it."""
    return size <= _SMALL * AT_ONCE


def _to_copy_at_once(
    storages: Mapping[int, torch.UntypedStorage], objects: Mapping[str, Any]
) -> Mapping[int, torch.UntypedStorage]:
    if is_small(_total(storages.values())):
        return storages
    may_wait = changed_by_steps_only(objects)
    return {key: storage for key, storage in storages.items() if key not in may_wait}


def _parameters_beside(module: nn.Module, trained: set[int]) -> list[nn.Parameter]:
    parameters = list(module.parameters())
    return parameters if any(id(parameter) in trained for parameter in parameters) else []


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized


def _key(tensor: torch.Tensor) -> int:
    """What tells a storage from every other, however many tensors share it."""
    return int(tensor.untyped_storage()._cdata) if _is_dense(tensor) else _NO_STORAGE


def storages_of(tensors: Iterable[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    """The storages that the bytes of strided tensors are in, each once, by what tells them apart."""
    found = (tensor.untyped_storage() for tensor in tensors if _is_dense(tensor))
    return {storage._cdata: storage for storage in found}


def _clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    if storage.device.type != "cpu":
        on_device: torch.UntypedStorage = storage.clone()  # type: ignore[no-untyped-call]
        return on_device
    copy = torch.UntypedStorage(storage.nbytes())  # type: ignore[no-untyped-call]
    # torch's own copy would wake its threads for each of a thousand small ones.
    ctypes.memmove(copy.data_ptr(), storage.data_ptr(), storage.nbytes())
    return copy


def _total(storages: Iterable[torch.UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages)


# --- copying at once -----------------------------------------------------------------------------


def _moved(tree: Any, copies: Mapping[int, torch.UntypedStorage]) -> Any:
    """The tree with each tensor of a copied storage on the copy; views and tied tensors stay what they are."""
    if isinstance(tree, torch.Tensor):
        return _on_copy(tree, copies)
    if isinstance(tree, dict):
        return rebuilt(tree, {name: _moved(value, copies) for name, value in tree.items()})
    if type(tree) in (list, tuple, set):
        return type(tree)(_moved(value, copies) for value in tree)
    return tree


def _on_copy(tensor: torch.Tensor, copies: Mapping[int, torch.UntypedStorage]) -> torch.Tensor:
    if not _is_dense(tensor):
        return tensor.clone()
    copy = copies.get(_key(tensor))
    if copy is None:
        return tensor
    made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    made.set_(copy, tensor.storage_offset(), tensor.shape, tensor.stride())
    made = made.conj() if tensor.is_conj() else made
    return torch._neg_view(made) if tensor.is_neg() else made
