"""When a training has diverged: back to the best good checkpoint, and on in another way."""

import logging
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ckptcache.cache import TrainingCache
from ckptcache.metadata import CheckpointMetadata
from ckptcache.policy.divergence import DivergenceGuard, LossWatch
from ckptcache.startup import Startup
from ckptcache.state.capture import capture
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
        self._waiting: deque[tuple[int, torch.Tensor, torch.cuda.Event]] = deque()
        self._tried = 0
        self._passed: int | None = None
        """The iteration that a checkpoint must lie beyond for the count to begin anew."""
        self._start: dict[str, Any] | None = None

    def _new_watch(self, usual: Any) -> LossWatch:
        return LossWatch(self.guard, usual, endures_overflow=self._endures_overflow)

    # --- noticing --------------------------------------------------------------------------------

    def begin(self, cache: TrainingCache, startup: Startup) -> None:
        """A stretch begins: what was usual before it, the index may tell."""
        self.found = None
        self._waiting.clear()
        self._watch = self._new_watch(losses_before(cache, startup.record))

    def logged(self, iteration: int, loss: Any) -> None:
        """Look at a training loss; one on a GPU is looked at once it has arrived, and not waited for."""
        if isinstance(loss, torch.Tensor) and loss.device.type == "cuda":
            self._waiting.append((iteration, *_on_its_way(loss)))
            while self._waiting and self._waiting[0][2].query():  # type: ignore[no-untyped-call]
                arrived, value, _ = self._waiting.popleft()
                self._judge(self._watch.look(arrived, float(value)), arrived)
        else:
            self._judge(self._watch.look(iteration, as_float(loss, "loss")), iteration)

    def evaluated(self, iteration: int, val_loss: float | None) -> None:
        """Look at a validation loss, which is no less reliable with a scaler."""
        if val_loss is not None and not math.isfinite(val_loss):
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
        if self._passed is not None and record.iteration > self._passed and record.val_loss is not None:
            self._tried, self._passed = 0, None

    def keep_start(self, objects: Mapping[str, Any]) -> None:
        """Keep a copy of the state at a fresh start, on the CPU, until there is a checkpoint to go back to."""
        self._start = {name: _copied(value) for name, value in {**capture(objects).state, RNG: capture_rng()}.items()}

    def restore(
        self, cache: TrainingCache, objects: Mapping[str, Any], needed: Mapping[str, Any], *, session: str
    ) -> Startup | None:
        """Restore the best checkpoint from before the divergence, or the start; None where there is neither."""
        before = self._passed = 0 if self.found is None else self.found[1]

        def is_good(record: CheckpointMetadata) -> bool:
            return record.session != session or record.iteration < before

        restored = cache.restore(objects, resume="best", only=is_good, **needed)
        if restored is not None:
            return Startup(restored.record, state=restored.state, report=restored.report, chose_best=True)
        if self._start is None:
            return None
        apply(objects, self._start, id="the start")
        return Startup()


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
        return type(value)((key, _copied(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    return value
