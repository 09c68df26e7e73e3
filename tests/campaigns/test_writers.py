"""Many real processes in one cache: writers that lose nothing, readers that never see half a checkpoint."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ckptcache import TrainingCache
from tests.caches import ids, save, temporary_files, tiny
from tests.faults import end_of, start_child, wait_until

LIMIT = 8


class Writers:
    """Processes that save into one cache, and write down outside of it what was acknowledged."""

    def __init__(self, folder: Path, saves: int) -> None:
        self.cache_dir, self.acknowledged, self.saves = folder / "c", folder / "acknowledged", saves
        self.acknowledged.mkdir()

    def start(self, number: int) -> int:
        return start_child(lambda: self.write(number))

    def write(self, number: int) -> None:
        draw = random.Random(number)
        with self.opened() as cache, (self.acknowledged / f"{number}.txt").open("a") as notes:
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


@contextmanager
def ended(processes: list[int]) -> Iterator[None]:
    """End what was started, whatever happens."""
    try:
        yield
    finally:
        for pid in processes:
            os.kill(pid, signal.SIGKILL)
            end_of(pid)


# --- writers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processes", "saves"), [(4, 25), pytest.param(8, 200, marks=[pytest.mark.campaign, pytest.mark.timeout(1200)])]
)
def test_writers_of_many_processes_lose_nothing_and_keep_the_limits(tmp_path, processes, saves, capsys):
    writers, began = Writers(tmp_path, saves), time.perf_counter()
    started = [writers.start(number) for number in range(processes)]
    assert [end_of(pid) for pid in started] == [0] * processes
    with capsys.disabled():
        if processes == 8:
            print(f"\n{processes} processes x {saves} saves: {time.perf_counter() - began:.1f} s")
    assert writers.count() == processes * saves
    writers.check()


@pytest.mark.parametrize(
    ("processes", "total", "pause"),
    [(2, 40, 0.15), pytest.param(8, 1600, 1.0, marks=[pytest.mark.campaign, pytest.mark.timeout(1200)])],
)
def test_writers_that_are_killed_lose_nothing_that_was_acknowledged(tmp_path, processes, total, pause):
    writers, draw = Writers(tmp_path, 10**6), random.Random(1)
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


# --- readers -------------------------------------------------------------------------------------


def read(folder: Path, until: Path, opens: int) -> None:
    """Restore again and again, from a cache opened anew each time; never nothing, and never anything but one whole."""
    done = 0
    while not until.exists() and done < opens:
        target, cache = tiny(-1.0, 4000), TrainingCache(folder)
        assert cache.ledger.file.read() is not None, "an index is there, and whole"
        restored = cache.restore(target, resume=("best", "latest")[done % 2])
        assert restored is not None, "a cache that always holds one was empty to a reader"
        assert set(target["w"].tolist()) == {float(restored.record.iteration)}
        assert restored.notes == () or all("passed over" not in n or "gone" in n for n in restored.notes)
        done += 1
    assert done > 3


def write_on(folder: Path, saves: int, keep: int) -> None:
    draw = random.Random(5)
    with TrainingCache(folder, max_checkpoints=keep, keep_latest=0) as cache:
        for iteration in range(2, saves):
            save(cache, draw.uniform(0.1, 9.0), iteration, state=tiny(float(iteration), 4000))


def prune_on(folder: Path, saves: int) -> None:
    with TrainingCache(folder, max_checkpoints=10_000) as cache:
        for iteration in range(2, saves):
            save(cache, 100.0 / iteration, iteration, state=tiny(float(iteration), 4000))
            if iteration % 5 == 0:
                TrainingCache(folder, max_checkpoints=1, keep_latest=0).prune()


@pytest.mark.parametrize("churn", [lambda f, n: write_on(f, n, 1), lambda f, n: write_on(f, n, 3), prune_on])
@pytest.mark.parametrize(
    ("readers", "saves"), [(2, 60), pytest.param(4, 1000, marks=[pytest.mark.campaign, pytest.mark.timeout(1200)])]
)
def test_readers_never_see_half_a_checkpoint_and_never_an_empty_cache(
    tmp_path, readers, saves, churn: Callable[[Path, int], None]
):
    folder, done = tmp_path / "c", tmp_path / "done"
    with TrainingCache(folder) as first:
        save(first, 9.5, 1, state=tiny(1.0, 4000))
    running = [start_child(lambda: read(folder, done, 10_000)) for _ in range(readers)]
    with ended(running):
        churn(folder, saves)
        done.touch()
        statuses = [end_of(running.pop(0)) for _ in range(readers)]
    assert statuses == [0] * readers
    assert TrainingCache(folder).doctor() == []


def test_a_child_that_was_forked_keeps_neither_the_lock_nor_a_lease(tmp_path):
    ready, die = tmp_path / "ready", tmp_path / "die"

    def parent() -> None:
        cache = TrainingCache(tmp_path / "c")
        save(cache, 1.0)
        cache.ledger.hold("sess_parent")
        with cache.ledger.change():
            start_child(lambda: (ready.write_text(str(os.getpid())), wait_until(die.exists)))
            wait_until(ready.exists)
            os.kill(os.getpid(), signal.SIGKILL)

    assert end_of(start_child(parent)) == -signal.SIGKILL
    cache = TrainingCache(tmp_path / "c")
    began = time.perf_counter()
    save(cache, 2.0)
    assert time.perf_counter() - began < 10
    assert cache.ledger.live_sessions(cache.ledger.view().index) == set()
    assert not (tmp_path / "c" / "sessions" / "sess_parent.lock").exists()
    die.touch()
