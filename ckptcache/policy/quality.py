"""How good a checkpoint is: the score by which the checkpoints of one group are ranked."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Literal

from ckptcache.config import CacheConfig, Direction
from ckptcache.metadata import CheckpointMetadata
from ckptcache.values import as_float

Status = Literal["known", "unknown", "diverged"]

LOWER_IS_BETTER = frozenset({"loss", "losses", "error", "errors", "perplexity", "mae", "mse", "rmse", "wer", "cer"})
"""Words in a metric's name that say "the less, the better"."""

_CAMEL_SEAM = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_WORD = re.compile(r"[^\W\d_]+")
_ITERATION: Callable[[CheckpointMetadata], int] = attrgetter("iteration")
_TIER = {"known": 2, "unknown": 1, "diverged": 0}


@dataclass(frozen=True, slots=True)
class Score:
    """The quality of one checkpoint within its group, and how it came about.

    Attributes:
        quality: higher is better; None unless `status` is "known".
        status: "unknown" where nothing was evaluated, "diverged" where the loss is not finite.
        parts: "loss_score", "metrics_score", "progress", and "metric.<name>" for each scored metric,
            as far as they exist; "best_fn" alone where that replaced the scorer.
        explain: makes `reason`; of a thousand scores few are ever explained, and the sentence is most of the cost.
    """

    quality: float | None
    status: Status
    parts: Mapping[str, float]
    explain: Callable[[], str] = field(repr=False, compare=False)

    @property
    def reason(self) -> str:
        """One sentence for a person."""
        return self.explain()


# --- the curves ----------------------------------------------------------------------------------


def loss_score(loss: float) -> float:
    """A finite loss as a score in [0, 2]: ``1 / (1 + loss)``, continued below 0 by ``2 - 1 / (1 - loss)``.

    Falls as the loss rises; 1 at a loss of 0, where the two pieces meet with the same slope.
    """
    return 1 / (1 + loss) if loss >= 0 else 2 - 1 / (1 - loss)


def metric_score(value: float, direction: Direction) -> float:
    """A finite metric as a score: "min" like a loss; "max" in [-1, 2], and as it is within [0, 1]."""
    if direction == "min":
        return loss_score(value)
    if value > 1:
        return 2 - 1 / value
    # x / (1 - x), written so that every step is monotone in floats too: the quotient's numerator and
    # denominator round apart, and a better metric could score an ulp less.
    return value if value >= 0 else 1 / (1 - value) - 1


# --- which metrics count -------------------------------------------------------------------------


def metric_direction(name: str) -> Direction:
    """Whether less or more is better, by the words of `name`: `val_loss`, `WER`, `testError` are "min"."""
    words = _WORD.findall(_CAMEL_SEAM.sub("_", name))
    return "min" if any(word.lower() in LOWER_IS_BETTER for word in words) else "max"


def find_scored_metrics(records: Iterable[CheckpointMetadata]) -> tuple[dict[str, Direction], tuple[str, ...]]:
    """The metrics of one group that are fit to be scored, and the names of those that are not.

    Fit is what is present and within [0, 1] in every record, so that a token count never decides
    what is best. Only records with a finite loss have a say, as long as there are any: a save between
    evaluations carries no metrics, and must not change how the evaluated ones are ranked.
    """
    members = list(records)
    named = sorted(set[str]().union(*[r.metrics for r in members]))
    judging = [r.metrics for r in members if (loss := r.val_loss) is not None and math.isfinite(loss)]
    if not judging:
        judging = [r.metrics for r in members]
    scored = {n: metric_direction(n) for n in named if all(0 <= m.get(n, math.nan) <= 1 for m in judging)}
    return scored, tuple(name for name in named if name not in scored)


# --- scoring a group -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scale:
    """What the scores of one group have in common.

    Attributes:
        directions: the metrics that are scored.
        unscored: metrics that are recorded and not fit to be scored, where none are declared.
        furthest: the most iterations of any record.
    """

    best_fn: Callable[[CheckpointMetadata], float | None] | None
    directions: Mapping[str, Direction]
    unscored: tuple[str, ...]
    absent: Mapping[str, float]
    """Per metric, what a record without a usable value gets."""
    furthest: int
    loss_weight: float
    metrics_weight: float
    progress_weight: float


def score_group(records: Iterable[CheckpointMetadata], config: CacheConfig) -> dict[str, Score]:
    """The scores of all records of one group, by id.

    ``quality = w_loss * loss_score + w_metrics * metrics_score + w_progress * progress``, where progress is the
    iteration's share of the group's furthest; without a scored metric the loss takes the metrics' weight too.
    `config.best_fn` replaces all of that. A loss that is not finite is diverged in any case; where none was
    measured at this iteration, the last one before it and the training loss tell.

    Raises:
        InvalidValue: `config.best_fn` returned neither a number nor None.
    """
    members = list(records)
    scale = scale_of(members, config)
    return {record.id: score(record, scale) for record in members}


def scale_of(members: list[CheckpointMetadata], config: CacheConfig) -> Scale:
    """The scale of a group, by all of its records."""
    directions, unscored = _metrics_of(members, config)
    loss_weight, metrics_weight = config.quality_weight_loss, config.quality_weight_metrics
    if not directions:
        loss_weight, metrics_weight = loss_weight + metrics_weight, 0.0
    return Scale(
        best_fn=config.best_fn,
        directions=directions,
        unscored=unscored,
        absent={name: _absent_score(members, name, direction) for name, direction in directions.items()},
        furthest=max(map(_ITERATION, members), default=0),
        loss_weight=loss_weight,
        metrics_weight=metrics_weight,
        progress_weight=config.quality_weight_progress,
    )


def _metrics_of(members: list[CheckpointMetadata], config: CacheConfig) -> tuple[dict[str, Direction], tuple[str, ...]]:
    if config.quality_metrics is not None:
        return dict(config.quality_metrics), ()
    return find_scored_metrics(members)


def _absent_score(members: list[CheckpointMetadata], name: str, direction: Direction) -> float:
    # 0, but never more than what a record of the group earned: rewards may be negative, and then
    # a NaN would win by scoring 0.
    if direction == "min":
        return 0.0  # which nobody scores less than
    finite = [v for r in members if (v := r.metrics.get(name)) is not None and math.isfinite(v)]
    # Scores rise with the value, so that the lowest is that of the lowest value.
    return min(0.0, metric_score(min(finite, default=0.0), direction))


def score(record: CheckpointMetadata, scale: Scale) -> Score:
    """The score of one record of a group, as `score_group` has it; raises InvalidValue likewise."""
    loss = record.val_loss
    progress = {"progress": record.iteration / scale.furthest if scale.furthest else 0.0}
    if (sign := _divergence(record)) is not None:
        return Score(None, "diverged", progress, lambda: f"diverged: {sign}")
    if scale.best_fn is not None:
        return _custom_score(scale.best_fn(record), record.id)
    if loss is None:
        return Score(None, "unknown", progress, lambda: "unknown: no val_loss was recorded")
    return _known_score(record, loss, progress, scale)


def _divergence(record: CheckpointMetadata) -> str | None:
    """Which loss isn't finite, in words. A val_loss, where there is one, outweighs what else was seen."""
    if record.val_loss is not None:
        return None if math.isfinite(record.val_loss) else f"val_loss is {record.val_loss}"
    losses = {"last_val_loss": record.last_val_loss, "train_loss": record.train_loss}
    return next((f"{n} is {loss}" for n, loss in losses.items() if loss is not None and not math.isfinite(loss)), None)


def _custom_score(given: float | None, id: str) -> Score:
    if given is None:
        return Score(None, "unknown", {}, lambda: "unknown: best_fn gave None")
    quality = as_float(given, f"best_fn of {id}")
    if not math.isfinite(quality):
        return Score(None, "diverged", {}, lambda: f"diverged: best_fn gave {quality}")
    return Score(quality, "known", {"best_fn": quality}, lambda: f"quality {quality:.6g}, as best_fn gave it")


def _known_score(record: CheckpointMetadata, loss: float, progress: dict[str, float], scale: Scale) -> Score:
    parts = {"loss_score": loss_score(loss), **progress}
    quality = scale.loss_weight * parts["loss_score"]
    if scale.directions:
        by_metric = {f"metric.{name}": _metric_part(record.metrics.get(name), name, scale) for name in scale.directions}
        # fsum, because it rounds once: a better metric never lowers the mean, in whatever order they come.
        parts["metrics_score"] = math.fsum(by_metric.values()) / len(by_metric)
        parts.update(by_metric)
        quality += scale.metrics_weight * parts["metrics_score"]
    if scale.progress_weight:
        quality += scale.progress_weight * parts["progress"]
    return Score(quality, "known", parts, partial(_sentence, record, loss, quality, parts, scale))


def _metric_part(value: float | None, name: str, scale: Scale) -> float:
    if value is None or not math.isfinite(value):
        return scale.absent[name]
    return metric_score(value, scale.directions[name])


def _sentence(record: CheckpointMetadata, loss: float, quality: float, parts: Mapping[str, float], scale: Scale) -> str:
    """How a known quality came about, and what was missing."""
    terms = [f"{scale.loss_weight:g} × loss_score {parts['loss_score']:.4g} (val_loss {loss:.6g})"]
    if scale.directions:
        names = ", ".join(scale.directions)
        terms.append(f"{scale.metrics_weight:g} × metrics_score {parts['metrics_score']:.4g} ({names})")
    if scale.progress_weight:
        terms.append(f"{scale.progress_weight:g} × progress {parts['progress']:.4g}")
    return "; ".join([f"quality {quality:.6g} = {' + '.join(terms)}", *_remarks(record.metrics, scale)])


def _remarks(metrics: Mapping[str, float], scale: Scale) -> Iterator[str]:
    for name in scale.directions:
        value = metrics.get(name)
        if value is None or not math.isfinite(value):
            said = "is missing" if value is None else f"is {value}"
            yield f"metric {name} {said} and scores {scale.absent[name]:.4g}"


# --- ranking -------------------------------------------------------------------------------------


def rank(records: Iterable[CheckpointMetadata], scores: Mapping[str, Score]) -> list[CheckpointMetadata]:
    """`records` of one group, best first: the known by quality, then the unknown, then the diverged.

    Equal qualities: the further-trained, then the later. The unknown and the diverged: the latest first. What was
    rolled back comes after all others, in the same order.
    """
    return sorted(records, key=lambda r: _standing(r, scores[r.id]), reverse=True)


def best(records: Iterable[CheckpointMetadata], scores: Mapping[str, Score]) -> CheckpointMetadata | None:
    """The first of `rank` that hasn't diverged and wasn't rolled back, or None."""
    sound = (r for r in records if scores[r.id].status != "diverged" and r.rolled_back is None)
    return max(sound, key=lambda r: _standing(r, scores[r.id]), default=None)


def _standing(record: CheckpointMetadata, score: Score) -> tuple[bool, int, float, int, tuple[int, str]]:
    stays, tier = record.rolled_back is None, _TIER[score.status]
    if score.quality is None:
        return stays, tier, 0.0, 0, record.order
    return stays, tier, score.quality, record.iteration, record.order


def improves(quality: float | None, best_quality: float | None, threshold: float) -> bool:
    """Whether `quality` is better than `best_quality` by at least the fraction `threshold` of its size.

    Without a known best anything counts; an unknown quality never beats a known one.
    """
    if best_quality is None:
        return True
    if quality is None:
        return False
    # The size, not the value: qualities may be negative, and then a fraction of the value lowers the bar.
    return quality > best_quality and quality - best_quality >= threshold * abs(best_quality)
