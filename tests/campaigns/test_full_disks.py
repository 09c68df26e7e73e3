"""Disks that are really full, at any moment of a save, and limits on what a process may write."""

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from ckptcache import TrainingCache
from ckptcache.errors import CkptCacheError, NoSpace, SaveFailed
from ckptcache.metadata import CheckpointMetadata
from ckptcache.storage import fs
from tests.caches import ids, save, temporary_files, tiny
from tests.campaigns import variants
from tests.campaigns.disks import Memory, Requires, inserted, need_mounts
from tests.faults import CountingSystem, run_child, swapped

CAMPAIGN = "full disks"
MEGABYTE = 1 << 18
"""Elements of four bytes."""


@pytest.fixture
def disk(tmp_path: Path, requires: Requires) -> Iterator[Memory]:
    need_mounts(requires)
    disk = inserted(Memory(tmp_path, 20), requires)
    yield disk
    disk.close()


def opened(folder: Path) -> TrainingCache:
    return TrainingCache(folder / "cache", max_checkpoints=100)


def check(cache: TrainingCache, kept: list[CheckpointMetadata], size: int) -> None:
    """What was there is there and whole, and nothing half is left."""
    assert set(ids(kept)) == set(ids(cache.checkpoints()))
    for record in kept:
        assert set(cache.load(record.id)["w"].tolist()) == {record.val_loss}
        assert cache.load(record.id)["w"].numel() == size
    assert temporary_files(cache.cache_dir) == []
    assert cache.doctor() == []


@pytest.mark.parametrize("blocking", [True, False])
def test_a_disk_that_fills_up_keeps_what_it_holds_and_training_goes_on(disk, counted, blocking):
    kept: list[CheckpointMetadata] = []
    failed = 0
    with opened(disk.root) as cache:
        for iteration in range(40):
            try:
                record = save(cache, float(40 - iteration), iteration, state=tiny(40.0 - iteration, MEGABYTE))
                cache.wait_until_finished()
                kept.append(record)
            except (NoSpace, SaveFailed) as error:
                assert str(disk.root) in str(error)
                failed += 1
        assert failed >= 20
        assert len(kept) >= 10
        check(cache, kept, MEGABYTE)
        cache.ledger.config = TrainingCache(max_checkpoints=3).config
        cache.prune()
        save(cache, 0.5, 99, state=tiny(0.5, MEGABYTE), blocking=blocking)
        cache.wait_until_finished()
        assert cache.best().val_loss == 0.5
    counted(CAMPAIGN, "saves refused by a full one", failed)


class FillingSystem(CountingSystem):
    """Right before an operation somebody else takes all the room that is left, but for `spare` bytes."""

    def __init__(self, at: int, hog: Path, spare: int) -> None:
        super().__init__()
        self.at, self.hog, self.spare = at, hog, spare

    def before(self, number: int, operation: str, arguments: tuple[Any, ...]) -> None:
        if number == self.at:
            fill(self.hog, self.spare)


def fill(hog: Path, spare: int) -> None:
    with hog.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, fs.free_bytes(hog.parent) - spare)


def filled_everywhere(
    disk: Memory, spares: tuple[int, ...], variant: variants.Variant = nullcontext
) -> tuple[int, int]:
    """Fill the disk at each operation of a save, until none is left to fill it at; how many points, how many failed."""
    hog, points, failed = disk.root / "hog", 0, 0
    with opened(disk.root) as cache:
        kept = [save(cache, 9.0, 1, state=tiny(9.0, MEGABYTE))]
        for spare in spares:
            for at in count():
                with swapped(FillingSystem(at, hog, spare)), variant():
                    try:
                        kept.append(save(cache, 8.0, 2, state=tiny(8.0, MEGABYTE)))
                    except CkptCacheError as error:
                        assert isinstance(error, NoSpace | SaveFailed)
                        failed += 1
                if not hog.exists():
                    break
                hog.unlink()
                check(cache, kept, MEGABYTE)
                points += 1
                if len(kept) > 1:
                    cache.ledger.config = TrainingCache(max_checkpoints=1, keep_latest=0).config
                    cache.prune()
                    cache.ledger.config = TrainingCache(max_checkpoints=100).config
                    kept = cache.checkpoints()
            kept = cache.checkpoints()
    return points, failed


@pytest.mark.parametrize("spares", [(0,), pytest.param((0, 4096, 8192, 65_536, 1_000_000), marks=pytest.mark.campaign)])
def test_a_disk_that_is_full_at_any_moment_of_a_save_loses_nothing(disk, counted, spares):
    points, failed = filled_everywhere(disk, spares)
    assert points > 10
    assert failed > 3
    counted(CAMPAIGN, "moments at which one became full", points)


def test_a_full_disk_shows_a_half_file_that_stays(disk, counted):
    with pytest.raises(AssertionError):
        filled_everywhere(disk, (0,), variants.keeping_temporary_files)
    counted.caught(CAMPAIGN, variants.name_of(variants.keeping_temporary_files))


# --- limited -------------------------------------------------------------------------------------


def save_under_a_limit(folder: Path, limit: int) -> int:
    """Save where no file may grow beyond `limit` bytes: 0 when it was saved, 3 when that was refused in our words."""

    def body() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            with opened(folder) as cache:
                save(cache, 1.0, 2, state=tiny(1.0, MEGABYTE // 16))
        except CkptCacheError as error:
            assert "large" in str(error)
            os._exit(3)

    return run_child(body)


@pytest.mark.parametrize("levels", [6, pytest.param(60, marks=pytest.mark.campaign)])
def test_a_limit_on_the_size_of_files_is_said_and_loses_nothing(quick_path, counted, levels):
    with opened(quick_path) as cache:
        kept = [save(cache, 9.0, 1, state=tiny(9.0, MEGABYTE // 16))]
        whole = kept[0].size or 0
    outcomes = []
    for level in range(levels):
        limit = int(whole * 1.3 * level / levels)
        outcomes.append(save_under_a_limit(quick_path, limit))
        cache = opened(quick_path)
        if outcomes[-1] == 0:
            kept.append(cache.get("latest"))
        check(cache, kept, MEGABYTE // 16)
    assert set(outcomes) == {0, 3}
    assert outcomes == sorted(outcomes, reverse=True)
    counted(CAMPAIGN, "limits on the size of files", levels)
