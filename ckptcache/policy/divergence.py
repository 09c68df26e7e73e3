"""Whether a training has diverged, judged by its losses alone."""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from ckptcache.errors import InvalidValue

_SPREAD_OF_NORMAL = 1.4826
"""Times the median absolute deviation gives the standard deviation of a normal distribution."""
_LEAST_SPREAD = 0.05
"""Of the median: a loss that hardly moved is not thereby forbidden to move."""
_LOST = 0.5
"""Share of what was gained that must be lost again."""
_ENOUGH = 10
"""Losses before which nothing is called unusual."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DivergenceGuard:
    """When a training counts as diverged, and what is tried then.

    A loss that is NaN or infinite is a divergence. A loss is unusual when it exceeds the median of the last
    `window` usual ones by more than `threshold` times their spread, which is 1.4826 times the median absolute
    deviation (Leys et al., "Detecting outliers: Do not use standard deviation around the mean, use absolute
    deviation around the median", 2013) and at least a twentieth of the median, and when half of what was gained since
    the highest usual one is lost again: a loss close to 0 may double without harm. `patience` unusual ones in a row
    are a divergence. What jumps by design (a target network that is exchanged, a term that is switched on) needs a
    higher `threshold` or `patience`.

    The first time the training resumes from the best good checkpoint with the same settings and other batches, the
    second time with the learning rate multiplied by `learning_rate_factor` too, the third time it stops. Once it
    has saved a checkpoint beyond the iteration at which it diverged, the count begins anew.

    Raises:
        InvalidValue: one of them makes no sense.
    """

    window: int = 50
    threshold: float = 6.0
    patience: int = 10
    learning_rate_factor: float = 0.1

    def __post_init__(self) -> None:
        for name, least in (("window", _ENOUGH), ("patience", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InvalidValue(name=name, value=value, reason=f"it must be a whole number of at least {least}")
        if not self.threshold > 0:
            raise InvalidValue(name="threshold", value=self.threshold, reason="it must be above 0")
        if not 0 < self.learning_rate_factor < 1:
            value = self.learning_rate_factor
            raise InvalidValue(name="learning_rate_factor", value=value, reason="it must be above 0 and below 1")


class LossWatch:
    """Follows the losses of one training.

    Args:
        usual: losses from before, oldest first, that were as they should be.
        endures_overflow: whether one loss that isn't finite is ordinary, as with a `GradScaler`.
    """

    def __init__(self, guard: DivergenceGuard, usual: Iterable[float] = (), *, endures_overflow: bool = False) -> None:
        known = [x for x in usual if math.isfinite(x)]
        self._guard = guard
        self._usual = deque(known, maxlen=guard.window)
        self._highest = max(known, default=-math.inf)
        self._endures_overflow = endures_overflow
        self._unusual: list[tuple[int, float]] = []

    def look(self, iteration: int, loss: float) -> str | None:
        """Why the training has diverged, in words, now that `loss` was seen at `iteration`; None while it hasn't."""
        limit = self.limit()
        if loss <= limit and math.isfinite(loss):
            self._usual.append(loss)
            self._highest = max(self._highest, loss)
            self._unusual.clear()
            return None
        self._unusual.append((iteration, loss))
        if not math.isfinite(loss) and not self._endures_overflow:
            return f"the loss is {loss} at iteration {iteration}"
        if len(self._unusual) < self._guard.patience:
            return None
        return self._spike(limit) if math.isfinite(loss) else f"the loss is {loss} since iteration {self.began_at}"

    def _spike(self, limit: float) -> str:
        lowest = min(loss for _, loss in self._unusual)
        return (
            f"the loss has been {lowest:.4g} or more since iteration {self.began_at}, "
            f"where {median(self._usual):.4g} is usual and {limit:.4g} the most that is"
        )

    def limit(self) -> float:
        """The highest loss that is not unusual; infinite as long as too few are known."""
        if len(self._usual) < _ENOUGH:
            return math.inf
        middle = median(self._usual)
        deviation = median(abs(x - middle) for x in self._usual)
        spread = max(_SPREAD_OF_NORMAL * deviation, _LEAST_SPREAD * abs(middle))
        return middle + max(self._guard.threshold * spread, _LOST * (self._highest - middle))

    @property
    def began_at(self) -> int | None:
        """The iteration of the first loss of those in a row that are unusual; None when the last was not."""
        return self._unusual[0][0] if self._unusual else None
