"""Many real processes that save into one cache, and are killed: nothing that was acknowledged is lost."""

import os
import random
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from ckptcache import TrainingCache
from tests.caches import ids, save, temporary_files
from tests.campaigns import variants
from tests.faults import end_of, ended, start_child

CAMPAIGN = "writers"
LIMIT = 8


class Writers:
    """Processes that save into one cache, and write down outside of it what was acknowledged."""

    def __init__(self, folder: Path, saves: int, variant: variants.Variant = nullcontext) -> None:
        self.cache_dir, self.acknowledged, self.saves = folder / "c", folder / "acknowledged", saves
        self.variant = variant
        self.acknowledged.mkdir()

    def start(self, number: int) -> int:
        return start_child(lambda: self.write(number))

    def write(self, number: int) -> None:
        draw = random.Random(number)
        with self.variant(), self.opened() as cache, (self.acknowledged / f"{number}.txt").open("a") as notes:
            for iteration in range(self.saves):
                record = save(cache, draw.uniform(0.1, 9.0), iteration, parents=[f"writer-{number}"])
                notes.write(f"{record.id} {record.sequence}\n")
                notes.flush()

    def opened(self) -> TrainingCache:
        return TrainingCache(self.cache_dir, max_checkpoints=LIMIT, max_records=100_000)

    def count(self) -> int:
        return sum(len(path.read_text().splitlines()) for path in self.acknowledged.iterdir())

    def check(self, *, killed: bool = False) -> None:
        """Each acknowledged save is available or was evicted by a decision; limits are kept; nothing is left over."""
        if killed:
            with self.opened() as last:
                save(last, 9.9)
        cache = self.opened()
        records = {r.id: r for r in cache.checkpoints(everything=True)}
        available, acknowledged = set(ids(cache.checkpoints())), []
        for path in self.acknowledged.iterdir():
            own = [line.split() for line in path.read_text().splitlines() if line.count(" ") == 1]
            sequences = [int(sequence) for _, sequence in own]
            assert sequences == sorted(set(sequences)), "sequences rise within a process"
            acknowledged += [id for id, _ in own]
            assert all(records[id].sequence == int(sequence) for id, sequence in own)
        assert len(acknowledged) == len(set(acknowledged))
        lost = [id for id in acknowledged if id not in available and records[id].decision != "evicted"]
        assert lost == []
        sequences = [r.sequence for r in records.values()]
        assert len(sequences) == len(set(sequences))
        assert len(available) <= LIMIT
        best = min((r for r in records.values()), key=lambda r: r.val_loss)
        assert cache.best().id == best.id, "the best of all that was ever saved is there"
        for id in available:
            assert cache.load(id)["w"].tolist() == pytest.approx([records[id].val_loss] * 4)
        assert temporary_files(self.cache_dir) == []
        assert cache.doctor() == []
        assert os.listdir(self.cache_dir / "sessions") == []


@pytest.mark.parametrize(
    ("processes", "saves"), [(4, 25), pytest.param(8, 200, marks=[pytest.mark.campaign, pytest.mark.timeout(1200)])]
)
def test_writers_of_many_processes_lose_nothing_and_keep_the_limits(quick_path, counted, processes, saves):
    save_all(Writers(quick_path, saves), processes)
    counted(CAMPAIGN, "saves side by side", processes * saves)


def save_all(writers: Writers, processes: int) -> None:
    started = [writers.start(number) for number in range(processes)]
    assert [end_of(pid) for pid in started] == [0] * processes
    assert writers.count() == processes * writers.saves
    writers.check()


def test_writers_show_a_lock_that_is_missing(quick_path, counted):
    with pytest.raises((AssertionError, KeyError)):
        save_all(Writers(quick_path, 25, variants.without_the_lock), 4)
    counted.caught(CAMPAIGN, variants.name_of(variants.without_the_lock))


@pytest.mark.parametrize(
    ("processes", "total", "pause"),
    [(2, 40, 0.15), pytest.param(8, 1600, 1.0, marks=[pytest.mark.campaign, pytest.mark.timeout(1200)])],
)
def test_writers_that_are_killed_lose_nothing_that_was_acknowledged(quick_path, counted, processes, total, pause):
    writers, draw = Writers(quick_path, 10**6), random.Random(1)
    running, kills, number = [writers.start(n) for n in range(processes)], 0, processes
    with ended(running):
        while writers.count() < total or kills < 3:
            time.sleep(pause)
            victim = running.pop(draw.randrange(len(running)))
            os.kill(victim, signal.SIGKILL)
            assert end_of(victim) == -signal.SIGKILL
            kills += 1
            running.append(writers.start(number))
            number += 1
        for pid in running:
            os.kill(pid, signal.SIGKILL)
        for pid in list(running):
            end_of(pid)
            running.remove(pid)
    writers.check(killed=True)
    counted(CAMPAIGN, "processes killed", kills + processes)
    counted(CAMPAIGN, "saves acknowledged by them", writers.count())
