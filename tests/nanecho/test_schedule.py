import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptcache.nanecho.schedule import ConnectionGrowth, cosine_with_warmup, learning_rate_at
from ckptcache.nanecho.settings import NanEchoConfig, TrainingSettings

RATES = {"learning_rate": 1.0, "min_learning_rate": 0.1, "warmup_iters": 10, "decay_iters": 110}


def test_it_warms_up_falls_along_a_cosine_and_stays():
    assert [cosine_with_warmup(i, **RATES) for i in (0, 4, 9)] == pytest.approx([1 / 11, 5 / 11, 10 / 11])
    assert cosine_with_warmup(10, **RATES) == pytest.approx(1.0)
    assert cosine_with_warmup(60, **RATES) == pytest.approx(0.55)
    assert cosine_with_warmup(35, **RATES) == pytest.approx(0.1 + 0.45 * (1 + 2**-0.5))
    assert {cosine_with_warmup(i, **RATES) for i in (110, 111, 220, 10**9)} == {0.1}


@given(st.integers(0, 300), st.integers(0, 50), st.integers(1, 200))
def test_it_rises_in_the_warm_up_and_never_after(iteration, warmup, length):
    rates = {**RATES, "warmup_iters": warmup, "decay_iters": warmup + length}
    now, later = (cosine_with_warmup(i, **rates) for i in (iteration, iteration + 1))
    assert 0 < now <= 1.0
    assert (later > now) if iteration + 1 < warmup else (later <= now or iteration + 1 == warmup)


def test_settings_give_the_rate_and_a_tenth_of_it_is_the_lowest_unless_said():
    settings = TrainingSettings(learning_rate=1e-5, warmup_iters=0, decay_iters=10)
    assert learning_rate_at(0, settings) == pytest.approx(1e-5)
    assert learning_rate_at(10, settings) == pytest.approx(1e-6)
    assert learning_rate_at(10, TrainingSettings(min_learning_rate=0.0, decay_iters=30)) > 0
    assert learning_rate_at(30, TrainingSettings(min_learning_rate=0.0, decay_iters=30)) == 0.0


def test_connections_grow_at_their_interval_up_to_the_maximum():
    growth = ConnectionGrowth(initial=0.5, maximum=0.75, interval=100, step=0.1)
    assert [growth.ratio_at(i) for i in (0, 99, 100, 199, 200, 300, 10**9)] == pytest.approx(
        [0.5, 0.5, 0.6, 0.6, 0.7, 0.75, 0.75]
    )
    assert growth.due(99, 0.5) is None
    assert growth.due(100, 0.5) == pytest.approx(0.6)
    assert growth.due(100, growth.ratio_at(100)) is None
    assert growth.due(250, 0.5) == pytest.approx(0.7)
    assert growth.due(100, 0.9) is None


def test_an_interval_of_nothing_never_grows():
    growth = ConnectionGrowth.of(NanEchoConfig(connection_ratio=0.3), TrainingSettings(connection_growth_interval=0))
    assert growth.ratio_at(10**9) == 0.3


@given(st.floats(0.01, 1.0), st.integers(1, 50), st.floats(0.001, 1.0), st.integers(0, 10_000))
def test_growth_never_falls_nor_passes_the_maximum(initial, interval, step, iteration):
    growth = ConnectionGrowth(initial=initial, maximum=1.0, interval=interval, step=step)
    assert initial <= growth.ratio_at(iteration) <= growth.ratio_at(iteration + 1) <= 1.0
