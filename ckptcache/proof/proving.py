"""Proving that a training resumes exactly: run undisturbed, then killed and resumed, and the traces compared."""

import contextlib
import os
import random
import shlex
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ckptcache.config import SCRATCH
from ckptcache.errors import InvalidValue, NothingToProve, ProofFailed
from ckptcache.proof.judging import Attempt, Difference, by_itself, judge
from ckptcache.proof.moments import (
    GENERATOR,
    UNREGISTERED,
    VARIABLE,
    Instruction,
    Kill,
    SessionTrace,
    read_trace,
)
from ckptcache.storage import fs

POLICIES = ("latest", "auto", "id")
LEAST_ITERATIONS = 3
_BACK = 2
"""A run is killed at most so many iterations after it has saved."""
_MAX_TRACE = 1 << 40
_PAUSE = 0.02
_TAIL = 15
Told = Callable[[str, int, int], object]
"""Called with what is run next, how many runs are over, and how many there are in all."""


class Child(Protocol):
    """A run of the training in a process group of its own."""

    @property
    def pid(self) -> int | None: ...

    def poll(self) -> int | None:
        """The exit status, or minus the signal that ended it; None while it runs."""


Launch = Callable[[Mapping[str, str], Path], Child]
"""Starts the training with environment variables added, its output going to a new file."""


def command_launcher(command: Sequence[str]) -> Launch:
    """Starts a command, without a shell."""

    def launch(variables: Mapping[str, str], output: Path) -> Child:
        with fs.new_file(output) as file:
            try:
                return subprocess.Popen(
                    list(command),
                    env={**os.environ, **variables},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                reason = f"{shlex.quote(command[0])} could not be started ({fs.reason_of(error)})"
                raise ProofFailed(run="undisturbed run", reason=reason) from error

    return launch


# --- the verdict ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came of it.

    Attributes:
        iterations: of the undisturbed run, in the session that was killed.
        attempts: each kill with its resume; the last one holds the difference, if there is one.
        compared: how much was compared after each iteration, by what it belongs to.
        logged: what was logged and compared, by name.
        batches: whether the batches were seen and compared.
        folder: where all of it is kept, if it is.
        has_diverged: whether the undisturbed run diverged after `iterations` and went back, so that it ends there.
    """

    iterations: int
    resume: str
    seed: int
    attempts: tuple[Attempt, ...]
    compared: Mapping[str, int]
    logged: tuple[str, ...]
    batches: bool
    folder: Path | None = None
    has_diverged: bool = False

    @property
    def difference(self) -> Difference | None:
        """The first thing that differs; None where everything is identical."""
        return next((a.difference for a in self.attempts if a.difference is not None), None)

    @property
    def word(self) -> str:
        """identical, differs, or not_repeatable: the training alone doesn't do the same twice."""
        if self.difference is None:
            return "identical"
        return "differs" if self.difference.is_resume else "not_repeatable"

    def lines(self) -> list[str]:
        """For a person."""
        lines = self._identical() if self.difference is None else self._differs(self.difference)
        return [*lines, *([f"everything is kept in {self.folder}"] if self.folder else [])]

    def _identical(self) -> list[str]:
        killed, resumed = ([getattr(a, name) for a in self.attempts] for name in ("killed_at", "resumed_at"))
        lines = [
            f"identical: {self.iterations} iterations, killed at {_listed(killed)}, resumed from {_listed(resumed)} "
            f"({self.resume})",
            f"compared after each iteration: {self._what_was_compared()}",
        ]
        if not self.batches:
            lines.append("the batches could not be seen: no registered model was called in training mode")
        if self.has_diverged:
            lines.append(
                f"after iteration {self.iterations} the undisturbed run diverged and went back, with other batches: "
                "what came then is never the same twice, and was not compared"
            )
        return lines

    def _what_was_compared(self) -> str:
        state = {name: count for name, count in self.compared.items() if name != "rng"}
        total = f"{sum(state.values())} tensors and values of {_listed(state)}"
        logged = f"what was logged ({', '.join(self.logged)})" if self.logged else ""
        generators = f"{self.compared.get('rng', 0)} generators"
        return ", ".join(filter(None, (total, generators, logged, "the batches" if self.batches else "")))

    def _differs(self, difference: Difference) -> list[str]:
        attempt = self.attempts[-1]
        first, *others = difference.found
        if difference.is_resume:
            where = f"resumed from {attempt.resumed_at} after a kill at {attempt.killed_at}"
            head = f"differs: {first.name}, {difference.when}, {where} ({self.resume})"
        else:
            head = f"not repeatable: {first.name} differs {difference.when} between two runs that nobody resumed"
        lines = [head, *([f"  {first.name}: {first.how}"] if first.how else [])]
        if others:
            more = f" and {len(others) - 5} more" if len(others) > 5 else ""
            lines.append(f"  and with it {', '.join(f.name for f in others[:5])}{more}")
        lines += [f"  {difference.hint}"] if difference.hint else []
        if not difference.is_resume:
            lines.append("  as long as the training itself differs from run to run, nothing can be said of its resume")
        return [*lines, f"  repeat it with --at {attempt.killed_at} --seed {self.seed}"]

    def to_json(self) -> dict[str, Any]:
        """For a program."""
        found = self.difference
        return {
            "verdict": self.word,
            "iterations": self.iterations,
            "resume": self.resume,
            "seed": self.seed,
            "kills": [
                {
                    "killed_at": a.killed_at,
                    "saved_at": a.saved_at,
                    "resumed_at": a.resumed_at,
                    "resumed_from": a.resumed_from,
                    "identical": a.difference is None,
                }
                for a in self.attempts
            ],
            "diverged": self.has_diverged,
            "compared": {**self.compared, "logged": list(self.logged), "batches": self.batches},
            "difference": None if found is None else _difference_to_json(found),
            "kept_in": None if self.folder is None else str(self.folder),
        }


def _difference_to_json(found: Difference) -> dict[str, Any]:
    return {
        "first": found.found[0].name,
        "session": found.session,
        "iteration": found.iteration,
        "when": found.when,
        "hint": found.hint,
        "all": [{"name": f.name, "how": f.how} for f in found.found],
    }


def _listed(items: Iterable[Any]) -> str:
    *most, last = [str(item) for item in items]
    return f"{', '.join(most)} and {last}" if most else last


# --- proving -------------------------------------------------------------------------------------


def prove(
    launch: Launch,
    *,
    kills: int = 3,
    at: Sequence[int] = (),
    seed: int = 0,
    resume: str = "latest",
    timeout: float | None = None,
    keep: bool = False,
    told: Told = lambda *_: None,
) -> Verdict:
    """Run a training undisturbed, then killed and resumed several times, and compare each iteration.

    Args:
        launch: starts the training; its caches go below a scratch folder.
        kills: how many iterations to kill it at, drawn by `seed`; fewer where it has fewer.
        at: these iterations instead.
        resume: "latest", "auto", or "id" for the id of the checkpoint that was saved before the kill.
        timeout: seconds that each run may take.
        keep: whether the scratch folder stays.

    Raises:
        InvalidValue: one of `at` can't be killed at.
        NothingToProve: no session was opened, or it did fewer than three iterations.
        ProofFailed: a run failed by itself, or took longer than `timeout`.
    """
    with fs.scratch("ckptcache-prove-", keep=keep) as folder:
        runs = _Runs(launch, folder, timeout, keep, lambda what, number: told(what, number, 1 + 2 * (len(at) or kills)))
        whole = runs.traced("undisturbed run", folder / "undisturbed", _FRESH)
        plan = plan_kills(whole, kills=kills, at=at, seed=seed)
        attempts: list[Attempt] = []
        for kill in plan:
            attempts.append(runs.attempt(whole, kill, resume))
            if attempts[-1].difference is not None:
                break
        return _verdict(whole[plan[0].session], attempts, resume, seed, folder if keep else None)


def _verdict(
    session: SessionTrace, attempts: Sequence[Attempt], resume: str, seed: int, folder: Path | None
) -> Verdict:
    last = session.steps[session.last]
    compared = Counter(_part(name, kind) for name, kind in last.leaves.kinds.items())
    logged = dict.fromkeys(name for moment in session.steps.values() for name in moment.logged)
    return Verdict(
        iterations=session.last,
        resume=resume,
        seed=seed,
        attempts=tuple(attempts),
        compared=dict(compared),
        logged=tuple(logged),
        batches=any(moment.batches for moment in session.steps.values()),
        folder=folder,
        has_diverged=session.has_diverged,
    )


def _part(name: str, kind: int) -> str:
    own, _, _ = name.partition(UNREGISTERED)
    return "rng" if kind == GENERATOR else own if UNREGISTERED in name else name.partition(".")[0]


def plan_kills(
    whole: Mapping[int, SessionTrace], *, kills: int, at: Sequence[int] = (), seed: int = 0
) -> tuple[Kill, ...]:
    """Where to save and where to kill: in the first session that is long enough, drawn by `seed` or as given.

    Raises:
        InvalidValue: one of `at` lies outside of that session.
        NothingToProve: no session is long enough.
    """
    long_enough = [s for s in whole.values() if s.last - s.first >= LEAST_ITERATIONS]
    if not long_enough:
        longest = max((s.last - s.first for s in whole.values()), default=0)
        reason = (
            f"the longest session did {longest} iterations{_before(whole)}, and it takes {LEAST_ITERATIONS}"
            if whole
            else "it opened no TrainingSession (or CachedTrainer), which the checkpoints to resume from come from"
        )
        raise NothingToProve(reason=reason)
    session = long_enough[0]
    draw = random.Random(seed)  # noqa: S311
    for iteration in at:
        if not session.first < iteration <= session.last:
            reason = f"the session does the iterations {session.first + 1} to {session.last}"
            raise InvalidValue(name="--at", value=iteration, reason=reason)
    possible = range(session.first + 2, session.last)
    points = sorted(set(at)) or sorted(draw.sample(possible, min(kills, len(possible))))
    least = session.first + 1
    return tuple(
        Kill(session=session.number, at=point, save=draw.randint(max(least, point - _BACK), point)) for point in points
    )


def _before(whole: Mapping[int, SessionTrace]) -> str:
    return " before it diverged" if any(session.has_diverged for session in whole.values()) else ""


@dataclass(frozen=True)
class _Order:
    """What a run is told: part of an `Instruction`."""

    resume: str = "latest"
    keeps_never: bool = True
    kill: Kill | None = None
    until: Mapping[int, int] | None = None
    resumed: int | None = None


_FRESH = _Order()
"""In a cache that is empty: a fresh start, whatever the program asks for; a later session goes on from an earlier."""


class _Runs:
    """Makes runs, one after the other, each with the caches of a folder."""

    def __init__(
        self, launch: Launch, folder: Path, timeout: float | None, keep: bool, told: Callable[[str, int], object]
    ) -> None:
        self._launch, self._folder, self._timeout, self._keep, self._told = launch, folder, timeout, keep, told
        self._count = 0

    def attempt(self, whole: Mapping[int, SessionTrace], kill: Kill, resume: str) -> Attempt:
        """One kill, and the resume after it, in caches of their own."""
        with fs.scratch(f"killed-at-{kill.at}-", inside=self._folder, keep=self._keep) as caches:
            what = f"run that was to be killed at iteration {kill.at}"
            killed = self.traced(what, caches, _Order(kill=kill))
            if (unlike := by_itself(whole, killed)) is not None:
                return _attempt_without_resume(kill, unlike)
            self._check_saved(what, killed, kill)
            policy = str(killed[kill.session].saved["id"]) if resume == "id" else resume
            until = {number: session.last for number, session in whole.items()}
            order = _Order(resume=policy, keeps_never=False, until=until, resumed=kill.session)
            resumed = self.traced(f"run that resumed after iteration {kill.at}", caches, order)
        return judge(whole, killed, resumed, kill)

    def _check_saved(self, what: str, killed: Mapping[int, SessionTrace], kill: Kill) -> None:
        session = killed.get(kill.session)
        if session is None or session.last < kill.at:
            raise ProofFailed(run=what, reason=f"it ended by itself before that{self._tail()}")
        if not session.saved:
            raise ProofFailed(run=what, reason=f"its checkpoint could not be saved{self._tail()}")

    def traced(self, what: str, caches: Path, order: _Order) -> dict[int, SessionTrace]:
        """Make one run, and read what it left."""
        self._told(what, self._count)
        self._count += 1
        base = self._folder / f"{self._count}"
        trace, self._output = base.with_suffix(".trace"), base.with_suffix(".log")
        instruction = Instruction(
            trace=str(trace),
            resume=order.resume,
            keeps_never=order.keeps_never,
            kill=order.kill,
            until=order.until or {},
            resumed=order.resumed,
        )
        fs.append(base.with_suffix(".json"), instruction.to_bytes())
        code = self._run(what, {VARIABLE: str(base.with_suffix(".json")), SCRATCH: str(caches)})
        try:
            found = read_trace(fs.read_bytes(trace, limit=_MAX_TRACE)) if trace.exists() else {}
        except ValueError as error:
            raise ProofFailed(run=what, reason=error) from error
        if code != 0 and not (order.kill and order.kill.session in found):
            raise ProofFailed(run=what, reason=f"it ended with {code}{self._tail()}")
        return found

    def _run(self, what: str, variables: Mapping[str, str]) -> int:
        child = self._launch(variables, self._output)
        end = None if self._timeout is None else time.monotonic() + self._timeout
        try:
            while (code := child.poll()) is None:
                if end is not None and time.monotonic() > end:
                    raise ProofFailed(run=what, reason=f"it took more than {self._timeout:g} seconds{self._tail()}")
                time.sleep(_PAUSE)
        finally:
            _end_all(child)
        return code

    def _tail(self) -> str:
        """The last lines that the run has written."""
        data = fs.read_bytes(self._output, limit=_MAX_TRACE) if self._output.exists() else b""
        lines = data.decode(errors="replace").splitlines()[-_TAIL:]
        return "; it wrote at last:\n" + "\n".join(f"  | {line}" for line in lines) if lines else ", and wrote nothing"


def _attempt_without_resume(kill: Kill, difference: Difference) -> Attempt:
    return Attempt(killed_at=kill.at, saved_at=kill.save, resumed_at=None, resumed_from=None, difference=difference)


def _end_all(child: Child) -> None:
    """End a run with all that it has started, such as the workers of a loader, which outlive a kill."""
    if child.pid is None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
    # One that has only just been started has no group of its own as yet.
    with contextlib.suppress(ProcessLookupError):
        if child.poll() is None:
            os.kill(child.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
    while child.poll() is None:
        time.sleep(_PAUSE)
