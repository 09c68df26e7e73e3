"""Whether a training that was killed and resumed is the one that never stopped, and where it first is not.

Pure, and without torch: three traces of it in, a judgement with its reason out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptcache.proof.moments import (
    BATCH,
    GENERATOR,
    LOADER,
    LOGGED,
    MODEL,
    OPTIMIZER,
    OTHER,
    UNREGISTERED,
    Finding,
    Kill,
    Moment,
    SessionTrace,
    findings,
    only_parts,
    state_findings,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first thing in which a run differs from the undisturbed one.

    Attributes:
        is_resume: whether the resume is to blame; otherwise the training alone doesn't repeat itself.
        iteration: after which it was found; None for the end of the session.
        when: in words.
        found: everything that differs at that moment, causes first.
        hint: the usual cause, and the way out.
    """

    is_resume: bool
    session: int
    iteration: int | None
    when: str
    found: tuple[Finding, ...]
    hint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One kill, and the resume after it."""

    killed_at: int
    saved_at: int
    resumed_at: int | None
    resumed_from: str | None
    difference: Difference | None


Runs = Mapping[int, SessionTrace]


def judge(whole: Runs, killed: Runs, resumed: Runs, kill: Kill) -> Attempt:
    """Compare a killed and a resumed run with the undisturbed one."""
    difference = by_itself(whole, killed) or _by_resume(whole, killed, resumed, kill)
    session = resumed.get(kill.session)
    return Attempt(
        killed_at=kill.at,
        saved_at=kill.save,
        resumed_at=None if session is None else session.first,
        resumed_from=None if session is None else session.opened["from"],
        difference=difference,
    )


def by_itself(whole: Runs, other: Runs) -> Difference | None:
    """Where two runs that nobody resumed differ: then the training doesn't repeat itself.

    A generator that differs and that nothing is drawn from, or nothing that shows, does no harm.
    """
    for number, session in other.items():
        if number not in whole:
            break
        unlike = generators_unlike(whole[number], session)
        pairs = [(None, whole[number].start, session.start), *_common(whole[number], session)]
        for iteration, a, b in pairs:
            if found := findings(a, b, frozenset(unlike)):
                when = "before the first iteration" if iteration is None else f"at iteration {iteration}"
                hint = _why_not_repeated(unlike, drawn_from(whole[number], iteration))
                at = session.first if iteration is None else iteration
                return Difference(
                    is_resume=False, session=number, iteration=at, when=when, found=tuple(found), hint=hint
                )
    return None


def _common(a: SessionTrace, b: SessionTrace) -> list[tuple[int, Moment, Moment]]:
    return [(i, a.steps[i], b.steps[i]) for i in sorted(a.steps.keys() & b.steps.keys())]


def generators_unlike(a: SessionTrace, b: SessionTrace) -> list[str]:
    """The generators that differ in two runs at any moment that both had."""
    moments = [(a.start, b.start), *((one, other) for _, one, other in _common(a, b))]
    found = (f.name for one, other in moments for f in state_findings(one, other) if f.kind == GENERATOR)
    return list(dict.fromkeys(found))


def drawn_from(session: SessionTrace, iteration: int | None) -> set[str]:
    """The generators that have moved by the end of `iteration`; all of them before the first."""
    before = session.start.state()
    if iteration is None:
        return set(before)
    after = session.steps[iteration].state()
    return {name for name, digest in after.items() if before.get(name) != digest}


def _why_not_repeated(unlike: Sequence[str], drawn: set[str]) -> str:
    names = [name for name in unlike if name in drawn] or list(unlike)
    if not names:
        return (
            "every generator that is known was the same: look for a generator without a seed, for time, for the order "
            "of files or sets, or for an operation that isn't deterministic (torch.use_deterministic_algorithms(True) "
            "finds those)"
        )
    seeds = ", ".join(_SEEDING.get(name, name) for name in names)
    return f"{_listed(names)} differed, which is what a generator without a seed does: call {seeds} at the start"


_SEEDING = {
    "rng.python": "random.seed(0)",
    "rng.numpy": "numpy.random.seed(0)",
    "rng.torch": "torch.manual_seed(0)",
    "rng.cuda": "torch.manual_seed(0)",
}


def _by_resume(whole: Runs, killed: Runs, resumed: Runs, kill: Kill) -> Difference | None:
    unseeded = frozenset(n for i in killed if i in whole for n in generators_unlike(whole[i], killed[i]))
    for number, session in whole.items():
        if number not in resumed:
            return _odd(number, None, "in the resumed run", "session", "it was never opened", "")
        if number == kill.session:
            found = _fresh(resumed[number]) or _just_after(killed, resumed[number])
            if found is not None:
                return found
        is_before = number < kill.session  # what it has made is there, or it is made again
        difference = None if is_before else _begun_elsewhere(session, resumed[number], resumed[kill.session], kill)
        difference = difference or _later(session, resumed[number], unseeded, is_whole=not is_before)
        if difference is not None:
            return difference
    return None


def _begun_elsewhere(a: SessionTrace, b: SessionTrace, killed: SessionTrace, kill: Kill) -> Difference | None:
    """Whether a session after the one that was killed starts where it should, if that had the time for all of it."""
    if a.number == kill.session or a.first == b.first or killed.ended.get("stop_reason") == "max_seconds":
        return None
    how = f"it begins at iteration {b.first}, not {a.first}"
    return _odd(b.number, b.first, f"in session {b.number} of the program", "the start", how, "")


def _odd(session: int, iteration: int | None, when: str, name: str, how: str, hint: str) -> Difference:
    found = (Finding(OTHER, name, how),)
    return Difference(is_resume=True, session=session, iteration=iteration, when=when, found=found, hint=hint)


def _fresh(session: SessionTrace) -> Difference | None:
    if session.opened["from"] is not None:
        return None
    why = "; ".join(str(message).strip() for message in session.opened["messages"])
    return _odd(session.number, 0, "at the resume", "the start", "it is fresh, and not a resume", why)


def _just_after(killed: Runs, session: SessionTrace) -> Difference | None:
    """What was restored, before anything is done with it, and what it was when it was saved.

    Only of the checkpoint that was saved between two iterations: the program may save its own in the midst of one.
    """
    before = killed[session.number]
    saved = before.steps.get(session.first)
    if saved is None or session.opened["from"] != before.saved["id"]:
        return None
    parts = session.opened["parts"]
    found = sorted(state_findings(only_parts(saved, parts), only_parts(session.start, parts)), key=lambda f: f.kind)
    if not found:
        return None
    when = f"right after the resume at iteration {session.first}, before any step"
    part = found[0].name.partition(".")[0]
    hint = (
        f"{part} is not in the checkpoint, and so began anew"
        if part in session.opened["fresh"]
        else f"{part} was not restored as it was: does load_state_dict put back all that state_dict gives?"
    )
    return _difference(session, session.first, when, found, hint)


def _later(a: SessionTrace, b: SessionTrace, unseeded: frozenset[str], *, is_whole: bool) -> Difference | None:
    for iteration, one, other in _common(a, b):
        if found := findings(one, other, unseeded):
            return _difference(b, iteration, f"at iteration {iteration}", found)
    if is_whole and b.last < a.last and b.ended.get("stop_reason") != "max_seconds":
        how = f"it ends after iteration {b.last}, not {a.last}"
        return _odd(b.number, b.last, "at the end", "the length", how, "")
    return _at_end(a, b, unseeded)


def _at_end(a: SessionTrace, b: SessionTrace, unseeded: frozenset[str]) -> Difference | None:
    both = a.end is not None and b.end is not None and a.last == b.last and b.steps
    if a.end is None or b.end is None or not both or {a.ended["stop_reason"], b.ended["stop_reason"]} != {"finished"}:
        return None
    found = findings(a.end, b.end, unseeded)
    if any(moment.batches for moment in a.steps.values()) and all(f.kind == LOADER for f in found):
        return None  # as after each iteration: what a loader gives is what counts
    return _difference(b, None, f"at the end, after iteration {b.last}", found) if found else None


def _difference(
    session: SessionTrace, iteration: int | None, when: str, found: Sequence[Finding], hint: str = ""
) -> Difference:
    hint = hint or hint_for(found, session.opened)
    return Difference(
        is_resume=True, session=session.number, iteration=iteration, when=when, found=tuple(found), hint=hint
    )


# --- why -----------------------------------------------------------------------------------------


def hint_for(found: Sequence[Finding], opened: Mapping[str, Any]) -> str:
    """The usual cause of a difference after a resume, and the way out."""
    first = found[0]
    part = first.name.partition(".")[0]
    if UNREGISTERED in first.name:
        what = first.name.partition(UNREGISTERED)[0]
        return f"{what} takes part in the training and is not registered: give it to the session by a name"
    if part in opened["fresh"]:
        return f"{part} is not in the checkpoint {opened['from']}, and so began anew"
    strangers = list(dict.fromkeys(f.name.partition(UNREGISTERED)[0] for f in found if UNREGISTERED in f.name))
    hints = {BATCH: _batch_hint, GENERATOR: _generator_hint, LOGGED: _logged_hint}
    hint = hints.get(first.kind, _state_hint)(found, opened)
    return f"{hint}; not registered: {_listed(strangers)}" if strangers else hint


def _batch_hint(found: Sequence[Finding], opened: Mapping[str, Any]) -> str:
    generators = [f.name for f in found if f.kind == GENERATOR]
    why = "is it seeded anew after the resume, or drawn from by each iter() of a DataLoader?"
    also = f"; {_listed(generators)} differed as well: {why}" if generators else ""
    loaders = opened["loaders"]
    if not loaders:
        return (
            "no loader or sampler is registered, so its position was lost: register one with state_dict and "
            f"load_state_dict, as loader=...{also}"
        )
    fresh = [name for name in loaders if name in opened["fresh"]]
    if fresh:
        return f"{_listed(fresh)} is not in the checkpoint {opened['from']}, and so began anew{also}"
    return (
        f"{_listed(loaders)} was restored, and the batches are others: its state must hold epoch, order and position, "
        f"and what is drawn on the way from it to the model needs a generator that is registered{also}"
    )


def _generator_hint(found: Sequence[Finding], _: Mapping[str, Any]) -> str:
    if found[0].name.startswith("rng.torch"):
        return (
            "torch's generator was drawn from once more or less, or seeded anew after the resume. Each iter() of a "
            "torch DataLoader draws a seed from it: give the DataLoader a generator of its own, "
            "generator=torch.Generator()"
        )
    return f"{found[0].name} is seeded anew or drawn from after the resume; seed before the session is opened"


def _logged_hint(found: Sequence[Finding], _: Mapping[str, Any]) -> str:
    others = [f.name for f in found if f.kind > LOGGED]
    if others:
        return (
            "the batches and the generators are the same, so something that isn't registered takes part in the loss: "
            "a generator or a model of its own, a counter, an average"
        )
    return (
        "the training is the same, so what is logged depends on something that isn't registered: an average of the "
        "model, a running mean, a count"
    )


def _state_hint(found: Sequence[Finding], _: Mapping[str, Any]) -> str:
    part = found[0].name.partition(".")[0]
    if found[0].kind == OPTIMIZER and found[0].name.endswith(".lr"):
        return (
            "a scheduler or the program sets it: is the scheduler registered, and restored? What the program sets must "
            "follow from `step`, or from values that the session keeps"
        )
    if found[0].kind in (OPTIMIZER, MODEL):
        return (
            "batches, generators and what was logged are the same, and the step is not: are gradients kept from one "
            "iteration to the next (a checkpoint holds none: zero_grad() in each), or does something take part in the "
            "step that isn't registered?"
        )
    return (
        f"{part} was restored, and went on otherwise: does its state_dict hold everything that it works with, and was "
        "the iteration over when the program saved?"
    )


def _listed(names: Iterable[str]) -> str:
    *most, last = list(names)
    return f"{', '.join(most)} and {last}" if most else last
