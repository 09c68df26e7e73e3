"""What the action asks of its inputs and of the machine before it trains."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.conftest import requires
from tests.workflows.acting import ROOT, git
from tests.workflows.test_lint import scripts_in

ACTION = ROOT / ".github/actions/cached-training"


def helper(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """How a script of the action ends, with nothing but the standard library to stand on."""
    command = [sys.executable, "-S", str(ACTION / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "command",
    [
        "python3 train.py",
        "python3 train.py >train.log 2>&1",
        "python3 -c 'import train; train.go() or 1 | 2'",
        'python3 train.py --note "a && b; c"',
        'python3 train.py --seed "$(cat seed | head -1)"',
        "python3 train.py lr=0.1 --ratio=1e-3",
    ],
)
def test_one_command_is_taken_as_one(command: str) -> None:
    done = helper("one_command.py", command)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("pip install x && python3 train.py", "there is a && in it"),
        ("python3 train.py || true", "there is a || in it"),
        ("python3 train.py | tee log", "there is a | in it"),
        ("cd model; python3 train.py", "there is a ; in it"),
        ("python3 train.py &", "there is a & in it"),
        ("python3 train.py --seed $(cat seed)&&python3 again.py", "there is a && in it"),
        ("OMP_NUM_THREADS=1 python3 train.py", "OMP_NUM_THREADS is assigned before it"),
        ("python3 'train.py", "No closing quotation"),
        (" ", "there is none"),
    ],
)
def test_what_is_more_than_one_command_is_refused(command: str, said: str) -> None:
    done = helper("one_command.py", command)
    assert done.returncode == 1
    assert said in done.stderr


def test_what_is_installed_already_is_not_pinned_to_another_version(tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("# tested\nTyping_Extensions==0.0.1\npytest==0.0.1\nnot-there-at-all==1.0\n")
    done = subprocess.run(
        [sys.executable, str(ACTION / "pins.py"), str(constraints)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["not-there-at-all==1.0"]


# --- the machine ---------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    requires("git")
    folder = tmp_path / "clone"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    git(folder, "commit", "-q", "--allow-empty", "-m", "Begin")
    return folder


def prepare(folder: Path, **inputs: str) -> subprocess.CompletedProcess[str]:
    """The action's first step, run in `folder`, as far as it goes where ckptcache is there already."""
    first = next(script for script in scripts_in((ACTION / "action.yml").read_text()) if "fail()" in script)
    given = {"RUN": "my-model", "COMMAND": "true", "MAX_MINUTES": "", "PROGRESS_DIR": ".training-progress"}
    given |= {"COMMIT": "true", "BRANCH": "", "CACHE": "true", "PYTHON": sys.executable, **inputs}
    given |= {"GITHUB_ACTION_PATH": str(ACTION), "GITHUB_OUTPUT": str(folder.parent / "output")}
    given |= {"PYTHONPATH": str(ROOT), "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    return subprocess.run(
        ["bash", "-eo", "pipefail", "-c", textwrap.dedent(first.partition("\n")[2])],
        cwd=folder, env={**os.environ, **given}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_clone_with_a_branch_will_do(clone: Path) -> None:
    done = prepare(clone)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert f"cache-dir={clone}/.training-progress/my-model/cache\n" in (clone.parent / "output").read_text()


def test_a_commit_without_a_branch_is_refused_before_the_training(clone: Path) -> None:
    git(clone, "checkout", "-q", "--detach")
    assert "branch must be given" in prepare(clone).stdout
    assert prepare(clone, BRANCH="main").returncode == 0
    assert prepare(clone, COMMIT="false").returncode == 0


def test_a_folder_that_git_knows_nothing_of_is_refused_before_the_training(tmp_path: Path) -> None:
    requires("git")
    (tmp_path / "bare").mkdir()
    done = prepare(tmp_path / "bare")
    assert done.returncode == 2
    assert "working-directory must be in a clone" in done.stdout
    assert "not a git repository" in done.stderr


@pytest.mark.parametrize(
    ("version", "is_enough"), [("2.25.1", False), ("2.30.9", False), ("2.31.0", True), ("3.0", True)]
)
def test_an_old_git_is_refused_before_the_training(clone: Path, version: str, is_enough: bool) -> None:
    programs = clone.parent / "programs"
    programs.mkdir()
    (programs / "git").write_text(f'#!/bin/sh\n[ "$1" != version ] || echo "git version {version}"\n')
    (programs / "git").chmod(0o755)
    done = prepare(clone, PATH=f"{programs}:{os.environ['PATH']}")
    assert ("git must be 2.31 or newer" in done.stdout) != is_enough
    assert (done.returncode == 0) == is_enough
