"""Bases of merges: what a clone lacks, and what somebody took out of a record on purpose, are not the same."""

import shutil

import pytest

from ckptcache.errors import GitFailed
from ckptcache.progress import git as running_git
from ckptcache.progress import restore as restoring
from ckptcache.progress.clean import clean
from ckptcache.progress.commit import commit
from ckptcache.progress.git import Repository
from ckptcache.progress.restore import open_ledger, restore
from tests.progress.repos import RUN, committed, folder, run_of, train
from tests.progress.repos import clone as clone_of


def without_files(clone, ids):
    for id in ids:
        (run_of(clone).cache_dir / "checkpoints" / f"{id}.pt").unlink()


def test_a_folder_that_was_lost_and_trained_in_again_removes_nothing(origin, clone):
    trained = train(clone)
    commit(folder(clone))
    shutil.rmtree(run_of(clone).root)
    again = train(clone, [4.0])
    assert again.parent is None
    commit(folder(clone))
    assert set(committed(origin).checkpoints) == {*trained.ids, *again.ids}
    assert set(committed(origin).sessions) == {trained.record.id, again.record.id}


@pytest.mark.parametrize("restores", [False, True])
def test_a_record_that_came_out_of_a_cache_with_its_files_removes_nothing(origin, clone, tmp_path, restores):
    """A cache of the whole folder brings the record of back then, and puts it in the place of the newer one."""
    first = train(clone)
    commit(folder(clone))
    cached = shutil.copytree(run_of(clone).cache_dir, tmp_path / "cached")
    second = train(clone, [1.0])
    commit(folder(clone))
    fresh = clone_of(origin, tmp_path / "fresh")
    shutil.rmtree(run_of(fresh).cache_dir)
    shutil.copytree(cached, run_of(fresh).cache_dir)
    if restores:
        restored = restore(folder(fresh), RUN)
        assert restored.view.available == set(first.ids)
        assert set(second.ids) < set(restored.view.index.checkpoints)
    third = train(fresh, [1.5])
    commit(folder(fresh))
    assert set(committed(origin).checkpoints) == {*first.ids, *second.ids, *third.ids}
    assert set(committed(origin).sessions) == {first.record.id, second.record.id, third.record.id}


def test_what_was_cleaned_stays_gone_though_the_clone_is_behind(origin, clone, tmp_path):
    behind = clone_of(origin, tmp_path / "behind")
    old, new = train(clone), train(clone, [1.0])
    commit(folder(clone))
    restore(folder(behind), RUN)
    cleaned = clean(run_of(behind), older_than_days=None, max_records=1, dry_run=False)
    assert set(cleaned.checkpoints) == set(old.ids)
    commit(folder(behind))
    assert set(committed(origin).checkpoints) == set(new.ids)


def test_a_file_whose_record_others_took_out_is_kept_and_held_against_its_digest(origin, clone, tmp_path):
    """Its sidecar, which came with it, vouches for nothing."""
    old = train(clone)
    train(clone, [1.0])
    commit(folder(clone))
    job = clone_of(origin, tmp_path / "job")
    files = run_of(job).cache_dir / "checkpoints"
    shutil.copytree(run_of(clone).cache_dir / "checkpoints", files)
    without_files(clone, old.ids)
    commit(folder(clone))
    clean(run_of(clone), older_than_days=None, max_records=1, dry_run=False)
    commit(folder(clone))
    assert not set(old.ids) & set(committed(origin).checkpoints)

    good, bad = old.ids
    data = bytearray((files / f"{bad}.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (files / f"{bad}.pt").write_bytes(data)
    restored = restore(folder(job), RUN)
    assert good in restored.view.available
    assert bad not in restored.view.available
    assert "digest" in restored.refused[f"{bad}.pt"]
    commit(folder(job))
    assert good in committed(origin).checkpoints


def test_a_checkpoint_that_a_training_saves_during_a_restore_is_no_stranger(origin, clone, monkeypatch):
    train(clone)
    commit(folder(clone))
    read, later = restoring.local_record, []

    def read_and_be_outrun(*given):
        found = read(*given)
        if not later:
            later.append(train(clone, [1.0]))
        return found

    monkeypatch.setattr(restoring, "local_record", read_and_be_outrun)
    restored = restore(folder(clone), RUN)
    assert restored.refused == {}
    assert set(later[0].ids) < restored.view.available
    assert set(later[0].ids) < set(open_ledger(run_of(clone)).view().observed.available)


def test_no_training_waits_for_git(origin, clone, monkeypatch):
    """Git may have to ask its remote for what it was not given yet, and for as long a training couldn't save."""
    train(clone)
    commit(folder(clone))
    train(clone, [1.0])
    index, ran, run_git = open_ledger(run_of(clone)).file, [], Repository._run

    def run_beside_a_training(self, *arguments, **given):
        with index.held(timeout=0):
            ran.append(arguments[0])
        return run_git(self, *arguments, **given)

    monkeypatch.setattr(Repository, "_run", run_beside_a_training)
    restore(folder(clone), RUN)
    commit(folder(clone))
    assert {"fetch", "merge-base", "push"} <= set(ran)


def test_a_git_that_hangs_is_named(clone, monkeypatch):
    train(clone)
    monkeypatch.setattr(running_git, "TIMEOUT", 1e-6)
    with pytest.raises(GitFailed, match=r"rev-parse.*no answer"):
        commit(folder(clone))
