"""What a session knows of itself: where it started, where it is, what it has to say."""

import logging
from typing import Any

from ckptcache.cache import TrainingCache
from ckptcache.errors import SessionClosed
from ckptcache.metadata import CheckpointMetadata, SessionRecord
from ckptcache.registry import Registry
from ckptcache.startup import Startup
from ckptcache.state.restore import RestoreReport
from ckptcache.state.warmreport import WarmStartReport
from ckptcache.stretch import Stretch

log = logging.getLogger("ckptcache")


class Facts:
    """See `TrainingSession`."""

    cache: TrainingCache
    _stretch: Stretch
    _registry: Registry
    _state: str
    _stop_reason: str | None
    _recoveries: int

    @property
    def id(self) -> str:
        """The session's id; after a divergence, that of the branch that it went on with."""
        return self._stretch.id

    @property
    def resumed_from(self) -> CheckpointMetadata | None:
        """The checkpoint that it resumed from; None after a fresh start."""
        return self._startup.record

    @property
    def warm_start_report(self) -> WarmStartReport | None:
        """What a warm start took, resized and left, tensor by tensor; None without one."""
        return self._startup.warm.report

    @property
    def start_iteration(self) -> int:
        """Where it started: the iteration of `resumed_from`, or 0."""
        return self._startup.iteration

    @property
    def is_comparable(self) -> bool:
        """Whether the losses of `resumed_from` were measured on the validation data at hand."""
        return self._startup.is_comparable

    @property
    def messages(self) -> tuple[str, ...]:
        """What was found, what was chosen and why, what was passed over and why; a line each."""
        return self._startup.messages

    def tell(self, line: str) -> None:
        """Add to `messages` what a front end has to say of how the session starts, and log it."""
        self._stretch.startup = self._startup.telling([line])
        log.info("%s", line)

    @property
    def report(self) -> RestoreReport:
        """Which parts were restored, which stayed fresh, and which parts of the checkpoint went unused."""
        return self._startup.report

    @property
    def values(self) -> dict[str, Any]:
        """Plain values that are saved with every checkpoint and come back at a resume: change them as you like."""
        return self._registry.values

    @property
    def iteration(self) -> int:
        """Optimizer steps taken so far, over all sessions."""
        return self._stretch.counter.iteration

    @property
    def stop_reason(self) -> str | None:
        """Why `steps` ended; None while it goes on."""
        return self._stop_reason

    @property
    def is_closed(self) -> bool:
        """Whether it has ended."""
        return self._state == "closed"

    @property
    def evaluated_at(self) -> int | None:
        """The iteration of the last evaluation in this session; None before the first."""
        return self._stretch.tally.evaluated_at

    @property
    def recoveries(self) -> int:
        """How often it went back to a checkpoint because it had diverged."""
        return self._recoveries

    @property
    def record(self) -> SessionRecord:
        """The session's record as it stands, and once the session is closed, as it was then."""
        return self._stretch.record(self._stop_reason)

    @property
    def _startup(self) -> Startup:
        return self._stretch.startup

    def _check_open(self) -> None:
        if self._state != "open":
            raise SessionClosed(session=self.id)
