"""Losses that are NaN, infinite or unknown, in every order: never best, never in the way, never a crash."""

import itertools
import math
from contextlib import nullcontext
from pathlib import Path

import pytest

from ckptcache import TrainingCache
from tests.caches import save, tiny
from tests.campaigns import variants

CAMPAIGN = "losses"
LOSSES = (math.nan, math.inf, -math.inf, None, 2.5)
ORDERS = [order for length in range(1, 6) for order in itertools.permutations(LOSSES, length)]
"""Every set of them in every order: 325."""


def expected(order: tuple[float | None, ...]) -> int | None:
    """Which iteration is best: the known one, else the unknown one, else none."""
    return order.index(2.5) if 2.5 in order else order.index(None) if None in order else None


def judge(folder: Path, order: tuple[float | None, ...], limit: int) -> None:
    cache = TrainingCache(folder, max_checkpoints=limit, keep_latest=0)
    for iteration, loss in enumerate(order):
        save(cache, loss, iteration, state=tiny(float(iteration)))
        best, target = cache.best(), tiny(-1.0)
        wanted = expected(order[: iteration + 1])
        assert (best and best.iteration) == wanted
        restored = cache.restore(target)
        assert (restored and restored.record.iteration) == wanted
        assert target["w"].tolist() == [-1.0 if wanted is None else float(wanted)] * 4
    listed = [r.val_loss for r in cache.checkpoints()]
    assert listed == sorted(listed, key=lambda loss: (loss is None, 0) if loss in (None, 2.5) else (2, 0))
    assert len(cache.explain(tiny())) == len(listed)
    assert cache.prune(dry_run=True).kept
    assert cache.doctor() == []


def judge_all(folder: Path, orders: list[tuple[float | None, ...]], variant: variants.Variant = nullcontext) -> None:
    with variant():
        for number, order in enumerate(orders):
            judge(folder / str(number), order, limit=(2, 9)[number % 2])


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.campaign)])
def test_the_best_is_known_or_unknown_and_never_diverged(quick_path, counted, every):
    judge_all(quick_path, ORDERS[::every])
    counted(CAMPAIGN, "orders of NaN, infinities, unknown and known", len(ORDERS[::every]))


def test_losses_show_who_takes_infinity_for_a_number(quick_path, counted):
    with pytest.raises(AssertionError):
        judge_all(quick_path, ORDERS[::11], variants.taking_infinity_for_a_number)
    counted.caught(CAMPAIGN, variants.name_of(variants.taking_infinity_for_a_number))
