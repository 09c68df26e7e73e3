"""What a trace of a training holds, and what differs between two moments of it. Pure, and without torch.

`trace` writes it, `judging` compares whole runs by it, `proving` makes these.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

VARIABLE = "CKPTCACHE_PROVE"
"""Names the file of an `Instruction`; a session that finds it records a trace."""
UNREGISTERED = " (not registered)"
BATCH, GENERATOR, LOGGED, LOADER, OTHER, OPTIMIZER, MODEL = 0, 1, 2, 3, 4, 5, 6
"""What differs, in the order in which one thing makes the next one differ within an iteration."""
_WIDTH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """Where a run is killed: at the end of iteration `at` of the session `session`, having saved at `save`."""

    session: int
    at: int
    save: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """What a traced run is to do.

    Attributes:
        trace: the file that it writes.
        resume: the policy in place of the program's own.
        keeps_never: whether a program that asks for "never" is given it.
        resumed: the session that `resume` is meant for; the others go on from the latest. None for all of them.
        kill: where it ends itself by SIGKILL; None for not at all.
        until: by session, the iteration after which it is stopped, though the program would go on.
    """

    trace: str
    resume: str
    keeps_never: bool
    kill: Kill | None = None
    until: Mapping[int, int] = field(default_factory=dict)
    resumed: int | None = None

    def policy(self, session: int, asked: str) -> str:
        """How a session of that number resumes, whose program asks for `asked`.

        A session after the one that was killed starts as it does where nobody is killed.
        """
        is_other = self.resumed is not None and session != self.resumed
        keeps_never = session > self.resumed if is_other and self.resumed is not None else self.keeps_never
        if asked == "never" and keeps_never:
            return asked
        return "latest" if is_other else self.resume

    def to_bytes(self) -> bytes:
        """As JSON."""
        return orjson.dumps(self, option=orjson.OPT_NON_STR_KEYS)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Instruction":
        """From JSON."""
        found = orjson.loads(data)
        kill = found.pop("kill")
        until = {int(session): iteration for session, iteration in found.pop("until").items()}
        return cls(**found, kill=None if kill is None else Kill(**kill), until=until)


# --- a trace -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Leaves:
    """Names of what is digested, with the kind of each (`GENERATOR` to `MODEL`); the same for many moments."""

    kinds: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A training after one iteration."""

    batches: tuple[tuple[str, str], ...] = ()
    """Of each call of a model: its name, and the digest of what it was given."""
    logged: Mapping[str, str] = field(default_factory=dict)
    """What was logged, as hexadecimal floats."""
    leaves: Leaves = field(default_factory=Leaves)
    digests: str = ""

    def state(self) -> dict[str, str]:
        """Digests by name."""
        parts = (self.digests[i : i + _WIDTH] for i in range(0, len(self.digests), _WIDTH))
        return dict(zip(self.leaves.kinds, parts, strict=True))


@dataclass(slots=True, kw_only=True)
class SessionTrace:
    """What one session left."""

    number: int
    opened: Mapping[str, Any]
    """How it started: policy, checkpoint, iteration, what was restored, what was fresh."""
    start: Moment
    steps: dict[int, Moment] = field(default_factory=dict)
    end: Moment | None = None
    ended: Mapping[str, Any] = field(default_factory=dict)
    saved: Mapping[str, Any] = field(default_factory=dict)
    has_diverged: bool = False
    """Whether it diverged after `last`, and went back: what came then has other batches each time, and is left out."""

    @property
    def first(self) -> int:
        """The iteration that it started from."""
        return int(self.opened["iteration"])

    @property
    def last(self) -> int:
        """The last iteration that it finished."""
        return max(self.steps, default=self.first)


def read_trace(data: bytes) -> dict[int, SessionTrace]:
    """The sessions of a trace by their numbers; a last line that a kill cut short is left out.

    After a session that has diverged nothing repeats itself, and no more is read.

    Raises ValueError for a trace that several processes wrote, whose lines are mixed.
    """
    sessions: dict[int, SessionTrace] = {}
    leaves = Leaves()
    processes: set[int] = set()
    for text in data.split(b"\n")[:-1]:
        line = orjson.loads(text)
        processes.add(line["process"])
        if len(processes) > 1:
            raise ValueError("several processes opened sessions, and only those of one can be proved")
        if line["kind"] == "leaves":
            leaves = Leaves(dict(zip(line["names"], line["kinds"], strict=True)))
        elif line["kind"] == "start":
            opened = SessionTrace(number=line["session"], opened=line["opened"], start=_moment(line, leaves))
            sessions[line["session"]] = opened
        elif line["kind"] == "diverged":
            sessions[line["session"]].has_diverged = True
            break
        else:
            _add(sessions[line["session"]], line, leaves)
    return sessions


def _add(session: SessionTrace, line: Mapping[str, Any], leaves: Leaves) -> None:
    if line["kind"] == "step":
        session.steps[line["iteration"]] = _moment(line, leaves)
    elif line["kind"] == "end":
        session.end, session.ended = _moment(line, leaves), line["ended"]
    elif line["kind"] == "saved":
        session.saved = line["saved"]


def _moment(line: Mapping[str, Any], leaves: Leaves) -> Moment:
    batches = tuple((name, digest) for name, digest in line["batches"])
    return Moment(batches=batches, logged=line["logged"], leaves=leaves, digests=line["state"])


# --- two moments ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that differs between two moments."""

    kind: int
    name: str
    how: str = ""


def findings(a: Moment, b: Moment, ignored: frozenset[str] = frozenset()) -> list[Finding]:
    """What differs between two moments, causes before effects; `ignored` names leaves that don't count.

    Loaders that tell of themselves otherwise and give the same batches are the same: some hold what they need no more.
    """
    found = [*_batch_findings(a, b), *_logged_findings(a, b), *state_findings(a, b, ignored)]
    if a.batches and all(finding.kind == LOADER for finding in found):
        return []
    return sorted(found, key=_rank)


def _rank(finding: Finding) -> tuple[int, bool]:
    # An optimizer that nobody saved makes its scheduler differ, and not the other way round.
    is_lost = finding.kind == OPTIMIZER and UNREGISTERED in finding.name
    return (OTHER if is_lost else finding.kind), not is_lost


def _batch_findings(a: Moment, b: Moment) -> Iterator[Finding]:
    if len(a.batches) != len(b.batches):
        yield Finding(BATCH, "batch", f"there are {len(b.batches)}, not {len(a.batches)}")
    for number, (one, other) in enumerate(zip(a.batches, b.batches, strict=False), 1):
        if one != other:
            which = f" {number} of {len(a.batches)}" if len(a.batches) > 1 else ""
            yield Finding(BATCH, f"batch{which}", f"what {one[0]} was called with")


def _logged_findings(a: Moment, b: Moment) -> Iterator[Finding]:
    for name in {**a.logged, **b.logged}:
        one, other = a.logged.get(name), b.logged.get(name)
        if one != other:
            yield Finding(LOGGED, name, f"{_number(other)}, not {_number(one)}")


def _number(text: str | None) -> str:
    return "not logged" if text is None else repr(float.fromhex(text))


def state_findings(a: Moment, b: Moment, ignored: frozenset[str] = frozenset()) -> Iterator[Finding]:
    """The leaves of state that differ, or that only one of the two has."""
    if a.leaves.kinds == b.leaves.kinds and a.digests == b.digests:
        return
    one, other = a.state(), b.state()
    for name, kind in {**a.leaves.kinds, **b.leaves.kinds}.items():
        if name in ignored or one.get(name) == other.get(name):
            continue
        if name in one and name in other:
            yield Finding(kind, name)
        elif UNREGISTERED not in name:  # of those it depends on chance which are found
            yield Finding(kind, name, "it is missing" if name in one else "it should not be there")


def only_parts(moment: Moment, parts: Iterable[str]) -> Moment:
    """A moment cut down to the state of `parts`, but for loaders, which may change by being asked."""
    known = set(parts)
    state = {
        name: digest
        for name, digest in moment.state().items()
        if name.partition(".")[0] in known and moment.leaves.kinds[name] != LOADER and UNREGISTERED not in name
    }
    leaves = Leaves({name: moment.leaves.kinds[name] for name in state})
    return Moment(leaves=leaves, digests="".join(state.values()))
