import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from ckptcache.errors import IndexDamaged, IndexTooNew, IndexUnreadable, InvalidValue
from ckptcache.metadata import CheckpointMetadata, Fingerprint, NamePointer, SessionRecord
from ckptcache.storage import fs, locks, reconcile
from ckptcache.storage.index import Index, IndexFile, parse, serialise
from ckptcache.storage.layout import Layout
from ckptcache.storage.reconcile import (
    leases,
    observe,
    open_index,
    quarantine,
    set_aside,
    sidecar_bytes,
    tidy,
    writer_state,
)
from tests.faults import wait_for
from tests.storage.test_index import contents, same
from tests.strategies import mutations

ROOT = Path(__file__).parents[2]
A, B, C = (f"ckpt_20260101_00000{n}_0000000{n}_abcdef01_000{n}" for n in (1, 2, 3))


class Cache:
    """A real cache folder, filled as saves would."""

    def __init__(self, root):
        self.layout = Layout(root)
        self.file = IndexFile(root)
        self.index = Index()
        for folder in (root, self.layout.checkpoints, self.layout.sessions):
            folder.mkdir(exist_ok=True)

    def put(self, id, *, data=None, sidecar=True, commit=True, **fields):
        """One save: file, sidecar, index."""
        data = f"content of {id}".encode() if data is None else data
        config = self.index.store_config({"n_layer": 2, "of": id})
        fingerprint = self.index.store_fingerprint(Fingerprint(parameters={"w": "float32[2]"}))
        given = {
            "sequence": self.index.sequence + 1,
            "size": len(data),
            "model_config": config,
            "fingerprint": fingerprint,
        }
        self.index.checkpoints[id] = record = CheckpointMetadata(id=id, **{**given, "val_loss": float("nan"), **fields})
        self.layout.checkpoint(id).write_bytes(data)
        if sidecar:
            self.layout.sidecar(id).write_bytes(sidecar_bytes(record, self.index))
        if commit:
            self.commit()
        return record

    def commit(self):
        with self.file.held():
            self.file.commit(self.index, writer="w1")

    def open(self):
        return open_index(IndexFile(self.layout.root), self.layout)

    def observe(self):
        return observe(self.open().index, self.layout)

    def tidy(self):
        with self.file.held():
            return tidy(self.observe(), self.file, self.layout)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture
def full(cache):
    """Three saves, a session, a name; the index before the last save is `.prev`."""
    cache.index.sessions["sess_1"] = SessionRecord(id="sess_1", sequence=1, saved=3)
    cache.index.names["slot-1"] = NamePointer(checkpoint=A, revision=1)
    cache.put(A)
    cache.put(B)
    cache.put(C)
    return cache


def listing(root):
    """Everything below `root`: kind, size, times, and bytes or target."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        found[str(path)] = (
            status.st_mode,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
            content,
        )
    return found


# --- observing -----------------------------------------------------------------------------------


def test_what_is_there_is_available_with_its_size(full):
    seen = full.observe()
    assert seen.available == {id: len(f"content of {id}") for id in (A, B, C)}
    assert (seen.missing, seen.damaged, seen.unrecorded, seen.leftovers) == ({}, {}, {}, {})


def test_an_empty_folder_and_one_that_isn_t_there_hold_nothing(tmp_path):
    for root in (tmp_path, tmp_path / "nowhere"):
        seen = observe(open_index(IndexFile(root), Layout(root)).index, Layout(root))
        assert seen == reconcile.Observed()
    assert not (tmp_path / "nowhere").exists()


def test_a_file_that_is_gone_is_missing_and_comes_back_available(full):
    path = full.layout.checkpoint(B)
    data = path.read_bytes()
    path.unlink()
    seen = full.observe()
    assert set(seen.missing) == {B}
    assert set(seen.available) == {A, C}
    assert B in full.open().index.checkpoints
    path.write_bytes(data)
    assert set(full.observe().available) == {A, B, C}


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_a_file_of_another_size_is_damaged(full, size):
    full.layout.checkpoint(B).write_bytes(bytes(size))
    seen = full.observe()
    assert f"{size} bytes" in seen.damaged[B]
    assert set(seen.available) == {A, C}


def test_a_record_without_a_size_takes_the_file_as_it_is(cache):
    cache.put(A, size=None)
    assert cache.observe().available == {A: len(f"content of {A}")}


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "fifo"])
def test_what_is_no_regular_file_is_missing(full, tmp_path, kind):
    path = full.layout.checkpoint(B)
    outside = tmp_path / "outside.pt"
    path.rename(outside)
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(outside if kind == "link" else "nowhere")
    assert set(full.observe().missing) == {B}


def test_a_file_without_record_or_sidecar_is_unrecorded(full):
    path = full.layout.checkpoints / "stray.pt"
    path.write_bytes(b"x")
    assert full.observe().unrecorded == {"stray": path}


def test_files_beside_the_index_count_as_in_the_oldest_layout_and_strangers_there_do_not(cache):
    cache.put(A)
    cache.layout.checkpoint(A).rename(cache.layout.root / f"{A}.pt")
    (cache.layout.root / "stray.pt").write_bytes(b"x")
    seen = cache.observe()
    assert set(seen.available) == {A}
    assert seen.unrecorded == {}, "an export, say, which must not be taken up and then evicted"


@pytest.mark.parametrize(
    "name", ["..pt", "A.pt", "a b.pt", "é.pt", "a..b.pt", "-a.pt", ".hidden.pt", "x" * 200 + ".pt", "a\n.pt"]
)
def test_a_file_whose_name_cannot_be_an_id_is_let_be(full, name):
    path = full.layout.checkpoints / name
    path.write_bytes(b"x")
    assert full.observe() == observe(full.index, full.layout)
    assert full.observe().unrecorded == {}
    full.tidy()
    assert path.exists()


def test_a_file_that_vanishes_during_the_look_hides_no_other(full, monkeypatch):
    # As another process evicts between the listing and the question for the size.
    real, vanishing = fs._entry, full.layout.checkpoint(B)

    def entry(item):
        vanishing.unlink(missing_ok=True)
        return real(item)

    monkeypatch.setattr(fs, "_entry", entry)
    seen = full.observe()
    assert {A, C} <= set(seen.available)


# --- leftovers and tidying -----------------------------------------------------------------------


def test_the_files_of_what_was_evicted_are_leftovers_and_go(full):
    full.index.checkpoints[B] = full.index.checkpoints[B].changed(decision="evicted", decision_reason="count")
    full.commit()
    seen = full.observe()
    assert set(seen.leftovers) == {full.layout.checkpoint(B), full.layout.sidecar(B)}
    assert set(seen.available) == {A, C}
    assert set(full.tidy()) == set(seen.leftovers)
    assert sorted(p.name for p in full.layout.checkpoints.iterdir()) == sorted(
        f"{i}.{e}" for i in (A, C) for e in ("pt", "json")
    )
    assert B in full.open().index.checkpoints


def test_a_quarantine_that_was_cut_short_is_ended_and_deletes_nothing(full):
    full.index.checkpoints[B] = full.index.checkpoints[B].changed(
        decision="quarantined", decision_reason="its digest differs"
    )
    full.commit()
    assert full.layout.checkpoint(B) not in full.observe().leftovers
    full.tidy()
    kept = full.layout.quarantine / f"{B}.pt"
    assert kept.read_bytes() == f"content of {B}".encode()
    assert "its digest differs" in (full.layout.quarantine / f"{B}.pt.reason.txt").read_text()
    assert not full.layout.checkpoint(B).exists()


LIVING = """
import sys, time
from pathlib import Path
from ckptcache.storage import fs, locks

root = Path(sys.argv[1])
lease = locks.Lease(root / "sessions" / (sys.argv[2] + ".lock"))
temp = fs.TempFile(root / "checkpoints" / "ckpt_new.pt", sys.argv[2])
temp.write(b"half of it")
(root / "ready").touch()
time.sleep(60)
"""


def start_writer(cache, writer):
    """A real process that holds a lease and is in the middle of a file."""
    process = subprocess.Popen(
        [sys.executable, "-c", LIVING, str(cache.layout.root), writer], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        wait_for(cache.layout.root / "ready")
    except TimeoutError:
        process.kill()
        raise
    (cache.layout.root / "ready").unlink()
    return process


@pytest.mark.parametrize("writer", ["writer_1", "with.dots.in.it"])
def test_the_file_of_a_living_writer_stays_and_that_of_a_dead_one_goes(full, writer):
    process = start_writer(full, writer)
    temp = full.layout.checkpoints / f"ckpt_new.pt.{writer}.tmp"
    try:
        before = listing(full.layout.root)
        assert full.observe().leftovers == {}
        assert leases(full.layout) == {writer: "live"}
        assert listing(full.layout.root) == before
        assert full.tidy() == []
        assert temp.exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = listing(full.layout.root)
    assert set(full.observe().leftovers) == {temp}
    assert leases(full.layout) == {writer: "dead"}
    assert listing(full.layout.root) == before
    assert full.tidy() == [temp]
    assert leases(full.layout) == {}
    assert set(full.observe().available) == {A, B, C}


def test_the_file_of_a_writer_on_another_machine_is_let_be(full):
    full.layout.lease("far").write_bytes(orjson.dumps({"host": "elsewhere", "boot_id": "x", "pid": 1}))
    temp = full.layout.checkpoints / "ckpt_new.pt.far.tmp"
    temp.write_bytes(b"half")
    assert leases(full.layout) == {"far": "unknown"}
    assert full.observe().leftovers == {}
    assert full.tidy() == []
    assert temp.exists()
    assert full.layout.lease("far").exists()


@pytest.mark.parametrize("content", [b"[]", b"null", b"\xff", b"x" * 10_000, b'{"host": []}'])
def test_a_lease_that_cannot_be_read_is_nobody_s_to_end(full, content):
    full.layout.lease("odd").write_bytes(content)
    temp = full.layout.checkpoints / "ckpt_new.json.odd.tmp"
    temp.write_bytes(b"half")
    assert full.tidy() == []
    assert temp.exists()


def test_the_file_of_a_writer_without_a_lease_is_left_over(full):
    temp = full.layout.checkpoints / "ckpt_new.pt.gone.tmp"
    temp.write_bytes(b"half")
    assert writer_state(full.layout, temp.name) == "dead"
    assert full.tidy() == [temp]


@pytest.mark.parametrize("name", ["x.tmp", ".tmp", "ckpt.pt.NOT AN ID.tmp", "x...tmp"])
def test_a_temporary_file_that_no_writer_named_is_let_be(full, name):
    path = full.layout.checkpoints / name
    path.write_bytes(b"a user's own")
    assert full.tidy() == []
    assert path.exists()


def test_half_written_indexes_go_under_the_lock(full):
    stale = [full.layout.root / f"metadata.json.{rest}" for rest in ("w9.tmp", "prev.w9.tmp")]
    others = [full.layout.root / name for name in ("notes.tmp", "metadata.json.backup", "my-metadata.json.w9.tmp")]
    for path in (*stale, *others):
        path.write_bytes(b"half")
    assert set(full.tidy()) == set(stale)
    assert all(path.exists() for path in others)
    assert same(full.open().index, full.index)


def test_half_written_summaries_of_the_dead_go_and_nobody_elses(full):
    name = "training_summary.json.writer_{}.tmp"
    stale, living = (full.layout.root / name.format(hex * 12) for hex in "0a")
    others = [full.layout.root / name for name in ("training_summary.json.backup.tmp", "training_summary.json")]
    for path in (stale, living, *others):
        path.write_bytes(b"{")
    lease = locks.Lease(full.layout.lease("writer_" + "a" * 12))
    assert set(full.observe().leftovers) == {stale}
    assert full.tidy() == [stale]
    assert all(path.exists() for path in (living, *others))
    lease.release()


def test_tidying_twice_removes_nothing_more(full):
    (full.layout.checkpoints / "ckpt_new.pt.gone.tmp").write_bytes(b"half")
    full.tidy()
    before = listing(full.layout.root)
    assert full.tidy() == []
    assert {k: v for k, v in listing(full.layout.root).items() if "lock" not in k} == {
        k: v for k, v in before.items() if "lock" not in k
    }


def test_nothing_outside_the_cache_is_removed_through_a_link(full, tmp_path):
    outside = tmp_path / "outside"
    full.layout.checkpoints.rename(outside)
    full.layout.checkpoints.symlink_to(outside)
    full.index.checkpoints[B] = full.index.checkpoints[B].changed(decision="evicted")
    full.commit()
    (outside / "ckpt_new.pt.gone.tmp").write_bytes(b"half")
    before = listing(outside)
    assert full.tidy() == []
    assert listing(outside) == before


def test_a_link_among_the_files_is_neither_followed_nor_taken_for_one(full, tmp_path):
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    for name in ("ckpt_new.pt.gone.tmp", "evil.pt", "evil.json"):
        (full.layout.checkpoints / name).symlink_to(precious)
    (full.layout.root / "metadata.json.w9.tmp").symlink_to(precious)
    (full.layout.sessions / "gone.lock").symlink_to(precious)
    assert full.tidy() == []
    assert precious.read_text() == "mine"
    assert full.open().unreadable_sidecars == {}


# --- opening -------------------------------------------------------------------------------------


def test_looking_changes_nothing(full):
    (full.layout.checkpoints / "stray.pt").write_bytes(b"x")
    (full.layout.checkpoints / "ckpt_new.pt.gone.tmp").write_bytes(b"half")
    full.put("ckpt_uncommitted", commit=False)
    full.layout.checkpoint(A).unlink()
    full.layout.lease("dead").write_bytes(orjson.dumps({**locks._this_machine(), "pid": 1}))
    before = listing(full.layout.root)
    for damage in (None, b"{", b""):
        if damage is not None:
            full.file.path.write_bytes(damage)
            before = listing(full.layout.root)
        seen = full.observe()
        leases(full.layout)
        assert seen.unrecorded
        assert listing(full.layout.root) == before


def test_a_checkpoint_that_a_crash_kept_from_the_index_is_adopted(full):
    record = full.put("ckpt_uncommitted", commit=False)
    opened = full.open()
    assert opened.adopted == ["ckpt_uncommitted"]
    assert opened.index.checkpoints["ckpt_uncommitted"].to_json() == record.to_json()
    assert same(opened.index, full.index)
    assert "ckpt_uncommitted" in observe(opened.index, full.layout).available


def test_a_sidecar_without_its_file_adopts_nothing(full):
    full.put("ckpt_uncommitted", commit=False)
    full.layout.checkpoint("ckpt_uncommitted").unlink()
    assert full.open().adopted == []


def test_many_strays_are_adopted_at_once(cache):
    for number in range(300):
        cache.put(f"ckpt_{number:04}", commit=False)
    opened = cache.open()
    assert len(opened.adopted) == 300
    assert same(opened.index, cache.index)


def test_a_lost_index_is_rebuilt_whole(full):
    """`.prev` is one save behind, and the sidecar has that save."""
    full.file.path.unlink()
    opened = full.open()
    assert opened.broken is None
    assert opened.adopted == [C]
    assert same(opened.index, full.index)


def test_without_the_generation_before_the_sidecars_bring_back_the_checkpoints(full):
    full.file.path.unlink()
    full.file.previous.unlink()
    opened = full.open()
    assert opened.adopted == [A, B, C]
    expected = full.index.copy()
    expected.sessions, expected.names = {}, {}
    assert same(opened.index, expected)


def test_without_sidecars_the_generation_before_brings_back_all_but_the_last(full):
    full.file.path.unlink()
    for id in (A, B, C):
        full.layout.sidecar(id).unlink()
    opened = full.open()
    assert set(opened.index.checkpoints) == {A, B}
    assert opened.index.names == full.index.names
    assert set(observe(opened.index, full.layout).unrecorded) == {C}


def keeps_every_checkpoint(cache):
    opened = cache.open()
    assert {A, B, C} <= set(opened.index.checkpoints)
    return opened


def test_a_truncated_index_is_rebuilt_whole_wherever_it_was_cut(full, counted):
    data = full.file.path.read_bytes()
    for length in range(len(data.rstrip())):
        full.file.path.write_bytes(data[:length])
        opened = keeps_every_checkpoint(full)
        assert opened.broken is not None
        assert contents(opened.index) == contents(full.index)
    counted("lost index", "truncations seen through", len(data.rstrip()))


def test_no_random_damage_to_the_index_loses_a_checkpoint(full, counted):
    broken = 0
    for damaged in mutations(full.file.path.read_bytes(), 500, seed=2):
        full.file.path.write_bytes(damaged)
        try:
            broken += keeps_every_checkpoint(full).broken is not None
        except IndexTooNew:
            assert b'"schema_version": 2' not in damaged
    assert broken > 200
    counted("lost index", "mutations seen through", 500)


def test_damage_to_the_generation_before_loses_no_checkpoint_either(full):
    full.file.path.write_bytes(b"{")
    for damaged in mutations(full.file.previous.read_bytes(), 100, seed=3):
        full.file.previous.write_bytes(damaged)
        try:
            keeps_every_checkpoint(full)
        except IndexTooNew:
            assert b'"schema_version": 2' not in damaged


def test_a_broken_index_with_nothing_to_rebuild_it_from_is_said_to_be_broken(cache):
    cache.file.path.write_bytes(b"{")
    with pytest.raises(IndexDamaged, match=r"metadata\.json"):
        cache.open()


def test_a_broken_index_is_rebuilt_from_the_generation_before_though_that_names_no_checkpoint(cache):
    cache.index.sessions["sess_1"] = SessionRecord(id="sess_1")
    cache.commit()
    cache.commit()
    cache.file.path.write_bytes(b"{")
    opened = cache.open()
    assert opened.broken is not None
    assert set(opened.index.sessions) == {"sess_1"}


def test_a_broken_index_beside_files_alone_is_not_replaced_unasked(full):
    full.file.path.write_bytes(b"{")
    full.file.previous.unlink()
    for id in (A, B, C):
        full.layout.sidecar(id).unlink()
    with pytest.raises(IndexDamaged):
        full.open()


@pytest.mark.parametrize("foreign", [b'{"name": "my dataset card"}', b"[]", b'"text"'])
def test_what_is_no_index_and_only_has_its_name_is_never_taken_for_a_broken_one(full, foreign):
    full.file.path.write_bytes(foreign)
    with pytest.raises(IndexDamaged):
        full.open()


def test_a_newer_index_is_not_rebuilt_over(full):
    full.file.path.write_bytes(full.file.path.read_bytes().replace(b'"schema_version": 2', b'"schema_version": 3'))
    with pytest.raises(IndexTooNew):
        full.open()


def test_an_index_that_the_system_refuses_is_not_rebuilt_over(full):
    # Running out of open files looks like damage to whoever doesn't ask, and a good index would be replaced.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open("/dev/null", os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(IndexUnreadable, match="too many open files"):
            full.file.read()
        with pytest.raises(IndexUnreadable, match="too many open files"):
            open_index(full.file, full.layout)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert same(full.open().index, full.index)


# --- sidecars ------------------------------------------------------------------------------------


def test_a_sidecar_holds_one_record_and_what_it_names(full):
    found = parse(full.layout.sidecar(B).read_bytes(), full.layout.sidecar(B))
    assert set(found.checkpoints) == {B}
    record = full.index.checkpoints[B]
    assert set(found.configs) == {record.model_config}
    assert set(found.fingerprints) == {record.fingerprint}
    assert (found.sessions, found.names) == ({}, {})


def test_a_sidecar_too_long_to_be_read_again_is_refused():
    record = CheckpointMetadata(id=A, notes="x" * reconcile.MAX_SIDECAR_BYTES)
    with pytest.raises(InvalidValue, match=f"the record of {A} cannot be .* are read again; keep less"):
        sidecar_bytes(record, Index())


def stray(cache, sidecar):
    """A file that the index doesn't name, with this sidecar."""
    cache.layout.checkpoint("stray").write_bytes(b"x")
    cache.layout.sidecar("stray").write_bytes(sidecar)


def lying(index, **document):
    return orjson.dumps({**orjson.loads(serialise(index)), **document})


HOSTILE_SIDECARS = {
    "empty": b"",
    "no json": b"{",
    "null": b"null",
    "zeroes": bytes(4096),
    "a list": b"[]",
    "nested": b"[" * 100_000,
    "nothing": serialise(Index()),
    "another id": serialise(Index(checkpoints={A: CheckpointMetadata(id=A)})),
    "two records": serialise(Index(checkpoints={id: CheckpointMetadata(id=id) for id in ("stray", "other")})),
    "hostile id": lying(Index(), checkpoints={"../../x": {}}),
    "hostile parent": lying(Index(), checkpoints={"stray": {"parents": ["../../x"]}}),
    "wrong types": lying(Index(), checkpoints={"stray": {"size": "many"}}),
    "negative size": lying(Index(), checkpoints={"stray": {"size": -1}}),
    "endless sequence": lying(Index(), checkpoints={"stray": {"sequence": 2**63}}),
    "newer": lying(Index(checkpoints={"stray": CheckpointMetadata(id="stray")}), schema_version=3),
    "conflict": b"<<<<<<< HEAD\n" + serialise(Index(checkpoints={"stray": CheckpointMetadata(id="stray")})),
}


@pytest.mark.parametrize("kind", HOSTILE_SIDECARS)
def test_a_hostile_sidecar_is_reported_and_passed_over(full, kind):
    stray(full, HOSTILE_SIDECARS[kind])
    opened = full.open()
    assert opened.adopted == []
    assert "stray.json" in opened.unreadable_sidecars["stray"]
    assert "\n" not in opened.unreadable_sidecars["stray"]
    assert same(opened.index, full.index)
    assert set(observe(opened.index, full.layout).unrecorded) == {"stray"}


@pytest.mark.parametrize("kind", ["link", "folder", "fifo", "huge"])
def test_a_sidecar_that_is_no_ordinary_file_is_reported_and_passed_over(full, tmp_path, kind):
    stray(full, b"")
    path = full.layout.sidecar("stray")
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(reconcile.MAX_SIDECAR_BYTES + 1)
    else:
        (tmp_path / "outside.json").write_bytes(serialise(Index(checkpoints={"stray": CheckpointMetadata(id="stray")})))
        path.symlink_to(tmp_path / "outside.json")
    assert "stray.json" in full.open().unreadable_sidecars["stray"]


def test_one_hostile_sidecar_keeps_no_other_from_being_adopted(full):
    stray(full, b"{")
    full.put("ckpt_z", commit=False)
    assert full.open().adopted == ["ckpt_z"]


def test_a_sidecar_brings_its_own_record_and_nothing_else(full):
    """Neither names, nor sessions, nor another content for a configuration that the index holds."""
    mine = full.index.checkpoints[A].model_config
    hostile = Index(
        checkpoints={"stray": CheckpointMetadata(id="stray", model_config=mine)},
        names={"slot-1": NamePointer(checkpoint="stray", revision=99), "slot-2": NamePointer(checkpoint="stray")},
        sessions={"sess_1": SessionRecord(id="sess_1", revision=99)},
        configs={mine: {"zzz": "a lie"}},
        unknown={"future": 1},
    )
    stray(full, serialise(hostile))
    opened = full.open()
    assert opened.adopted == ["stray"]
    expected = full.index.copy()
    expected.checkpoints["stray"] = hostile.checkpoints["stray"]
    assert same(opened.index, expected)


@pytest.mark.parametrize("decision", ["evicted", "quarantined", "anything"])
def test_a_sidecar_cannot_have_its_file_removed(full, decision):
    stray(full, serialise(Index(checkpoints={"stray": CheckpointMetadata(id="stray", decision=decision, size=1)})))
    assert "stray" in full.observe().available
    assert full.tidy() == []
    assert full.layout.checkpoint("stray").exists()


def test_a_sidecar_is_not_asked_about_what_the_index_names(full):
    full.layout.sidecar(A).write_bytes(
        sidecar_bytes(replace(full.index.checkpoints[A], revision=99, notes="x"), full.index)
    )
    opened = full.open()
    assert (opened.adopted, opened.unreadable_sidecars) == ([], {})
    assert same(opened.index, full.index)


# --- quarantine ----------------------------------------------------------------------------------


def test_quarantine_keeps_the_file_and_says_why(full):
    target = quarantine(full.layout.checkpoint(B), full.layout, reason="its digest differs")
    assert target == full.layout.quarantine / f"{B}.pt"
    assert target.read_bytes() == f"content of {B}".encode()
    assert target.with_name(f"{B}.pt.reason.txt").read_text() == "its digest differs\n"
    assert set(full.observe().missing) == {B}


def test_quarantine_overwrites_nothing(full, tmp_path):
    folder = full.layout.quarantine
    folder.mkdir()
    (folder / f"{B}.pt").mkdir()
    (folder / f"{B}.1.pt").symlink_to(tmp_path / "nowhere")
    targets = []
    for number in range(3):
        path = full.layout.checkpoint(B)
        path.write_text(f"version {number}")
        targets.append(quarantine(path, full.layout, reason=f"reason {number}"))
    assert [t.name for t in targets] == [f"{B}.{n}.pt" for n in (2, 3, 4)]
    assert [t.read_text() for t in targets] == ["version 0", "version 1", "version 2"]
    assert [t.with_name(f"{t.name}.reason.txt").read_text() for t in targets] == [f"reason {n}\n" for n in range(3)]
    assert (folder / f"{B}.1.pt").is_symlink()
    assert not (tmp_path / "nowhere").exists()


def test_quarantine_yields_to_what_arrives_in_the_same_instant(full, monkeypatch):
    folder, path = full.layout.quarantine, full.layout.checkpoint(B)
    folder.mkdir()

    class Racing(fs.System):
        def link(self, source, target):
            if not list(folder.iterdir()):
                target.write_text("another process's")
            super().link(source, target)

    monkeypatch.setattr(fs, "system", Racing())
    target = quarantine(path, full.layout, reason="x")
    assert (folder / f"{B}.pt").read_text() == "another process's"
    assert target.name == f"{B}.1.pt"
    assert not path.exists()


def test_quarantine_works_where_there_are_no_hard_links(full, monkeypatch):
    class Linkless(fs.System):
        def link(self, source, target):
            raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(fs, "system", Linkless())
    full.layout.quarantine.mkdir()
    (full.layout.quarantine / f"{B}.pt").symlink_to("nowhere")
    target = quarantine(full.layout.checkpoint(B), full.layout, reason="x")
    assert target.name == f"{B}.1.pt"
    assert target.read_bytes() == f"content of {B}".encode()
    assert not full.layout.checkpoint(B).exists()


def test_a_reason_may_hold_anything(full):
    target = quarantine(full.layout.checkpoint(B), full.layout, reason="half a pair \ud800, é")
    assert "é" in target.with_name(f"{B}.pt.reason.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["broken", "folder", "link", "dangling link"])
def test_a_broken_index_is_kept_aside_and_the_cache_goes_on(full, tmp_path, kind):
    path = full.file.path
    path.unlink()
    if kind == "broken":
        path.write_bytes(b"{")
    elif kind == "folder":
        path.mkdir()
    else:
        (tmp_path / "outside.json").write_bytes(b"mine")
        path.symlink_to(tmp_path / ("outside.json" if kind == "link" else "nowhere"))
    opened = full.open()
    assert opened.broken is not None
    with full.file.held():
        target = set_aside(full.file, full.layout)
        full.file.commit(opened.index, writer="w2")
    assert target == full.layout.quarantine / "metadata.json"
    assert os.path.lexists(target)
    assert same(full.open().index, full.index)
    assert full.open().broken is None
    if kind == "link":
        assert (tmp_path / "outside.json").read_bytes() == b"mine"


def test_there_is_nothing_to_set_aside_where_there_is_no_index(cache):
    assert set_aside(cache.file, cache.layout) is None
    assert not cache.layout.quarantine.exists()
