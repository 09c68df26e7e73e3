"""What depends on the iteration alone: the learning rate, and how many connections are active.

Both are functions of the iteration and of the settings in force. A restored scheduler object would
bring its old horizon along, and rise again beyond it.
"""

import math
from dataclasses import dataclass
from typing import Self

from ckptcache.nanecho.settings import NanEchoConfig, TrainingSettings


def cosine_with_warmup(
    iteration: int, *, learning_rate: float, min_learning_rate: float, warmup_iters: int, decay_iters: int
) -> float:
    """The learning rate of the step that follows `iteration` steps.

    It rises in a line to `learning_rate` over `warmup_iters` steps, falls along half a cosine to
    `min_learning_rate` at `decay_iters`, and stays there: Loshchilov and Hutter, "SGDR: Stochastic
    Gradient Descent with Warm Restarts", ICLR 2017, equation 5, with one period and no restart.

    Args:
        iteration: optimizer steps taken before, from 0.
    """
    if iteration < warmup_iters:
        return learning_rate * (iteration + 1) / (warmup_iters + 1)
    if iteration >= decay_iters:
        return min_learning_rate
    progress = (iteration - warmup_iters) / (decay_iters - warmup_iters)
    return min_learning_rate + 0.5 * (1.0 + math.cos(math.pi * progress)) * (learning_rate - min_learning_rate)


def learning_rate_at(iteration: int, settings: TrainingSettings) -> float:
    """The learning rate that `settings` give the step that follows `iteration` steps."""
    return cosine_with_warmup(
        iteration,
        learning_rate=settings.learning_rate,
        min_learning_rate=settings.lowest_learning_rate,
        warmup_iters=settings.warmup_iters,
        decay_iters=settings.decay_iters,
    )


@dataclass(frozen=True, kw_only=True)
class ConnectionGrowth:
    """How many of the connections are to be active, by iteration."""

    initial: float
    """Ratio before the first growth."""
    maximum: float
    """Ratio at which growth ends."""
    interval: int
    """Iterations between growths; 0 never grows."""
    step: float
    """How much the ratio rises at each."""

    @classmethod
    def of(cls, model: NanEchoConfig, training: TrainingSettings) -> Self:
        """The growth that the settings ask for."""
        return cls(
            initial=model.connection_ratio,
            maximum=model.max_connections,
            interval=training.connection_growth_interval,
            step=training.connection_growth_step,
        )

    def ratio_at(self, iteration: int) -> float:
        """The ratio that the step after `iteration` steps is taken with; never falls as iterations pass."""
        if self.interval == 0:
            return self.initial
        return min(self.maximum, self.initial + self.step * (iteration // self.interval))

    def due(self, iteration: int, ratio: float) -> float | None:
        """The ratio to grow to from `ratio` before the step after `iteration` steps; None: nothing to grow.

        Answers the same however often it is asked, so a session that resumes just before or just
        after a growth comes to the same network as one that never stopped.
        """
        target = self.ratio_at(iteration)
        return target if target > ratio else None
