import json
import random

import pytest

from ckptcache.errors import NoBranch, ProgressNotFound, PushFailed, RunNotFound
from ckptcache.progress import commit as committing
from ckptcache.progress.commit import commit, delays
from ckptcache.progress.git import Repository
from ckptcache.progress.removed import note_removed
from ckptcache.progress.restore import open_ledger
from ckptcache.storage.index import parse
from tests.progress.repos import RUN, committed, folder, git, run_of, train
from tests.progress.repos import clone as clone_of


def files_of(origin, branch="main"):
    return set(git(origin, "ls-tree", "-r", "--name-only", branch).splitlines())


def test_a_training_is_committed_and_pushed_with_the_files_made_of_it(origin, clone):
    trained = train(clone)
    done = commit(folder(clone))
    assert done.pushed_to == "main of origin"
    assert git(origin, "rev-parse", "main") == done.commit
    inside = {"README.md", ".gitignore", ".gitattributes", f"{RUN}/cache/metadata.json", f"{RUN}/training_summary.json"}
    assert files_of(origin) == {"train.py", *(f".training-progress/{n}" for n in (*inside, f"{RUN}/loss.svg"))}
    index = committed(origin)
    assert set(index.checkpoints) == set(trained.ids)
    assert set(index.sessions) == {trained.record.id}


def test_the_message_states_iteration_loss_best_and_whether_it_improved(clone):
    train(clone, [3.0, 2.0])
    assert commit(folder(clone)).message.startswith(
        f"Train {RUN} to iteration 2: val_loss 2.0000, best 2.0000 (the first)\n"
    )
    train(clone, [1.5, 1.75])
    second = commit(folder(clone)).message
    assert second.startswith(f"Train {RUN} to iteration 4: val_loss 1.7500, best 1.5000 (improved from 2.0000)\n")
    assert "iterations 2 to 4" in second
    train(clone, [4.0])
    assert "best 1.5000 (not improved)" in commit(folder(clone)).message


def test_the_clone_follows_and_is_clean(origin, clone):
    train(clone)
    done = commit(folder(clone))
    assert git(clone, "status", "--porcelain") == ""
    assert git(clone, "rev-parse", "HEAD") == done.commit
    assert git(clone, "for-each-ref", "refs/ckptcache/pending") == ""


def test_nothing_new_makes_no_commit(origin, clone):
    train(clone)
    commit(folder(clone))
    before = git(origin, "rev-parse", "main")
    again = commit(folder(clone))
    assert (again.commit, again.pushed_to) == (None, None)
    assert git(origin, "rev-parse", "main") == before


def test_what_others_have_pushed_meanwhile_is_merged_and_stays(origin, clone, tmp_path):
    other = clone_of(origin, tmp_path / "other")
    theirs = train(other, [2.5, 1.5])
    commit(folder(other))
    (other / "train.py").write_text("print()\n")
    git(other, "commit", "-qam", "Change the code")
    git(other, "push", "-q", "origin", "main")
    ours = train(clone)
    done = commit(folder(clone))
    index = committed(origin)
    assert {*ours.ids, *theirs.ids} == set(index.checkpoints)
    assert {ours.record.id, theirs.record.id} == set(index.sessions)
    assert git(origin, "show", "main:train.py") == "print()"
    assert git(clone, "rev-parse", "HEAD") == done.commit
    assert (clone / "train.py").read_text() == "print()\n"
    assert git(clone, "status", "--porcelain") == ""


def test_a_push_that_comes_too_late_is_made_again_from_the_new_tip(origin, clone, tmp_path, monkeypatch):
    other = clone_of(origin, tmp_path / "other")
    train(clone)
    theirs = train(other, [2.5])
    fetch, outran = Repository.fetch, []

    def fetch_and_be_outrun(self, remote, branch):
        tip = fetch(self, remote, branch)
        if not outran:
            outran.append(commit_quietly(other))
        return tip

    def commit_quietly(where):
        monkeypatch.setattr(Repository, "fetch", fetch)
        commit(folder(where))
        monkeypatch.setattr(Repository, "fetch", fetch_and_be_outrun)
        return True

    monkeypatch.setattr(Repository, "fetch", fetch_and_be_outrun)
    done = commit(folder(clone))
    assert done.attempts == 2
    assert set(theirs.ids) < set(committed(origin).checkpoints)


def test_a_local_branch_with_commits_of_its_own_stays_where_it_is(origin, clone):
    (clone / "mine.txt").write_text("mine")
    git(clone, "add", "mine.txt")
    git(clone, "commit", "-qm", "Mine")
    mine = git(clone, "rev-parse", "HEAD")
    train(clone)
    done = commit(folder(clone))
    assert git(clone, "rev-parse", "HEAD") == mine
    assert git(clone, "rev-parse", f"{done.commit}^") == git(clone, "rev-parse", "HEAD^")
    assert "mine.txt" not in files_of(origin)
    assert any("git pull" in note for note in done.notes)
    git(clone, "add", ".training-progress")
    git(clone, "commit", "-qm", "The record as well")
    git(clone, "pull", "-q", "--no-rebase", "--no-edit", "-X", "ours")
    assert "mine.txt" in git(clone, "ls-files")


def test_a_repository_without_remote_gets_the_commit_on_its_branch(tmp_path):
    git(tmp_path, "init", "-q", "-b", "trunk", "alone")
    alone = tmp_path / "alone"
    train(alone)
    done = commit(folder(alone))
    assert done.pushed_to is None
    assert git(alone, "rev-parse", "trunk") == done.commit
    assert git(alone, "status", "--porcelain") == ""
    assert "ckptcache" in git(alone, "log", "-1", "--format=%an %ae")


def test_no_push_commits_to_another_branch_as_well(origin, clone):
    train(clone)
    done = commit(folder(clone), branch="records", push=False)
    assert git(clone, "rev-parse", "records") == done.commit
    assert git(clone, "rev-parse", "main") != done.commit
    assert git(origin, "branch", "--list", "records") == ""


def test_a_branch_that_the_remote_lacks_is_made(origin, clone):
    train(clone)
    commit(folder(clone), branch="persistence/17")
    assert len(committed(origin, branch="persistence/17").checkpoints) == 2
    assert ".training-progress/README.md" not in files_of(origin)


def test_a_path_may_stand_for_a_remote(clone, tmp_path):
    elsewhere = tmp_path / "elsewhere.git"
    git(tmp_path, "init", "-q", "--bare", str(elsewhere))
    train(clone)
    commit(folder(clone), remote=str(elsewhere), branch="main")
    assert len(committed(elsewhere).checkpoints) == 2


def test_what_can_never_be_pushed_is_left_in_a_bundle_at_once(origin, clone, tmp_path):
    hook = origin / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\necho 'nobody may push here'\nexit 1\n")
    hook.chmod(0o755)
    trained = train(clone)
    with pytest.raises(PushFailed) as caught:
        commit(folder(clone))
    assert "1 attempt" in str(caught.value)
    (bundle,) = folder(clone).root.glob("*.bundle")
    fresh = clone_of(origin, tmp_path / "fresh")
    git(fresh, "fetch", "-q", str(bundle), "refs/ckptcache/unpushed")
    data = git(fresh, "show", f"FETCH_HEAD:.training-progress/{RUN}/cache/metadata.json")
    assert set(parse(data.encode(), bundle).checkpoints) == set(trained.ids)
    hook.unlink()
    commit(folder(clone))
    assert set(committed(origin).checkpoints) == set(trained.ids)


def test_the_bundles_are_not_committed(origin, clone):
    train(clone)
    (folder(clone).root / "unpushed-0.bundle").write_bytes(b"x")
    commit(folder(clone))
    git(clone, "add", "-A")
    assert git(clone, "status", "--porcelain") == ""


def test_only_the_runs_that_are_named_are_committed(origin, clone):
    train(clone)
    train(clone, [4.0], name="other-run")
    commit(folder(clone), ["other-run"])
    assert not any(f".training-progress/{RUN}/" in f for f in files_of(origin))
    commit(folder(clone))
    assert any(f".training-progress/{RUN}/" in f for f in files_of(origin))


def test_the_page_shows_runs_that_only_others_have(origin, clone, tmp_path):
    other = clone_of(origin, tmp_path / "other")
    train(other, name="their-run")
    commit(folder(other))
    train(clone)
    commit(folder(clone))
    page = git(origin, "show", "main:.training-progress/README.md")
    assert "their-run" in page
    assert RUN in page


def test_the_summary_is_that_of_the_newest_session_with_paths_of_the_repository(origin, clone):
    train(clone)
    newest = train(clone, [1.0])
    commit(folder(clone))
    summary = json.loads(git(origin, "show", f"main:.training-progress/{RUN}/training_summary.json"))
    assert summary["session"] == newest.record.id
    assert summary["cache_dir"] == f".training-progress/{RUN}/cache"
    assert summary["available"] == sorted(run_ids(clone))


def run_ids(clone):
    return [path.stem for path in (run_of(clone).cache_dir / "checkpoints").glob("*.pt")]


def test_a_clone_without_files_leaves_it_to_others_which_are_kept(origin, clone, tmp_path):
    train(clone)
    commit(folder(clone))
    laptop = clone_of(origin, tmp_path / "laptop")
    train(laptop, [4.0], name="second")
    commit(folder(laptop))
    summary = json.loads(git(origin, "show", f"main:.training-progress/{RUN}/training_summary.json"))
    assert summary["available"] == sorted(run_ids(clone))


def test_what_was_removed_here_on_purpose_is_removed_there(origin, clone):
    trained = train(clone, [3.0, 2.0])
    commit(folder(clone))
    with open_ledger(run_of(clone)).change() as change:
        note_removed(run_of(clone).cache_dir, trained.ids[:1])
        del change.index.checkpoints[trained.ids[0]]
        change.is_dirty = True
        (run_of(clone).cache_dir / "checkpoints" / f"{trained.ids[0]}.json").unlink()
        (run_of(clone).cache_dir / "checkpoints" / f"{trained.ids[0]}.pt").unlink()
    commit(folder(clone))
    assert set(committed(origin).checkpoints) == set(trained.ids[1:])


def test_a_lost_record_removes_nothing_there(origin, clone):
    trained = train(clone)
    commit(folder(clone))
    run_of(clone).index.unlink()
    commit(folder(clone))
    assert set(committed(origin).checkpoints) == set(trained.ids)


def test_a_detached_head_needs_a_branch(origin, clone):
    train(clone)
    git(clone, "checkout", "-q", "--detach")
    with pytest.raises(NoBranch, match="--branch"):
        commit(folder(clone))
    commit(folder(clone), branch="main")
    assert len(committed(origin).checkpoints) == 2


def test_a_shallow_clone_can_commit(origin, clone, tmp_path):
    train(clone)
    commit(folder(clone))
    shallow = clone_of(origin, tmp_path / "shallow", "--depth", "1")
    train(clone, [1.5])
    commit(folder(clone))
    train(shallow, [2.5])
    commit(folder(shallow))
    assert len(committed(origin).sessions) == 3
    assert git(shallow, "rev-parse", "--is-shallow-repository") == "true"


def test_there_has_to_be_something_to_commit(clone):
    with pytest.raises(ProgressNotFound):
        commit(folder(clone))
    train(clone)
    with pytest.raises(RunNotFound, match=RUN):
        commit(folder(clone), ["no-such"])


def test_the_token_goes_to_its_own_server_only(clone, monkeypatch):
    monkeypatch.setenv("GITHUB_TOKEN", "s3cret")
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://git.example.org")
    repository = Repository(clone)
    for remote in ("origin", "https://other.example.org/a/b", "http://git.example.org/a/b", "git@git.example.org:a/b"):
        assert repository._access(remote) == {}, remote
    given = repository._access("https://git.example.org/a/b")
    assert given["GIT_CONFIG_KEY_1"] == "http.https://git.example.org/.extraheader"
    assert "s3cret" not in str(given)
    git(clone, "remote", "set-url", "origin", "https://git.example.org/a/b.git")
    assert repository._access("origin") == given


def test_a_training_that_goes_on_meanwhile_loses_nothing(origin, clone, monkeypatch):
    train(clone)
    later, make_page = [], committing.page_file

    def page_while_training_goes_on(*given):
        if not later:
            later.append(train(clone, [1.0]))
        return make_page(*given)

    monkeypatch.setattr(committing, "page_file", page_while_training_goes_on)
    commit(folder(clone))
    assert set(later[0].ids) < set(open_ledger(run_of(clone)).view().index.checkpoints)
    commit(folder(clone))
    assert set(later[0].ids) < set(committed(origin).checkpoints)


def test_waiting_grows_and_never_falls_together():
    waits = [value for value, _ in zip(delays(random.Random(1)), range(12), strict=False)]
    others = [value for value, _ in zip(delays(random.Random(2)), range(12), strict=False)]
    assert waits != others
    assert max(waits[:2]) < 0.5
    assert max(waits) <= 8.0
