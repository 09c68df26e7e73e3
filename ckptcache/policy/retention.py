"""Which checkpoints stay and which go, each with its reason; the same answer serves dry runs and real ones."""

import heapq
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ckptcache.metadata import CheckpointMetadata


@dataclass(frozen=True, slots=True)
class Candidate:
    """A checkpoint whose file is there.

    Attributes:
        record: what is known of it.
        size: bytes of its file.
        group: those it may be ranked against.
        rank: 0 for the best of its group.
        last_used: the order at which its group was last used, the same for all of a group.
    """

    record: CheckpointMetadata
    size: int
    group: Hashable
    rank: int
    last_used: tuple[int, str]

    @property
    def id(self) -> str:
        """The checkpoint's id."""
        return self.record.id


@dataclass(frozen=True, slots=True)
class Plan:
    """What stays and what goes, as id to reason, and the warning where a limit can't be kept."""

    kept: Mapping[str, str]
    evicted: Mapping[str, str]
    over_limit: str | None = None


# --- protection ----------------------------------------------------------------------------------


def protections(
    candidates: Iterable[Candidate],
    *,
    names: Mapping[str, str],
    current_group: Hashable,
    live_sessions: Collection[str],
    live_parents: Mapping[str, str],
    keep_latest: int,
    diverged: Collection[str] = (),
) -> dict[str, str]:
    """The candidates that stay whatever the limits say, as id to reason; several reasons are joined by commas.

    What was rolled back stays for a name, a pin or a live session, and is neither the best nor the newest.

    Args:
        names: name to the id of the checkpoint it points to.
        current_group: the group whose best is protected.
        live_sessions: the sessions that are running.
        live_parents: id to the live session that resumed from it and hasn't saved yet.
        keep_latest: how many of the latest of each live session, and of the newest one, stay.
        diverged: ids that are never the best.
    """
    members = sorted(candidates, key=lambda c: c.record.order)
    reasons: dict[str, list[str]] = {c.id: [] for c in members}
    for id, reason in (
        *_chosen(members, names),
        *_best_of(members, current_group, diverged),
        *_latest(members, live_sessions, keep_latest),
        *((id, f"parent of live session {session}") for id, session in live_parents.items()),
    ):
        if id in reasons:
            reasons[id].append(reason)
    return {id: ", ".join(given) for id, given in reasons.items() if given}


def _chosen(members: list[Candidate], names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name, id in sorted(names.items()):
        yield id, f"named {name}"
    for candidate in members:
        if candidate.record.pinned:
            yield candidate.id, "pinned"


def _best_of(members: list[Candidate], group: Hashable, diverged: Collection[str]) -> Iterator[tuple[str, str]]:
    unsound = frozenset(diverged)
    sound = (c for c in members if c.group == group and c.id not in unsound and c.record.rolled_back is None)
    if best := min(sound, key=_worth, default=None):
        yield best.id, "best of the current group"


def _latest(members: list[Candidate], live: Collection[str], keep: int) -> Iterator[tuple[str, str]]:
    if not members or keep < 1:
        return
    # A session may be None, which is where checkpoints saved by hand belong.
    newest, running = _newest(members), frozenset(live)
    by_session: defaultdict[str | None, list[Candidate]] = defaultdict(list)
    for candidate in members:
        by_session[candidate.record.session].append(candidate)
    for session, own in by_session.items():
        if session == newest or session in running:
            kind = "live" if session in running else "newest"
            staying = own if kind == "live" else [c for c in own if c.record.rolled_back is None]
            for candidate in staying[-keep:]:
                yield candidate.id, _latest_reason(kind, session, keep)


def _newest(members: list[Candidate]) -> str | object | None:
    """The session of the latest that wasn't rolled back; nobody's where all were."""
    return next((c.record.session for c in reversed(members) if c.record.rolled_back is None), object())


def _latest_reason(kind: str, session: str | None, keep: int) -> str:
    which = "latest" if keep == 1 else f"among the latest {keep}"
    return f"{which} of the {kind} session {session}" if session else f"{which} saved outside of a session"


# --- the plan ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Group:
    """What is left of a group while planning; `removable` has the lowest last."""

    members: int
    best_is_removable: bool
    last_used: tuple[int, str]
    removable: list[Candidate] = field(default_factory=list)

    def turn(self) -> tuple[bool, int, tuple[int, str]]:
        """When the group must give next, the least first: the lone after all others, the longest tail before
        shorter ones, the least recently used before the others."""
        tail = len(self.removable) - self.best_is_removable
        return self.members == 1, -tail, self.last_used


@dataclass(slots=True)
class _Load:
    """How much the checkpoints that are left take, against the limits."""

    count: int
    size: int
    max_checkpoints: int
    max_bytes: int

    def excess(self) -> str:
        """What is exceeded; empty where nothing is."""
        parts = []
        if self.count > self.max_checkpoints:
            parts.append(f"{self.count} checkpoints exceed max_checkpoints {self.max_checkpoints}")
        if self.size > self.max_bytes:
            parts.append(f"{self.size} bytes exceed max_cache_size_gb ({self.max_bytes} bytes)")
        return " and ".join(parts)


def plan(
    candidates: Iterable[Candidate], protected: Mapping[str, str], *, max_checkpoints: int, max_bytes: int
) -> Plan:
    """What to evict so that at most `max_checkpoints` files of at most `max_bytes` together are left.

    While a limit is exceeded the longest tail gives its lowest, a tail being what is unprotected below the best of a
    group; of equal tails, that of the least recently used group. A group's last one goes only when no other
    can, the least recently used group first. Before all of these go those that were rolled back, the lowest first.
    Planning over what was kept evicts nothing.

    Args:
        candidates: all checkpoints whose files are there.
        protected: id to reason of those that stay even above a limit, as `protections` gives them.
    """
    members = sorted(candidates, key=_worth)
    load = _Load(len(members), sum(c.size for c in members), max_checkpoints, max_bytes)
    evicted: dict[str, str] = {}
    for candidate, is_last in _victims(members, protected):
        if not (excess := load.excess()):
            break
        evicted[candidate.id] = f"{_place(candidate, is_last)}: {excess}"
        load.count, load.size = load.count - 1, load.size - candidate.size
    kept = {c.id: protected.get(c.id) or _kept_reason(c) for c in members if c.id not in evicted}
    excess = load.excess()
    return Plan(kept, evicted, f"{excess}, all of them protected" if excess else None)


def _victims(members: list[Candidate], protected: Collection[str]) -> Iterator[tuple[Candidate, bool]]:
    """All unprotected, in the order in which they would go; each with whether it is the last of its group."""
    left_behind = [c for c in members if c.record.rolled_back is not None and c.id not in protected]
    yield from ((candidate, False) for candidate in reversed(left_behind))
    gone = {c.id for c in left_behind}
    groups = _groups([c for c in members if c.id not in gone], protected)
    # The number settles equal turns, the same way each time: groups come in the order of their best.
    waiting = [(group.turn(), number, group) for number, group in enumerate(groups)]
    heapq.heapify(waiting)
    while waiting:
        _, number, group = heapq.heappop(waiting)
        yield group.removable.pop(), group.members == 1
        group.members -= 1
        if group.removable:
            heapq.heappush(waiting, (group.turn(), number, group))


def _groups(members: list[Candidate], protected: Collection[str]) -> list[_Group]:
    """The groups that have something to give; `members` are sorted by worth."""
    groups: dict[Hashable, _Group] = {}
    for candidate in members:
        is_removable = candidate.id not in protected
        group = groups.setdefault(candidate.group, _Group(0, is_removable, candidate.last_used))
        group.members += 1
        if is_removable:
            group.removable.append(candidate)
    return [group for group in groups.values() if group.removable]


def _worth(candidate: Candidate) -> tuple[int, int, str]:
    """A key that puts the best of a group first; the later of two that share a rank."""
    return candidate.rank, -candidate.record.sequence, candidate.id


def _place(candidate: Candidate, is_last: bool) -> str:
    if candidate.record.rolled_back is not None:
        return f"rolled back to {candidate.record.rolled_back}"
    if is_last:
        return "the last of the least recently used group"
    return f"rank {candidate.rank + 1}, the lowest of its group that may go"


def _kept_reason(candidate: Candidate) -> str:
    return f"rank {candidate.rank + 1} of its group, within the limits"
