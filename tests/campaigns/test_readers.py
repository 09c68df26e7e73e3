"""Processes that read while others save, evict and prune: never half a checkpoint, never an empty cache."""

import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from ckptcache import TrainingCache
from tests.caches import save, tiny
from tests.campaigns import variants
from tests.faults import end_of, ended, start_child

CAMPAIGN = "readers"
RECORDS = 40
"""Of what was evicted few are kept, since reading them takes longer than all else."""


class Readers:
    """Processes that read one cache for as long as others change it, and count how often."""

    def __init__(self, folder: Path, variant: variants.Variant = nullcontext) -> None:
        self.folder, self.done, self.count = folder / "c", folder / "done", folder / "opens"
        self.variant = variant
        self.count.touch()
        with TrainingCache(self.folder) as first:
            save(first, 9.5, 1, state=tiny(1.0, 4000))

    def opens(self) -> int:
        return self.count.stat().st_size

    def read(self) -> None:
        with self.variant(), self.count.open("ab", buffering=0) as count:
            number = 0
            while not self.done.exists():
                self.read_once(("best", "latest")[number % 2])
                count.write(b".")
                number += 1
        assert number > 3

    def read_once(self, resume: str) -> None:
        """Restore from a cache opened anew; never nothing, and never anything but one whole."""
        target, cache = tiny(-1.0, 4000), TrainingCache(self.folder)
        assert cache.ledger.file.read() is not None, "an index is there, and whole"
        restored = cache.restore(target, resume=resume)
        assert restored is not None, "a cache that always holds one was empty to a reader"
        assert set(target["w"].tolist()) == {float(restored.record.iteration)}
        assert restored.notes == () or all("passed over" not in n or "gone" in n for n in restored.notes)


Churn = Callable[[Readers, int, int], None]


def keep_saving(readers: Readers, saves: int, opens: int, keep: int) -> None:
    draw, iteration = random.Random(5), 1
    with TrainingCache(readers.folder, max_checkpoints=keep, keep_latest=0, max_records=RECORDS) as cache:
        while iteration < saves or readers.opens() < opens:
            iteration += 1
            save(cache, draw.uniform(0.1, 9.0), iteration, state=tiny(float(iteration), 4000))


def keep_one(readers: Readers, saves: int, opens: int) -> None:
    keep_saving(readers, saves, opens, 1)


def keep_three(readers: Readers, saves: int, opens: int) -> None:
    keep_saving(readers, saves, opens, 3)


def keep_pruning(readers: Readers, saves: int, opens: int) -> None:
    iteration = 1
    with TrainingCache(readers.folder, max_checkpoints=10_000, max_records=RECORDS) as cache:
        while iteration < saves or readers.opens() < opens:
            iteration += 1
            save(cache, 100.0 / iteration, iteration, state=tiny(float(iteration), 4000))
            if iteration % 5 == 0:
                TrainingCache(readers.folder, max_checkpoints=1, keep_latest=0).prune()


def read_through(churn: Churn, readers: Readers, number: int, saves: int, opens: int) -> None:
    """Let so many read while the cache changes, at least so often."""
    running = [start_child(readers.read) for _ in range(number)]
    with ended(running):
        churn(readers, saves, opens)
        readers.done.touch()
        statuses = [end_of(running.pop(0)) for _ in range(number)]
    assert statuses == [0] * number
    assert TrainingCache(readers.folder).doctor() == []


LONG = (pytest.mark.campaign, pytest.mark.timeout(1200))


@pytest.mark.parametrize(
    ("churn", "number", "saves", "opens"),
    [
        *((churn, 2, 60, 20) for churn in (keep_one, keep_three, keep_pruning)),
        *(pytest.param(churn, 4, 1000, 1000, marks=LONG) for churn in (keep_one, keep_three)),
        pytest.param(keep_pruning, 4, 1000, 10_000, marks=LONG),
    ],
)
def test_readers_never_see_half_a_checkpoint_and_never_an_empty_cache(
    quick_path, counted, churn: Churn, number, saves, opens
):
    readers = Readers(quick_path)
    read_through(churn, readers, number, saves, opens)
    counted(CAMPAIGN, "opens", readers.opens())
    counted(CAMPAIGN, "saves meanwhile, at the least", saves)


@pytest.mark.timeout(300)
def test_readers_show_a_look_that_is_not_repeated(quick_path, counted):
    with pytest.raises(AssertionError):
        # Where a machine is busy with other things, a reader may never look at the wrong instant.
        for attempt in range(8):
            folder = quick_path / str(attempt)
            folder.mkdir()
            read_through(keep_one, Readers(folder, variants.without_a_second_look), 4, 300, 0)
    counted.caught(CAMPAIGN, variants.name_of(variants.without_a_second_look))
