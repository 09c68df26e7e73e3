"""A process that is killed, or refused, at each of the system calls that an operation of the cache makes."""

import errno
import gc
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptcache import TrainingCache
from ckptcache.errors import CkptCacheError, SaveFailed
from ckptcache.storage import fs, locks
from tests.caches import file_of, flip, ids, save, temporary_files, tiny
from tests.faults import CountingSystem, FailingSystem, KillingSystem, run_child, swapped

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EMFILE, errno.EROFS)
LIMIT = 3

Act = Callable[[TrainingCache], Any]


def opened(folder: Path) -> TrainingCache:
    return TrainingCache(folder, max_checkpoints=LIMIT)


def fill(cache: TrainingCache) -> None:
    """Up to the limit, so that the next save evicts; the worst is protected, the middle one not."""
    for loss in (3.0, 2.0, 1.0):
        save(cache, loss, iteration=int(loss))
    cache.name("latest", "slot-1")
    cache.pin(cache.checkpoints()[-1].id)


def new_best(cache: TrainingCache) -> None:
    save(cache, 0.5, iteration=9)


def spoil_best(cache: TrainingCache) -> None:
    fill(cache)
    cache.unname("slot-1")
    flip(file_of(cache, cache.get("best")))


def break_index(cache: TrainingCache) -> None:
    fill(cache)
    (cache.cache_dir / "metadata.json").write_text("{broken")


def save_in_the_background(cache: TrainingCache) -> None:
    cache.save(tiny(0.5), iteration=9, val_loss=0.5, blocking=False)
    cache.wait_until_finished()


def import_one(cache: TrainingCache) -> None:
    path = cache.cache_dir.parent / "foreign.pt"
    torch.save({"w": torch.full((4,), 0.5), "step": 1}, path)
    cache.import_(path, val_loss=0.5)


def change_marks(cache: TrainingCache) -> None:
    cache.pin("best")
    cache.name("best", "slot-2")
    cache.unname("slot-1")
    cache.tag("latest", "x")


def prune_to_one(cache: TrainingCache) -> None:
    cache.unpin("latest")
    TrainingCache(cache.cache_dir, max_checkpoints=1, keep_latest=0).prune()


# What is there before, and what is then cut short.
SCENARIOS: dict[str, tuple[Act, Act]] = {
    "a save that evicts": (fill, new_best),
    "the first save": (lambda cache: None, new_best),
    "a save in the background": (fill, save_in_the_background),
    "a restore that quarantines": (spoil_best, lambda cache: cache.restore(tiny())),
    "pins, names and tags": (fill, change_marks),
    "pruning": (fill, prune_to_one),
    "an import": (fill, import_one),
    "a save over a broken index": (break_index, new_best),
    "a repair": (break_index, lambda cache: cache.doctor(repair=True)),
}
# What pins and names, or has to do with the generation before.
CHANGING_MARKS = ("pins, names and tags", "pruning", "a save over a broken index", "a repair")
EVERY = [pytest.param(n, marks=[pytest.mark.campaign] if i > 1 else []) for i, n in enumerate(SCENARIOS)]


class Stage:
    """A folder in the state before a scenario's act, laid out anew for each try."""

    def __init__(self, folder: Path, scenario: str) -> None:
        gc.collect()  # caches of earlier tests give their leases back, which counts as an operation too
        prepare, self.act = SCENARIOS[scenario]
        self.template, self.folder = folder / "template", folder / "cache"
        with opened(self.template) as cache:
            prepare(cache)
        self.keeps_marks = scenario not in CHANGING_MARKS
        found = opened(self.template).checkpoints()
        self.acknowledged, self.names = {r.id: r for r in found}, opened(self.template).names()
        self.pinned = {r.id for r in found if r.pinned}
        self.spoilt = {f.subject for f in opened(self.template).doctor() if f.kind == "damaged"}

    def lay_out(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.template.exists():
            shutil.copytree(self.template, self.folder, symlinks=True)

    def operations(self) -> list[str]:
        self.lay_out()
        with swapped(CountingSystem()) as counting, opened(self.folder) as cache:
            self.act(cache)
        return counting.operations

    def check(self) -> None:
        """Everything acknowledged is there and sound, or evicted for something better; then all works, and is tidy."""
        cache = opened(self.folder)
        there, records = set(ids(cache.checkpoints())), {r.id: r for r in cache.checkpoints(everything=True)}
        for id in self.acknowledged.keys() - self.spoilt:
            assert id in there or records[id].decision == "evicted", f"{id} was lost"
        assert len(there) >= min(1, len(self.acknowledged) - len(self.spoilt)), "none is left"
        for id in there - self.spoilt:
            assert cache.load(id)["w"].tolist() == [records[id].val_loss] * 4
        if self.keeps_marks:
            assert cache.names() == self.names
            assert {r.id for r in records.values() if r.pinned} == self.pinned
        self.check_goes_on(cache)

    def check_goes_on(self, cache: TrainingCache) -> None:
        for loss in (0.25, 0.125):
            record = save(cache, loss, iteration=99)
            assert cache.load(record.id)["w"][0] == loss
            assert cache.best().id == record.id
        cache.close()
        assert temporary_files(self.folder) == []
        damage = {f.subject for f in opened(self.folder).doctor() if f.subject not in self.spoilt}
        assert damage == self.unsigned()
        available = set(ids(cache.checkpoints()))
        assert {path.stem for path in self.folder.glob("checkpoints/*.pt")} == available
        assert {path.stem for path in self.folder.glob("checkpoints/*.json")} == available
        assert len(available) <= LIMIT

    def unsigned(self) -> set[str]:
        """Leases of those killed before they could sign: whose they are nobody knows, so that they stay."""
        return {path.stem for path in self.folder.glob("sessions/*.lock") if locks.lease_state(path) == "unknown"}


# --- killed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("scenario", EVERY)
@pytest.mark.timeout(600)
def test_nothing_acknowledged_is_lost_by_a_kill_at_any_operation(tmp_path, scenario, torn):
    stage = Stage(tmp_path, scenario)
    operations = stage.operations()
    assert len(operations) > 10
    for at, operation in enumerate(operations):
        if torn and operation != "write":
            continue
        stage.lay_out()

        def child(at: int = at) -> None:

            fs.system = KillingSystem(at, torn=torn)
            with opened(stage.folder) as cache:
                stage.act(cache)

        assert run_child(child) == -signal.SIGKILL
        stage.check()


# --- refused -------------------------------------------------------------------------------------


def tries(operations: int, everything: bool) -> list[tuple[int, int]]:
    """Which operation fails how: every one in every way, or each in one way, in turn."""
    if everything:
        return [(at, error) for at in range(operations) for error in ERRORS]
    return [(at, ERRORS[at % len(ERRORS)]) for at in range(operations)]


def refused(stage: Stage, at: int, error: int, *, lasting: bool) -> CkptCacheError | None:
    """The error that the act ends with when an operation fails; anything but an error of ours is raised."""
    stage.lay_out()
    cache, caught = opened(stage.folder), None
    with swapped(FailingSystem(at, error, lasting=lasting)) as failing:
        try:
            stage.act(cache)
        except CkptCacheError as raised:
            caught = raised
        cache.close()
    assert failing.hit
    if not lasting and stage.act is new_best and caught is not None:
        check_left_alone(stage, cache)
    return caught


def check_left_alone(stage: Stage, cache: TrainingCache) -> None:
    assert ids(cache.checkpoints()) == ids(opened(stage.template).checkpoints())
    assert temporary_files(stage.folder) == []
    assert cache.names() == opened(stage.template).names()


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.campaign)])
@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.timeout(600)
def test_a_save_that_is_refused_at_any_operation_says_so_and_leaves_the_old_set_as_it_was(
    tmp_path, everything, lasting
):
    stage = Stage(tmp_path, "a save that evicts")
    count, failed = len(stage.operations()), 0
    for at, error in tries(count, everything):
        caught = refused(stage, at, error, lasting=lasting)
        if caught is not None:
            failed += 1
            assert len(str(caught)) > 40
            assert isinstance(caught, SaveFailed) or "written" in str(caught)
        stage.check()
    assert failed > count // 2, "what fails after the commit is survived; everything before it is not"


@pytest.mark.campaign
@pytest.mark.parametrize("scenario", list(SCENARIOS))
@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.timeout(900)
def test_an_operation_of_any_kind_that_is_refused_ends_in_an_error_of_ours_and_leaves_a_sound_cache(
    tmp_path, scenario, lasting
):
    stage = Stage(tmp_path, scenario)
    for at, error in tries(len(stage.operations()), everything=True):
        refused(stage, at, error, lasting=lasting)
        stage.check()
