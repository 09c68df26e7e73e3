"""The action around the training of a project that holds nothing of ckptcache, as act runs it."""

import os
import re
import signal
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.faults import wait_until
from tests.workflows.acting import TOKEN, Github, git
from tests.workflows.foreign import RUN, WORKFLOW, block, changed, publish

pytestmark = pytest.mark.campaign
STEP = "        session.log(loss=loss)\n"


def sessions(github: Github) -> list[dict[str, Any]]:
    """The sessions of the record that was committed last, the oldest first."""
    found = [{**session, "id": id} for id, session in github.record(RUN)["sessions"].items()]
    return sorted(found, key=lambda s: s["sequence"])


def checkpoints_in(archive: Path) -> list[str]:
    with tarfile.open(archive) as tar:
        return [name for name in tar.getnames() if name.endswith(".pt")]


def newest_cache(github: Github) -> Path:
    return sorted((github.stand_ins / "cache").glob("*/files.tar"))[-1]


def test_the_example_of_the_page_goes_on_in_the_next_job(github: Github) -> None:
    publish(github)
    first, second = github.run(WORKFLOW), github.run(WORKFLOW)

    assert (first.code, second.code) == (0, 0), first.log + second.log
    one, two = sessions(github)
    assert (one["start_iteration"], one["end_iteration"], two["start_iteration"], two["end_iteration"]) == (
        0,
        20,
        20,
        40,
    )
    assert github.record(RUN)["checkpoints"][two["parent"]]["iteration"] == 20
    assert two["first_val_loss"] < one["first_val_loss"]
    assert github.summary(RUN)["end_iteration"] == 40
    assert len(github.subjects()) == 3
    assert github.caches() == [f"ckptcache-{RUN}-{1000 + i}-1-train" for i in (1, 2)]
    assert [*github.artifacts()] == [f"ckptcache-{RUN}-1-train"]
    assert "| iterations | 20 to 40 | 0 to 20 |" in github.job_summary("train")
    kept = git(github.origin, "ls-tree", "-r", "--name-only", "main").splitlines()
    assert not [path for path in kept if path.endswith((".pt", ".db", ".bundle"))]


def test_a_training_that_fails_leaves_its_record_and_its_files_and_fails_the_job(github: Github) -> None:
    failing = changed(block("python"), STEP, STEP + '        assert step < 15, "a mistake in the training"\n')
    publish(github, script=failing)
    ended = github.run(WORKFLOW)

    assert ended.code == 1
    assert ended.result_of("train") == "failed"
    (session,) = sessions(github)
    assert session["stop_reason"] == "error"
    assert [c["iteration"] for c in github.record(RUN)["checkpoints"].values()] == [10]
    assert len(checkpoints_in(newest_cache(github))) == 1
    assert [*github.artifacts()] == [f"ckptcache-{RUN}-1-train"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_cancellation_reaches_the_training_and_loses_nothing_that_is_saved(github: Github, number: int) -> None:
    slow = changed(block("python"), "session_iters=20", "")
    tell = '(Path(os.environ["STAND_INS"]) / "training").write_text(f"{os.getpid()} {os.getppid()}")'
    pause = f"        time.sleep(0.02)\n        if step == 12:\n            {tell}\n"
    publish(github, script="import os, time\nfrom pathlib import Path\n" + changed(slow, STEP, STEP + pause))
    with github.started(WORKFLOW) as act:
        told = github.stand_ins / "training"
        wait_until(lambda: told.exists() and len(told.read_text().split()) == 2, seconds=60)
        training, parent = map(int, told.read_text().split())
        # No shell is left between: who starts the step holds the training itself.
        assert parent == act.pid
        os.kill(training, number)
        act.wait(timeout=60)
    ended = github.ended(act)

    assert ended.result_of("train") == "failed"
    (session,) = sessions(github)
    iterations = {c["iteration"] for c in github.record(RUN)["checkpoints"].values()}
    assert session.get("stop_reason") == (None if number == signal.SIGKILL else "signal")
    # What was saved before; and with a signal that can be heard, where it stood.
    assert 10 in iterations
    assert (max(iterations) > 12) == (number != signal.SIGKILL)
    assert len(checkpoints_in(newest_cache(github))) == len(iterations)


def test_its_minutes_end_a_training_that_has_no_end_of_its_own(github: Github) -> None:
    endless = changed(block("python"), "session_iters=20", "")
    # A second for a minute.
    action = github.folder / "ckptcache/.github/actions/cached-training/action.yml"
    action.write_text(changed(action.read_text(), "MAX_MINUTES * 60", "MAX_MINUTES / 60"))
    publish(github, script=endless)
    ended = github.run(WORKFLOW)

    assert ended.code == 0, ended.log
    assert github.summary(RUN)["stop_reason"] == "max_seconds"


def test_the_training_is_given_its_folder_and_its_seconds_and_no_token(github: Github) -> None:
    show = "import os\nprint('seen:', sorted(os.environ.items()))\n"
    publish(github, script=show + block("python"))
    ended = github.run(WORKFLOW)

    assert ended.code == 0, ended.log
    seen = next(line for line in ended.log.splitlines() if "seen:" in line)
    assert "('CKPTCACHE_MAX_SECONDS', '3600')" in seen
    assert re.search(rf"\('CKPTCACHE_DIR', '/[^']*/\.training-progress/{RUN}/cache'\)", seen)
    assert TOKEN not in seen
    assert "GITHUB_TOKEN" not in seen
    # It is there all the same, for the steps that fetch and push.
    assert TOKEN not in git(github.origin, "log", "-p", "main")


def test_files_that_the_record_does_not_vouch_for_are_never_loaded(github: Github, tmp_path: Path) -> None:
    publish(github)
    github.run(WORKFLOW)
    archive = newest_cache(github)
    files = tmp_path / "files"
    with tarfile.open(archive) as tar:
        tar.extractall(files, filter="data")
    for path in files.rglob("*.pt"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with tarfile.open(archive, "w") as tar:
        for path in sorted(files.iterdir()):
            tar.add(path, path.name)
    ended = github.run(WORKFLOW)

    assert ended.code == 0, ended.log
    one, two = sessions(github)
    assert (two["start_iteration"], two["end_iteration"], two.get("parent")) == (0, 20, None)
    assert "refused" in github.job_summary("train")
    own = {id for id, c in github.record(RUN)["checkpoints"].items() if c["session"] == two["id"]}
    assert {Path(name).stem for name in checkpoints_in(newest_cache(github))} == own
    assert one["id"] in github.record(RUN)["sessions"]


def test_a_push_that_is_declined_fails_the_job_and_leaves_a_bundle(github: Github) -> None:
    publish(github)
    hook = github.origin / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\necho 'protected branch hook declined'\nexit 1\n")
    hook.chmod(0o755)
    ended = github.run(WORKFLOW)

    assert ended.result_of("train") == "failed"
    assert github.subjects() == ["Begin"]
    (bundle,) = github.artifacts()[f"ckptcache-{RUN}-1-train"].glob("unpushed-*.bundle")
    clone = github.folder / "clone-by-hand"
    git(github.folder, "clone", "-q", str(github.origin), str(clone))
    # As docs/github-actions.md has it.
    git(clone, "fetch", "-q", str(bundle), "refs/ckptcache/unpushed")
    git(clone, "merge", "-q", "FETCH_HEAD")
    assert (clone / f".training-progress/{RUN}/cache/metadata.json").exists()
    assert len(github.caches()) == 1


def test_without_a_commit_it_only_reports(github: Github) -> None:
    publish(github, inputs='commit: "false"')
    ended = github.run(WORKFLOW)
    assert ended.code == 0, ended.log
    assert github.subjects() == ["Begin"]
    assert RUN in github.job_summary("train")
    assert len(github.caches()) == 1


def test_ckptcache_is_installed_from_the_actions_own_commit_where_it_is_missing(github: Github) -> None:
    publish(github, inputs="python: ./lacking")
    with (github.folder / "ckptcache/constraints.txt").open("a") as constraints:
        constraints.write("not-installed-anywhere==1.0\n")
    lacking = github.folder / "project" / "lacking"
    lacking.write_text(
        '#!/bin/bash\ncase "$*" in\n'
        '  *"-m pip install"*) printf "%s\\n" "$@" >"$STAND_INS/pip"\n'
        '    cp "$RUNNER_TEMP/ckptcache-constraints.txt" "$STAND_INS/pins" ;;\n'
        '  *find_spec*) [ -e "$STAND_INS/pip" ] ;;\n'
        '  *) exec python3 "$@" ;;\nesac\n'
    )
    lacking.chmod(0o755)
    project = github.folder / "project"
    git(project, "add", "-A")
    git(project, "commit", "-q", "-m", "Lack it")
    git(project, "push", "-q", str(github.origin), "main")
    ended = github.run(WORKFLOW)

    assert ended.code == 0, ended.log
    *_, flag, _pins, package = (github.stand_ins / "pip").read_text().splitlines()
    source = package.removesuffix("[plots]")
    # What is installed already stays as it is.
    assert flag == "-c"
    pinned = (github.stand_ins / "pins").read_text()
    assert "not-installed-anywhere==1.0" in pinned
    assert "pytest==" not in pinned
    assert re.search(r"/act/actions/OWNER-ckptcache[\w.-]*@COMMIT$", source)  # and not the project that trains


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("run: my-model", "run: ../elsewhere", "run must be a name"),
        ("command: python3 train.py", 'command: "python3 train.py\\npython3 again.py"', "command must be one command"),
        ('max-minutes: "60"', "max-minutes: soon", "max-minutes must be a whole number"),
        ('max-minutes: "60"', "progress-dir: /root", "progress-dir must be a folder in the repository"),
        ('max-minutes: "60"', 'commit: "yes"', "commit and cache must be true or false"),
        ("command: python3 train.py", "command: true && python3 train.py", "one command, and there is a && in it"),
        ('max-minutes: "60"', "python: ./no-such-python", "python must be 3.11 or newer"),
    ],
)
def test_inputs_that_do_not_work_are_refused_before_anything_is_done(
    github: Github, monkeypatch: pytest.MonkeyPatch, old: str, new: str, sentence: str
) -> None:
    monkeypatch.setattr("tests.workflows.foreign.DOCS", changed(block_page(), old, new))
    publish(github)
    ended = github.run(WORKFLOW)
    assert ended.result_of("train") == "failed"
    assert sentence in ended.log
    assert (github.caches(), github.artifacts()) == ([], {})


def block_page() -> str:
    """The page's two blocks."""
    return f"```python\n{block('python')}```\n```yaml\n{block('yaml')}```\n"
