"""What a session has measured and saved so far, and the record and the summary that come of it."""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptcache.curves import Curves
from ckptcache.metadata import CheckpointMetadata, SessionRecord
from ckptcache.values import as_float, encode_float


class Tally:
    """Counts of one session, its evaluations and its curves.

    Args:
        record: the session at its start.
        parent: the checkpoint that it resumed from, if its losses were measured on the same data.
    """

    def __init__(self, record: SessionRecord, parent: CheckpointMetadata | None = None) -> None:
        self.record = record
        self.curves = Curves()
        self.last_saved: CheckpointMetadata | None = None
        self.saved_at: int | None = None
        """Iteration of the last save."""
        self.evaluated_at: int | None = None
        """Iteration of the last evaluation of this session that gave a loss."""
        self._failed_at: int | None = None
        self._measured_at: int | None = None
        self._metrics: dict[str, float] = {}
        self._last_loss = _last_loss(parent)
        self._best_saved = math.inf
        self._before: tuple[CheckpointMetadata | None, int | None, float, str | None] | None = None
        """What was so before the save in flight; None where none is."""

    # --- measuring -------------------------------------------------------------------------------

    def evaluated(self, iteration: int, val_loss: Any, metrics: Mapping[str, Any]) -> float | None:
        """Note an evaluation; returns its loss as a number. Raises InvalidValue for what is none."""
        numbers = {name: as_float(value, f"metrics.{name}") for name, value in metrics.items()}
        loss = None if val_loss is None else as_float(val_loss, "val_loss")
        self.curves.add(iteration, numbers if loss is None else {**numbers, "val_loss": loss})
        self._metrics = {**self._metrics, **numbers} if self._measured_at == iteration else numbers
        self._measured_at = iteration
        if loss is not None:
            self._note_loss(iteration, loss)
        return loss

    def _note_loss(self, iteration: int, loss: float) -> None:
        self.evaluated_at, self._last_loss = iteration, (iteration, loss)
        first, best = self.record.first_val_loss, self.record.best_val_loss
        self._change(last_val_loss=loss, first_val_loss=loss if first is None else first)
        if math.isfinite(loss) and (best is None or loss < best):
            self._change(best_val_loss=loss)
        # A warm start's donor was another model: what is measured first is no loss of its.
        parent = None if self.record.warm_start else self.record.parent
        if iteration == self.record.start_iteration and parent is not None:
            self._note_best(parent, loss)

    def measured(self, iteration: int) -> dict[str, Any]:
        """What was measured at `iteration`; where no loss was, when the last one was, and what it gave."""
        found: dict[str, Any] = {"metrics": self._metrics} if self._measured_at == iteration else {}
        if self.evaluated_at == iteration and self._last_loss is not None:
            return {**found, "val_loss": self._last_loss[1]}
        if self._last_loss is not None:
            found |= {"last_val_loss_iteration": self._last_loss[0], "last_val_loss": self._last_loss[1]}
        return found

    # --- saving ----------------------------------------------------------------------------------

    def saved(self, record: CheckpointMetadata) -> None:
        """Note a checkpoint that counts, or will once its file is written; `collected` or `unsaved` follows then."""
        self._before = (self.last_saved, self.saved_at, self._best_saved, self.record.best_checkpoint)
        self.last_saved, self.saved_at = record, record.iteration
        # As high as the one that was saved along with the checkpoint, so that it replaces that.
        self._change(saved=self.record.saved + 1, revision=self.record.revision + 1)
        if record.val_loss is not None:
            self._note_best(record.id, record.val_loss)

    @property
    def is_in_flight(self) -> bool:
        """Whether it isn't known yet what came of the last save."""
        return self._before is not None

    def collected(self, evicted: int) -> None:
        """The last save counts, and so many others had to go for it."""
        if self._before is not None:
            self._before = None
            self._change(evicted=self.record.evicted + evicted)

    def unsaved(self) -> None:
        """The last save came to nothing after all."""
        if self._before is None or self.last_saved is None:
            return
        failed = self.last_saved
        self.last_saved, self.saved_at, best_saved, best = self._before
        self._before = None
        self._change(saved=self.record.saved - 1)
        if self.record.best_checkpoint == failed.id:
            self._best_saved = best_saved
            self._change(best_checkpoint=best)
        self.failed(failed.iteration)

    def _note_best(self, id: str, loss: float) -> None:
        if math.isfinite(loss) and loss <= self._best_saved:
            self._best_saved = loss
            self._change(best_checkpoint=id)

    def failed(self, iteration: int) -> None:
        """Note that saving failed at `iteration`, however many reasons there were to try it there."""
        if iteration == self._failed_at:
            return
        self._failed_at = iteration
        self._change(failed_saves=self.record.failed_saves + 1)

    def _change(self, **fields: Any) -> None:
        self.record = dataclasses.replace(self.record, **fields)

    # --- what comes of it ------------------------------------------------------------------------

    def as_of(self, iteration: int, seconds: float, stop_reason: str | None) -> SessionRecord:
        """The session's record as it stands."""
        return dataclasses.replace(
            self.record,
            end_iteration=iteration,
            seconds=round(seconds, 3),
            curves=self.curves.thinned(),
            stop_reason=stop_reason,
            revision=self.record.revision + 1,
        )


def _last_loss(parent: CheckpointMetadata | None) -> tuple[int, float] | None:
    if parent is None:
        return None
    if parent.val_loss is not None:
        return parent.iteration, parent.val_loss
    if parent.last_val_loss is not None and parent.last_val_loss_iteration is not None:
        return parent.last_val_loss_iteration, parent.last_val_loss
    return None


def summary_of(record: SessionRecord, cache_dir: Path) -> dict[str, Any]:
    """What `training_summary.json` holds of a session."""
    steps = record.end_iteration - record.start_iteration
    names = ("first_val_loss", "last_val_loss", "best_val_loss")
    losses = {name: getattr(record, name) for name in names}
    return {
        "session": record.id,
        "parent": record.parent,
        "resumed_from": None if record.warm_start else record.parent,
        "start_iteration": record.start_iteration,
        "end_iteration": record.end_iteration,
        **{name: None if loss is None else encode_float(loss) for name, loss in losses.items()},
        "best_checkpoint": record.best_checkpoint,
        "saved": record.saved,
        "evicted": record.evicted,
        "failed_saves": record.failed_saves,
        "seconds": record.seconds,
        "iterations_per_second": round(steps / record.seconds, 3) if record.seconds else 0.0,
        "stop_reason": record.stop_reason,
        "cache_dir": os.fsencode(cache_dir).decode(errors="backslashreplace"),
    }
