"""What is done to a cache while it is killed, or refused: the folder before, the act, and what must hold afterwards."""

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ckptcache import TrainingCache
from ckptcache.errors import SaveFailed
from ckptcache.metadata import ROLLBACK, CheckpointMetadata, SessionRecord
from ckptcache.storage import locks
from ckptcache.storage.index import IndexFile
from tests.caches import file_of, flip, ids, save, temporary_files, tiny
from tests.faults import CountingSystem, swapped

LIMIT = 3
DISCARDED = "sess_discarded"

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


def save_that_is_taken_back(cache: TrainingCache) -> None:
    """The disk refuses right after the index was committed, so that the old one has to be put back."""
    commit, calls = IndexFile.commit, []

    def commit_and_fail(*arguments: Any, **named: Any) -> None:
        commit(*arguments, **named)
        calls.append(1)
        if len(calls) == 1:
            raise OSError("the disk is gone for a moment")

    with patch.object(IndexFile, "commit", commit_and_fail), pytest.raises(SaveFailed):
        new_best(cache)


def fill_in_a_session(cache: TrainingCache) -> None:
    fill(cache)
    cache.unpin(cache.checkpoints()[-1].id)
    cache.unname("slot-1")
    session = cache.record_session(SessionRecord(id=DISCARDED))
    save(cache, 0.75, iteration=8, session=session)


def fill_two_branches(cache: TrainingCache) -> None:
    """Up to the limit; the first is rolled back to, past the two that came of it, of which one is pinned."""
    first = save(cache, 3.0, iteration=1)
    second = save(cache, 2.0, iteration=2, parents=[first.id])
    cache.pin(save(cache, 1.0, iteration=3, parents=[second.id]).id)


def roll_back(cache: TrainingCache) -> str:
    first = min(cache.checkpoints(everything=True), key=lambda r: r.order).id
    cache.rollback(first)
    cache.undo_rollback()
    cache.rollback(first)
    return first


def roll_back_and_follow(cache: TrainingCache) -> None:
    save(cache, 2.5, iteration=2, parents=[roll_back(cache)])


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
    "a save that is taken back": (fill, save_that_is_taken_back),
    "a session that is discarded": (fill_in_a_session, lambda cache: cache.forget_session(DISCARDED)),
    "a rollback": (fill_two_branches, roll_back),
    "a rollback that is followed": (fill_two_branches, roll_back_and_follow),
    "a repair": (break_index, lambda cache: cache.doctor(repair=True)),
}
# What pins and names, or has to do with the generation before.
CHANGING_MARKS = ("pins, names and tags", "pruning", "a save over a broken index", "a repair")


class Stage:
    """A folder in the state before a scenario's act, laid out anew for each try."""

    def __init__(self, folder: Path, scenario: str) -> None:
        gc.collect()  # caches of earlier tests give their leases back, which counts as an operation too
        prepare, self.act = SCENARIOS[scenario]
        self.template, self.folder = folder / "template", folder / "cache"
        with opened(self.template) as cache:
            prepare(cache)
        self.keeps_marks = scenario not in CHANGING_MARKS
        found = [r for r in opened(self.template).checkpoints() if r.session != DISCARDED]
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
        self.check_rollback(cache, records)
        if self.keeps_marks:
            assert {name: id for name, id in cache.names().items() if name != ROLLBACK} == self.names
            assert {r.id for r in records.values() if r.pinned} == self.pinned
        self.check_goes_on(cache)

    def check_rollback(self, cache: TrainingCache, records: dict[str, CheckpointMetadata]) -> None:
        """All of its marks are there or none is, and the pointer with them until something followed."""
        target = cache.names().get(ROLLBACK)
        marked = {id for id, record in records.items() if record.rolled_back is not None}
        first = min(self.acknowledged, key=lambda id: records[id].order, default=None)
        assert marked in (set(), self.acknowledged.keys() - {first})
        if target is not None:
            assert marked
            assert cache.best().id == target
            cache.undo_rollback()
            assert not any(record.rolled_back for record in cache.checkpoints(everything=True))
        elif marked:
            assert cache.best().id not in marked
            assert len(records) > len(self.acknowledged)

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
