"""Runs as their index records them, made without training anything."""

import math
from collections.abc import Sequence
from typing import Any

from ckptcache.metadata import CheckpointMetadata, NamePointer, SessionRecord
from ckptcache.progress.views import RunView, view_of
from ckptcache.storage.index import Index

HOSTILE = '`|"]-->x["<script>alert(1)</script>\n## not a heading\n```\n[a](javascript:b) @everyone **b** $x$ %% ;end'


def add_session(index: Index, losses: Sequence[float], *, parent: str | None = None, **fields: Any) -> str:
    """A session with these validation losses, 10 iterations apart, and a checkpoint at the last; returns its id."""
    number = len(index.sessions)
    before = index.checkpoints.get(parent or "")
    start = 0 if before is None else before.iteration
    curve = tuple((start + 10 * i, loss) for i, loss in enumerate(losses))
    end = curve[-1][0] if curve else start
    id, first = f"sess_20260102_{number:06d}_{number:08x}", losses[0] if losses else None
    last = losses[-1] if losses else None
    finite = [loss for loss in losses if math.isfinite(loss)]
    index.sessions[id] = SessionRecord(
        id=id,
        sequence=2 * number + 1,
        parent=parent,
        start_iteration=start,
        end_iteration=end,
        **{
            "first_val_loss": first,
            "last_val_loss": last,
            "best_val_loss": min(finite, default=None),
            "seconds": 2.0,
            "stop_reason": "finished",
            "curves": {"val_loss": curve},
            **fields,
        },
    )
    checkpoint = f"ckpt_20260102_{number:06d}_{end:08d}_0123abcd_{number:04x}"
    index.checkpoints[checkpoint] = CheckpointMetadata(
        id=checkpoint,
        sequence=2 * number + 2,
        session=id,
        iteration=end,
        val_loss=last,
        save_reason="final",
        size=1_560_000,
        parents=(parent,) if parent else (),
    )
    return id


def last_checkpoint(index: Index) -> str:
    """The id of the newest checkpoint."""
    return max(index.checkpoints.values(), key=lambda r: r.order).id


def run(sessions: int, evaluations: int = 5, *, name: str = "ci", kept: int | None = None) -> RunView:
    """A run in which each session goes on from the one before, and its loss falls."""
    index = Index()
    for number in range(sessions):
        losses = [5.0 / (1 + number + i / evaluations) for i in range(evaluations)]
        add_session(index, losses, parent=last_checkpoint(index) if number else None)
    ids = sorted(index.checkpoints)
    return view_of(name, index, frozenset(ids if kept is None else ids[len(ids) - kept :]))


def hostile_run() -> RunView:
    """A run in whose index somebody has written markup wherever text may stand."""
    index = Index()
    index.sessions[HOSTILE] = SessionRecord(
        id=HOSTILE,
        sequence=1,
        parent=HOSTILE + "gone",
        stop_reason=HOSTILE,
        end_iteration=20,
        first_val_loss=2.0,
        last_val_loss=1.0,
        best_val_loss=1.0,
        curves={"val_loss": ((0, 2.0), (20, 1.0)), HOSTILE: ((0, 1.0),)},
    )
    index.checkpoints[HOSTILE] = CheckpointMetadata(
        id=HOSTILE, sequence=2, session=HOSTILE, iteration=20, val_loss=1.0, save_reason=HOSTILE, notes=HOSTILE
    )
    index.names[HOSTILE] = NamePointer(checkpoint=HOSTILE)
    return view_of("hostile", index, frozenset({HOSTILE}))
