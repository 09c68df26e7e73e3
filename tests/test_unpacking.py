import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from ckptcache import TrainingCache
from ckptcache.errors import CacheDirIsFile, CacheDirNotWritable, CacheNotEmpty, IndexDamaged, RestoreFailed
from ckptcache.metadata import CheckpointMetadata, NamePointer, SessionRecord
from ckptcache.storage import fs
from ckptcache.storage.index import Index, serialise
from ckptcache.unpacking import combined
from tests.caches import file_of, flip, ids, listing, save, temporary_files, tiny
from tests.faults import FailingSystem, swapped
from tests.jobs import Job, cache_at

LIMIT = 10


@pytest.fixture
def source(tmp_path: Path) -> SimpleNamespace:
    """A cache of three, and its backup."""
    cache = TrainingCache(tmp_path / "source", max_checkpoints=LIMIT)
    session = cache.record_session(SessionRecord(id="sess_source"))
    records = [save(cache, loss, iteration=int(loss), session=session) for loss in (3.0, 2.0, 1.0)]
    cache.name("best", "slot-1")
    cache.name("latest", "theirs")
    path = cache.backup(tmp_path / "all.tar").path
    cache.close()
    return SimpleNamespace(cache=cache, path=path, worst=records[0].id, middle=records[1].id, best=records[2].id)


@pytest.fixture
def target(tmp_path: Path) -> TrainingCache:
    return TrainingCache(tmp_path / "target", max_checkpoints=LIMIT)


def tidy_and_sound(cache: TrainingCache) -> bool:
    assert temporary_files(cache.cache_dir) == []
    assert list(cache.cache_dir.rglob("*.restored")) == []
    return cache.doctor() == []


# --- into a folder of its own --------------------------------------------------------------------


def test_all_of_it_is_there_and_sound(source, target):
    done = target.restore_backup(source.path)
    assert done.folder == target.cache_dir
    assert done.added == tuple(sorted(ids(source.cache.checkpoints())))
    assert (done.present, dict(done.kept_out), dict(done.left_out)) == ((), {}, {})
    assert (done.records, done.sessions, done.names) == (3, 1, 2)
    assert ids(target.checkpoints()) == ids(source.cache.checkpoints())
    assert target.names() == source.cache.names()
    assert tidy_and_sound(target)
    assert target.load("best")["w"].tolist() == [1.0] * 4


def test_a_folder_with_other_things_in_it_keeps_them(source, target):
    target.cache_dir.mkdir()
    (target.cache_dir / "README.md").write_text("mine")
    (target.cache_dir / "checkpoints").mkdir()
    target.restore_backup(source.path)
    assert (target.cache_dir / "README.md").read_text() == "mine"
    assert tidy_and_sound(target)


def test_doing_it_again_changes_nothing(source, target):
    target.restore_backup(source.path)
    target.close()
    before = listing(target.cache_dir)
    again = TrainingCache(target.cache_dir)
    done = again.restore_backup(source.path)
    again.close()
    assert (done.added, len(done.present)) == ((), 3)
    assert listing(target.cache_dir) == before


def test_what_got_lost_since_comes_back_and_what_was_truncated_is_set_aside(source, target):
    target.restore_backup(source.path)
    file_of(target, source.best).unlink()
    file_of(target, source.middle).write_bytes(b"short")
    done = target.restore_backup(source.path)
    assert set(done.added) == {source.best, source.middle}
    assert target.load(source.middle)["w"].tolist() == [2.0] * 4
    assert (target.cache_dir / "quarantine" / f"{source.middle}.pt").read_bytes() == b"short"
    assert tidy_and_sound(target)


def test_training_goes_on_in_it(source, target):
    target.restore_backup(source.path)
    record = save(target, 0.5, iteration=9)
    assert record.sequence == source.cache.get("latest").sequence + 1
    assert target.get("best").id == record.id
    assert tidy_and_sound(target)


def test_progress_runs_to_the_end(source, target):
    calls = []
    target.restore_backup(source.path, progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1] > 0


# --- where it may not go -------------------------------------------------------------------------


def test_a_folder_with_checkpoints_of_its_own_is_refused_and_named(source, target):
    save(target, 9.0)
    target.close()
    before = listing(target.cache_dir)
    with pytest.raises(CacheNotEmpty, match=r"1 checkpoint of its own.*--cache-dir.*--merge"):
        target.restore_backup(source.path)
    assert listing(target.cache_dir) == before


def test_a_folder_with_sessions_or_files_of_its_own_is_refused(source, target, tmp_path):
    target.record_session(SessionRecord(id="sess_own"))
    with pytest.raises(CacheNotEmpty, match="1 session of its own"):
        target.restore_backup(source.path)
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    (tmp_path / "other" / "checkpoints" / "stray.pt").write_bytes(b"x")
    with pytest.raises(CacheNotEmpty, match="1 checkpoint of its own"):
        TrainingCache(tmp_path / "other").restore_backup(source.path)


def test_a_file_and_a_linked_folder_and_a_broken_index_are_refused(source, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CacheDirIsFile):
        TrainingCache(tmp_path / "file").restore_backup(source.path)
    for name in ("linked", "broken", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "linked" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheDirNotWritable, match="it is a link"):
        TrainingCache(tmp_path / "linked").restore_backup(source.path)
    (tmp_path / "broken" / "metadata.json").write_text("{broken")
    with pytest.raises(IndexDamaged):
        TrainingCache(tmp_path / "broken").restore_backup(source.path)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_disk_without_room_is_told_before_anything_is_written(source, target, monkeypatch):
    monkeypatch.setattr(fs, "free_bytes", lambda _: 1000)
    with pytest.raises(RestoreFailed, match="bytes, and 1000 are free"):
        target.restore_backup(source.path)
    assert not target.cache_dir.exists()


@pytest.mark.parametrize("operation", ["create", "write", "fsync", "replace"])
def test_a_disk_that_refuses_leaves_no_file(source, target, operation):
    at = {"create": 0, "write": 1, "fsync": 3, "replace": 0}[operation]  # the first few are the lease's
    with swapped(FailingSystem(at, 28, operation, lasting=True)) as failing:
        with pytest.raises((RestoreFailed, CacheDirNotWritable), match="no space left"):
            target.restore_backup(source.path)
        target.close()
    assert failing.hit
    assert [p.name for p in target.cache_dir.rglob("*") if p.is_file() and p.suffix != ".lock"] == []
    assert target.checkpoints(everything=True) == []
    target.restore_backup(source.path)
    assert tidy_and_sound(target)


# --- into a cache that goes on -------------------------------------------------------------------


def test_merging_adds_what_is_missing_and_leaves_what_is_there(source, target):
    own = save(target, 9.0)
    target.name(own.id, "slot-1")
    target.tag(own.id, "mine")
    done = target.restore_backup(source.path, merge=True)
    assert set(done.added) == {source.worst, source.middle, source.best}
    assert set(ids(target.checkpoints())) == {own.id, *done.added}
    assert target.names() == {"slot-1": own.id, "theirs": source.best}
    assert target.get(own.id).tags == ("mine",)
    assert tidy_and_sound(target)


def test_marks_of_the_higher_revision_win(source, target):
    target.restore_backup(source.path)
    target.pin(source.worst)
    target.tag(source.worst, "later")
    save(target, 9.0)
    target.restore_backup(source.path, merge=True)
    assert target.get(source.worst).pinned
    assert target.get(source.worst).tags == ("later",)


def test_what_was_evicted_there_stays_so_and_what_was_quarantined_comes_back(source, target):
    target.restore_backup(source.path)
    with target.ledger.change() as change:
        target.ledger.evict(change, {source.worst: "too low"})
    flip(file_of(target, source.middle))
    target.doctor(repair=True)
    assert ids(target.checkpoints()) == [source.best]
    done = target.restore_backup(source.path)
    assert done.added == (source.middle,)
    assert dict(done.kept_out) == {source.worst: "too low"}
    assert target.load(source.middle)["w"].tolist() == [2.0] * 4
    assert tidy_and_sound(target)


def test_a_decision_in_the_backup_takes_nothing_away_here(source, target, tmp_path):
    target.restore_backup(source.path)
    with source.cache.ledger.change() as change:
        source.cache.ledger.evict(change, {source.worst: "too low"})
    later = source.cache.backup(tmp_path / "later.tar").path
    save(target, 9.0)
    target.restore_backup(later, merge=True)
    assert source.worst in ids(target.checkpoints())
    assert target.load(source.worst)["w"].tolist() == [3.0] * 4
    assert tidy_and_sound(target)


def test_another_checkpoint_of_the_same_id_is_refused(source, target):
    other = save(target, 9.0)
    layout = target.ledger.layout
    with target.ledger.change() as change:
        twin = dataclasses.replace(change.index.checkpoints.pop(other.id), id=source.best)
        shutil.move(layout.checkpoint(other.id), layout.checkpoint(source.best))
        layout.sidecar(other.id).unlink()
        change.put(twin)
    before = file_of(target, source.best).read_bytes()
    for merge in (False, True):
        with pytest.raises(RestoreFailed, match="another checkpoint there"):
            target.restore_backup(source.path, merge=merge)
    assert file_of(target, source.best).read_bytes() == before


def test_a_session_that_runs_there_goes_on(source, tmp_path):
    with cache_at(tmp_path / "target", max_checkpoints=LIMIT) as cache:

        def in_step(session, done: int) -> None:
            session.checkpoint(val_loss=10.0 - done)
            if done == 2:
                TrainingCache(tmp_path / "target").restore_backup(source.path, merge=True)

        Job().run(cache, 4, in_step=in_step)
        assert len(cache.checkpoints()) == 7
        assert {s.stop_reason for s in cache.sessions() if s.id != "sess_source"} == {"finished"}
        assert tidy_and_sound(cache)


def test_names_and_configurations_of_the_target_win():
    def index(checkpoint: str, config: str) -> Index:
        names = {"a": NamePointer(checkpoint=checkpoint, revision=5 if config == "theirs" else 0)}
        return Index(names=names, configs={"h": config}, unknown={"x": config})

    both = combined(index("one", "ours"), index("two", "theirs"), (), ())
    assert (both.names["a"].checkpoint, both.configs, both.unknown) == ("one", {"h": "ours"}, {"x": "ours"})


@pytest.mark.parametrize("mine", [None, "evicted", "quarantined"])
@pytest.mark.parametrize("theirs", [None, "evicted", "quarantined"])
@pytest.mark.parametrize("revision", [0, 1, 2, 3])
@pytest.mark.parametrize("is_here", [False, True])
@pytest.mark.parametrize("is_brought", [False, True])
def test_nothing_that_is_there_is_decided_against(mine, theirs, revision, is_here, is_brought):
    if (is_here and mine) or (is_brought and theirs):
        return
    ours = Index(checkpoints={"x": CheckpointMetadata(id="x", revision=1, decision=mine)})
    other = Index(checkpoints={"x": CheckpointMetadata(id="x", revision=revision, decision=theirs)})
    here, brought = {"x"} if is_here else (), {"x"} if is_brought else ()
    both = combined(ours, other, here, brought)
    if is_here or (is_brought and mine == "quarantined"):
        assert both.checkpoints["x"].decision is None
    if mine == "evicted" and revision < 1:
        assert both.checkpoints["x"].decision == "evicted"
    assert serialise(combined(both, other, here, brought)) == serialise(both), "once more changes nothing"


def test_a_file_that_nothing_records_is_set_aside_for_one_of_its_id(source, target):
    save(target, 9.0)
    file_of(target, source.best).write_bytes(b"somebody's")
    with pytest.raises(CacheNotEmpty, match="2 checkpoints"):
        target.restore_backup(source.path)
    assert source.best in target.restore_backup(source.path, merge=True).added
    assert (target.cache_dir / "quarantine" / f"{source.best}.pt").read_bytes() == b"somebody's"
    assert target.load(source.best)["w"].tolist() == [1.0] * 4
    assert tidy_and_sound(target)


# --- between commit and final names --------------------------------------------------------------


@pytest.fixture
def waiting(source, target) -> TrainingCache:
    """As after a crash right behind the commit: everything counts, and nothing has its final name."""
    target.restore_backup(source.path)
    target.close()
    for path in list((target.cache_dir / "checkpoints").iterdir()):
        if path.suffix == ".pt":
            path.rename(f"{path}.restored")
        else:
            path.unlink()
    return TrainingCache(target.cache_dir, max_checkpoints=LIMIT)


def test_what_has_no_final_name_yet_counts_and_is_read(waiting, source):
    assert ids(waiting.checkpoints()) == ids(source.cache.checkpoints())
    assert waiting.load("best")["w"].tolist() == [1.0] * 4
    objects = tiny()
    assert waiting.restore(objects).record.id == source.best
    assert not any(f.is_damage for f in waiting.doctor())
    assert [p.suffix for p in (waiting.cache_dir / "checkpoints").iterdir()] == [".restored"] * 3


def test_the_next_change_gives_final_names(waiting):
    save(waiting, 0.5)
    assert list(waiting.cache_dir.rglob("*.restored")) == []
    assert len(waiting.checkpoints()) == 4
    waiting.doctor(repair=True)
    assert tidy_and_sound(waiting)


def test_it_can_be_evicted_and_backed_up_and_restored_again(waiting, source, tmp_path):
    assert len(waiting.backup(tmp_path / "again.tar").checkpoints) == 3
    waiting.restore_backup(source.path)
    assert tidy_and_sound(waiting)


def test_what_no_index_names_is_no_checkpoint_and_goes(target):
    save(target, 1.0)
    target.close()
    stray = file_of(target, "stray.pt").with_name("stray.pt.restored")
    stray.write_bytes(b"x")
    assert len(target.checkpoints(everything=True)) == 1
    assert [f.kind for f in TrainingCache(target.cache_dir).doctor()] == ["leftover"]
    assert stray.exists(), "looking changes nothing"
    save(TrainingCache(target.cache_dir), 2.0)
    assert not stray.exists()


# --- a rollback ----------------------------------------------------------------------------------


def test_a_rollback_comes_along_and_is_not_in_force_again_once_it_was_followed(source, target, tmp_path):
    source.cache.rollback(source.middle)
    path = source.cache.backup(tmp_path / "rolled.tar").path
    target.restore_backup(path)
    assert target.names()["rollback"] == source.middle
    followed = save(target, 5.0, iteration=9, parents=(source.middle,))
    assert "rollback" not in target.names()
    target.restore_backup(path, merge=True)
    assert "rollback" not in target.names()
    assert target.get("latest").id == followed.id


def test_a_rollback_of_the_folder_itself_stays_in_force(source, target):
    target.restore_backup(source.path)
    target.rollback(source.middle)
    save(source.cache, 5.0, iteration=9, parents=(source.middle,))
    path = source.cache.backup(source.path, overwrite=True).path
    both = combined(target.ledger.view().index, source.cache.ledger.view().index, (), ())
    assert both.names["rollback"].checkpoint == source.middle
    target.restore_backup(path, merge=True)
    assert target.names()["rollback"] == source.middle
