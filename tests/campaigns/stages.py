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
from ckptcache.storage import archive, locks
from ckptcache.storage.index import IndexFile
from tests.caches import file_of, flip, ids, save, temporary_files, tiny
from tests.faults import CountingSystem, swapped

LIMIT = 3
DISCARDED = "sess_discarded"
FOREIGN = 0.5
"""What a file holds that came without a record."""

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
    torch.save({"w": torch.full((4,), FOREIGN), "step": 1}, path)
    cache.import_(path, val_loss=FOREIGN)


def lose_records(cache: TrainingCache) -> None:
    """One checkpoint is known; another has neither a sidecar nor a place in the index, and a third is foreign."""
    save(cache, 3.0, iteration=3)
    index = cache.cache_dir / "metadata.json"
    known = index.read_bytes()
    file_of(cache, save(cache, 2.0, iteration=2)).with_suffix(".json").unlink()
    for path in (index, index.with_name("metadata.json.prev")):
        path.write_bytes(known)
    torch.save({"w": torch.full((4,), FOREIGN), "step": 1}, file_of(cache, "given"))


def adopt(cache: TrainingCache) -> None:
    cache.restore(tiny())


def export(cache: TrainingCache) -> None:
    cache.export("best", cache.cache_dir.parent / "out.pt", optimizer=True, overwrite=True)


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


def make_backup(cache: TrainingCache) -> None:
    """Of another cache, beside this one; this one stays as it is."""
    with TrainingCache(cache.cache_dir.parent / "source") as source:
        records = [save(source, loss, iteration=7) for loss in (4.0, 1.5)]
        source.name("best", "slot-1")
        source.name(records[0].id, "slot-9")
        source.record_session(SessionRecord(id="sess_source"))
        source.backup(cache.cache_dir.parent / "source.tar")


def make_and_fill(cache: TrainingCache) -> None:
    make_backup(cache)
    fill(cache)


def restore_backup(cache: TrainingCache) -> None:
    cache.restore_backup(cache.cache_dir.parent / "source.tar", merge=True)


def back_up(cache: TrainingCache) -> None:
    cache.backup(cache.cache_dir.parent / "all.tar", overwrite=True)


def check_backup(stage: "Stage") -> None:
    """Nothing under the final name, or all of it; the next one goes through, and nothing is left of the last."""
    file = stage.folder.parent / "all.tar"
    if file.exists():
        with archive.opened(file) as backup:
            backup.verify()
    with opened(stage.folder) as cache:
        back_up(cache)
    assert [path.name for path in file.parent.glob("all.tar*")] == ["all.tar"]
    file.unlink()


def check_export(stage: "Stage") -> None:
    """Nothing under the final name, or all of it; the next one goes through."""
    file = stage.folder.parent / "out.pt"
    for _ in range(2):
        assert not file.exists() or torch.load(file, weights_only=True)["w"].tolist() == [1.0] * 4
        with opened(stage.folder) as cache:
            export(cache)
    for path in file.parent.glob("out.pt*"):  # what one that was killed leaves beside it, which is nobody's to remove
        path.unlink()


def check_adopted(stage: "Stage") -> None:
    """The next restore takes up what this one did not come to; nothing is taken for damaged."""
    with opened(stage.folder) as cache:
        adopt(cache)
        assert sorted(r.val_loss or 0.0 for r in cache.checkpoints()) == [0.0, 2.0, 3.0]
        assert cache.get("given").pinned
        cache.doctor(repair=True)  # what was taken up gets its sidecar


def check_restored(stage: "Stage") -> None:
    """All of it counts, or nothing does; the next attempt goes through."""
    with TrainingCache(stage.folder.parent / "source") as source:
        brought, names = set(ids(source.checkpoints())), source.names()
    own = names if not stage.names else {**names, **stage.names}
    with opened(stage.folder) as cache:
        there, known = set(ids(cache.checkpoints())), set(ids(cache.checkpoints(everything=True)))
        is_there = bool(known & brought)
        assert there & brought == known & brought == (brought if is_there else set()), "a part of it counts"
        assert cache.names() == (own if is_there else stage.names)
        assert ("sess_source" in {s.id for s in cache.sessions()}) == is_there
        restore_backup(cache)
        assert set(ids(cache.checkpoints())) == stage.acknowledged.keys() | brought
        assert cache.names() == own
    assert temporary_files(stage.folder) == []
    assert list(stage.folder.rglob("*.restored")) == []
    assert {f.subject for f in opened(stage.folder).doctor()} == stage.unsigned()
    with opened(stage.folder) as cache:
        cache.unname("slot-9")  # or more would be protected than the limit allows


# What is there before, and what is then cut short.
SCENARIOS: dict[str, tuple[Act, Act]] = {
    "a save that evicts": (fill, new_best),
    "the first save": (lambda cache: None, new_best),
    "a save in the background": (fill, save_in_the_background),
    "a restore that quarantines": (spoil_best, lambda cache: cache.restore(tiny())),
    "pins, names and tags": (fill, change_marks),
    "pruning": (fill, prune_to_one),
    "an import": (fill, import_one),
    "an adoption": (lose_records, adopt),
    "an export": (fill, export),
    "a save over a broken index": (break_index, new_best),
    "a save that is taken back": (fill, save_that_is_taken_back),
    "a session that is discarded": (fill_in_a_session, lambda cache: cache.forget_session(DISCARDED)),
    "a rollback": (fill_two_branches, roll_back),
    "a rollback that is followed": (fill_two_branches, roll_back_and_follow),
    "a repair": (break_index, lambda cache: cache.doctor(repair=True)),
    "a backup": (fill, back_up),
    "a backup restored": (make_backup, restore_backup),
    "a backup merged": (make_and_fill, restore_backup),
}
# What must hold besides, before anything else is done.
CHECKS: dict[str, Callable[["Stage"], None]] = {
    "an adoption": check_adopted,
    "an export": check_export,
    "a backup": check_backup,
    "a backup restored": check_restored,
    "a backup merged": check_restored,
}
# What pins and names, or has to do with the generation before.
CHANGING_MARKS = (
    *("pins, names and tags", "pruning", "an adoption", "a save over a broken index", "a repair"),
    *("a backup restored", "a backup merged"),
)


class Stage:
    """A folder in the state before a scenario's act, laid out anew for each try."""

    def __init__(self, folder: Path, scenario: str) -> None:
        gc.collect()  # caches of earlier tests give their leases back, which counts as an operation too
        prepare, self.act = SCENARIOS[scenario]
        self.template, self.folder = folder / "template", folder / "cache"
        with opened(self.template) as cache:
            prepare(cache)
        self.check_more = CHECKS.get(scenario)
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
        if self.check_more is not None:
            self.check_more(self)
        cache = opened(self.folder)
        there, records = set(ids(cache.checkpoints())), {r.id: r for r in cache.checkpoints(everything=True)}
        for id in self.acknowledged.keys() - self.spoilt:
            assert id in there or records[id].decision == "evicted", f"{id} was lost"
        assert len(there) >= min(1, len(self.acknowledged) - len(self.spoilt)), "none is left"
        for id in there - self.spoilt:
            loss = records[id].val_loss
            assert cache.load(id)["w"].tolist() == [FOREIGN if loss is None else loss] * 4
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
