"""What the action asks of its inputs and of the machine before it trains."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.workflows.acting import ROOT

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
