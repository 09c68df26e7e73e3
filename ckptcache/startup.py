"""How a session starts: from which checkpoint, or fresh, with every reason said."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptcache.cache import Restored, TrainingCache
from ckptcache.catalog import Catalog
from ckptcache.metadata import CheckpointMetadata
from ckptcache.resume import why_not
from ckptcache.state.rng import derived_seed, seed_everything

log = logging.getLogger("ckptcache")


@dataclass(frozen=True, slots=True)
class Startup:
    """Where a session starts."""

    record: CheckpointMetadata | None = None
    """The checkpoint that it resumed from; None for a fresh start."""
    reseeded: bool = False
    messages: tuple[str, ...] = ()
    state: Mapping[str, Any] = field(default_factory=dict)
    """Parts of the checkpoint that no object took yet."""

    @property
    def iteration(self) -> int:
        """Optimizer steps taken before."""
        return 0 if self.record is None else self.record.iteration


def start(
    cache: TrainingCache,
    session: str,
    objects: Mapping[str, Any],
    configs: Mapping[str, Any],
    *,
    resume: str,
    seed: int,
) -> Startup:
    """Restore what the policy `resume` chooses into `objects`; a fresh start leaves them as they are."""
    needed = {"model_config": configs["model_config"], "data_config": configs["data_config"]}
    restored = cache.restore(objects, resume=resume, **needed)
    catalog = cache.ledger.view()
    found = _found(catalog)
    if restored is None:
        return Startup(messages=(found, *_why_fresh(cache, objects, needed, resume)))
    lines = [found, _resumed(restored), *restored.notes]
    record, was_reseeded = restored.record, False
    if resume == "best" and (why := continued_by(catalog, record)):
        was_reseeded = True
        lines += _reseed(objects, derived_seed(seed, session), why)
    if restored.report.fresh:
        lines.append(f"not in the checkpoint, and so fresh: {', '.join(restored.report.fresh)}")
    return Startup(record, was_reseeded, tuple(lines), restored.state)


def continued_by(catalog: Catalog, record: CheckpointMetadata) -> str:
    """Who has already trained on from a checkpoint, in words; empty when nobody has.

    The rest of the session that saved it counts as well: it went on, and its batches were seen.
    """
    children = [s.id for s in catalog.index.sessions.values() if s.parent == record.id]
    if children:
        return f"{len(children)} session{'s' * (len(children) > 1)} went on from it already"
    own = catalog.index.sessions.get(record.session or "")
    if own is not None and own.end_iteration > record.iteration:
        return f"its own session went on to iteration {own.end_iteration}"
    return ""


def _reseed(objects: Mapping[str, Any], seed: int, why: str) -> list[str]:
    """Otherwise every run that resumes the same best would train on the same stretch for ever."""
    seed_everything(seed)
    lines = [f"reseeded, so that other batches come: {why} (resume=latest or an id repeats exactly)"]
    for name, value in objects.items():
        if callable(reseed := getattr(value, "reseed", None)):
            reseed(seed)
        elif name == "loader":
            lines.append("the loader has no reseed(seed): it goes on where the checkpoint left it")
    return lines


def _found(catalog: Catalog) -> str:
    available = len(catalog.observed.available)
    missing = len(catalog.observed.missing)
    text = f"found {available} checkpoint{'s' * (available != 1)} in {catalog.root}"
    return text + (f", and {missing} more records whose files are gone" if missing else "")


def _resumed(restored: Restored) -> str:
    record = restored.record
    loss = "not evaluated" if record.val_loss is None else f"val_loss {record.val_loss:.4f}"
    return f"resumes from {record.id}: iteration {record.iteration}, {loss}"


def _why_fresh(
    cache: TrainingCache, objects: Mapping[str, Any], needed: Mapping[str, Any], resume: str
) -> tuple[str, ...]:
    if resume == "never":
        return ("starts fresh, as asked; what is there stays",)
    explanations = cache.explain(objects, **needed)
    if not explanations:
        return ("starts fresh: there is nothing to resume from",)
    return ("starts fresh: no checkpoint can be resumed from", *(f"  {line}" for line in why_not(explanations)))
