"""`ckptcache prove`: what it prints, and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ckptcache.cache import TrainingCache
from ckptcache.proof import proving
from ckptcache.session import TrainingSession
from ckptcache.testing import _function_launcher
from tests.cli.conftest import ROOT, ckptcache_cli, environment, process, terminal
from tests.faults import wait_until
from tests.jobs import Job

TRAIN = """
import sys
iterations = int(sys.argv[1])
import torch
from ckptcache import TrainingCache, TrainingSession
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
optimizer = torch.optim.AdamW(model.parameters())
with TrainingSession(TrainingCache("runs/cache"), model=model, optimizer=optimizer) as session:
    for step in session.steps(iterations):
        loss = model(torch.ones(2, 4)).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        session.log(loss=loss)
        print("step", step, flush=True)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("train.py").write_text(TRAIN)
    yield tmp_path / "work"
    assert os.listdir(tmp_path / "temporary") == []
    assert os.listdir(tmp_path / "work") == ["train.py"]


def command(*arguments):
    return [sys.executable, "train.py", *map(str, arguments)]


def test_a_training_that_resumes_exactly_ends_with_0_and_a_terminal_is_told_which_run_is_made():
    code, shown = terminal(100, "prove", "--at", "3", "--", *command(5))
    assert code == 0
    assert "run 1 of 3: undisturbed run" in shown
    assert "identical: 5 iterations, killed at 3, resumed from " in shown
    assert "compared after each iteration: " in shown


def forgets(folder):
    job = Job()
    with TrainingSession(TrainingCache(Path(folder) / "cache"), model=job.model, loader=job.loader) as session:
        for step in session.steps(6):
            session.log(loss=job.train_step(step))


def test_a_difference_ends_with_1_and_is_in_the_json(folder, monkeypatch):
    # In a forked child: a command would import torch three times.
    monkeypatch.setattr(proving, "command_launcher", lambda command: _function_launcher(forgets, command, "fork"))
    done = ckptcache_cli("prove", "--at", "3", "--resume", "auto", "--json", "--", folder, rc=1)
    found = json.loads(done.stdout)
    assert found["verdict"] == "differs"
    assert found["resume"] == "auto"
    # Other tests of this process may have left optimizers behind, which are counted.
    first = re.compile(r"AdamW(-\d+)? \(not registered\)\.state\.0\.step")
    assert first.fullmatch(found["difference"]["first"])
    plain = ckptcache_cli("prove", "--at", "3", "--", folder, rc=1)
    assert re.match(rf"differs: {first.pattern}, at iteration ", plain.stdout)


def test_nothing_to_prove_ends_with_3():
    done = process("prove", "--", sys.executable, "-c", "pass")
    assert done.returncode == 3
    assert done.stderr.startswith("ckptcache: error: There is nothing to prove: ")


def test_a_command_that_fails_ends_with_1_and_shows_its_last_lines_once():
    done = process("prove", "--", *command("x"))
    assert done.returncode == 1
    assert done.stdout == ""
    *shown, last = done.stderr.splitlines()
    assert "  | ValueError: invalid literal for int() with base 10: 'x'" in shown
    assert last == (
        "ckptcache: error: The undisturbed run could not be made: it ended with 1. Correct that, and run it again."
    )


@pytest.mark.parametrize(
    "arguments", [[], ["--at", "x", "--", "true"], ["--kills", "0", "--", "true"], ["--resume", "best", "--", "true"]]
)
def test_wrong_usage_ends_with_2(arguments):
    assert ckptcache_cli("prove", *arguments, rc=2).stdout == ""


def test_an_iteration_that_is_not_there_ends_with_2(folder, monkeypatch):
    monkeypatch.setattr(proving, "command_launcher", lambda command: _function_launcher(forgets, command, "fork"))
    done = ckptcache_cli("prove", "--at", "9", "--", folder, rc=2)
    assert "--at cannot be 9: the session does the iterations 1 to 6" in done.stderr


def test_ctrl_c_ends_the_command_and_leaves_nothing(folder):
    arguments = [sys.executable, "-m", "ckptcache.cli", "prove", "--", *command(10**9)]
    child = subprocess.Popen(arguments, env=environment(), stderr=subprocess.PIPE, text=True)
    logs = folder.parent / "temporary"
    wait_until(lambda: any(path.stat().st_size for path in logs.rglob("1.log")), 60)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert said.strip().endswith("interrupted")


def test_it_does_not_need_torch_itself(folder):
    code = "import sys, ckptcache.proof.proving, ckptcache.testing, ckptcache.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
