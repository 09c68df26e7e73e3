"""What one session record covers: from a start, or a recovery, to the end or to the next recovery."""

import dataclasses
import logging
import time
from typing import Any

from ckptcache.cache import TrainingCache
from ckptcache.checkpointing import SURVIVABLE, Checkpointer
from ckptcache.environment import environment
from ckptcache.events import Events
from ckptcache.metadata import SessionRecord, new_session_id, utc_now
from ckptcache.registry import Registry
from ckptcache.startup import Startup, avoid_repeating, reseeded
from ckptcache.state.rng import derived_seed
from ckptcache.state.stepping import StepCounter
from ckptcache.tally import Tally

log = logging.getLogger("ckptcache")


class Stretch:
    """One branch of training in a cache: its id and lease, its counts and its saves.

    Args:
        configs: the model's, the data's and the training's configuration, by the names of `TrainingCache.save`.
        resume: how it came to its start: a policy, an id, or "recovery".
    """

    def __init__(
        self, cache: TrainingCache, registry: Registry, configs: dict[str, Any], events: Events, *, resume: str
    ) -> None:
        self.id = new_session_id()
        self.startup = Startup()
        self.tally = Tally(SessionRecord(id=self.id))
        self.saves = Checkpointer(cache, self.tally, configs, None, events)
        self.counter = StepCounter(0)
        self.final: SessionRecord | None = None
        """Its record once it has ended."""
        self._cache, self._registry, self._configs, self._events = cache, registry, configs, events
        self._resume = resume
        self._clock = time.monotonic()

    # --- its life --------------------------------------------------------------------------------

    def hold(self) -> None:
        """Take its lease."""
        self._cache.ledger.hold(self.id)

    def release(self) -> None:
        """Give its lease back."""
        self._cache.ledger.release(self.id)

    def begin(self, found: Startup, *, seed: int, reseed_because: str = "") -> None:
        """Enter it in the index, as going on from what was `found`; generators are begun anew where they would repeat.

        Args:
            reseed_because: why they are begun anew in any case.

        Raises what writing the index raises.
        """
        declared = {name: config for name, config in self._configs.items() if config is not None}
        record = self._cache.record_session(self._new_record(found), declared or None)
        # Only now is it known who else went on from there: what two commit at once, one of them commits first.
        objects = self._registry.objects
        if reseed_because:
            self.startup = reseeded(found, objects, derived_seed(seed, self.id), reseed_because)
        else:
            self.startup = avoid_repeating(found, self._cache, objects, session=record, seed=seed)
        if self.startup.reseeded:
            record = self._cache.record_session(record.changed(reseeded=True))
        self.tally = Tally(record, found.record if found.is_comparable else None)
        self.saves = Checkpointer(self._cache, self.tally, self._configs, found.parent, self._events)
        self.counter.remove()
        self.counter = StepCounter(found.iteration, objects.values())

    def _new_record(self, found: Startup) -> SessionRecord:
        return SessionRecord(
            id=self.id,
            parent=None if found.parent is None else found.parent.id,
            resume=self._resume,
            warm_start=found.warm.report is not None,
            started_at=utc_now(),
            start_iteration=found.iteration,
            end_iteration=found.iteration,
            environment=environment(),
        )

    def record(self, stop_reason: str | None) -> SessionRecord:
        """Its record as it stands, and once it has ended, as it was then."""
        if self.final is not None:
            return self.final
        return self.tally.as_of(self.counter.iteration, time.monotonic() - self._clock, stop_reason)

    def end(self, stop_reason: str | None) -> None:
        """Count no more."""
        self.final = dataclasses.replace(self.record(stop_reason), ended_at=utc_now())
        self.counter.remove()

    def close(self, stop_reason: str | None) -> None:
        """End it, and write its record as far as the disk lets."""
        self.end(stop_reason)
        try:
            self._cache.record_session(self.record(stop_reason))
        except SURVIVABLE as error:
            log.warning("the session's record could not be written: %s", error)
