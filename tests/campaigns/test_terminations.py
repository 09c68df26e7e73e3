"""SIGTERM at any moment of a save: it finishes or leaves no trace, and the training ends within the grace time."""

import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.caches import temporary_files
from tests.campaigns import variants
from tests.faults import ended, start_child
from tests.jobs import Job, as_python_would, cache_at

CAMPAIGN = "terminations"
GRACE = 10.0
"""Seconds that schedulers give at the least."""
SPAN = 0.08
"""Seconds over which the moments are spread from the start of a save, which takes a third of it; steps take nothing."""


def train(folder: Path, started: int, *, blocking: bool) -> None:
    """A training that saves after each step, and says when it begins to."""
    job = Job()

    def in_step(session, done: int) -> None:
        if done == 2:
            os.write(started, b".")
        if blocking:
            session.checkpoint(val_loss=1 / done)
        else:
            cache.save(job.objects(), iteration=done, val_loss=1 / done, blocking=False)

    with cache_at(folder, max_checkpoints=3) as cache:
        job.run(cache, 10**6, in_step=in_step)


def terminated(folder: Path, offset: float, *, blocking: bool, variant: variants.Variant = nullcontext) -> int:
    """Start it, send SIGTERM so many seconds after its first save began, and wait: its exit status."""
    read, write = os.pipe()

    def body() -> None:
        with variant():
            train(folder, write, blocking=blocking)

    pid = start_child(lambda: as_python_would(body))
    os.close(write)
    running = [pid]
    with ended(running):
        os.read(read, 1)
        os.close(read)
        time.sleep(offset)
        os.kill(pid, signal.SIGTERM)
        status = _end_within(pid, GRACE)
        running.remove(pid)
    return status


def _end_within(pid: int, seconds: float) -> int:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    raise AssertionError(f"it did not end within {seconds:g} seconds")


def check(folder: Path, status: int) -> None:
    """It said why it ended, saved where it ended, if it had not just done so, and the next training goes on there."""
    assert status == 143
    cache = cache_at(folder)
    assert temporary_files(folder) == []
    assert cache.doctor() == []
    assert os.listdir(folder / "sessions") == []
    session, latest = cache.sessions()[-1], cache.get("latest")
    assert session.stop_reason == "signal"
    assert latest.save_reason in ("signal", "improved")
    assert latest.iteration == session.end_iteration
    assert {path.stem for path in folder.glob("checkpoints/*.pt")} == {r.id for r in cache.checkpoints()}
    again = Job(seed=9).run(cache, latest.iteration + 1, resume="auto")
    assert again.resumed_from.id == latest.id


@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "background"])
@pytest.mark.parametrize("offsets", [6, pytest.param(100, marks=pytest.mark.campaign)])
@pytest.mark.timeout(600)
def test_a_training_that_is_told_to_end_during_a_save_ends_in_order(quick_path, counted, offsets, blocking):
    for number in range(offsets):
        folder = quick_path / str(number)
        check(folder, terminated(folder, SPAN * number / offsets, blocking=blocking))
    counted(CAMPAIGN, "moments of a blocking save" if blocking else "moments of a save in the background", offsets)


def test_a_termination_shows_a_handler_that_is_missing(quick_path, counted):
    with pytest.raises(AssertionError):
        check(quick_path / "c", terminated(quick_path / "c", 0.01, blocking=True, variant=variants.deaf_to_signals))
    counted.caught(CAMPAIGN, variants.name_of(variants.deaf_to_signals))
