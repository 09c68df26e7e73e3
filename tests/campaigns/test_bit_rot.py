"""Files that change on the disk: found before anything is decoded, set aside, and the next best is taken, loudly."""

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from ckptcache import TrainingCache
from ckptcache.errors import CheckpointDamaged
from ckptcache.storage import ptfile
from tests.caches import file_of, save, tiny
from tests.campaigns import variants
from tests.storage.test_ptfile import flip, flips

CAMPAIGN = "bit rot"
PAGE = 4096

Damage = Callable[[Path], object]


class Rotting:
    """A cache of two checkpoints, laid out anew for each damage to the better one."""

    def __init__(self, folder: Path) -> None:
        self.template, self.folder = folder / "template", folder / "cache"
        with TrainingCache(self.template) as cache:
            save(cache, 2.0, 1, state=tiny(2.0, 800))
            best = save(cache, 1.0, 2, state=tiny(1.0, 800))
        self.name, self.size = file_of(cache, best).name, best.size or 0
        self.whole = file_of(cache, best).read_bytes()

    def judge(self, damage: Damage) -> None:
        """Restore after the damage."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.template, self.folder)
        path = self.folder / "checkpoints" / self.name
        damage(path)
        spoilt = path.read_bytes()
        assert spoilt != self.whole
        cache, target = TrainingCache(self.folder), tiny(-1.0, 800)
        restored = cache.restore(target)
        assert restored is not None
        assert restored.record.val_loss == 2.0, "what is damaged was resumed from"
        assert set(target["w"].tolist()) == {2.0}
        assert any(self.name.removesuffix(".pt") in sentence for sentence in cache.last_warned)
        assert (self.folder / "quarantine" / self.name).read_bytes() == spoilt
        assert not path.exists()

    def judge_all(self, damages: Iterable[Damage], variant: variants.Variant = nullcontext) -> int:
        count = 0
        with variant():
            for damage in damages:
                self.judge(damage)
                count += 1
        return count


def all_flips(size: int, count: int) -> Iterable[Damage]:
    return (lambda path, at=at, bit=bit: flip(path, at, bit) for at, bit in flips(size, count))


def zeroed(whole: bytes, start: int) -> Damage | None:
    """Where a page is zero already, it can't be lost."""
    page = whole[start : start + PAGE]
    spoilt = whole[:start] + bytes(len(page)) + whole[start + PAGE :]
    return (lambda path: path.write_bytes(spoilt)) if any(page) else None


@pytest.mark.parametrize("every", [40, pytest.param(1, marks=pytest.mark.campaign)])
@pytest.mark.timeout(600)
def test_every_flipped_bit_is_found_and_the_next_best_is_taken(quick_path, counted, every):
    rotting = Rotting(quick_path)
    found = rotting.judge_all(list(all_flips(rotting.size, 3000))[::every])
    counted(CAMPAIGN, "flipped bits found by a cache", found)


@pytest.mark.parametrize("every", [500, pytest.param(1, marks=pytest.mark.campaign)])
@pytest.mark.timeout(600)
def test_every_truncation_and_zeroed_page_is_found_and_the_next_best_is_taken(quick_path, counted, every):
    rotting = Rotting(quick_path)
    cuts = [lambda path, length=length: os.truncate(path, length) for length in range(0, rotting.size, every)]
    counted(CAMPAIGN, "truncations found by a cache", rotting.judge_all(cuts))
    pages = [zeroed(rotting.whole, start) for start in range(0, rotting.size, 512)]
    counted(CAMPAIGN, "zeroed pages found by a cache", rotting.judge_all(page for page in pages if page))


@pytest.mark.campaign
def test_every_length_of_a_file_of_64_kilobytes_is_found(quick_path, counted):
    with TrainingCache(quick_path / "c") as cache:
        record = save(cache, 1.0, state={"w": torch.rand(16_000)})
    path = file_of(cache, record)
    assert record.size > 1 << 16
    for length in range(record.size - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises(CheckpointDamaged):
            ptfile.read(path, size=record.size, digest=record.digest)
    counted(CAMPAIGN, "lengths of one file", record.size)


def test_every_zeroed_page_of_a_file_of_64_kilobytes_is_found(quick_path, counted):
    with TrainingCache(quick_path / "c") as cache:
        record = save(cache, 1.0, state={"w": torch.rand(16_000)})
    path = file_of(cache, record)
    whole = path.read_bytes()
    damages = [damage for start in range(0, len(whole), 512) if (damage := zeroed(whole, start))]
    assert len(damages) > 120
    for damage in damages:
        damage(path)
        with pytest.raises(CheckpointDamaged):
            ptfile.read(path, size=record.size, digest=record.digest)
    counted(CAMPAIGN, "zeroed pages of one file", len(damages))


def test_bit_rot_shows_a_digest_that_is_not_compared(quick_path, counted):
    rotting = Rotting(quick_path)
    inside = list(all_flips(rotting.size, 2000))[1024:]
    with pytest.raises(AssertionError, match="what is damaged was resumed from"):
        rotting.judge_all(inside, variants.without_comparing_digests)
    counted.caught(CAMPAIGN, variants.name_of(variants.without_comparing_digests))
