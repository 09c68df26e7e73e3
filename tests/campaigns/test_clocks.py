"""Clocks that are ten years off between one save and the next, and file times that mean nothing: order stays order."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import pytest

from ckptcache import TrainingCache, metadata
from ckptcache.metadata import SessionRecord, new_session_id
from tests.caches import save, tiny
from tests.campaigns import variants

CAMPAIGN = "clocks"
TEN_YEARS = 3652 * 86_400
SAVES = 10


@contextmanager
def clock_off_by(seconds: float) -> Iterator[None]:
    class Shifted(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return super().now(tz) + timedelta(seconds=seconds)

    with patch.object(metadata, "datetime", Shifted):
        yield


def scramble_times(folder: Path, draw: random.Random) -> None:
    for path in folder.rglob("*"):
        when = path.stat().st_mtime + draw.uniform(-TEN_YEARS, TEN_YEARS)
        os.utime(path, (when, when))


def history(folder: Path, seed: int, *, is_off: bool) -> list[Any]:
    """What a cache says after each of some saves, by iteration, for ids and times differ in any case."""
    draw, chance, said = random.Random(seed), random.Random(seed + 1), []
    cache = TrainingCache(folder, max_checkpoints=3)
    for iteration in range(SAVES):
        loss, size, blocking = draw.choice([1.0, 2.0, 3.0, None]), draw.choice([3, 4]), draw.random() < 0.5
        if is_off:
            cache = TrainingCache(folder, max_checkpoints=3)
            scramble_times(folder, chance)
        with clock_off_by(chance.uniform(-TEN_YEARS, TEN_YEARS) if is_off else 0):
            session = SessionRecord(id=new_session_id(), started_at=metadata.utc_now(), start_iteration=iteration)
            session = cache.record_session(session)
            save(cache, loss, iteration, state=tiny(iteration, size), blocking=blocking, session=session)
            cache.wait_until_finished()
            said.append(everything_said(cache))
    assert len({r.created_at[:4] for r in cache.checkpoints(everything=True)}) > (2 if is_off else 0)
    return said


def everything_said(cache: TrainingCache) -> list[Any]:
    records = {r.id: r.iteration for r in cache.checkpoints(everything=True)}
    restored = [cache.restore(tiny(-1.0, size), resume=how) for size in (3, 4) for how in ("best", "latest", "auto")]
    plan = cache.prune(dry_run=True)
    return [
        [r.iteration for r in cache.checkpoints()],
        [r.iteration for r in cache.checkpoints(everything=True)],
        cache.get("latest").iteration,
        cache.get("best").iteration,
        [r and r.record.iteration for r in restored],
        [s.start_iteration for s in cache.sessions()],
        sorted(records[id] for id in plan.kept),
    ]


def compare(folder: Path, seeds: int, variant: variants.Variant = nullcontext) -> None:
    for seed in range(seeds):
        right = history(folder / f"right-{seed}", seed, is_off=False)
        with variant():
            assert history(folder / f"wrong-{seed}", seed, is_off=True) == right


@pytest.mark.parametrize("seeds", [3, pytest.param(50, marks=pytest.mark.campaign)])
def test_order_latest_and_retention_are_what_they_are_under_the_right_clock(quick_path, counted, seeds):
    compare(quick_path, seeds)
    counted(CAMPAIGN, "saves under a wrong clock", seeds * SAVES)


def test_wrong_clocks_show_an_order_by_time(quick_path, counted):
    with pytest.raises(AssertionError):
        compare(quick_path, 10, variants.ordering_by_time)
    counted.caught(CAMPAIGN, variants.name_of(variants.ordering_by_time))
