"""Children of a process that is killed: they inherit neither its lock, nor its lease, nor its writer."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from ckptcache import TrainingCache
from ckptcache.storage import fs
from tests.caches import save, temporary_files, tiny
from tests.campaigns import variants
from tests.campaigns.stages import Stage, opened
from tests.faults import CountingSystem, KillingSystem, end_of, run_child, start_child, wait_for

CAMPAIGN = "forks"


@contextmanager
def leash() -> Iterator[tuple[int, int]]:
    """A pipe that ends those who wait for it to be closed, however this process ends."""
    read, write = os.pipe()
    try:
        yield read, write
    finally:
        os.close(read)
        os.close(write)


class ForkingSystem(KillingSystem):
    """Is killed right before an operation, and leaves a child that lives until the leash is let go."""

    def __init__(self, at: int, leash: tuple[int, int]) -> None:
        super().__init__(at)
        self.leash = leash

    def before(self, number: int, operation: str, arguments: tuple[Any, ...]) -> None:
        read, write = self.leash
        if number == self.at and os.fork() == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
        super().before(number, operation, arguments)


def save_at_once(folder: Path, seconds: int) -> None:
    """A new process opens, cleans up and saves, or is ended."""

    def body() -> None:
        signal.alarm(seconds)
        with opened(folder) as cache:
            record = save(cache, 0.01, 50)
            assert cache.load(record.id)["w"].tolist() == tiny(0.01)["w"].tolist()
            assert cache.ledger.live_sessions(cache.ledger.view().index) == set()

    assert run_child(body) == 0, "somebody waits for what a child has kept"
    assert temporary_files(folder) == []


def forked_everywhere(
    stage: Stage, variant: variants.Variant = nullcontext, *, every: int = 1, seconds: int = 20
) -> int:
    """At each of the operations kill the process and leave a child of it; returns how many."""
    points = range(0, len(stage.operations()), every)
    for at in points:
        stage.lay_out()
        with leash() as ends, variant():

            def parent(at: int = at, ends: tuple[int, int] = ends) -> None:
                fs.system = ForkingSystem(at, ends)
                with opened(stage.folder) as cache:
                    cache.ledger.hold("sess_parent")
                    stage.act(cache)

            status = run_child(parent)
            if status != -signal.SIGKILL:  # no AssertionError, which of a broken variant would count as found out
                raise ChildProcessError(f"it ended with {status} and was not killed at operation {at}")
            save_at_once(stage.folder, seconds)
    return len(points)


@pytest.mark.parametrize("scenario", ["a save that evicts", "a save in the background"])
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.campaign)])
def test_a_new_process_saves_at_once_though_a_child_of_one_that_was_killed_lives(quick_path, counted, scenario, every):
    counted(CAMPAIGN, "parents killed", forked_everywhere(Stage(quick_path, scenario), every=every))


def test_forks_show_a_lock_that_is_inherited(quick_path, counted):
    stage = Stage(quick_path, "a save that evicts")
    with pytest.raises(AssertionError, match="somebody waits for what a child has kept"):
        forked_everywhere(stage, variants.with_a_lock_that_children_keep, seconds=2)
    counted.caught(CAMPAIGN, variants.name_of(variants.with_a_lock_that_children_keep))


class PausingSystem(CountingSystem):
    """Waits before it syncs the first file that it made until it is told to go on."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def before(self, number: int, operation: str, arguments: tuple[Any, ...]) -> None:
        if operation == "fsync" and "create" in self.operations and not (self.folder / "waiting").exists():
            (self.folder / "waiting").touch()
            wait_for(self.folder / "go")


def save_as_an_orphan(folder: Path, variant: variants.Variant = nullcontext) -> None:
    """A child saves; its parent is killed meanwhile, and somebody else tidies up: the child's save is its own."""

    def child() -> None:
        fs.system = PausingSystem(folder)
        try:
            with variant():
                save(cache, 0.5, 2)
        finally:
            (folder / "ended").touch()

    def parent() -> None:
        save(cache, 1.0)
        start_child(child)
        wait_for(folder / "waiting")
        os.kill(os.getpid(), signal.SIGKILL)

    cache = TrainingCache(folder / "c")
    assert end_of(start_child(parent)) == -signal.SIGKILL
    save(TrainingCache(folder / "c"), 2.0)
    (folder / "go").touch()
    wait_for(folder / "ended")
    assert {r.val_loss for r in TrainingCache(folder / "c").checkpoints()} == {0.5, 1.0, 2.0}


def test_a_child_writes_in_its_own_name_and_nobody_takes_its_file_for_its_parents(quick_path, counted):
    save_as_an_orphan(quick_path)
    counted(CAMPAIGN, "orphans that saved", 1)


def test_forks_show_a_writer_that_is_inherited(quick_path, counted):
    with pytest.raises(AssertionError):
        save_as_an_orphan(quick_path, variants.with_a_writer_that_children_keep)
    counted.caught(CAMPAIGN, variants.name_of(variants.with_a_writer_that_children_keep))
