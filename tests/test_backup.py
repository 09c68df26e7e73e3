import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from ckptcache import TrainingCache
from ckptcache.errors import BackupFailed, CacheNotFound
from ckptcache.metadata import SessionRecord
from ckptcache.storage import archive, fs
from ckptcache.storage.index import serialise
from tests.caches import as_nobody, file_of, flip, ids, let_in, listing, python, save
from tests.faults import FailingSystem, ended, start_child, swapped, wait_until
from tests.jobs import Job, cache_at, differences


@pytest.fixture
def cache(tmp_path: Path) -> TrainingCache:
    """Marks, sessions, and checkpoints that were evicted or lost."""
    cache = TrainingCache(tmp_path / "cache", max_checkpoints=3)
    session = cache.record_session(SessionRecord(id="sess_a", curves={"val_loss": ((1, 4.0), (2, 3.0))}))
    for loss in (5.0, 4.0, 3.0, 2.0, 1.0):
        save(cache, loss, iteration=int(loss), session=session, model_config={"n_layer": 1}, metrics={"accuracy": 0.5})
    cache.name("best", "slot-1")
    cache.pin("latest")
    cache.tag("best", "baseline")
    file_of(cache, cache.checkpoints()[1]).unlink()
    cache.close()
    return cache


def restored(path: Path, folder: Path) -> TrainingCache:
    cache = TrainingCache(folder)
    cache.restore_backup(path)
    return cache


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "checkpoints").iterdir()}


def test_a_backup_holds_a_whole_cache(cache, tmp_path):
    done = cache.backup(tmp_path / "all.tar")
    assert done.path == tmp_path / "all.tar"
    assert done.bytes == done.path.stat().st_size
    assert done.checkpoints == tuple(sorted(ids(cache.checkpoints())))
    assert (done.records, done.sessions, dict(done.damaged), done.unrecorded) == (5, 1, {}, ())
    other = restored(done.path, tmp_path / "new")
    assert serialise(other.ledger.view().index) == serialise(cache.ledger.view().index)
    here, there = files(cache.cache_dir), files(other.cache_dir)
    assert {n: d for n, d in there.items() if n.endswith(".pt")} == {n: d for n, d in here.items() if n.endswith(".pt")}
    assert [f.kind for f in other.doctor()] == ["missing"]
    assert (other.names(), other.get("best").tags) == (cache.names(), ("baseline",))
    assert other.load("slot-1")["w"].tolist() == [1.0] * 4


def test_what_is_derived_or_at_work_stays_out(cache, tmp_path):
    cache.data.get("tokens", lambda: {"tokens": [1, 2, 3]})
    assert cache.data.entries()
    (cache.cache_dir / "quarantine").mkdir(exist_ok=True)
    (cache.cache_dir / "quarantine" / "x.pt").write_bytes(b"bad")
    (cache.cache_dir / "mine.txt").write_text("mine")
    other = restored(cache.backup(tmp_path / "all.tar").path, tmp_path / "new")
    assert {p.name for p in other.cache_dir.iterdir()} == {
        *("metadata.json", "metadata.json.lock", "checkpoints", "sessions"),
    }


def test_a_cache_that_nobody_used_yet_is_no_backup(tmp_path):
    with pytest.raises(CacheNotFound, match="train first"):
        TrainingCache(tmp_path / "none").backup(tmp_path / "all.tar")
    assert list(tmp_path.iterdir()) == []


def test_making_one_changes_nothing(cache, tmp_path):
    before = listing(cache.cache_dir)
    cache.backup(tmp_path / "all.tar")
    assert listing(cache.cache_dir) == before
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["all.tar"]


def test_progress_runs_to_the_end(cache, tmp_path):
    calls = []
    cache.backup(tmp_path / "all.tar", progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1] > 0


# --- where it goes -------------------------------------------------------------------------------


def test_a_file_that_is_there_is_replaced_only_when_asked(cache, tmp_path):
    path = tmp_path / "all.tar"
    path.write_text("mine")
    with pytest.raises(BackupFailed, match="there already"):
        cache.backup(path)
    assert path.read_text() == "mine"
    cache.backup(path, overwrite=True)
    with archive.opened(path) as backup:
        backup.verify()


@pytest.mark.parametrize(
    "name",
    ["checkpoints/x.tar", "metadata.json", "x.pt", "sessions/x.lock", "data/x.tar", "metadata.json.prev", "x.tmp"],
)
def test_what_would_be_taken_for_the_caches_own_is_refused(cache, name):
    before = listing(cache.cache_dir)
    with pytest.raises(BackupFailed, match="cache's own"):
        cache.backup(cache.cache_dir / name, overwrite=True)
    (cache.cache_dir.parent / "link").symlink_to(cache.cache_dir)
    with pytest.raises(BackupFailed, match="cache's own"):
        cache.backup(cache.cache_dir.parent / "link" / name, overwrite=True)
    assert listing(cache.cache_dir) == before


def test_a_tar_beside_the_index_is_fine_and_no_part_of_the_next(cache):
    first = cache.backup(cache.cache_dir / "first.tar")
    second = cache.backup(cache.cache_dir / "second.tar")
    assert first.bytes == second.bytes
    assert [f.kind for f in cache.doctor()] == ["missing"]


def test_a_place_that_cannot_be_is_named(cache, tmp_path):
    for path, why in ((tmp_path, "it is a folder"), (tmp_path / "none" / "x.tar", "no such folder")):
        with pytest.raises(BackupFailed, match=why):
            cache.backup(path, overwrite=True)
    with pytest.raises(BackupFailed, match="too long"):
        cache.backup(tmp_path / ("x" * 250))


def test_a_disk_without_room_is_told_before_anything_is_written(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(fs, "free_bytes", lambda _: 1000)
    with pytest.raises(BackupFailed, match=r"it needs [0-9]+ bytes, and 1000 are free"):
        cache.backup(tmp_path / "all.tar")
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_a_backup_that_fails_leaves_the_old_one(cache, tmp_path):
    path = cache.backup(tmp_path / "all.tar").path
    before = path.read_bytes()
    for operation in ("create", "write", "fsync", "replace"):
        at = 1 if operation in ("create", "fsync") else 0
        with (
            swapped(FailingSystem(0, 28, operation, lasting=True)) as failing,
            pytest.raises(BackupFailed, match="space"),
        ):
            cache.backup(path, overwrite=True)
        assert failing.hit, at
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["all.tar"]


# --- what is damaged -----------------------------------------------------------------------------


def test_damaged_checkpoints_are_left_out_and_their_records_kept(cache, tmp_path, caplog):
    worst, best = cache.checkpoints()[-1].id, cache.get("best").id
    extra = save(cache, 0.5, iteration=9).id
    flip(file_of(cache, worst))
    with file_of(cache, best).open("ab") as file:
        file.write(b"more")
    before = listing(cache.cache_dir)
    done = cache.backup(tmp_path / "all.tar")
    assert listing(cache.cache_dir).keys() == before.keys()
    assert set(done.damaged) == {worst, best}
    assert extra in done.checkpoints
    assert "differs from the digest" in done.damaged[worst]
    for id in (worst, best):
        assert any(id in r.message and "left out" in r.message for r in caplog.records if r.levelno == logging.WARNING)
    other = TrainingCache(tmp_path / "new")
    assert dict(other.restore_backup(done.path).left_out) == done.damaged
    assert {f.subject for f in other.doctor() if f.kind == "missing"} >= {worst, best}
    assert {f.kind for f in other.doctor()} == {"missing", "name"}


def test_files_that_nothing_records_are_named(cache, tmp_path, caplog):
    file_of(cache, "stray").write_bytes(b"x")
    assert cache.backup(tmp_path / "all.tar").unrecorded == ("stray.pt",)
    assert "stray.pt is left out" in caplog.text


def test_a_link_among_the_checkpoints_is_not_followed(cache, tmp_path):
    best = cache.get("best").id
    path = file_of(cache, best)
    path.rename(tmp_path / "elsewhere.pt")
    path.symlink_to(tmp_path / "elsewhere.pt")
    assert best not in cache.backup(tmp_path / "all.tar").checkpoints


def test_a_checkpoint_of_the_oldest_layout_beside_the_index_comes_along(tmp_path):
    with TrainingCache(tmp_path / "cache") as cache:
        record = save(cache, 1.0)
    file_of(cache, record).rename(cache.cache_dir / f"{record.id}.pt")
    other = restored(cache.backup(tmp_path / "all.tar").path, tmp_path / "new")
    assert other.load(record.id)["w"].tolist() == [1.0] * 4


# --- while others work ---------------------------------------------------------------------------


def save_without_end(folder: Path) -> None:
    with TrainingCache(folder, max_checkpoints=3) as cache:
        for number in range(10**6):
            save(cache, 1.0 / (1 + number), iteration=number)


def test_each_backup_is_whole_while_another_process_saves_and_evicts(tmp_path):
    cache = TrainingCache(tmp_path / "cache")
    with ended([start_child(lambda: save_without_end(tmp_path / "cache"))]):
        wait_until(lambda: len(cache.checkpoints()) >= 3)
        seen = set()
        for number in range(12):
            done = cache.backup(tmp_path / f"{number}.tar")
            assert dict(done.damaged) == {}
            assert len(done.checkpoints) == 3
            seen.update(done.checkpoints)
            time.sleep(0.05)
    assert len(seen) > 6, "nothing was evicted meanwhile"
    for number in range(12):
        assert restored(tmp_path / f"{number}.tar", tmp_path / str(number)).doctor() == []


def test_what_is_evicted_between_two_looks_is_looked_for_again(cache, tmp_path, monkeypatch):
    """Where the lock can't be taken, as in a folder that is read-only here and not elsewhere."""
    (cache.cache_dir / "metadata.json.lock").unlink()
    opened, calls = fs.open_regular, []

    def evicting(path: Path):
        if path.suffix == ".pt" and not calls:
            calls.append(path)
            with TrainingCache(cache.cache_dir, max_checkpoints=1, keep_latest=0) as other:
                other.unpin("latest")
                other.unname("slot-1")
                save(other, 0.1, iteration=100)
        return opened(path)

    monkeypatch.setattr(fs, "open_regular", evicting)
    done = cache.backup(tmp_path / "all.tar")
    monkeypatch.undo()
    assert calls
    assert dict(done.damaged) == {}
    other = restored(done.path, tmp_path / "new")
    assert other.get("best").val_loss == 0.1
    assert other.load("best")["w"][0].item() == pytest.approx(0.1)


def train(folder: Path) -> None:
    with cache_at(folder, max_checkpoints=1000) as cache:
        Job().run(cache, 10**6, in_step=lambda session, done: session.checkpoint(val_loss=1 / done))


@pytest.mark.parametrize("resume", ["auto", "latest"])
def test_a_running_training_goes_on_elsewhere_bit_for_bit(tmp_path, resume):
    cache = cache_at(tmp_path / "cache", max_checkpoints=1000)
    pid = start_child(lambda: train(tmp_path / "cache"))
    with ended([pid]):
        wait_until(lambda: len(cache.checkpoints()) >= 4)
        done = cache.backup(tmp_path / "all.tar")
        os.kill(pid, 0)
    other = cache_at(tmp_path / "new", max_checkpoints=1000)
    other.restore_backup(done.path)
    assert other.doctor() == []
    latest = other.get("latest")
    assert file_of(other, latest).read_bytes() == file_of(cache, latest).read_bytes()
    steps = latest.iteration + 3
    here, there = Job(seed=1), Job(seed=2)
    assert there.run(other, steps, resume=resume).resumed_from.id == latest.id
    state = there.state()
    here.run(cache, steps, resume=latest.id)
    assert there.losses == here.losses
    assert there.batches == here.batches
    assert list(differences(state, here.state())) == []


def test_a_thread_of_the_training_itself_can_make_one(tmp_path):
    done = []

    def in_step(session, step: int) -> None:
        session.checkpoint(val_loss=1 / step)
        if step == 3:
            thread = threading.Thread(target=lambda: done.append(session.cache.backup(tmp_path / "all.tar")))
            thread.start()
            in_step.thread = thread

    with cache_at(tmp_path / "cache") as cache:
        Job().run(cache, 8, in_step=in_step)
        in_step.thread.join()
    other = restored(done[0].path, tmp_path / "new")
    assert other.doctor() == []
    assert other.get("latest").iteration >= 3


# --- what is left of it --------------------------------------------------------------------------


def killed_backup(cache: TrainingCache, path: Path) -> Path:
    """What a backup leaves that is killed while it writes."""

    def child() -> None:
        fs.system = Killing()
        cache.backup(path)

    class Killing(fs.System):
        def write(self, fd: int, data: memoryview) -> int:
            done = super().write(fd, data)
            if done > 1000:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

    pid = start_child(child)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    (left,) = path.parent.glob(f"{path.name}.*.tmp")
    return left


def test_the_next_backup_removes_what_one_left_that_was_killed(cache, tmp_path):
    left = killed_backup(cache, tmp_path / "all.tar")
    cache.backup(tmp_path / "other.tar")
    assert left.exists(), "it is another file's"
    cache.backup(tmp_path / "all.tar")
    assert not left.exists()
    assert [f.kind for f in cache.doctor() if f.kind != "missing"] == []


def test_what_a_living_backup_or_that_of_another_cache_is_at_stays(cache, tmp_path):
    left = killed_backup(cache, tmp_path / "all.tar")
    writer = left.name.removeprefix("all.tar.").removesuffix(".tmp")
    with TrainingCache(tmp_path / "other") as other:
        save(other, 1.0)
        other.backup(tmp_path / "all.tar")
    assert left.exists()
    holder = TrainingCache(cache.cache_dir)
    holder.ledger.hold(writer)
    cache.backup(tmp_path / "all.tar", overwrite=True)
    assert left.exists()
    holder.close()
    cache.backup(tmp_path / "all.tar", overwrite=True)
    assert not left.exists()


# --- where little is there -----------------------------------------------------------------------


def test_a_cache_that_cannot_be_written_is_backed_up(cache, tmp_path):
    let_in(tmp_path)
    for path in (cache.cache_dir, *cache.cache_dir.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o777)

    def body() -> None:
        TrainingCache(cache.cache_dir).backup(tmp_path / "out" / "all.tar")
        assert TrainingCache(tmp_path / "out" / "new").restore_backup(tmp_path / "out" / "all.tar").added

    assert as_nobody(body) == 0


def test_what_was_restored_is_read_where_nothing_can_be_written(cache, tmp_path):
    let_in(tmp_path)
    other = restored(cache.backup(tmp_path / "all.tar").path, tmp_path / "new")
    other.close()
    for path in (other.cache_dir, *other.cache_dir.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def body() -> None:
        there = TrainingCache(tmp_path / "new")
        assert there.load("best")["w"].tolist() == [1.0] * 4
        assert there.names() == cache.names()

    assert as_nobody(body) == 0


def test_neither_way_needs_torch(cache, tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from ckptcache.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
    )
    done = python(code, "--cache-dir", str(cache.cache_dir), "backup", str(tmp_path / "all.tar"))
    assert done.returncode == 0, done.stderr
    done = python(code, "--cache-dir", str(tmp_path / "new"), "restore", str(tmp_path / "all.tar"))
    assert done.returncode == 0, done.stderr
    assert TrainingCache(tmp_path / "new").load("best")["w"].tolist() == [1.0] * 4
