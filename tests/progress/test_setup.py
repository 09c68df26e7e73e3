import json
import os
import sys
from pathlib import Path

import pytest

from ckptcache.errors import MergeFailed
from ckptcache.progress.commit import commit
from ckptcache.progress.folder import IGNORED
from ckptcache.progress.setup import merge_files, prepare, tool
from ckptcache.storage.index import Index, parse, serialise
from tests.progress.repos import RUN, folder, git, run_of, train
from tests.progress.repos import clone as clone_of


def test_init_makes_the_folder_and_may_be_run_again(clone):
    prepared = prepare(folder(clone))
    assert {path.name for path in prepared.written} == {"README.md", ".gitignore", ".gitattributes"}
    assert "no run yet" in folder(clone).page.read_text()
    assert prepare(folder(clone)).written == []


def test_big_and_private_files_stay_out_of_git(clone):
    prepare(folder(clone))
    train(clone)
    run = run_of(clone)
    (run.cache_dir / "training_summary.json").write_text("{}")
    for name in ("a.pth", "train.bin", "history.db", "history.db-wal", "metadata.json.prev", "x.tmp", "b.bundle"):
        (run.cache_dir / name).write_bytes(b"x")
    git(clone, "add", "-A")
    staged = git(clone, "diff", "--cached", "--name-only").splitlines()
    inside = {"cache/metadata.json", "training_summary.json"}
    assert {p.removeprefix(f".training-progress/{RUN}/") for p in staged if RUN in p} == inside


def test_lines_that_somebody_added_stay(clone):
    folder(clone).root.mkdir()
    own = folder(clone).root / ".gitignore"
    own.write_text("mine/\n*.pt")
    prepare(folder(clone))
    lines = own.read_text().splitlines()
    assert lines[:2] == ["mine/", "*.pt"]
    assert set(IGNORED) <= set(lines)
    assert lines.count("*.pt") == 1


def test_outside_of_a_clone_it_says_that_git_was_not_told(tmp_path):
    prepared = prepare(folder(tmp_path))
    assert prepared.driver is None
    assert "git" in prepared.notes[0]


def test_git_merges_two_branches_record_by_record(origin, clone, tmp_path, monkeypatch):
    prepare(folder(clone))
    common = train(clone)
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "Record")
    git(clone, "checkout", "-q", "-b", "theirs")
    theirs = train(clone, [1.5], resume="never")
    git(clone, "commit", "-qam", "Their record")
    git(clone, "checkout", "-q", "main")
    ours = train(clone, [1.75], resume="never")
    git(clone, "commit", "-qam", "Our record")
    git(clone, "merge", "-q", "--no-edit", "theirs")
    assert git(clone, "status", "--porcelain") == ""
    merged = parse(run_of(clone).index.read_bytes(), run_of(clone).index)
    assert set(merged.checkpoints) == {*common.ids, *ours.ids, *theirs.ids}
    assert {ours.record.id, theirs.record.id} < set(merged.sessions)


def test_the_driver_is_called_by_its_full_path():
    driver = tool()
    assert Path(driver.split(" ")[0]).is_absolute()
    assert os.access(driver.split(" ")[0], os.X_OK)
    assert Path(sys.executable).parent == Path(driver.split(" ")[0]).parent


def test_a_version_that_cannot_be_read_leaves_ours_as_it_is(tmp_path):
    for name, data in (("base", b""), ("ours", serialise(Index())), ("theirs", b"{nope")):
        (tmp_path / name).write_bytes(data)
    with pytest.raises(MergeFailed):
        merge_files(tmp_path / "base", tmp_path / "ours", tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == serialise(Index())
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["base", "ours", "theirs"]


def test_a_conflict_that_git_was_not_told_to_merge_is_taken_up_by_the_next_commit(origin, clone, tmp_path):
    train(clone)
    commit(folder(clone))
    other = clone_of(origin, tmp_path / "other")
    # Further than the first, or their records could lie apart in the file, and git see no conflict.
    theirs = train(other, [2.5, 2.4, 2.3])
    git(other, "commit", "-qam", "By hand")
    git(other, "push", "-q", "origin", "main")
    ours = train(clone, [2.25, 2.2, 2.1], resume="never")
    git(clone, "commit", "-qam", "By hand as well")
    git(clone, "pull", "-q", "--no-rebase", check=False)
    assert "<<<<<<<" in run_of(clone).index.read_text()
    commit(folder(clone))
    tip = git(origin, "show", f"main:.training-progress/{RUN}/cache/metadata.json")
    assert {*ours.ids, *theirs.ids} < json.loads(tip)["checkpoints"].keys()
