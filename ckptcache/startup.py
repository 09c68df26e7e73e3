"""How a session starts: from which checkpoint, or fresh, with every reason said."""

import dataclasses
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from ckptcache.cache import TrainingCache
from ckptcache.catalog import Catalog, Explanation
from ckptcache.metadata import CheckpointMetadata, SessionRecord
from ckptcache.registry import VALUES
from ckptcache.resume import why_not
from ckptcache.state.capture import walk
from ckptcache.state.restore import RestoreReport
from ckptcache.state.rng import derived_seed, reseed_generator, seed_everything
from ckptcache.warming import Warmed, Wish, donors, give_weights, hint
from ckptcache.words import count

log = logging.getLogger("ckptcache")
_REASONS = 3
"""How many reasons for passing over checkpoints are told beside the one that was resumed from."""
_FOR_ANOTHER_BRANCH = "a rollback asks for another branch"
_REJECTED = 10
"""How many checkpoints that don't fit are told of one by one, when none does."""


@dataclass(frozen=True, slots=True)
class Startup:
    """Where a session starts."""

    record: CheckpointMetadata | None = None
    """The checkpoint that it resumed from; None for a fresh start."""
    reseeded: bool = False
    is_comparable: bool = True
    """Whether its losses were measured on the validation data at hand."""
    messages: tuple[str, ...] = ()
    state: Mapping[str, Any] = field(default_factory=dict)
    """Parts of the checkpoint that no object took yet."""
    chose_best: bool = False
    """Whether it was chosen for being the best, so that others may be given the same one."""
    report: RestoreReport = field(default_factory=RestoreReport)
    """Which parts were restored, which objects stayed fresh, which parts no object took."""
    by_rollback: bool = False
    """Whether it was chosen because it was rolled back to, for another branch."""
    warm: Warmed = field(default_factory=Warmed)
    """What a warm start gave, where none could be resumed from."""

    @property
    def parent(self) -> CheckpointMetadata | None:
        """What training goes on from: the checkpoint that was resumed from, or that gave its weights."""
        return self.record or self.warm.donor

    @property
    def iteration(self) -> int:
        """Optimizer steps taken before."""
        return 0 if self.record is None else self.record.iteration

    def telling(self, lines: Iterable[str]) -> Self:
        """The same, with more to say."""
        return dataclasses.replace(self, messages=(*self.messages, *lines))

    def without(self, part: str) -> Self:
        """The same, once an object has taken a part of the checkpoint."""
        state = {name: value for name, value in self.state.items() if name != part}
        unused = tuple(name for name in self.report.unused if name != part)
        report = dataclasses.replace(self.report, restored=(*self.report.restored, part), unused=unused)
        return dataclasses.replace(self, state=state, report=report)


class _Fallback(logging.Handler):
    """Plain lines on stderr, for as long as the program has no handler of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers and sys.stderr is not None:
            try:
                sys.stderr.write(f"{record.getMessage()}\n")
            except (OSError, ValueError):
                self.handleError(record)


def is_fallback() -> bool:
    """Whether what is logged is shown on stderr for want of any handler."""
    return not logging.getLogger().handlers and any(isinstance(handler, _Fallback) for handler in log.handlers)


def be_heard() -> None:
    """Let what sessions log be seen, where the program has set up no logging; once per process."""
    if not log.handlers and not logging.getLogger().handlers:
        log.addHandler(_Fallback(logging.INFO))
        if log.level == logging.NOTSET:
            log.setLevel(logging.INFO)


def announce(startup: Startup, said: Iterable[str] = ()) -> None:
    """Log what was found and chosen, but for what was `said` as a warning already."""
    known = {*said, *startup.warm.warned}
    for line in startup.messages:
        if line not in known:
            log.info("%s", line)


def start(
    cache: TrainingCache,
    objects: Mapping[str, Any],
    needed: Mapping[str, Any],
    *,
    resume: str,
    wish: Wish | None = None,
) -> Startup:
    """Restore what the policy `resume` chooses into `objects`; a fresh start leaves them as they are.

    Args:
        needed: the configurations that must fit: model_config and data_config.
        wish: from where weights are taken, if there is nothing to resume from.
    """
    restored = cache.restore(objects, resume=resume, **needed)
    description = cache.needed(objects, **needed)
    catalog = cache.ledger.view()
    found = _found(catalog)
    explanations = [] if resume == "never" else catalog.explain(description)
    if restored is None:
        if wish is None:
            could = donors(catalog, objects, description) if resume != "never" else []
            warm = Warmed(messages=hint(len(could)))
        else:
            warm = give_weights(cache, objects, description, wish)
        start = "starts fresh" if warm.report is None else "starts a new training"
        why = _why_fresh(explanations, resume, start)
        return Startup(messages=(found, *cache.last_notes, *why, *warm.messages), warm=warm)
    record = restored.record
    policy = "rollback" if restored.by_rollback else resume
    lines = [found, _resumed(record, explanations, policy), *restored.notes, *_passed_over(explanations)]
    is_comparable = catalog.judge(record, description).comparable
    if not is_comparable and record.val_loss is not None:
        lines.append("the validation data differ from those of the checkpoint: the first evaluation sets the baseline")
    if wish is not None and isinstance(wish.wanted, str):
        lines.append(f"no weights are taken from {wish.wanted}: there is a checkpoint to resume from (or resume=never)")
    report = restored.report
    return Startup(
        record,
        is_comparable=is_comparable,
        messages=(*lines, *_what_became_of(report)),
        state=restored.state,
        chose_best=policy == "best",
        report=report,
        by_rollback=restored.by_rollback,
    )


def _what_became_of(report: RestoreReport) -> list[str]:
    """What was restored, what was not, and what is fresh; plain values come back without being asked for."""
    taken = [*report.restored, *(part for part in report.unused if part == VALUES)]
    told = {
        "restored": taken,
        "in the checkpoint, and not asked for": [part for part in report.unused if part != VALUES],
        "not in the checkpoint, and so fresh": report.fresh,
    }
    return [f"{what}: {', '.join(parts)}" for what, parts in told.items() if parts]


def avoid_repeating(
    startup: Startup, cache: TrainingCache, objects: Mapping[str, Any], *, session: SessionRecord, seed: int
) -> Startup:
    """Reseed what draws at random, if the best was chosen and somebody went on from it before `session`.

    Otherwise every run that resumes the same best would train on the same stretch for ever. The
    session is to be in the index already, so that of two that start at once one sees the other.
    A rollback asks for another branch, and so for other batches, whatever the policy.
    """
    if startup.record is None or not (startup.chose_best or startup.by_rollback):
        return startup
    why = _FOR_ANOTHER_BRANCH if startup.by_rollback else ""
    why = why or continued_by(cache.ledger.view(), startup.record, before=session)
    if not why:
        return startup
    return reseeded(startup, objects, derived_seed(seed, session.id), why)


def reseeded(startup: Startup, objects: Mapping[str, Any], seed: int, why: str) -> Startup:
    """`startup`, once whatever draws at random has begun anew from `seed`."""
    lines = _reseed(objects, seed, why)
    return dataclasses.replace(startup, reseeded=True, messages=(*startup.messages, *lines))


def continued_by(catalog: Catalog, record: CheckpointMetadata, *, before: SessionRecord) -> str:
    """Who trained on from a checkpoint before the session `before`, in words; empty when nobody did.

    The rest of the session that saved it counts as well: it went on, and its batches were seen.
    """
    followers = [s for s in catalog.index.sessions.values() if s.parent == record.id and not s.warm_start]
    children = [s for s in followers if s.order < before.order]
    if children:
        return f"{len(children)} session{'s' * (len(children) > 1)} went on from it already"
    own = catalog.index.sessions.get(record.session or "")
    if own is not None and own.end_iteration > record.iteration:
        return f"its own session went on to iteration {own.end_iteration}"
    return ""


def _reseed(objects: Mapping[str, Any], seed: int, why: str) -> list[str]:
    seed_everything(seed)
    exact = "ID" if why == _FOR_ANOTHER_BRANCH else "latest or an id"
    lines = [f"reseeded, so that other batches come: {why} (resume={exact} repeats exactly)"]
    for name, value in objects.items():
        if not reseed_object(name, value, seed) and name == "loader":
            lines.append("the loader has no reseed(seed): it goes on where the checkpoint left it")
    return lines


def reseed_object(name: str, value: Any, seed: int) -> bool:
    """Begin anew what draws at random in a registered object; False where nothing does that can be told to.

    Each generator gets a seed of its own name, or two of them would draw the same.
    """
    found = False
    for path, leaf in walk({name: value}):
        if callable(reseed := getattr(leaf, "reseed", None)):
            reseed(seed)
            found = True
        else:
            found |= reseed_generator(leaf, derived_seed(seed, path))
    return found


def loader_note(kind: str) -> str:
    """What a resume means for a loader of class `kind` that can't say where it is."""
    return (
        f"the loader's position is approximate: {kind} has no state_dict, so that its epoch begins anew, and batches "
        "come again (a loader or sampler with state_dict and load_state_dict goes on exactly)"
    )


def stray_note(optimizer: str, number: int) -> str:
    """What it means that an optimizer changes tensors of which nothing registered knows."""
    return (
        f"{optimizer} changes {count(number, 'tensor')} of nothing that is registered so far: they are neither saved "
        "nor restored (register the model that is meant)"
    )


def _found(catalog: Catalog) -> str:
    available = len(catalog.observed.available)
    missing = len(catalog.observed.missing)
    text = f"found {available} checkpoint{'s' * (available != 1)} in {catalog.root}"
    return text + (f", and {missing} more records whose files are gone" if missing else "")


def _resumed(record: CheckpointMetadata, explanations: list[Explanation], resume: str) -> str:
    loss = "not evaluated" if record.val_loss is None else f"val_loss {record.val_loss:.4f}"
    fitting = [e.record for e in explanations if e.eligible]
    why = "as asked by the rollback" if resume == "rollback" else "as asked"
    if resume in ("best", "latest", "auto") and fitting:
        is_best, is_latest = record.id == fitting[0].id, record.id == max(fitting, key=lambda r: r.order).id
        names = [word for word, is_so in (("best", is_best), ("latest", is_latest)) if is_so]
        which = " and ".join(["latest"] if resume == "latest" and is_latest else names) or "next"
        why = f"the {which} of {len(fitting)} that fit" if len(fitting) > 1 else "the only one that fits"
    return f"resumes from {record.id}: iteration {record.iteration}, {loss}, {why}"


def _passed_over(explanations: Iterable[Explanation]) -> list[str]:
    """Why others can't be resumed from, each reason once."""
    reasons = Counter(e.reason for e in explanations if not e.eligible)
    lines = [
        f"  passed over {count} checkpoint{'s' * (count > 1)}: {reason}"
        for reason, count in reasons.most_common(_REASONS)
    ]
    rest = sum(reasons.values()) - sum(count for _, count in reasons.most_common(_REASONS))
    return [*lines, f"  and {rest} more (`ckptcache explain` lists all)"] if rest else lines


def _why_fresh(explanations: list[Explanation], resume: str, start: str) -> tuple[str, ...]:
    if resume == "never":
        return (f"{start}, as asked; what is there stays",)
    if not explanations:
        return (f"{start}: there is nothing to resume from",)
    why = (f"  {line}" for line in why_not(explanations, _REJECTED))
    return (f"{start}: no checkpoint can be resumed from", *why)
