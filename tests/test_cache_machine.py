"""A state machine over the cache, beside a model of what it should hold; after each step the auditor is asked."""

import json
import math
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ckptcache import TrainingCache
from ckptcache.metadata import CheckpointMetadata
from ckptcache.storage import fs, locks
from tests.caches import file_of, flip, ids, save, tiny
from tests.campaigns import variants
from tests.faults import KillingSystem, run_child

MAX_CHECKPOINTS, MAX_BYTES = 4, 14_000
SIZES = (3, 5, 1500)
LOSSES = st.one_of(
    st.floats(-2, 9).map(lambda x: round(x, 1)), st.none(), st.sampled_from([math.nan, math.inf, -math.inf])
)


@dataclass
class Known:
    """What the model knows of a checkpoint."""

    record: CheckpointMetadata
    size: int
    """Elements of its state: another number is another architecture, and so another group."""
    is_flipped: bool = False
    """Whether its file holds a wrong bit that can't be seen from outside."""
    state: str = "available"

    @property
    def loss(self) -> float | None:
        return self.record.val_loss

    @property
    def worth(self) -> tuple[float, int, tuple[int, str]]:
        """What the best of a group has the greatest of; only for those that haven't diverged."""
        return (
            (-math.inf, 0, self.record.order)
            if self.loss is None
            else (-self.loss, self.record.iteration, self.record.order)
        )


class CacheMachine(RuleBasedStateMachine):
    @initialize(at=st.integers(0, 9), torn=st.booleans())
    def start(self, at: int, torn: bool) -> None:
        """The first save of all is killed, so that there is no sequence without a crash; most have more."""
        self.folder = Path(tempfile.mkdtemp(prefix="machine-", dir=_quick_folder()))
        self.known: dict[str, Known] = {}
        self.names: dict[str, str] = {}
        self.pinned: set[str] = set()
        self.tags: dict[str, tuple[str, ...]] = {}
        self.counter = 0
        self.was_killed = False
        self.reopen()
        self.save_and_be_killed(at, 1.0, True, torn)
        assert self.was_killed

    crashing = kills = 0

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            CacheMachine.crashing += self.was_killed
            self.cache.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    # --- what the model says ---------------------------------------------------------------------

    def those(self, state: str) -> dict[str, Known]:
        return {id: known for id, known in self.known.items() if known.state == state}

    def ranked(self, size: int) -> list[Known]:
        sound = [k for k in self.those("available").values() if k.size == size and _is_sound(k.loss)]
        return sorted(sound, key=lambda k: k.worth, reverse=True)

    def protected(self, current: CheckpointMetadata | None) -> set[str]:
        available = self.those("available")
        chosen = (self.pinned | set(self.names.values())) & available.keys()
        if current is None:
            return chosen
        best = [k.record.id for k in self.ranked(self.known[current.id].size)[:1]]
        return {*chosen, *best, max(available.values(), key=lambda k: k.record.order).record.id}

    def pick(self, number: int, state: str = "available") -> str | None:
        choices = sorted(self.those(state))
        return choices[number % len(choices)] if choices else None

    def has_gone(self, evicted: dict[str, str], current: CheckpointMetadata | None) -> None:
        """Judge an eviction: nothing protected, nothing without need, and not more than was needed."""
        protected = self.protected(current)
        assert not protected & evicted.keys(), "something protected was evicted"
        before = self.those("available")
        assert evicted.keys() <= before.keys()
        if evicted:
            assert _exceeds(before.values()), "evicted without need"
        for id in evicted:
            self.known[id].state = "evicted"
        after = self.those("available")
        if _exceeds(after.values()):
            assert after.keys() <= protected, "a limit is exceeded by what could go"
        if evicted:
            last = before[list(evicted)[-1]]
            assert _exceeds([*after.values(), last]), "one too many was evicted"

    # --- steps -----------------------------------------------------------------------------------

    @rule(loss=LOSSES, size=st.sampled_from(SIZES), blocking=st.booleans(), tagged=st.booleans())
    def save(self, loss: float | None, size: int, blocking: bool, tagged: bool) -> None:
        self.counter += 1
        tags = ("born",) if tagged else ()
        state = tiny(float(self.counter), size)
        record = save(self.cache, loss, self.counter, state=state, blocking=blocking, tags=tags)
        self.cache.wait_until_finished()
        record = self.cache.get(record.id)
        assert all(record.sequence > k.record.sequence for k in self.known.values())
        self.known[record.id] = Known(record, size)
        self.tags[record.id] = tags
        self.has_gone(dict(self.cache.last_evicted), record)

    @rule()
    def prune(self) -> None:
        foreseen = self.cache.prune(dry_run=True)
        plan = self.cache.prune()
        assert plan == foreseen
        latest = max(self.those("available").values(), key=lambda k: k.record.order, default=None)
        self.has_gone(dict(plan.evicted), latest.record if latest else None)

    @rule(number=st.integers(0, 99), on=st.booleans())
    def pin(self, number: int, on: bool) -> None:
        if id := self.pick(number):
            assert (self.cache.pin if on else self.cache.unpin)(id).pinned is on
            (self.pinned.add if on else self.pinned.discard)(id)

    @rule(number=st.integers(0, 99), name=st.sampled_from(["a", "b"]))
    def name(self, number: int, name: str) -> None:
        if id := self.pick(number):
            self.cache.name(id, name)
            self.names[name] = id

    @precondition(lambda self: self.names)
    @rule(number=st.integers(0, 99))
    def unname(self, number: int) -> None:
        name = sorted(self.names)[number % len(self.names)]
        assert self.cache.unname(name) == self.names.pop(name)

    @rule(number=st.integers(0, 99), text=st.sampled_from(["x", "y"]))
    def tag(self, number: int, text: str) -> None:
        if id := self.pick(number):
            self.tags[id] = tuple(dict.fromkeys((*self.tags[id], text)))
            assert self.cache.tag(id, text).tags == self.tags[id]

    @rule()
    def reopen(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()
        limit = MAX_BYTES / 10**9
        self.cache = TrainingCache(self.folder / "c", max_checkpoints=MAX_CHECKPOINTS, max_cache_size_gb=limit)

    @rule(size=st.sampled_from(SIZES))
    def restore(self, size: int) -> None:
        target, expected = tiny(-9.0, size), None
        for known in list(self.those("damaged").values()):
            if known.size == size and _is_sound(known.loss):
                known.state = "quarantined"
        for known in self.ranked(size):
            if not known.is_flipped:
                expected = known
                break
            known.state = "quarantined"
        restored = self.cache.restore(target)
        assert (restored and restored.record.id) == (expected and expected.record.id)
        assert set(target["w"].tolist()) == {float(expected.record.iteration) if expected else -9.0}

    # --- what the world does to it ---------------------------------------------------------------

    @rule(number=st.integers(0, 99))
    def delete_a_file(self, number: int) -> None:
        if id := self.pick(number):
            file_of(self.cache, id).unlink()
            self.known[id].state = "missing"

    @rule(number=st.integers(0, 99), truncate=st.booleans())
    def corrupt_a_file(self, number: int, truncate: bool) -> None:
        if id := self.pick(number):
            path = file_of(self.cache, id)
            if truncate:
                path.write_bytes(path.read_bytes()[:-1])
                self.known[id].state = "damaged"
            elif not self.known[id].is_flipped:
                flip(path, 700 + number)
                self.known[id].is_flipped = True

    @precondition(lambda self: (self.folder / "c" / "metadata.json").exists())
    @rule(how=st.sampled_from(["delete", "break"]))
    def lose_the_index(self, how: str) -> None:
        """What the last commit decided is lost; every record, and every file, is not."""
        path = self.folder / "c" / "metadata.json"
        if self.known.keys() - self.ids_that_a_rebuild_can_know():
            return
        path.unlink()  # where a commit was cut short, the generation before is the same file
        if how == "break":
            path.write_text("{broken")
        if self.known:
            assert {f.kind for f in self.cache.doctor(verify=False)} & {"index", "adopted"}
        self.cache.doctor(repair=True, verify=False)
        self.those_damaged_were_quarantined()
        self.learn_what_was_decided()

    @rule(at=st.integers(0, 30), loss=LOSSES, blocking=st.booleans(), torn=st.booleans())
    def save_and_be_killed(self, at: int, loss: float | None, blocking: bool, torn: bool) -> None:
        self.counter += 1
        state = tiny(float(self.counter), SIZES[0])
        self.be_killed(lambda: save(self.cache, loss, self.counter, state=state, blocking=blocking), at, torn)

    @rule(at=st.integers(0, 12), number=st.integers(0, 99), torn=st.booleans())
    def mark_and_be_killed(self, at: int, number: int, torn: bool) -> None:
        if id := self.pick(number):
            self.be_killed(lambda: (self.cache.pin(id), self.cache.name(id, "b"), self.cache.tag(id, "z")), at, torn)

    def be_killed(self, act: Callable[[], object], at: int, torn: bool) -> None:
        """In another process, at one of its operations, if it makes so many; then it is tidied up."""
        self.cache.close()

        def child() -> None:
            self.reopen()
            fs.system = KillingSystem(at, torn=torn)
            act()
            self.cache.close()

        status = run_child(child)
        assert status in (0, -signal.SIGKILL)
        CacheMachine.kills += status == -signal.SIGKILL
        self.was_killed |= status == -signal.SIGKILL
        before = {id for id, known in self.known.items() if known.state == "available"}
        self.cache.doctor(repair=True, verify=False)
        self.those_damaged_were_quarantined()
        for record in self.cache.checkpoints(everything=True):
            if record.id not in self.known:
                assert record.iteration == self.counter
                self.known[record.id], self.tags[record.id] = Known(record, SIZES[0]), ()
        lost = before - set(ids(self.cache.checkpoints()))
        self.learn_what_was_decided()
        assert all(self.known[id].state == "evicted" for id in lost)
        assert not lost & (self.pinned | set(self.names.values()))

    def ids_that_a_rebuild_can_know(self) -> set[str]:
        """What the generation before and the sidecars hold: nothing more is promised."""
        previous, sidecars = (
            self.folder / "c" / "metadata.json.prev",
            (self.folder / "c" / "checkpoints").glob("*.json"),
        )
        held = json.loads(previous.read_text())["checkpoints"] if previous.exists() else {}
        return {*held, *(path.stem for path in sidecars)}

    def those_damaged_were_quarantined(self) -> None:
        for known in self.those("damaged").values():
            known.state = "quarantined"

    def learn_what_was_decided(self) -> None:
        """Take over from the cache what it may have lost or decided, and hold it to what it may not."""
        found = {r.id: r for r in self.cache.checkpoints(everything=True)}
        assert found.keys() == self.known.keys(), "a record was lost"
        available = set(ids(self.cache.checkpoints()))
        self.names = self.cache.names()
        self.pinned = {id for id, record in found.items() if record.pinned}
        self.tags = {id: record.tags for id, record in found.items()}
        for id, known in self.known.items():
            if known.state == "available":
                known.state = "available" if id in available else "evicted" if found[id].decision else "missing"
            elif known.state in ("evicted", "quarantined") and found[id].decision is None:
                known.state = "missing"
            assert (known.state == "available") == (id in available)

    # --- after each step -------------------------------------------------------------------------

    @invariant()
    def the_auditor_finds_what_was_broken_and_nothing_else(self) -> None:
        if not hasattr(self, "cache"):
            return
        expected = {("missing", id) for id in self.those("missing")}
        expected |= {("damaged", id) for id in self.those("damaged")}
        expected |= {("damaged", id) for id, known in self.those("available").items() if known.is_flipped}
        expected |= {("name", n) for n, id in self.names.items() if self.known[id].state != "available"}
        # Whoever is killed before it signs its lease leaves one of which nobody knows whose it is: it stays.
        leases = self.cache.ledger.layout.sessions.glob("*.lock")
        expected |= {("lease", path.stem) for path in leases if locks.lease_state(path) == "unknown"}
        assert {(f.kind, f.subject) for f in self.cache.doctor()} == expected

    @invariant()
    def the_cache_says_what_the_model_says(self) -> None:
        if not hasattr(self, "cache"):
            return
        records = {r.id: r for r in self.cache.checkpoints(everything=True)}
        assert records.keys() == self.known.keys()
        assert set(ids(self.cache.checkpoints())) == self.those("available").keys()
        assert self.cache.names() == self.names
        for id, record in records.items():
            assert record.pinned == (id in self.pinned)
            assert record.tags == self.tags[id]
            decided = self.known[id].state in ("evicted", "quarantined")
            assert (record.decision == self.known[id].state) if decided else record.decision is None
        listed = ids(self.cache.checkpoints())
        for size in SIZES:
            found, ranked = self.cache.best(tiny(size=size)), self.ranked(size)
            assert (found and found.id) == (ranked[0].record.id if ranked else None)
            members = [k for k in self.those("available").values() if k.size == size]
            diverged = sorted((k for k in members if k not in ranked), key=lambda k: k.record.order, reverse=True)
            order = [k.record.id for k in (*ranked, *diverged)]
            assert [id for id in listed if id in order] == order


def _is_sound(loss: float | None) -> bool:
    return loss is None or math.isfinite(loss)


def _exceeds(members) -> bool:
    members = list(members)
    return len(members) > MAX_CHECKPOINTS or sum(k.record.size for k in members) > MAX_BYTES


def _quick_folder() -> str | None:
    """A file system in memory, where there is one: durability is proved elsewhere."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@pytest.mark.timeout(1800)
class TestCacheMachine(CacheMachine.TestCase):
    settings = settings(
        max_examples=1000 if os.environ.get("CKPTCACHE_HYPOTHESIS") == "ci" else 200,
        stateful_step_count=20,
        deadline=None,
    )

    @pytest.fixture(autouse=True)
    def _count(self, counted):
        CacheMachine.crashing = CacheMachine.kills = 0
        yield
        assert CacheMachine.crashing >= self.settings.max_examples
        counted("state machine", "sequences with crashes", CacheMachine.crashing)
        counted("state machine", "processes killed in them", CacheMachine.kills)


@pytest.mark.filterwarnings("ignore")
def test_the_machine_shows_leftovers_that_stay(counted):
    quick = settings(max_examples=300, stateful_step_count=20, deadline=None, database=None, phases=[Phase.generate])
    with variants.keeping_leftovers(), pytest.raises((AssertionError, BaseExceptionGroup)):
        run_state_machine_as_test(CacheMachine, settings=quick)
    counted.caught("state machine", variants.name_of(variants.keeping_leftovers))
