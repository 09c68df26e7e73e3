"""When a training has diverged: back to the best good checkpoint, and on in another way."""

import logging
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ckptcache.cache import TrainingCache
from ckptcache.metadata import CheckpointMetadata
from ckptcache.policy.branches import lineage
from ckptcache.policy.divergence import DivergenceGuard, LossWatch
from ckptcache.registry import VALUES
from ckptcache.startup import Startup
from ckptcache.state.capture import capture, rebuilt, walk
from ckptcache.state.restore import RNG, apply
from ckptcache.state.rng import capture_rng
from ckptcache.values import as_float

log = logging.getLogger("ckptcache")


@dataclass(frozen=True, slots=True)
class Divergence:
    """What was noticed, and what is done about it; handlers of "diverged" are given it.

    Attributes:
        reason: what was noticed, in words.
        iteration: the first at which it showed.
        resumed_from: the checkpoint that training goes on from; None for the start, or where it stops.
        learning_rate_factor: by how much the learning rate was multiplied; 1.0 where it stays.
        stops: whether training ends.
    """

    reason: str
    iteration: int
    resumed_from: CheckpointMetadata | None = None
    learning_rate_factor: float = 1.0
    stops: bool = False

    def __str__(self) -> str:
        if self.stops:
            return f"training has diverged, and stops: {self.reason}"
        where = "the start" if self.resumed_from is None else f"{self.resumed_from.id}"
        at = 0 if self.resumed_from is None else self.resumed_from.iteration
        rate = "" if self.learning_rate_factor == 1 else f", the learning rate times {self.learning_rate_factor:g}"
        return (
            f"training has diverged: {self.reason}; it goes on from {where} (iteration {at}) with other batches{rate}"
        )


class Recovery:
    """Notices that a training has diverged, and knows what is to be tried next.

    Args:
        endures_overflow: whether one loss that isn't finite is ordinary, as with a `GradScaler`.
    """

    def __init__(self, guard: DivergenceGuard, *, endures_overflow: bool = False) -> None:
        self.guard = guard
        self.found: tuple[str, int] | None = None
        """Why and since when it has diverged; None while it hasn't."""
        self._endures_overflow = endures_overflow
        self._watch = self._new_watch(())
        self._waiting: deque[tuple[int, int, torch.Tensor, torch.cuda.Event]] = deque()
        self._line = ""
        """The checkpoint that the training resumed from before all this; what that came from is its own past."""
        self._began: CheckpointMetadata | None = None
        """Where the present stretch began."""
        self._sound = -1
        """The last iteration whose weights gave a loss as usual; -1 where none has yet."""
        self._left: dict[str, tuple[int, int]] = {}
        """Of each stretch that diverged: up to where it was sound, and from where it had diverged."""
        self._unsound: set[str] = set()
        """Checkpoints from which it diverged at once."""
        self._tried = 0
        self._passed: int | None = None
        """The iteration that a checkpoint must lie beyond for the count to begin anew."""
        self._start: dict[str, Any] | None = None

    def _new_watch(self, usual: Any) -> LossWatch:
        return LossWatch(self.guard, usual, endures_overflow=self._endures_overflow)

    # --- noticing --------------------------------------------------------------------------------

    def begin(self, cache: TrainingCache, startup: Startup) -> None:
        """A stretch begins: what was usual before it, the index may tell."""
        if self._began is None and startup.record is not None and not self._left:
            self._line = startup.record.id
        self.found, self._began, self._sound = None, startup.record, -1
        self._waiting.clear()
        self._watch = self._new_watch(losses_before(cache, startup.record))

    def logged(self, iteration: int, loss: Any, weights_of: int) -> None:
        """Look at a training loss; one on a GPU is looked at once it has arrived, and not waited for.

        Args:
            weights_of: the iteration of the weights that it was computed with, which is one less after the step.
        """
        if isinstance(loss, torch.Tensor) and loss.device.type == "cuda":
            self._waiting.append((iteration, weights_of, *_on_its_way(loss)))
            self._look_at_arrived(wait=False)
        else:
            self._look(iteration, as_float(loss, "loss"), weights_of)

    def catch_up(self) -> None:
        """Look at every loss that is still on its way from a GPU."""
        self._look_at_arrived(wait=True)

    def _look_at_arrived(self, *, wait: bool) -> None:
        while self._waiting and (wait or self._waiting[0][3].query()):  # type: ignore[no-untyped-call]
            iteration, weights_of, value, event = self._waiting.popleft()
            event.synchronize()
            self._look(iteration, float(value), weights_of)

    def _look(self, iteration: int, loss: float, weights_of: int) -> None:
        self._judge(self._watch.look(iteration, loss), iteration)
        self._note_sound(weights_of)

    def _note_sound(self, weights_of: int) -> None:
        if self._watch.began_at is None and self.found is None:
            self._sound = max(self._sound, weights_of)

    def evaluated(self, iteration: int, val_loss: float | None) -> None:
        """Look at a validation loss, which is no less reliable with a scaler."""
        if val_loss is not None and math.isfinite(val_loss):
            self._note_sound(iteration)
        elif val_loss is not None:
            self._judge(f"the validation loss is {val_loss} at iteration {iteration}", iteration)

    def _judge(self, reason: str | None, iteration: int) -> None:
        if reason is not None and self.found is None:
            began_at = self._watch.began_at
            self.found = reason, iteration if began_at is None else began_at

    # --- what to try -----------------------------------------------------------------------------

    def next_factor(self) -> float | None:
        """By how much to multiply the learning rate for the next try: 1.0 first, then less; None: there is no next."""
        factor = (1.0, self.guard.learning_rate_factor, None)[min(self._tried, 2)]
        self._tried += 1
        return factor

    def saved(self, record: CheckpointMetadata) -> None:
        """A checkpoint counts: the start is not needed any more, and what is passed is forgiven."""
        self._start = None
        is_sound = record.val_loss is not None or record.iteration <= self._sound
        if self._passed is not None and record.iteration > self._passed and is_sound:
            self._tried, self._passed = 0, None

    def keep_start(self, objects: Mapping[str, Any]) -> None:
        """Keep a copy of the state at a fresh start, on the CPU, until there is a checkpoint to go back to."""
        self._start = {**_copied(capture(objects).state), RNG: capture_rng()}

    def keep_more(self, objects: Mapping[str, Any]) -> None:
        """Keep what was registered since the start as well, where that is kept."""
        if self._start is not None and VALUES not in objects:
            self._start |= _copied(capture(objects).state)

    def leave(self, session: str) -> None:
        """The stretch `session` has diverged: what is sound of it is settled."""
        before = self._passed = 0 if self.found is None else self.found[1]
        self._left[session] = (self._sound, before)
        if self._began is not None and self._began.val_loss is None and self._sound < self._began.iteration:
            self._unsound.add(self._began.id)  # it has diverged from there without one loss as usual

    def is_spoilt(self, record: CheckpointMetadata) -> bool:
        """Whether a checkpoint is of a stretch that has diverged, and no loss says that its weights are sound."""
        left = self._left.get(record.session or "")
        return left is not None and record.iteration > left[0] and not _is_finite(record.val_loss)

    def restore(self, cache: TrainingCache, objects: Mapping[str, Any], needed: Mapping[str, Any]) -> Startup | None:
        """Restore this training's best checkpoint from before the divergence, or the start; None: there is neither.

        The weights of a checkpoint are known to be sound up to the last loss that was as usual. One from between that
        and the divergence counts if it was evaluated; otherwise it is the last resort.
        """
        index = cache.ledger.view().index
        line = {self._line, *lineage(index.checkpoints, index.sessions).ancestors(self._line)}

        def is_own(record: CheckpointMetadata) -> bool:
            # What others reached in this cache is another training, which this one must not turn into.
            left = self._left.get(record.session or "")
            return record.id in line if left is None else record.iteration < left[1]

        def is_sound(record: CheckpointMetadata) -> bool:
            return is_own(record) and not self.is_spoilt(record) and record.id not in self._unsound

        best = partial(cache.restore, objects, resume="best", **needed)
        restored = best(only=is_sound)
        if restored is None and self._start is not None:
            return self._from_start(objects)
        restored = restored or best(only=is_own)
        if restored is None:
            return None
        left = restored.report.fresh
        told = (f"not in the checkpoint, and so left as they are: {', '.join(left)}",) if left else ()
        return Startup(restored.record, state=restored.state, report=restored.report, chose_best=True, messages=told)

    def _from_start(self, objects: Mapping[str, Any]) -> Startup:
        # What loads a state may keep its tensors and train on in them, and the start may be needed again.
        start = _copied(self._start)
        report = apply(objects, start, id="the start")
        return Startup(state={VALUES: start[VALUES]} if VALUES in start else {}, report=report)


def _is_finite(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)


def clear_gradients(objects: Mapping[str, Any]) -> None:
    """Forget the gradients of registered models and optimizers, as after any restart; those that diverged add up."""
    for _, value in walk(objects):
        if isinstance(value, torch.nn.Module | torch.optim.Optimizer):
            value.zero_grad(set_to_none=True)


def losses_before(cache: TrainingCache, record: CheckpointMetadata | None) -> list[float]:
    """The training losses that led to a checkpoint, as far as its session's curve tells."""
    if record is None:
        return []
    session = next((s for s in cache.sessions() if s.id == record.session), None)
    curve = () if session is None else session.curves.get("loss", ())
    return [loss for iteration, loss in curve if iteration <= record.iteration]


def _on_its_way(loss: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
    value = torch.empty_like(loss, device="cpu", pin_memory=True).copy_(loss.detach(), non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return value, event


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return rebuilt(value, {key: _copied(item) for key, item in value.items()})
    if type(value) in (list, tuple, set):
        return type(value)(_copied(item) for item in value)
    return value
