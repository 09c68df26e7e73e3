"""A process under strace: killed at its system calls themselves, all of which are to have come by `fs.System`."""

import json
import os
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.campaigns import variants
from tests.campaigns.stages import Stage, opened
from tests.faults import CountingSystem, end_of, ended, start_child, swapped

CAMPAIGN = "system calls"
KINDS = {
    "write": ("write", "pwrite64", "writev", "pwritev", "pwritev2"),
    "sync": ("fsync", "fdatasync", "sync_file_range"),
    "rename": ("rename", "renameat", "renameat2"),
    "link": ("link", "linkat", "symlink", "symlinkat"),
    "unlink": ("unlink", "unlinkat", "rmdir"),
    "mkdir": ("mkdir", "mkdirat"),
    "resize": ("fallocate", "ftruncate", "truncate"),
    "open": ("openat", "open", "creat"),
}
"""Every call that can change a file, by what `fs.System` calls it."""
OURS = {
    "fsync": "sync",
    "fsync_folder": "sync",
    "replace": "rename",
    "reserve": "resize",
    "create": "open",
    "overwrite": "open",
}
CALLS = tuple(call for calls in KINDS.values() for call in calls)
_FOR_WRITING = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|\bcreat\(")


@pytest.fixture
def tracing(requires: Callable[..., None]) -> None:
    requires("strace")
    tried = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, check=False)
    requires("to trace processes", found=tried.returncode == 0)


@contextmanager
def traced(body: Callable[[], object], report: Path, *options: str) -> Iterator[int]:
    """A forked child that begins with `body` once strace is attached to it; gives its process id."""
    read, write = os.pipe()

    def child() -> None:
        os.close(write)
        os.read(read, 1)
        body()

    pid = start_child(child)
    os.close(read)
    command = ["strace", "-f", "-y", "-s", "0", "-o", str(report), *options, "-p", str(pid)]
    running = [pid]
    with ended(running), subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        said = tracer.stderr.readline()
        assert "attached" in said
        os.close(write)
        yield pid
        running.remove(pid)
        tracer.communicate(timeout=30)


def act(stage: Stage) -> None:
    with opened(stage.folder) as cache:
        stage.act(cache)


def calls_in(report: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """The calls that are to change `folder`, by name with their line."""
    for line in report.read_text().splitlines():
        found = re.match(r"\d+\s+(\w+)\(", line)
        if found and str(folder) in line and (found[1] not in KINDS["open"] or _FOR_WRITING.search(line)):
            yield found[1], line


# --- killed --------------------------------------------------------------------------------------


def killed_at(stage: Stage, report: Path, call: str, number: int) -> bool:
    """Let the act be killed at this call of this name; whether it made so many."""
    stage.lay_out()
    inject = f"inject={call}:signal=KILL:when={number}"
    with traced(lambda: act(stage), report, "-e", f"trace={call}", "-e", inject) as pid:
        status = end_of(pid)
    assert status in (0, -signal.SIGKILL)
    return status == -signal.SIGKILL


def points_of(stage: Stage, report: Path) -> list[tuple[str, int]]:
    """Every call with its number, which strace counts for each thread by itself."""
    stage.lay_out()
    with traced(lambda: act(stage), report, "-e", f"trace={','.join(CALLS)}") as pid:
        assert end_of(pid) == 0
    counts = Counter(re.findall(r"^(\d+)\s+(\w+)\(", report.read_text(), re.MULTILINE))
    return sorted({(call, number + 1) for (_, call), count in counts.items() for number in range(count)})


@pytest.mark.parametrize("scenario", ["a save that evicts", "a save in the background"])
@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.campaign)])
@pytest.mark.timeout(600)
def test_nothing_acknowledged_is_lost_by_a_kill_at_any_system_call(quick_path, counted, tracing, scenario, every):
    stage, report = Stage(quick_path, scenario), quick_path / "report"
    points = points_of(stage, report)[::every]
    assert len(points) * every > 40
    for call, number in points:
        assert killed_at(stage, report, call, number), f"{call} was not called {number} times"
        stage.check()
    counted(CAMPAIGN, "processes killed", len(points))


# --- compared ------------------------------------------------------------------------------------


class RecordingSystem(CountingSystem):
    """Keeps the first argument of each operation too: a path, or a descriptor."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, str]] = []

    def before(self, number: int, operation: str, arguments: tuple[Any, ...]) -> None:
        self.made.append((operation, str(arguments[0])))


def through_the_system(stage: Stage, report: Path, variant: variants.Variant = nullcontext) -> int:
    """Compare what the kernel saw with what went through `fs.System`; returns how many calls there were."""
    stage.lay_out()
    notes = stage.folder.parent / "notes.json"

    def body() -> None:
        with swapped(RecordingSystem()) as system, variant():
            act(stage)
        notes.write_text(json.dumps(system.made))

    with traced(body, report, "-e", f"trace={','.join(CALLS)}") as pid:
        assert end_of(pid) == 0
    seen = [(kind_of(call), line) for call, line in calls_in(report, stage.folder)]
    seen = [(kind, line) for kind, line in seen if not is_of_filelock(kind, line)]
    made = json.loads(notes.read_text())
    assert Counter(kind for kind, _ in seen) == Counter(OURS.get(o, "write" if "write" in o else o) for o, _ in made)
    for operation, path in made:
        assert operation not in ("create", "overwrite") or any(path in line for kind, line in seen if kind == "open")
    return len(seen)


def is_of_filelock(kind: str, line: str) -> bool:
    """It opens its locks itself, on which nobody relies to be whole, and makes sure of the folder before."""
    return (kind == "open" and ".lock" in line and "O_RDWR" in line) or (kind == "mkdir" and "EEXIST" in line)


def kind_of(call: str) -> str:
    return next(kind for kind, calls in KINDS.items() if call in calls)


@pytest.mark.parametrize("scenario", ["a save that evicts", "a save in the background", "a restore that quarantines"])
def test_whatever_is_changed_in_the_cache_is_changed_through_the_system(quick_path, counted, tracing, scenario):
    counted(CAMPAIGN, "calls compared", through_the_system(Stage(quick_path, scenario), quick_path / "report"))


def test_a_trace_shows_what_bypasses_the_system(quick_path, counted, tracing):
    with pytest.raises(AssertionError):
        through_the_system(
            Stage(quick_path, "a save that evicts"), quick_path / "report", variants.writing_past_the_system
        )
    counted.caught(CAMPAIGN, variants.name_of(variants.writing_past_the_system))
