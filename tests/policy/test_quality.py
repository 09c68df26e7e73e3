import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ckptcache.config import CacheConfig
from ckptcache.errors import InvalidValue
from ckptcache.metadata import CheckpointMetadata
from ckptcache.policy.quality import (
    Score,
    best,
    find_scored_metrics,
    improves,
    loss_score,
    metric_direction,
    metric_score,
    rank,
    score_group,
)

finite = st.floats(allow_nan=False, allow_infinity=False)
near_the_seams = st.one_of(finite, st.floats(-2, 2), st.sampled_from([0.0, -0.0, 1.0, 5e-324, -5e-324, 1e308, -1e308]))
directions = st.sampled_from(["max", "min"])


def record(id="ckpt_a", **fields):
    return CheckpointMetadata(id=id, **fields)


def config(**settings):
    return CacheConfig(cache_dir="unused", **settings)


def alone(config_=None, **fields):
    return score_group([record(**fields)], config_ or config())["ckpt_a"]


# --- the curves ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "score"), [(0, 1), (1, 0.5), (3, 0.25), (-1, 1.5), (-3, 1.75), (1e308, 1e-308)])
def test_a_loss_scores_what_the_formula_says(loss, score):
    assert loss_score(loss) == pytest.approx(score)


@pytest.mark.parametrize(
    ("value", "score"), [(0.41, 0.41), (0, 0), (1, 1), (2, 1.5), (4, 1.75), (-1, -0.5), (-3, -0.75), (1e308, 2)]
)
def test_a_metric_to_maximise_scores_what_the_formula_says(value, score):
    assert metric_score(value, "max") == pytest.approx(score)
    assert metric_score(value, "min") == loss_score(value)


@given(near_the_seams, near_the_seams)
def test_a_lower_loss_never_scores_less(a, b):
    low, high = sorted((a, b))
    assert loss_score(low) >= loss_score(high)


@given(near_the_seams, near_the_seams, directions)
def test_a_better_metric_never_scores_less(a, b, direction):
    worse, better = sorted((a, b), reverse=direction == "min")
    assert metric_score(better, direction) >= metric_score(worse, direction)


@given(near_the_seams, directions)
@example(-3.3214223153261697, "max")  # where x / (1 - x), computed as it stands, falls
@example(-1.2628125762269522, "max")
def test_the_next_float_never_scores_the_wrong_way(value, direction):
    following = math.nextafter(value, math.inf)
    if math.isfinite(following):
        sign = 1 if direction == "max" else -1
        assert sign * (metric_score(following, direction) - metric_score(value, direction)) >= 0


@given(st.floats(-1e5, 1e5), st.floats(1e-4, 1e5), directions)
def test_what_differs_visibly_scores_differently(low, gap, direction):
    scores = metric_score(low, direction), metric_score(low + gap, direction)
    assert scores[0] < scores[1] if direction == "max" else scores[0] > scores[1]


@pytest.mark.parametrize("seam", [0.0, 1.0])
@pytest.mark.parametrize("direction", ["max", "min"])
def test_the_pieces_meet_at_the_seams(seam, direction):
    step = 1e-9
    assert metric_score(seam - step, direction) == pytest.approx(metric_score(seam + step, direction), abs=3 * step)


@given(near_the_seams)
def test_scores_are_bounded(value):
    assert 0 <= loss_score(value) <= 2
    assert -1 <= metric_score(value, "max") <= 2


# --- which metrics count -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("loss", "val_loss", "error", "top1.error", "perplexity", "mae", "val/mse", "RMSE", "wer", "cer", "test-cer"),
        *("valLoss", "MSELoss", "mae2", "errors", "aux losses"),
    ],
)
def test_names_that_say_so_are_minimised(name):
    assert metric_direction(name) == "min"


@pytest.mark.parametrize(
    "name",
    ["accuracy", "certainty", "maeve", "lossless", "answer", "cerebral_score", "terror", "f1", "", "power", "mser"],
)
def test_other_names_are_maximised(name):
    assert metric_direction(name) == "max"


def test_what_every_record_has_within_0_and_1_is_scored():
    records = [
        record(
            "ckpt_a", val_loss=1.0, metrics={"accuracy": 0.0, "wer": 1.0, "tokens": 3e5, "f1": 0.5, "auc": math.nan}
        ),
        record("ckpt_b", val_loss=2.0, metrics={"accuracy": 1.0, "wer": 0.2, "tokens": 0.5, "auc": 0.5}),
    ]
    assert find_scored_metrics(records) == ({"accuracy": "max", "wer": "min"}, ("auc", "f1", "tokens"))


def test_a_save_between_evaluations_does_not_change_what_is_scored():
    evaluated = [
        record("ckpt_a", val_loss=1.0, metrics={"acc": 0.9}),
        record("ckpt_b", val_loss=0.9, metrics={"acc": 0.1}),
    ]
    before = score_group(evaluated, config())
    after = score_group([*evaluated, record("ckpt_c"), record("ckpt_d", val_loss=math.nan, metrics={"x": 1})], config())
    assert {id: after[id].quality for id in before} == {id: s.quality for id, s in before.items()}


def test_declaring_no_metric_at_all_scores_none():
    assert "metrics_score" not in alone(config(quality_metrics={}), val_loss=1.0, metrics={"acc": 0.5}).parts


def test_without_a_loss_the_metrics_of_all_records_count():
    records = [record("ckpt_a", metrics={"acc": 0.5, "auc": 0.5}), record("ckpt_b", metrics={"acc": 0.5})]
    assert find_scored_metrics(records) == ({"acc": "max"}, ("auc",))
    assert find_scored_metrics([]) == ({}, ())


def test_a_token_count_does_not_decide_what_is_best():
    many = record("ckpt_many", val_loss=3.0, metrics={"accuracy": 0.2, "tokens": 1e9}, iteration=10)
    good = record("ckpt_good", val_loss=2.0, metrics={"accuracy": 0.4, "tokens": 5.0})
    assert best([many, good], score_group([many, good], config())) is good


# --- scores --------------------------------------------------------------------------------------


def test_quality_is_the_weighted_sum():
    score = alone(val_loss=1.0, metrics={"accuracy": 0.4, "wer": 1.0})
    assert score.quality == pytest.approx(0.7 * 0.5 + 0.3 * (0.4 + 0.5) / 2)
    expected = {"loss_score": 0.5, "metrics_score": 0.45, "metric.accuracy": 0.4, "metric.wer": 0.5, "progress": 0.0}
    assert dict(score.parts) == pytest.approx(expected)
    assert score.status == "known"


@pytest.mark.parametrize(("loss", "metrics", "progress"), [(0.7, 0.3, 0.0), (0.0, 1.0, 0.0), (0.0, 0.5, 0.5)])
def test_without_a_scored_metric_the_loss_takes_the_metrics_weight(loss, metrics, progress):
    settings = config(
        quality_weight_loss=loss, quality_weight_metrics=metrics, quality_weight_progress=progress, quality_metrics=None
    )
    low, high = record("ckpt_a", val_loss=1.0), record("ckpt_b", val_loss=3.0, metrics={"tokens": 9e9})
    scores = score_group([low, high], settings)
    assert scores["ckpt_a"].quality == pytest.approx((loss + metrics) * 0.5)
    assert scores["ckpt_b"].quality == pytest.approx((loss + metrics) * 0.25)


def test_progress_is_the_share_of_the_furthest_in_the_group():
    records = [record("ckpt_a", val_loss=1.0, iteration=50), record("ckpt_b", val_loss=1.0, iteration=200)]
    scores = score_group(records, config(quality_weight_progress=0.2))
    assert [scores[r.id].parts["progress"] for r in records] == [0.25, 1.0]
    assert scores["ckpt_a"].quality == pytest.approx(0.5 + 0.2 * 0.25)
    assert alone(val_loss=1.0).parts["progress"] == 0


@pytest.mark.parametrize(("metrics", "said"), [({}, "f1 is missing"), ({"f1": math.nan}, "f1 is nan")])
def test_a_declared_metric_without_a_value_scores_0_and_is_named(metrics, said):
    score = alone(config(quality_metrics={"f1": "max"}), val_loss=1.0, metrics=metrics)
    assert score.quality == pytest.approx(0.35)
    assert score.parts["metric.f1"] == 0
    assert said in score.reason


def test_a_missing_reward_never_beats_a_negative_one():
    settings = config(quality_metrics={"reward": "max"})
    bad = record("ckpt_bad", val_loss=1.0, metrics={"reward": -200.0})
    broken = record("ckpt_broken", val_loss=1.0, metrics={"reward": math.nan})
    scores = score_group([bad, broken], settings)
    assert scores["ckpt_broken"].quality <= scores["ckpt_bad"].quality


def test_declared_metrics_are_scored_outside_of_0_and_1_and_no_others():
    settings = config(quality_metrics={"bleu": "max"})
    records = [
        record("ckpt_a", val_loss=1.0, metrics={"bleu": 30.0, "acc": 0.9}),
        record("ckpt_b", val_loss=1.0, metrics={"bleu": 31.0}),
    ]
    scores = score_group(records, settings)
    assert set(scores["ckpt_a"].parts) == {"loss_score", "metrics_score", "metric.bleu", "progress"}
    assert best(records, scores) is records[1]


@given(near_the_seams, near_the_seams, st.dictionaries(st.sampled_from("abc"), near_the_seams, max_size=3))
def test_quality_falls_as_the_loss_rises(a, b, metrics):
    settings = config(quality_metrics={"a": "max", "b": "min", "c": "max"})
    low, high = (
        record("ckpt_a", val_loss=min(a, b), metrics=metrics),
        record("ckpt_b", val_loss=max(a, b), metrics=metrics),
    )
    scores = score_group([low, high], settings)
    assert scores["ckpt_a"].quality >= scores["ckpt_b"].quality


@given(near_the_seams, near_the_seams, near_the_seams, directions)
def test_quality_rises_with_every_metric(a, b, other, direction):
    settings = config(quality_metrics={"m": direction, "other": "max"})
    worse, better = sorted((a, b), reverse=direction == "min")
    records = [record(id, val_loss=1.0, metrics={"m": m, "other": other}) for id, m in (("w", worse), ("b", better))]
    scores = score_group(records, settings)
    assert scores["b"].quality >= scores["w"].quality


@given(st.lists(near_the_seams, min_size=1, max_size=6), directions)
def test_who_lacks_a_metric_gets_no_more_for_it_than_anybody_who_has_it(values, direction):
    settings = config(quality_metrics={"m": direction})
    having = [record(f"ckpt_{n}", val_loss=1.0, metrics={"m": value}) for n, value in enumerate(values)]
    lacking = [record("none", val_loss=1.0), record("nan", val_loss=1.0, metrics={"m": math.nan})]
    scores = score_group([*having, *lacking], settings)
    earned = min(0.0, *(scores[r.id].parts["metric.m"] for r in having))
    assert [scores[r.id].parts["metric.m"] for r in lacking] == [earned, earned]


def test_what_is_unknown_or_diverged_has_no_quality_and_says_why():
    unknown, diverged = alone(last_val_loss=1.0), alone(val_loss=-math.inf)
    assert (unknown.quality, unknown.status) == (None, "unknown")
    assert (diverged.quality, diverged.status) == (None, "diverged")
    assert "no val_loss" in unknown.reason
    assert "val_loss is -inf" in diverged.reason


@pytest.mark.parametrize("name", ["train_loss", "last_val_loss"])
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_save_between_evaluations_of_a_diverged_run_has_diverged(name, loss):
    score = alone(**{name: loss})
    assert (score.status, score.reason) == ("diverged", f"diverged: {name} is {loss}")
    assert alone(**{name: loss}, val_loss=1.0).status == "known"
    scores = score_group(records := [record(**{name: loss})], config())
    assert best(records, scores) is None


@pytest.mark.parametrize(
    ("given_", "status", "quality"),
    [(3, "known", 3.0), (None, "unknown", None), (math.nan, "diverged", None), (math.inf, "diverged", None)],
)
def test_best_fn_replaces_the_scorer(given_, status, quality):
    settings = config(best_fn=lambda r: given_)
    for loss in (None, 1.0):
        score = alone(settings, val_loss=loss)
        assert (score.status, score.quality) == (status, quality)
    assert alone(settings, val_loss=math.nan).status == "diverged"


def test_best_fn_that_gives_no_number_is_refused():
    with pytest.raises(InvalidValue, match="best_fn of ckpt_a"):
        alone(config(best_fn=lambda r: "good"), val_loss=1.0)


# --- ranking -------------------------------------------------------------------------------------

losses = st.one_of(st.none(), st.sampled_from([math.nan, math.inf, -math.inf, 1.0, 2.0]), finite)
groups = st.lists(st.tuples(losses, st.integers(0, 3), st.integers(0, 3)), max_size=8).map(
    lambda rows: [
        record(f"ckpt_{i}", val_loss=loss, iteration=iteration, sequence=sequence, metrics={"acc": iteration / 3})
        for i, (loss, iteration, sequence) in enumerate(rows)
    ]
)


@given(groups, st.randoms())
def test_ranking_is_total_and_independent_of_the_order_given(records, random):
    shuffled = random.sample(records, len(records))
    settings = config()
    ranked = rank(records, score_group(records, settings))
    assert sorted(r.id for r in ranked) == sorted(r.id for r in records)
    assert rank(shuffled, score_group(shuffled, settings)) == ranked


@given(groups)
def test_best_is_the_first_that_has_not_diverged(records):
    scores = score_group(records, config())
    sound = [r for r in rank(records, scores) if scores[r.id].status != "diverged"]
    assert best(records, scores) == (sound[0] if sound else None)


@pytest.mark.parametrize("order", list(itertools.permutations([math.nan, math.inf, -math.inf, None, 2.5])))
def test_diverged_is_never_best_and_unknown_ranks_below_known(order):
    records = [record(f"ckpt_{i}", val_loss=loss, sequence=i) for i, loss in enumerate(order)]
    scores = score_group(records, config())
    ranked = rank(records, scores)
    assert [r.val_loss for r in ranked[:2]] == [2.5, None]
    assert [r.sequence for r in ranked[2:]] == sorted((r.sequence for r in ranked[2:]), reverse=True)
    assert best(records, scores).val_loss == 2.5
    without_known = [r for r in records if r.val_loss != 2.5]
    assert best(without_known, score_group(without_known, config())).val_loss is None
    diverged = [r for r in without_known if r.val_loss is not None]
    assert best(diverged, score_group(diverged, config())) is None


def test_of_only_unknown_ones_the_latest_is_best_whatever_its_iteration():
    records = [record("ckpt_b", sequence=2, iteration=9), record("ckpt_a", sequence=3), record("ckpt_c", sequence=1)]
    assert best(records, score_group(records, config())).id == "ckpt_a"
    assert [r.id for r in rank(records, score_group(records, config()))] == ["ckpt_a", "ckpt_b", "ckpt_c"]


def test_equal_scores_go_to_the_further_trained_then_to_the_later():
    records = [
        record("ckpt_z", val_loss=1.0, iteration=5, sequence=9),
        record("ckpt_a", val_loss=1.0, iteration=7, sequence=1),
        record("ckpt_b", val_loss=1.0, iteration=7, sequence=2),
        record("ckpt_c", val_loss=1.0, iteration=7, sequence=2),
    ]
    assert [r.id for r in rank(records, score_group(records, config()))] == ["ckpt_c", "ckpt_b", "ckpt_a", "ckpt_z"]


def test_no_records_have_no_best():
    assert score_group([], config()) == {}
    assert rank([], {}) == []
    assert best([], {}) is None


def test_a_hidden_quality_in_the_record_plays_no_part():
    old = record("ckpt_old", val_loss=2.0, quality_score=99.0)
    new = record("ckpt_new", val_loss=1.0, quality_score=0.1)
    assert best([old, new], score_group([old, new], config())) is new
    assert score_group([replace(old, quality_score=None)], config()) == score_group([old], config())


# --- improvement ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quality", "best_quality", "threshold", "expected"),
    [
        (0.1, None, 0.5, True),
        (None, None, 0.5, True),
        (None, 0.1, 0.0, False),
        (0.5, 0.5, 0.0, False),
        (math.nextafter(0.5, 1), 0.5, 0.0, True),
        (0.504, 0.5, 0.01, False),
        (0.506, 0.5, 0.01, True),
        (0.4, 0.5, 0.01, False),
        (-0.5, -0.5, 0.01, False),
        (-0.504, -0.5, 0.01, False),
        (-0.4, -0.5, 0.01, True),
        (-0.498, -0.5, 0.01, False),
        (0.0, 0.0, 0.01, False),
        (1e-9, 0.0, 0.01, True),
    ],
)
def test_an_improvement_is_relative_to_the_best(quality, best_quality, threshold, expected):
    assert improves(quality, best_quality, threshold) is expected


@given(finite, finite, st.floats(0, 10))
def test_an_improvement_is_always_strictly_better(quality, best_quality, threshold):
    if improves(quality, best_quality, threshold):
        assert quality > best_quality
        assert improves(quality, best_quality, 0)


def test_a_score_cannot_be_changed():
    with pytest.raises(AttributeError):
        Score(1.0, "known", {}, str).quality = 2.0


def test_what_was_rolled_back_comes_after_all_others_and_is_never_the_best():
    losses = {"a": 1.0, "b": 2.0, "c": None, "d": math.nan, "e": 3.0}
    records = [CheckpointMetadata(id=id, val_loss=loss) for id, loss in losses.items()]
    left = [r.changed(rolled_back="e") if r.id in "ad" else r for r in records]
    scores = score_group(left, CacheConfig())
    assert [r.id for r in rank(left, scores)] == ["b", "e", "c", "a", "d"]
    assert best(left, scores).id == "b"
    assert best([r for r in left if r.rolled_back], scores) is None
