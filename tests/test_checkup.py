import errno
import os
import signal
from pathlib import Path

import orjson
import pytest
import torch

from ckptcache import TrainingCache
from ckptcache.errors import IndexDamaged
from ckptcache.storage import integrity
from tests.caches import as_nobody, file_of, flip, ids, kinds, let_in, listing, save, tiny
from tests.faults import run_child


@pytest.fixture
def cache(tmp_path: Path) -> TrainingCache:
    """Three checkpoints: the best pinned, one named, one tagged; nothing wrong."""
    cache = TrainingCache(tmp_path / "cache", max_checkpoints=9)
    for loss in (1.0, 2.0, 3.0):
        save(cache, loss, iteration=int(loss), tags=[f"t{loss:g}"])
    best, second, _ = cache.checkpoints()
    cache.pin(best.id)
    cache.name(second.id, "slot-1")
    assert cache.doctor() == []
    return cache


def truncate(cache: TrainingCache) -> None:
    path = file_of(cache, cache.get("best"))
    path.write_bytes(path.read_bytes()[:-3])


def remove_index(cache: TrainingCache) -> None:
    (cache.cache_dir / "metadata.json").unlink()


def break_index(cache: TrainingCache) -> None:
    (cache.cache_dir / "metadata.json").write_text("{broken")


def lose_the_record(cache: TrainingCache, *, sidecar: bool) -> None:
    best = cache.get("best").id
    for name in ("metadata.json", "metadata.json.prev"):
        path = cache.cache_dir / name
        index = orjson.loads(path.read_bytes())
        del index["checkpoints"][best]
        path.write_bytes(orjson.dumps(index))
    if not sidecar:
        file_of(cache, best).with_suffix(".json").unlink()


def leave_a_lease(cache: TrainingCache) -> None:
    def child() -> None:
        other = TrainingCache(cache.cache_dir)
        other.ledger.hold("sess_killed")
        os.kill(os.getpid(), signal.SIGKILL)

    assert run_child(child) == -signal.SIGKILL


def put(cache: TrainingCache, name: str, data: bytes = b"half") -> None:
    (cache.cache_dir / name).parent.mkdir(exist_ok=True)
    (cache.cache_dir / name).write_bytes(data)


def evicted_file_comes_back(cache: TrainingCache) -> None:
    third = cache.checkpoints()[2]
    data, sidecar = file_of(cache, third).read_bytes(), file_of(cache, third).with_suffix(".json").read_bytes()
    other = TrainingCache(cache.cache_dir, max_checkpoints=2, keep_latest=0)
    assert list(other.prune().evicted) == [third.id]
    file_of(cache, third).write_bytes(data)
    file_of(cache, third).with_suffix(".json").write_bytes(sidecar)


def put_a_foreign_file(cache: TrainingCache) -> None:
    torch.save({"state_dict": {"w": torch.ones(3)}}, cache.cache_dir / "checkpoints" / "mine.pt")


def change_sidecar(cache: TrainingCache, data: bytes | None) -> None:
    path = file_of(cache, cache.get("best")).with_suffix(".json")
    path.unlink() if data is None else path.write_bytes(data)


FAULTS = {
    "a flipped bit": (lambda c: flip(file_of(c, c.get("best"))), ["damaged"]),
    "a truncated file": (truncate, ["damaged"]),
    "a file of garbage": (lambda c: put(c, f"checkpoints/{c.get('best').id}.pt"), ["damaged"]),
    "an index that is gone": (remove_index, ["index"]),
    "a broken index": (break_index, ["index"]),
    "an index that is a link": (
        lambda c: (remove_index(c), (c.cache_dir / "metadata.json").symlink_to("/etc/passwd")),
        ["index"],
    ),
    "a lost record": (lambda c: lose_the_record(c, sidecar=True), ["adopted"]),
    "a lost record and its sidecar": (lambda c: lose_the_record(c, sidecar=False), ["unrecorded"]),
    "a foreign file": (put_a_foreign_file, ["unrecorded"]),
    "no checkpoint at all": (lambda c: put(c, "checkpoints/mine.pt"), ["unrecorded"]),
    "a sidecar that is gone": (lambda c: change_sidecar(c, None), ["sidecar"]),
    "a broken sidecar": (lambda c: change_sidecar(c, b"{"), ["sidecar"]),
    "another's sidecar": (
        lambda c: change_sidecar(c, file_of(c, c.get("latest")).with_suffix(".json").read_bytes()),
        ["sidecar"],
    ),
    "a sidecar alone": (lambda c: put(c, "checkpoints/ckpt_x.json", b"{}"), ["leftover"]),
    "half a file": (lambda c: put(c, "checkpoints/ckpt_x.pt.writer_00.tmp"), ["leftover"]),
    "half an index": (lambda c: put(c, "metadata.json.writer_00.tmp"), ["leftover"]),
    "half a generation": (lambda c: put(c, "metadata.json.prev.writer_00.tmp"), ["leftover"]),
    "half a reason": (lambda c: put(c, "quarantine/x.pt.reason.txt.00ff.tmp"), ["leftover"]),
    "an evicted file that came back": (evicted_file_comes_back, ["leftover", "leftover"]),
    "a dead lease": (leave_a_lease, ["lease"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_and_mended_and_looking_alone_changes_nothing(cache, fault):
    spoil, expected = FAULTS[fault]
    cache.close()
    spoil(cache)
    before = listing(cache.cache_dir)
    looking = TrainingCache(cache.cache_dir, max_checkpoints=9)
    found = looking.doctor()
    assert sorted(f.kind for f in found) == expected
    assert not any(f.repaired for f in found)
    assert all(f.message and f.subject for f in found)
    assert listing(cache.cache_dir) == before
    repaired = looking.doctor(repair=True)
    assert sorted(f.kind for f in repaired) == expected
    assert all(f.repaired for f in repaired)
    assert TrainingCache(cache.cache_dir).doctor() == []
    assert TrainingCache(cache.cache_dir).doctor(repair=True) == []
    assert [name for name in listing(cache.cache_dir) if name.endswith(".tmp")] == []
    save(looking, 0.5)
    looking.close()
    assert looking.doctor() == []


@pytest.mark.parametrize("fault", [f for f in FAULTS if not f.startswith(("a flipped", "a trunc", "a file of"))])
def test_a_mended_cache_has_all_its_checkpoints_with_what_was_known_of_them(cache, fault):
    before = {r.id: (r.val_loss, r.iteration, r.tags, r.digest) for r in cache.checkpoints()}
    FAULTS[fault][0](cache)
    cache.doctor(repair=True)
    after = {r.id: (r.val_loss, r.iteration, r.tags, r.digest) for r in cache.checkpoints()}
    lost = before.keys() - after.keys()
    assert len(lost) == (1 if "evicted" in fault else 0)
    assert {id: what for id, what in after.items() if id in before} == {
        id: what for id, what in before.items() if id not in lost
    }
    for id in after:
        cache.load(id)


def test_what_cannot_be_mended_is_said_each_time_and_nothing_else(cache):
    third, second = cache.checkpoints()[2], cache.checkpoints()[1]
    file_of(cache, third).unlink()
    file_of(cache, second).unlink()
    assert kinds(cache) == ["missing", "missing", "name"]
    found = cache.doctor(repair=True)
    assert not any(f.repaired for f in found)
    assert not any(f.is_damage for f in found), "a clone that holds only the index is whole"
    assert kinds(cache) == ["missing", "missing", "name"]
    assert {second.id, third.id} <= set(ids(cache.checkpoints(everything=True)))


def test_what_may_not_be_read_is_no_damage_and_is_left_where_it_is(cache, tmp_path, monkeypatch):
    best, opened = cache.get("best"), os.open

    def refuse(path, *given, **how):
        if str(path).endswith(f"{best.id}.pt"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return opened(path, *given, **how)

    monkeypatch.setattr(os, "open", refuse)
    for repair in (False, True):
        (found,) = cache.doctor(repair=repair)
        assert (found.kind, found.subject, found.is_damage, found.repaired) == ("unreadable", best.id, False, False)
    monkeypatch.undo()
    assert cache.doctor() == []
    assert cache.load(best.id)


def test_what_was_damaged_only_at_the_first_look_is_not_quarantined(cache, monkeypatch):
    best, verify, looks = cache.get("best"), integrity.verify, []

    def verify_once_damaged(path, **known):
        if path != file_of(cache, best) or looks:
            return verify(path, **known)
        looks.append(path)
        flip(path)
        try:
            return verify(path, **known)
        finally:
            flip(path)

    monkeypatch.setattr(integrity, "verify", verify_once_damaged)
    (found,) = cache.doctor(repair=True)
    assert (found.kind, found.repaired) == ("damaged", False)
    assert cache.doctor() == []


def test_without_verifying_only_what_can_be_seen_from_outside_is_found(cache):
    flip(file_of(cache, cache.get("best")))
    assert kinds(cache, verify=False) == []
    truncate(cache)
    assert kinds(cache, verify=False) == ["damaged"]


def test_an_index_with_nothing_to_rebuild_it_from_is_set_aside_and_the_rest_is_mended_too(tmp_path):
    (tmp_path / "metadata.json").write_text("{broken")
    cache = TrainingCache(tmp_path)
    assert kinds(cache) == ["index"]
    with pytest.raises(IndexDamaged, match=r"doctor --repair"):
        cache.checkpoints()
    assert [f.repaired for f in cache.doctor(repair=True)] == [True]
    assert cache.doctor() == []
    assert (tmp_path / "quarantine" / "metadata.json").read_text() == "{broken"
    save(cache, 1.0)
    assert cache.doctor() == []


def test_a_lost_index_keeps_pins_and_names_of_the_generation_before_and_every_record(cache):
    save(cache, 0.5)
    before = {r.id: r for r in cache.checkpoints(everything=True)}
    remove_index(cache)
    cache.doctor(repair=True)
    after = {r.id: r for r in cache.checkpoints(everything=True)}
    assert after.keys() == before.keys()
    assert all(after[id].val_loss == before[id].val_loss and after[id].pinned == before[id].pinned for id in before)
    assert list(cache.names()) == ["slot-1"]


def test_with_only_the_sidecars_left_every_record_comes_back(cache):
    before = {(r.id, r.val_loss, r.sequence, r.tags) for r in cache.checkpoints()}
    (cache.cache_dir / "metadata.json.prev").unlink()
    remove_index(cache)
    assert kinds(cache) == ["adopted"] * 3
    cache.doctor(repair=True)
    assert {(r.id, r.val_loss, r.sequence, r.tags) for r in cache.checkpoints()} == before


def test_a_broken_index_without_a_generation_before_keeps_records_whose_files_are_gone(cache):
    gone = cache.get("latest")
    file_of(cache, gone).unlink()
    (cache.cache_dir / "metadata.json.prev").unlink()
    break_index(cache)
    cache.doctor(repair=True)
    assert gone.id in ids(cache.checkpoints(everything=True))
    assert kinds(cache) == ["missing"]


def test_with_only_the_files_left_every_record_comes_back_from_inside_them(cache):
    before = {(r.id, r.val_loss, r.iteration, r.tags, r.size, r.digest) for r in cache.checkpoints()}
    for path in cache.cache_dir.glob("**/*.json*"):
        path.unlink()
    assert kinds(cache) == ["unrecorded"] * 3
    cache.doctor(repair=True)
    assert {(r.id, r.val_loss, r.iteration, r.tags, r.size, r.digest) for r in cache.checkpoints()} == before
    assert cache.doctor() == []


def test_a_live_writer_is_left_alone(cache):
    cache.ledger.hold("sess_mine")
    cache.ledger.hold(cache.ledger.writer)
    put(cache, f"checkpoints/x.pt.{cache.ledger.writer}.tmp")
    other = TrainingCache(cache.cache_dir)
    assert other.doctor(repair=True) == []
    assert (cache.cache_dir / f"checkpoints/x.pt.{cache.ledger.writer}.tmp").exists()


@pytest.mark.parametrize("signature", [{"host": "elsewhere", "boot_id": "another", "pid": 1}, None])
def test_a_writer_of_another_machine_and_one_that_is_about_to_sign_are_said_and_left_alone(cache, signature):
    left = {"sessions/sess_other.lock": b"" if signature is None else orjson.dumps(signature)}
    left["checkpoints/x.pt.sess_other.tmp"] = b"half"
    for name, data in left.items():
        put(cache, name, data)
    for repair in (False, True):
        (found,) = cache.doctor(repair=repair)
        assert (found.kind, found.subject, found.is_damage, found.repaired) == ("lease", "sess_other", False, False)
        assert "by hand" in found.message
    assert {name: (cache.cache_dir / name).read_bytes() for name in left} == left


def test_the_doctor_looks_without_rights_to_write(cache, tmp_path, requires):
    requires("root")
    flip(file_of(cache, cache.get("best")))
    cache.close()
    let_in(tmp_path)
    before = listing(cache.cache_dir)

    def child() -> None:
        assert kinds(TrainingCache(cache.cache_dir)) == ["damaged"]

    assert as_nobody(child) == 0
    assert listing(cache.cache_dir) == before


def test_a_quarantine_that_was_cut_short_is_ended_and_nothing_is_deleted(cache):
    best = cache.get("best")
    with cache.ledger.change() as change:
        change.put(change.index.checkpoints[best.id].changed(decision="quarantined", decision_reason="because"))
    assert "leftover" in kinds(TrainingCache(cache.cache_dir))
    save(TrainingCache(cache.cache_dir), 9.0, state=tiny())
    assert (cache.cache_dir / "quarantine" / f"{best.id}.pt").exists()
    assert "because" in (cache.cache_dir / "quarantine" / f"{best.id}.pt.reason.txt").read_text()
    assert kinds(cache) == []
