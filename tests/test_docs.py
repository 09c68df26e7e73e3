import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults import wait_until

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import generate_docs  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SKIP = "<!-- skip -->"


def python_blocks(page: str) -> str:
    """The Python of a page, each line where it stands there, so that a traceback names the page's line."""
    kept, inside, before = [], None, ""
    for line in page.splitlines():
        fence = re.match(r"```(\w*)", line)
        if fence and inside is None:
            inside = "python" if fence[1] == "python" and before != SKIP else "other"
            kept.append("")
        elif fence:
            inside = None
            kept.append("")
        else:
            kept.append(line if inside == "python" else "")
        before = line.strip() or before
    return "\n".join(kept)


def run_page(page: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "page.py").write_text(python_blocks(page), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "page.py"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_on_the_page_runs(page, tmp_path):
    text = page.read_text(encoding="utf-8")
    if not python_blocks(text).strip():
        return
    done = run_page(text, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_block_that_fails_is_told_with_its_line(tmp_path):
    done = run_page("# Page\n\n```python\nx = 1\n```\n\nSo:\n\n```python\nassert x == 2\n```\n", tmp_path)
    assert done.returncode == 1
    assert "line 10" in done.stderr


def test_blocks_share_a_namespace_and_skipped_or_other_ones_do_not_run(tmp_path):
    page = f"```python\nx = 1\n```\n{SKIP}\n\n```python\nx = 2\n```\n```sh\nx = 3\n```\n```python\nassert x == 1\n```\n"
    done = run_page(page, tmp_path)
    assert done.returncode == 0, done.stderr


def test_generated_pages_are_up_to_date():
    command = [sys.executable, "scripts/generate_docs.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_page_that_is_old_or_not_there_is_out_of_date(tmp_path):
    (tmp_path / "old.md").write_text("before\n")
    (tmp_path / "same.md").write_text("same\n")
    made = {"old.md": "now\n", "same.md": "same\n", "new.md": "new\n"}
    assert generate_docs.out_of_date(made, tmp_path) == ["old.md", "new.md"]


def test_errors_are_listed_with_code_and_message_below_their_section():
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    settings, folder = page.index("## Settings and arguments"), page.index("## The folder")
    row = "| `AmbiguousId` | 2 | {prefix!r} fits {count} checkpoints ({examples}): give more of the id. |"
    assert settings < page.index(row) < folder


def test_the_command_line_is_listed_with_every_command():
    click = pytest.importorskip("click")

    @click.group(help="All of it.")
    def main() -> None: ...

    @main.group(help="Inner ones.")
    def names() -> None: ...

    @names.command("set", help="Set one.")
    def set_() -> None: ...

    @main.command(hidden=True)
    def secret() -> None: ...

    page = generate_docs.cli_page(main)
    assert re.findall(r"^## (.*)$", page, re.M) == ["ckptcache", "ckptcache names", "ckptcache names set"]
    assert "Set one." in page
    assert "secret" not in page


# --- the batch script ----------------------------------------------------------------------------

TRAINING = """
import sys, time, torch
from torch import nn
from ckptcache import TrainingCache, TrainingSession

model = nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with TrainingSession(TrainingCache("runs/cache"), model=model, optimizer=optimizer, resume="auto") as session:
    for step in session.steps(int(sys.argv[1]) if sys.argv[1:] else 40):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        time.sleep(0.1)
        with open("step", "w") as file:
            file.write(str(step))
"""


def bash_block(page: str) -> str:
    return re.search(r"```bash\n(.*?)```", page, re.S)[1]


def submit(folder: Path, seconds: str, training: str = TRAINING) -> subprocess.Popen[str]:
    """Run the script of the page as a scheduler would; `srun` runs a command, `scontrol` keeps what it is told."""
    script = bash_block((ROOT / "docs" / "slurm.md").read_text(encoding="utf-8"))
    (folder / "job.sh").write_text(script.replace("=14000", f"={seconds}"))
    (folder / "train.py").write_text(training)
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name, text in {
        "srun": 'echo $$ > srun.pid; exec "$@"',
        "scontrol": 'echo "$@" >> scontrol.log',
        "python3": f'exec {sys.executable} "$@"',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    return subprocess.Popen(
        ["bash", "job.sh"], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def summary_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs/cache/training_summary.json").read_text())


def test_the_batch_script_requeues_what_ran_out_of_time_and_was_signalled_and_ends_once_it_is_done(tmp_path):
    job = submit(tmp_path, "2")
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output
    first = summary_in(tmp_path)
    assert first["stop_reason"] == "max_seconds", output
    assert 0 < first["end_iteration"] < 40

    job = submit(tmp_path, "600")
    wait_until(lambda: int((tmp_path / "step").read_text() or 0) > first["end_iteration"])
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGTERM)
    output, _ = job.communicate(timeout=120)
    second = summary_in(tmp_path)
    assert second["stop_reason"] == "signal", output
    assert second["start_iteration"] == first["end_iteration"]

    job = submit(tmp_path, "600")
    output, _ = job.communicate(timeout=120)
    assert (job.returncode, summary_in(tmp_path)["stop_reason"]) == (0, "finished"), output
    assert summary_in(tmp_path)["start_iteration"] == second["end_iteration"]
    assert (tmp_path / "scontrol.log").read_text() == "requeue 17\n" * 2


def test_the_batch_script_does_not_requeue_what_fails_before_its_session(tmp_path):
    job = submit(tmp_path, "2")
    output, _ = job.communicate(timeout=120)
    assert summary_in(tmp_path)["stop_reason"] == "max_seconds", output
    job = submit(tmp_path, "2", training="raise ImportError('no such module')")
    output, _ = job.communicate(timeout=120)
    assert (job.returncode, (tmp_path / "scontrol.log").read_text()) == (1, "requeue 17\n"), output
