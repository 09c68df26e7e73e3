"""The loops of docs/examples.md: before and after, killed and not, they train the same."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ckptcache import TrainingCache
from tests.faults import wait_until
from tests.jobs import differences

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "examples.md").read_text(encoding="utf-8"), re.S)
EXAMPLES = {block.splitlines()[0].split("# ")[1]: block.splitlines() for block in BLOCKS}
LAST = {"cnn.py": "epoch 9", "rnn.py": "step 149", "gan.py": "pictures"}
MIDDLE = {"cnn.py": "epoch 3", "rnn.py": "step 69", "gan.py": "epoch 2"}

pytestmark = pytest.mark.timeout(300)


def side(lines: list[str], kept: str) -> str:
    """The program before ("-") or after ("+")."""
    return "\n".join(line[1:] for line in lines if line[:1] in (" ", kept))


def run(folder: Path, name: str, kept: str) -> list[str]:
    done = start(folder, name, kept)
    output, errors = done.communicate(timeout=200)
    assert done.returncode == 0, errors
    return output.splitlines()


def start(folder: Path, name: str, kept: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(side(EXAMPLES[name], kept))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / "errors").open("w") as errors:
        return subprocess.Popen(
            [sys.executable, name], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )


def killed_in_the_middle(folder: Path, name: str) -> None:
    process = start(folder, name, "+")
    try:
        assert any(line.startswith(MIDDLE[name]) for line in process.stdout)
        cache = folder / "runs" / name.removesuffix(".py")
        wait_until(lambda: any((cache / "checkpoints").glob("*.json")))
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


def test_there_are_three():
    assert set(EXAMPLES) == set(LAST)


@pytest.mark.parametrize("name", LAST)
def test_under_eight_lines_are_changed(name):
    added, removed = ([line for line in EXAMPLES[name] if line.startswith(sign)] for sign in "+-")
    assert 0 < len(added) < 8
    assert len(removed) == 1
    compile(side(EXAMPLES[name], "-"), name, "exec")


@pytest.mark.parametrize("name", LAST)
def test_it_trains_the_same_with_and_without_and_goes_on_exactly_where_it_was_killed(name, tmp_path):
    whole = run(tmp_path / "before", name, "-")
    assert whole[-1].startswith(LAST[name])
    after = run(tmp_path / "after", name, "+")
    assert after == whole

    folder = tmp_path / "killed"
    killed_in_the_middle(folder, name)
    resumed = run(folder, name, "+")
    assert 0 < len(resumed) < len(whole), "it began in the middle"
    assert resumed == whole[-len(resumed) :]

    names = [tmp_path / run / "runs" / name.removesuffix(".py") for run in ("after", "killed")]
    one, other = (TrainingCache(folder) for folder in names)
    assert one.get("latest").iteration == other.get("latest").iteration
    # Python's and NumPy's generators differ: nothing in these programs seeds them, or draws from them.
    states = [{**state, "rng": state["rng"]["torch"]} for state in (one.load("latest"), other.load("latest"))]
    assert not list(differences(*states))
    assert [s.stop_reason for s in other.sessions()] == [None, "finished"]


@pytest.mark.parametrize("ending", ["raise ValueError('wrong')", "import sys; sys.exit(3)", "pass"])
def test_a_script_that_ends_without_close_ends_its_session_as_an_error(tmp_path, ending):
    script = f"""
import torch
from ckptcache import TrainingCache, TrainingSession
model = torch.nn.Linear(1, 1)
session = TrainingSession(TrainingCache("c"), model=model).start()
for step in session.steps(3):
    pass
{ending}
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert done.returncode == {"r": 1, "i": 3, "p": 0}[ending[0]]
    cache = TrainingCache(tmp_path / "c")
    [session] = cache.sessions()
    assert session.stop_reason == "error"
    assert cache.checkpoints() == []
    assert cache.doctor() == []
