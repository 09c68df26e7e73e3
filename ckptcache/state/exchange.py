"""A module's tensors and the saved ones, exchanged in place: to put back what was there, they are exchanged once more.

A copy of the module, kept for the case that something after it fails, would take fresh memory of the module's size,
and with it more time than all else that a restore does.
"""

import _thread
import ctypes
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, islice, pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from ckptcache.environment import processors

_SPAN = 4 << 20
"""Bytes that a thread takes on at once."""
_BLOCK = 256 << 10
"""Bytes that are kept aside while two blocks change places: few enough for a core's own cache."""
_ASIDE = 0
"""Stands for the address where they are kept; nothing else is there."""
_MAX_THREADS = 4
"""More would only wait for the memory."""
_LOOK_SECONDS = 0.0005
_TENSORS = frozenset((torch.Tensor, nn.Parameter, nn.Buffer))
_BY_TORCH = frozenset(vars(kind)["_load_from_state_dict"] for kind in (nn.Module, _NormBase, _InstanceNorm))
"""How torch's own modules load: where every name is there, a copy of each tensor and nothing else."""
_METHODS = ("state_dict", "load_state_dict", "get_extra_state", "set_extra_state")
_HOOKS = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_state_dict_hooks", "_state_dict_pre_hooks")
_Copy = tuple[int, int, int]
"""Where to, where from, how many bytes; to do it twice in a row does no harm."""


def exchange_of(module: nn.Module, saved: Mapping[str, Any]) -> "Exchange | None":
    """What loads `saved`, a complete state_dict of `module` that nobody else holds, as `load_state_dict` would.

    None where more has to be done than to copy every tensor, or may have to: for modules that load in a way of their
    own, on devices, and for whatever doesn't fit; `load_state_dict` knows what to do, or to say, then.
    """
    if not all(_loads_by_copying(each) for each in module.modules()):
        return None
    ours = _loaded(module)
    if ours.keys() != saved.keys() or not all(_may_change_places(ours[name], saved[name]) for name in ours):
        return None
    spans = {_span(ours[name], saved[name]) for name in ours if ours[name].numel()}
    if _overlap([(span.ours, span.length) for span in spans]) or _overlap([(s.saved, s.length) for s in spans]):
        return None
    return Exchange([(ours[name], saved[name]) for name in ours], sorted(spans, key=lambda span: span.ours))


def _loads_by_copying(module: nn.Module) -> bool:
    kind, own = type(module), vars(module)
    if any(own.get(hooks) for hooks in _HOOKS) or "load_state_dict" in own or "_load_from_state_dict" in own:
        return False
    is_torchs = all(getattr(kind, name) is getattr(nn.Module, name) for name in _METHODS)
    return is_torchs and kind._load_from_state_dict in _BY_TORCH


def _loaded(module: nn.Module) -> dict[str, torch.Tensor]:
    """What `load_state_dict` writes to, by its names; a `state_dict` may be made to hold copies instead."""
    return {
        f"{path}.{name}" if path else name: tensor.detach()
        for path, each in module.named_modules(remove_duplicate=False)
        for name, tensor in chain(each._parameters.items(), each._buffers.items())
        if tensor is not None and name not in each._non_persistent_buffers_set
    }


def _may_change_places(ours: Any, saved: Any) -> bool:
    if not (_is_plain(ours) and _is_plain(saved)) or ours.dtype != saved.dtype or ours.shape != saved.shape:
        return False
    return bool(ours.stride() == saved.stride()) and _is_dense(ours)


def _is_plain(value: Any) -> bool:
    if type(value) not in _TENSORS or value.layout is not torch.strided:
        return False
    is_as_stored = not (value.is_conj() or value.is_neg() or value.is_quantized or value.is_inference())
    return is_as_stored and value.device.type == "cpu" and _is_all_there(value)


def _is_all_there(tensor: torch.Tensor) -> bool:
    """Whether its storage holds all of it: one may be made smaller under it, as some do to save memory."""
    end = tensor.storage_offset() + 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() == 0 or tensor.untyped_storage().nbytes() >= end * tensor.element_size()


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill the memory from the first to the last, each in a place of its own."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


class _Span(NamedTuple):
    """As many bytes in each of two places."""

    ours: int
    saved: int
    length: int


def _span(ours: torch.Tensor, saved: torch.Tensor) -> _Span:
    return _Span(ours.data_ptr(), saved.data_ptr(), ours.nbytes)


def _overlap(places: Sequence[tuple[int, int]]) -> bool:
    return any(start + length > following for (start, length), (following, _) in pairwise(sorted(places)))


def _parts(spans: Sequence[_Span]) -> list[list[_Copy]]:
    """What has to be copied, in the order given within each part; the parts are independent of each other."""
    return [[*_copies(span, start)] for span in spans for start in range(0, span.length, _SPAN)]


def _copies(span: _Span, start: int) -> Iterator[_Copy]:
    end = min(start + _SPAN, span.length)
    for at in range(start, end, _BLOCK):
        length = min(_BLOCK, end - at)
        yield _ASIDE, span.ours + at, length
        yield span.ours + at, span.saved + at, length
        yield span.saved + at, _ASIDE, length


class Exchange:
    """Live tensors and saved ones that may change places, bit for bit; made by `exchange_of`."""

    def __init__(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], spans: Sequence[_Span]) -> None:
        self._pairs = pairs
        """Held, so that the addresses stay theirs."""
        self._spans = spans
        self._work: _Work | None = None

    def run(self) -> None:
        """Let them change places. What interrupts it, such as Ctrl-C, comes through when all of them have."""
        for ours, _ in self._pairs:
            _count_change(ours)
        self._work = _Work(_parts(self._spans))
        self._work.complete()

    def undo(self) -> None:
        """Put back what was there before `run`, however far that came."""
        if self._work is not None:
            # What was interrupted again while it was interrupted may have left helpers behind, at work or about to be.
            self._work.complete()
            self.run()


def _count_change(tensor: torch.Tensor) -> None:
    """Have torch count what it can't see: autograd, and a save under way, compare versions."""
    tensor.detach().as_strided((0,), (1,)).zero_()


class _Work:
    """Parts that any thread may take, all of which are done once one is, whatever interrupts the main thread."""

    def __init__(self, parts: Sequence[Sequence[_Copy]]) -> None:
        self._left = iter(parts)
        self._own = _Hand(self._left)
        self._idle = [_Hand(self._left) for _ in range(min(_MAX_THREADS, processors(), len(parts)) - 1)]
        self._helping: set[_Hand] = set()

    def complete(self) -> None:
        """Do all that is left, and raise what interrupted it afterwards."""
        interrupt: BaseException | None = None
        is_done = False
        while not is_done:
            try:
                self._start_helpers()
                self._own.go_on()
                self._wait_for_helpers()
                is_done = True
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _start_helpers(self) -> None:
        while self._idle:
            hand = self._idle.pop()
            with suppress(RuntimeError):  # no more threads: the interpreter is ending, or the system's limit is reached
                # Not threading's, in whose locks an interrupt would leave both this thread and that one.
                _thread.start_new_thread(self._help, (hand,))

    def _help(self, hand: "_Hand") -> None:
        # Known before it takes anything, so that whoever finds nothing left to take knows whom to wait for.
        self._helping.add(hand)
        hand.go_on()
        self._helping.discard(hand)

    def _wait_for_helpers(self) -> None:
        while self._helping:
            time.sleep(_LOOK_SECONDS)


class _Hand:
    """Takes one part after another and does it; may be interrupted anywhere, and then goes on where it was."""

    def __init__(self, parts: Iterator[Sequence[_Copy]]) -> None:
        self._parts = parts
        self._taken: deque[_Copy] = deque()
        self._aside = ctypes.create_string_buffer(_BLOCK)

    def go_on(self) -> None:
        """Return when nothing is left to take."""
        aside = ctypes.addressof(self._aside)
        while True:
            while self._taken:
                to, source, length = self._taken[0]
                ctypes.memmove(to or aside, source or aside, length)
                # Only now: what is interrupted before it is done again.
                self._taken.popleft()
            # One call, within which no signal is handled: between taking a part and having it, it would be lost.
            self._taken.extend(chain.from_iterable(islice(self._parts, 1)))
            if not self._taken:
                return
