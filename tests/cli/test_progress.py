import json
import os
import re
import subprocess
import sys

import pytest

from ckptcache.progress.commit import commit
from tests.cli.conftest import ROOT, ckptcache_cli, environment, process, terminal
from tests.progress import repos
from tests.progress.conftest import _plain_git, clone, origin  # noqa: F401 - fixtures
from tests.progress.repos import RUN, folder, run_of, train

pytestmark = pytest.mark.usefixtures("_plain_git")


@pytest.fixture
def here(clone, monkeypatch):  # noqa: F811
    """A clone, as the current folder."""
    monkeypatch.chdir(clone)
    return clone


def test_from_init_to_commit(here, origin, tmp_path):  # noqa: F811
    ckptcache_cli("progress", "init")
    trained = train(here)
    assert "2 checkpoints available and verified" in ckptcache_cli("progress", "restore", RUN).output
    assert RUN in ckptcache_cli("progress", "summarize").output
    shown = ckptcache_cli("progress", "commit", RUN).output
    assert "best 2.0000 (the first)" in shown
    assert "pushed to main of origin" in shown
    assert "nothing to commit" in ckptcache_cli("progress", "commit").output
    assert set(repos.committed(origin).checkpoints) == set(trained.ids)


def test_json_is_one_document_per_command(here):
    train(here)
    for command in (["init"], ["restore", RUN], ["summarize"], ["commit"], ["clean", "--max-records", "1"]):
        result = ckptcache_cli("progress", *command, "--json")
        assert isinstance(json.loads(result.stdout), dict)
    assert json.loads(ckptcache_cli("progress", "commit", "--json").stdout)["message"] is None
    assert json.loads(ckptcache_cli("progress", "restore", RUN, "--json").stdout)["available"]


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (["restore", "../x"], 2, "name of a run"),
        (["commit", "no-such"], 3, RUN),
        (["--progress-dir", "nowhere", "commit"], 3, "progress init"),
        (["commit", "--branch", "a..b"], 2, "branch"),
        (["clean"], 2, "--older-than"),
        (["clean", "--max-records", "-1"], 2, "-1"),
        (["merge-driver", "a", "b", "c"], 1, "could not be merged"),
    ],
)
def test_an_error_says_what_and_how_out_and_changes_nothing(here, command, code, said):
    train(here)
    before = repos.git(here, "status", "--porcelain")
    done = process("progress", *command, cwd=here)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert repos.git(here, "status", "--porcelain") == before


def test_an_empty_cache_is_no_failure(here):
    assert "0 checkpoints available" in ckptcache_cli("progress", "restore", RUN).output


def test_the_report_is_appended(here, tmp_path):
    report = tmp_path / "summary.md"
    report.write_text("before\n")
    train(here)
    commit(folder(here))
    path = next((run_of(here).cache_dir / "checkpoints").glob("*.pt"))
    path.write_bytes(path.read_bytes()[:-1])
    ckptcache_cli("progress", "restore", RUN, "--report", report)
    train(here, [1.0])
    ckptcache_cli("progress", "commit", RUN, "--report", report)
    text = report.read_text()
    assert text.startswith("before\n")
    assert re.search(rf"refused\*\* .*{path.stem[-4:]}", text)
    assert "best 1.0000" in text
    assert "```mermaid" in text
    assert "| " in text


def test_a_push_that_fails_is_in_the_report(here, origin, tmp_path):  # noqa: F811
    hook = origin / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    train(here)
    result = ckptcache_cli("progress", "commit", "--report", tmp_path / "s.md", rc=None)
    assert result.exit_code == 0 or result.exception is not None
    assert "not committed" in (tmp_path / "s.md").read_text()
    assert "bundle" in (tmp_path / "s.md").read_text()
    done = process("progress", "commit", cwd=here)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "hook declined" in done.stderr


def test_nothing_of_it_imports_torch(here):
    train(here)
    code = "import sys; from ckptcache.cli import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    for command in (["restore", RUN], ["summarize"], ["commit"]):
        done = subprocess.run(
            [sys.executable, "-c", code, "progress", *command],
            capture_output=True,
            text=True,
            check=True,
            env={**environment(), "PYTHONPATH": str(ROOT)},
            cwd=here,
        )
        assert done.stdout.splitlines()[-1] == "False", command


def test_a_terminal_sees_a_table_and_no_control_characters_of_others(here):
    train(here)
    code, shown = terminal(100, "progress", "--progress-dir", str(folder(here).root), "summarize")
    assert code == 0
    assert "sessions" in shown


def test_a_name_from_the_branch_is_not_sent_to_the_terminal(here, tmp_path):
    os.makedirs(folder(here).root / "evil\x1b[31mrun" / "cache")
    assert "\x1b[31m" not in ckptcache_cli("progress", "init").output
