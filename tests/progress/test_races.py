"""Many clones that train and commit at once to one repository: no record is ever lost, and none is ever pushed over."""

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
import pytest
import torch

from ckptcache.ledger import Change
from ckptcache.progress import commit as committing
from ckptcache.progress import restore as restoring
from ckptcache.progress.commit import commit
from ckptcache.progress.git import Outrun, Repository
from ckptcache.progress.record import Record
from ckptcache.progress.restore import restore
from ckptcache.storage.index import Index, parse
from tests.faults import end_of, start_child
from tests.progress import repos

RECORD = f".training-progress/{repos.RUN}/cache/metadata.json"


class Clones:
    """Clones of one bare repository, a process each, and what each was told is saved."""

    def __init__(self, folder: Path, number: int, rounds: int) -> None:
        self.rounds, self.notes = rounds, folder / "notes"
        self.notes.mkdir()
        self.origin = repos.bare(folder / "origin.git")
        repos.git(self.origin, "config", "core.logAllRefUpdates", "always")
        self.paths = [repos.clone(self.origin, folder / f"clone-{n}") for n in range(number)]
        for path in self.paths:
            self.note(self.paths.index(path), "cloned")
            # The other side is another machine: it isn't killed with the job that talks to it.
            for service in ("receivepack", "uploadpack"):
                program = f"git-{service.removesuffix('pack')}-pack"
                repos.git(path, "config", f"remote.origin.{service}", f"setsid --wait {program}")

    # --- in the processes --------------------------------------------------------------------------

    def start(self, number: int) -> int:
        return start_child(lambda: self.work(number))

    def work(self, number: int) -> None:
        """What a job does, round by round; a job that was killed first brings in what it has left behind."""
        os.setpgid(0, 0)
        try:
            self.rounds_of(number)
        except BaseException as error:
            self.note(number, "failed", *str(error).split())
            raise

    def rounds_of(self, number: int) -> None:
        torch.set_num_threads(1)
        draw, folder = random.Random(os.getpid()), repos.folder(self.paths[number])
        if self.lines(number, "training"):
            self.commit(number)
        while (done := len(self.lines(number, "pushed"))) < self.rounds:
            self.note(number, "training")
            if done:
                restore(folder, repos.RUN)
            trained = repos.train(self.paths[number], [draw.uniform(1, 4), draw.uniform(1, 4)])
            self.note(number, "saved", trained.record.id, *trained.ids)
            self.commit(number)
        self.note(number, "done")

    def commit(self, number: int) -> None:
        self.note(number, "committing")
        made = commit(repos.folder(self.paths[number]))
        self.note(number, "pushed", str(made.attempts), made.commit or "")

    # --- what they have noted ------------------------------------------------------------------------

    def note(self, number: int, *words: str) -> None:
        with (self.notes / str(number)).open("a") as notes:
            notes.write(f"{' '.join(words)}\n")

    def lines(self, number: int, kind: str) -> list[list[str]]:
        lines = (self.notes / str(number)).read_text().splitlines()
        return [line.split()[1:] for line in lines if line.split()[:1] == [kind]]

    def all_lines(self, kind: str) -> list[list[str]]:
        return [line for number in range(len(self.paths)) for line in self.lines(number, kind)]

    # --- at the end ----------------------------------------------------------------------------------

    def check(self) -> None:
        self.check_history()
        index = repos.committed(self.origin)
        saved = self.all_lines("saved")
        assert len(saved) >= len(self.paths)
        assert [session for session, *_ in saved if session not in index.sessions] == []
        assert [id for _, *ids in saved for id in ids if id not in index.checkpoints] == []
        self.check_files()
        self.check_clones(index)

    def check_history(self) -> None:
        """Linear, each old tip below the new one, and no commit without a record that the one before it had."""
        repos.git(self.origin, "fsck", "--strict", "--no-dangling")
        assert repos.git(self.origin, "rev-list", "--merges", "main") == ""
        for entry in (self.origin / "logs/refs/heads/main").read_text().splitlines()[1:]:
            old, new = entry.split()[:2]
            assert repos.git(self.origin, "rev-list", "--count", old, f"^{new}") == "0", f"{old} was pushed over"
        before = Index()
        for name in repos.git(self.origin, "rev-list", "--reverse", "main", "--", RECORD).split():
            now = parse(repos.git(self.origin, "show", f"{name}:{RECORD}").encode(), Path(name))
            assert before.checkpoints.keys() <= now.checkpoints.keys(), f"{name} has lost a checkpoint"
            assert before.sessions.keys() <= now.sessions.keys(), f"{name} has lost a session"
            before = now

    def check_files(self) -> None:
        names = repos.git(self.origin, "ls-tree", "-r", "--name-only", "main").splitlines()
        assert not [name for name in names if name.endswith((".pt", ".lock", ".prev", ".tmp", ".bundle"))]
        contents = {name: repos.git(self.origin, "show", f"main:{name}") for name in names}
        assert [n for n, text in contents.items() if "<<<<<<<" in text or ">>>>>>>" in text] == []
        assert contents["train.py"] == "pass"
        summary = orjson.loads(contents[f".training-progress/{repos.RUN}/training_summary.json"])
        page = contents[".training-progress/README.md"]
        assert summary["session"] in contents[RECORD]
        assert page.startswith("# Training progress")
        assert repos.RUN in page

    def check_clones(self, index: Index) -> None:
        """None is stuck: each can still restore and commit, and has nothing left to tell."""
        for path in self.paths:
            began = time.monotonic()
            assert repos.git(path, "rev-list", "--count", "HEAD", "^origin/main") == "0"
            # Behind a lock that a killed git has left the branch stays back, and only the branch.
            if not any((path / ".git").rglob("*.lock")):
                assert repos.git(path, "status", "--short") == ""
            restored = restore(repos.folder(path), repos.RUN)
            assert restored.view.index.checkpoints.keys() == index.checkpoints.keys()
            assert set(restored.view.catalog.observed.available) >= self.own_files(path)
            assert restored.refused == {}
            assert time.monotonic() - began < 20

    def own_files(self, path: Path) -> set[str]:
        return {file.stem for file in (repos.run_of(path).cache_dir / "checkpoints").glob("*.pt")}

    def git_locks(self) -> list[Path]:
        return [lock for path in (self.origin, *self.paths) for lock in path.rglob("*.lock") if self.is_git(lock)]

    def is_git(self, path: Path) -> bool:
        return ".training-progress" not in path.parts

    def report(self) -> str:
        pushed = self.all_lines("pushed")
        attempts = sorted(int(attempt) for attempt, *_ in pushed)
        made = sum(len(line) > 1 for line in pushed)
        return (
            f"{len(self.paths)} clones: {made} commits, {len(pushed) - made} with nothing new, attempts "
            f"{sum(attempts)}, at most {max(attempts)}"
        )


@contextmanager
def ended(processes: dict[int, int]) -> Iterator[None]:
    """End what was started, with the git commands that it runs, whatever happens."""
    try:
        yield
    finally:
        for pid in processes.values():
            kill(pid)


def kill(pid: int, *, alone: bool = False) -> int:
    """End a process with all of its group, at whatever it is; `alone`, its git command goes on."""
    try:
        (os.kill if alone else os.killpg)(pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(pid, signal.SIGKILL)  # it has not made its group yet
    return end_of(pid)


def run_to_the_end(clones: Clones) -> None:
    running = {number: clones.start(number) for number in range(len(clones.paths))}
    with ended(running):
        for number in list(running):
            status = end_of(running.pop(number))
            assert status == 0, number


# --- without kills -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "rounds"), [(4, 2), pytest.param(10, 5, marks=[pytest.mark.campaign, pytest.mark.timeout(600)])]
)
def test_clones_that_commit_at_once_lose_nothing(tmp_path, capsys, number, rounds):
    clones, began = Clones(tmp_path, number, rounds), time.monotonic()
    run_to_the_end(clones)
    clones.check()
    assert clones.git_locks() == []
    assert len(clones.all_lines("pushed")) == number * rounds
    with capsys.disabled():
        print(f"\n{clones.report()}, {time.monotonic() - began:.0f} s")


# --- with kills ----------------------------------------------------------------------------------


def kill_some(clones: Clones, kills: int, draw: random.Random) -> dict[int, int]:
    """Start all, kill jobs while they commit, and start each one again; returns those that run at the end."""
    running = {number: clones.start(number) for number in range(len(clones.paths))}
    try:
        while kills:
            number = draw.choice(list(running))
            if len(clones.lines(number, "committing")) > len(clones.lines(number, "pushed")) + deaths(clones, number):
                time.sleep(draw.uniform(0, 0.9))
                if not clones.lines(number, "done"):
                    kills -= 1
                    clones.note(number, "killed")
                    assert kill(running.pop(number), alone=draw.random() < 0.25) in (-signal.SIGKILL, 0)
                    running[number] = clones.start(number)
            if all(clones.lines(number, "done") for number in running):
                break
            time.sleep(0.02)
    except BaseException:
        with ended(running):
            raise
    return running


def deaths(clones: Clones, number: int) -> int:
    """How many commits were begun and never ended, because of a kill."""
    open_commits = count = 0
    for words in (clones.notes / str(number)).read_text().splitlines():
        if words == "committing":
            open_commits += 1
        elif words.startswith("pushed"):
            open_commits -= 1
        elif words == "killed" and open_commits:
            count, open_commits = count + 1, 0
    return count


@pytest.mark.campaign
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [11])
def test_clones_that_are_killed_while_they_commit_lose_nothing_that_was_saved(tmp_path, capsys, seed):
    clones, began, draw = Clones(tmp_path, 10, 5), time.monotonic(), random.Random(seed)
    running = kill_some(clones, 40, draw)
    with ended(running):
        for number in list(running):
            assert end_of(running.pop(number)) == 0, clones.all_lines("failed")
    clones.check()
    kills, hit = len(clones.all_lines("killed")), sum(deaths(clones, n) for n in range(10))
    with capsys.disabled():
        print(f"\n{clones.report()}, {kills} kills, {hit} of them in a commit, {time.monotonic() - began:.0f} s")
        print("locks that killed gits have left:", [str(lock.relative_to(tmp_path)) for lock in clones.git_locks()])
    assert hit >= 20


LOCKS = ["index.lock", "HEAD.lock", "packed-refs.lock", "refs/heads/main.lock", "refs/remotes/origin/main.lock"]


@pytest.mark.parametrize("name", [*LOCKS, "refs/ckptcache/fetched/main.lock", "config.lock", "FETCH_HEAD.lock"])
def test_a_lock_that_a_killed_git_has_left_keeps_no_record_back(origin, tmp_path, name):
    clone, other = repos.clone(origin, tmp_path / "clone"), repos.clone(origin, tmp_path / "other")
    ids = set(repos.train(other).ids)
    commit(repos.folder(other))
    repos.git(clone, "config", "core.packedRefsTimeout", "20")
    lock = clone / ".git" / name
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    for _ in range(2):
        restore(repos.folder(clone), repos.RUN)
        ids |= set(repos.train(clone).ids)
        commit(repos.folder(clone))
        assert repos.committed(origin).checkpoints.keys() == ids
    lock.unlink()
    assert commit(repos.folder(clone)).commit is None
    assert repos.git(clone, "rev-parse", "HEAD") == repos.git(origin, "rev-parse", "main")
    assert repos.git(clone, "status", "--short") == ""


def test_who_was_killed_right_after_the_push_is_brought_up_to_date(origin, tmp_path):
    clone = repos.clone(origin, tmp_path / "clone")
    before = repos.git(clone, "rev-parse", "HEAD")
    repos.train(clone)
    commit(repos.folder(clone))
    repos.git(clone, "update-ref", "HEAD", before)
    repos.git(clone, "read-tree", before)
    assert "train" in repos.git(clone, "ls-files")
    assert repos.git(clone, "status", "--short") != ""
    assert commit(repos.folder(clone)).commit is None
    assert repos.git(clone, "status", "--short") == ""
    assert repos.git(clone, "rev-parse", "HEAD") == repos.git(origin, "rev-parse", "main")


# --- that these tests can fail ------------------------------------------------------------------------


def keep_ours(change: Change, ours: Record, base: Index, theirs: Record) -> list[str]:
    """A merge that takes up nothing."""
    return []


def theirs_as_base(base: Index, ours: Record, theirs: Record, **known: object) -> Index:
    """A base after which whatever is not here was removed here."""
    return theirs.index


def push_with_force(self: Repository, remote: str, commit: str, branch: str) -> None:
    """A push that no other is in the way of."""
    try:
        repos.git(self.root, "push", "-q", "--force", remote, f"{commit}:refs/heads/{branch}")
    except AssertionError as error:
        raise Outrun(str(error)) from error


VARIANTS: dict[str, tuple[object, str, object]] = {
    "ours": (committing, "take_up", keep_ours),
    "theirs as base": (restoring, "told_apart", theirs_as_base),
    "force": (Repository, "push", push_with_force),
}


@pytest.mark.parametrize(
    "variant", ["ours", *(pytest.param(name, marks=pytest.mark.campaign) for name in ("theirs as base", "force"))]
)
def test_what_loses_records_is_found_out(tmp_path, monkeypatch, variant):
    monkeypatch.setattr(*VARIANTS[variant])
    number, rounds = (4, 3) if variant == "force" else (2, 1)
    clones = Clones(tmp_path, number, rounds)
    run_to_the_end(clones)
    with pytest.raises(AssertionError, match=r"has lost a|was pushed over"):
        clones.check()
