"""When losses say that a training has diverged."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptcache.errors import InvalidValue
from ckptcache.policy.divergence import DivergenceGuard, LossWatch

GUARD = DivergenceGuard()


def first_reason(losses, guard=GUARD, usual=(), **options):
    """When it is noticed, from 1, and why; (None, None) where it never is."""
    watch = LossWatch(guard, usual, **options)
    for iteration, loss in enumerate(losses, 1):
        if reason := watch.look(iteration, loss):
            return iteration, reason
    return None, None


def noisy(length, draw=None, start=6.0, end=1.0):
    """A loss that falls as losses do, with noise of a tenth."""
    draw = draw or random.Random(3)
    return [(end + (start - end) * math.exp(-i / 40)) * draw.uniform(0.9, 1.1) for i in range(length)]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_noticed_at_once(loss):
    assert first_reason([2.0, loss]) == (2, f"the loss is {loss} at iteration 2")


def test_with_a_scaler_only_several_in_a_row_are():
    losses = [2.0, math.inf, 2.0, *[math.nan, math.inf] * 5]
    assert first_reason(losses[:-1], endures_overflow=True) == (None, None)
    assert first_reason(losses, endures_overflow=True) == (13, "the loss is inf since iteration 4")


@given(st.integers(0, 2**31))
def test_a_loss_that_falls_with_noise_is_never_called_diverged(seed):
    assert first_reason(noisy(400, random.Random(seed))) == (None, None)


@given(st.integers(0, 2**31), st.integers(20, 200), st.floats(1.01, 100.0))
def test_a_loss_that_stays_high_is_noticed_after_as_many_as_patience_says(seed, quiet, factor):
    losses = noisy(quiet, random.Random(seed))
    watch = LossWatch(GUARD)
    assert not any(watch.look(*pair) for pair in enumerate(losses))
    iteration, reason = first_reason([*losses, *[watch.limit() * factor] * 20])
    assert watch.limit() < 4 * losses[0]
    assert iteration == quiet + GUARD.patience
    assert f"since iteration {quiet + 1}" in reason


def test_a_single_spike_is_forgiven():
    losses = noisy(100)
    losses[50:59] = [50.0] * 9
    assert first_reason(losses) == (None, None)


def test_nothing_is_unusual_before_enough_is_known_unless_it_was_known_before():
    losses = [1.0, 1.0, *[50.0] * GUARD.patience]
    assert first_reason(losses[:9]) == (None, None)
    assert first_reason(losses, usual=[1.0, 1.1] * 5)[0] == 2 + GUARD.patience


def test_a_loss_that_hardly_moved_may_move():
    assert first_reason([1.0] * 60 + [1.2] * 60) == (None, None)
    assert first_reason([-3.0] * 60 + [-2.5] * 60) == (None, None)


def test_a_loss_that_came_close_to_0_may_move_there():
    assert first_reason([2.0, 1.0, 0.5, 0.1] * 5 + [0.001] * 60 + [0.5] * 20) == (None, None)
    assert first_reason([2.0, 1.0, 0.5, 0.1] * 5 + [0.001] * 60 + [1.5] * 20)[0] == 80 + GUARD.patience


def test_a_term_that_is_switched_on_is_no_divergence():
    assert first_reason([*noisy(300), *(1.0 + x / 3 for x in noisy(300))]) == (None, None)


def test_what_is_unusual_does_not_become_usual_by_lasting():
    assert first_reason([1.0, 1.01] * 20 + [9.0, 9.0, 9.0, 1.0] * 30) == (None, None)
    assert first_reason([1.0, 1.01] * 20 + [9.0, 9.0, 9.0, 1.0] * 30 + [9.0] * 10)[0] is not None


@pytest.mark.parametrize(
    "settings",
    [{"window": 3}, {"patience": 0}, {"patience": 1.5}, {"threshold": 0}, {"threshold": math.nan}]
    + [{"learning_rate_factor": factor} for factor in (0, 1, 2.0, math.nan)],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused_by_name(settings):
    with pytest.raises(InvalidValue, match=next(iter(settings))):
        DivergenceGuard(**settings)
