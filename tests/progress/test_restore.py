import dataclasses
import shutil

from ckptcache.cache import TrainingCache
from ckptcache.progress.commit import commit
from ckptcache.progress.restore import open_ledger, restore
from ckptcache.storage.reconcile import read_sidecar
from tests.progress.repos import RUN, folder, git, run_of, train
from tests.progress.repos import clone as clone_of


def carry_files(source, target, name=RUN):
    """What a cache does between two machines: it brings the checkpoint files, and no record."""
    files = run_of(source, name).cache_dir / "checkpoints"
    shutil.copytree(files, run_of(target, name).cache_dir / "checkpoints", dirs_exist_ok=True)
    return run_of(target, name).cache_dir / "checkpoints"


def next_machine(origin, path, source):
    fresh = clone_of(origin, path)
    return fresh, carry_files(source, fresh)


def test_the_record_of_git_and_the_files_of_a_cache_make_a_whole(origin, clone, tmp_path):
    trained = train(clone)
    commit(folder(clone))
    fresh, _ = next_machine(origin, tmp_path / "fresh", clone)
    restored = restore(folder(fresh), RUN)
    assert restored.view.available == set(trained.ids)
    assert restored.refused == {}
    again = train(fresh, [1.0])
    assert again.start_iteration == 2
    assert again.parent.id in trained.ids


def test_an_expired_cache_leaves_the_record_and_a_fresh_start(origin, clone, tmp_path):
    trained = train(clone)
    commit(folder(clone))
    fresh = clone_of(origin, tmp_path / "fresh")
    restored = restore(folder(fresh), RUN)
    assert restored.view.available == frozenset()
    assert restored.to_json()["missing"] == sorted(trained.ids)
    again = train(fresh, [3.5])
    assert again.start_iteration == 0
    commit(folder(fresh))
    assert restore(folder(clone), RUN).to_json()["records"] == 3


def test_a_file_that_differs_goes_to_quarantine_unread_and_its_record_stays(origin, clone, tmp_path, caplog):
    good, bad = train(clone).ids
    commit(folder(clone))
    fresh, files = next_machine(origin, tmp_path / "fresh", clone)
    data = bytearray((files / f"{bad}.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (files / f"{bad}.pt").write_bytes(data)
    restored = restore(folder(fresh), RUN)
    assert restored.view.available == {good}
    assert "digest" in restored.refused[f"{bad}.pt"]
    assert (run_of(fresh).cache_dir / "quarantine" / f"{bad}.pt").read_bytes() == data
    assert restored.view.index.checkpoints[bad].decision is None

    (files / f"{bad}.pt").write_bytes((run_of(clone).cache_dir / "checkpoints" / f"{bad}.pt").read_bytes())
    assert restore(folder(fresh), RUN).view.available == {good, bad}


def test_a_part_of_a_file_is_refused(origin, clone, tmp_path):
    good, bad = train(clone).ids
    commit(folder(clone))
    fresh, files = next_machine(origin, tmp_path / "fresh", clone)
    path = files / f"{bad}.pt"
    path.write_bytes(path.read_bytes()[:-100])
    restored = restore(folder(fresh), RUN)
    assert restored.view.available == {good}
    assert "bytes" in restored.refused[path.name]


def test_files_that_the_record_does_not_name_are_refused_with_their_sidecars(origin, clone, tmp_path):
    train(clone)
    commit(folder(clone))
    strange = train(clone, [1.0], resume="never").ids
    fresh, _ = next_machine(origin, tmp_path / "fresh", clone)
    restored = restore(folder(fresh), RUN)
    assert set(restored.refused) == {f"{id}{end}" for id in strange for end in (".pt", ".json")}
    assert not restored.view.available & set(strange)
    assert len(restored.view.available) == 2


def test_adopt_takes_them_up_on_the_word_of_their_sidecars(origin, clone, tmp_path):
    train(clone)
    commit(folder(clone))
    strange = train(clone, [1.0], resume="never").ids
    fresh, _ = next_machine(origin, tmp_path / "fresh", clone)
    restored = restore(folder(fresh), RUN, adopt=True)
    assert set(strange) < restored.view.available
    assert restored.refused == {}


def test_what_was_pushed_after_the_checkout_counts(origin, clone, tmp_path):
    train(clone)
    commit(folder(clone))
    behind = clone_of(origin, tmp_path / "behind")
    newer = train(clone, [1.0]).ids
    commit(folder(clone))
    files = carry_files(clone, behind)
    assert len(list(files.glob("*.pt"))) == 3
    assert set(newer) < restore(folder(behind), RUN).view.available


def test_offline_only_what_is_here_counts(origin, clone, tmp_path):
    train(clone)
    commit(folder(clone))
    behind = clone_of(origin, tmp_path / "behind")
    train(clone, [1.0])
    commit(folder(clone))
    assert len(restore(folder(behind), RUN, offline=True).view.index.checkpoints) == 2
    git(behind, "remote", "set-url", "origin", str(tmp_path / "gone"))
    unreached = restore(folder(behind), RUN)
    assert len(unreached.view.index.checkpoints) == 2
    assert any("could not be fetched" in note for note in unreached.notes)


def test_a_false_digest_here_gives_way_to_that_of_git(origin, clone, tmp_path):
    trained = train(clone)
    commit(folder(clone))
    fresh, _ = next_machine(origin, tmp_path / "fresh", clone)
    with open_ledger(run_of(fresh)).change() as change:
        record = change.index.checkpoints[trained.ids[0]]
        change.put(record.changed(digest="blake3:" + "0" * 64))
    restored = restore(folder(fresh), RUN)
    assert restored.view.available == set(trained.ids)
    assert any(trained.ids[0] in note and "edited" in note for note in restored.notes)


def test_a_sidecar_from_elsewhere_is_made_to_say_what_the_record_says(origin, clone, tmp_path):
    trained = train(clone)
    commit(folder(clone))
    fresh, files = next_machine(origin, tmp_path / "fresh", clone)
    sidecar = files / f"{trained.ids[0]}.json"
    sidecar.write_bytes(sidecar.read_bytes().replace(b"blake3:", b"blake3:0000"))
    restore(folder(fresh), RUN)
    ledger = open_ledger(run_of(fresh))
    found = read_sidecar(ledger.layout, trained.ids[0])
    assert found.checkpoints[trained.ids[0]].digest == ledger.view().index.checkpoints[trained.ids[0]].digest


def test_a_record_without_digest_vouches_for_nothing(origin, clone, tmp_path):
    trained = train(clone)
    with open_ledger(run_of(clone)).change() as change:
        change.index.checkpoints[trained.ids[0]] = dataclasses.replace(
            change.index.checkpoints[trained.ids[0]], digest=None
        )
        change.is_dirty = True
    commit(folder(clone))
    fresh, _ = next_machine(origin, tmp_path / "fresh", clone)
    restored = restore(folder(fresh), RUN)
    assert restored.view.available == {trained.ids[1]}
    assert "vouches" in restored.refused[f"{trained.ids[0]}.pt"]


def test_a_first_run_has_nothing_to_restore_and_leaves_no_trace(clone):
    restored = restore(folder(clone), RUN)
    assert restored.view.available == frozenset()
    assert any("begins" in note for note in restored.notes)
    assert not folder(clone).root.exists()


def test_files_without_any_record_are_refused(origin, clone, tmp_path):
    train(clone)
    fresh, files = next_machine(origin, tmp_path / "fresh", clone)
    restored = restore(folder(fresh), RUN)
    assert restored.view.available == frozenset()
    assert len(restored.refused) == 4
    assert list(files.iterdir()) == []


def test_outside_of_a_repository_the_record_that_is_here_counts(clone, tmp_path):
    trained = train(clone)
    shutil.copytree(folder(clone).root, tmp_path / "plain" / ".training-progress")
    restored = restore(folder(tmp_path / "plain"), RUN)
    assert restored.view.available == set(trained.ids)
    assert any("git" in note for note in restored.notes)


def test_conflict_markers_are_taken_for_both_sides(origin, clone, tmp_path):
    other = clone_of(origin, tmp_path / "other")
    train(clone)
    commit(folder(clone))
    git(other, "pull", "-q")
    theirs = train(other, [2.5])
    git(other, "add", "-A")
    git(other, "commit", "-qm", "By hand")
    ours = train(clone, [2.25], resume="never")
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "By hand")
    git(clone, "fetch", "-q", str(other), "main")
    git(clone, "-c", "merge.conflictStyle=diff3", "merge", "-q", "FETCH_HEAD", check=False)
    assert "<<<<<<<" in run_of(clone).index.read_text()
    restored = restore(folder(clone), RUN)
    assert {*ours.ids, *theirs.ids} < set(restored.view.index.checkpoints)
    assert {ours.record.id, theirs.record.id} < set(restored.view.index.sessions)
    assert any("conflict" in note for note in restored.notes)
    assert list((run_of(clone).cache_dir / "quarantine").glob("metadata*.json"))
    with TrainingCache(str(run_of(clone).cache_dir)) as cache:
        assert not any(finding.is_damage for finding in cache.doctor())
