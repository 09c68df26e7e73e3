"""A training that is killed and resumed is, bit for bit, the one that never stopped; and what is left out is named."""

import os
import re

import pytest

from ckptcache.testing import assert_resumes_exactly
from tests.exact_jobs import ITERATIONS, grow, train

FEATURES = ("dropout", "accumulation", "amp", "cosine", "plateau", "ema", "own generator", "torchdata")
POLICIES = ("latest", "auto", "id")
SEED = int.from_bytes(os.urandom(4), "big")
"""From which the iterations to kill at are drawn; a failure names it."""


def prove(*args, folder, **options):
    """Prove `train` with `args`, or a function given first, in forked children."""
    function, *rest = args if callable(args[0]) else (train, *args)
    return assert_resumes_exactly(function, str(folder), *rest, start="fork", **options)


def difference(*args, folder, **options):
    """What it says of a training that doesn't resume exactly."""
    with pytest.raises(AssertionError) as caught:
        prove(*args, folder=folder, **options)
    # Other tests of this process may have left such objects behind, which are counted.
    return re.sub(r"-\d+(?= \(not registered\)| takes part)", "", str(caught.value))


# --- the matrix ----------------------------------------------------------------------------------

MATRIX = [(feature, workers, policy) for feature in FEATURES for workers in (0, 2) for policy in POLICIES]
ORDINARY = {(feature, (i + i // 2) % 2 * 2, POLICIES[i % 3]) for i, feature in enumerate(FEATURES)}
"""What every run tries: each feature, each number of workers, each policy; the campaign tries them all together."""


@pytest.mark.parametrize(
    ("feature", "workers", "policy"),
    [pytest.param(*case, marks=() if case in ORDINARY else pytest.mark.campaign) for case in MATRIX],
)
def test_killed_at_three_iterations_and_resumed_it_is_the_same_training(feature, workers, policy, tmp_path, requires):
    if feature == "torchdata":
        requires("torchdata")
    verdict = prove(feature, workers, folder=tmp_path, seed=SEED, resume=policy)
    assert verdict.iterations == ITERATIONS
    assert len(verdict.attempts) == 3
    assert all(a.killed_at - 2 <= a.resumed_at <= a.killed_at for a in verdict.attempts)
    assert verdict.batches
    assert verdict.compared["rng"] == (4 if feature == "own generator" else 3)
    assert {"model", "optimizer", "loader"} <= verdict.compared.keys()
    assert verdict.logged[:2] == ("loss", "noise")


@pytest.mark.parametrize(
    "policy", [pytest.param(p, marks=() if p == "auto" else pytest.mark.campaign) for p in POLICIES]
)
def test_connections_that_grow_between_the_kill_and_the_end_are_the_same(policy, tmp_path):
    verdict = prove(grow, folder=tmp_path, at=(3, 5, 9), resume=policy)
    assert [a.killed_at for a in verdict.attempts] == [3, 5, 9]


def test_the_cache_and_the_summary_of_the_program_are_not_touched(tmp_path):
    prove("dropout", folder=tmp_path, kills=1)
    assert list(tmp_path.iterdir()) == []


# --- what is left out or spoilt is named ---------------------------------------------------------


def test_a_loader_that_is_left_out_is_named_by_its_first_batch(tmp_path):
    said = difference("dropout", 2, "loader", folder=tmp_path, at=(4,))
    assert said.startswith("differs: batch, at iteration ")
    assert "no loader or sampler is registered" in said


def test_an_optimizer_that_is_left_out_is_named(tmp_path):
    said = difference("dropout", 0, "optimizer", folder=tmp_path, at=(4,))
    assert said.startswith("differs: AdamW (not registered).state.0.")
    assert "AdamW takes part in the training and is not registered" in said


@pytest.mark.parametrize(("feature", "kind"), [("cosine", "CosineAnnealingLR"), ("plateau", "ReduceLROnPlateau")])
def test_a_scheduler_that_is_left_out_is_named(feature, kind, tmp_path):
    said = difference(feature, 0, "scheduler", folder=tmp_path, at=(6,))
    assert said.startswith(f"differs: {kind} (not registered).")


def test_a_scaler_that_is_left_out_is_named(tmp_path):
    said = difference("amp", 0, "scaler", folder=tmp_path, at=(6,))
    assert said.startswith("differs: GradScaler (not registered).scale")


def test_an_average_that_is_left_out_is_named_though_only_its_output_shows_it(tmp_path):
    said = difference("ema", 0, "ema", folder=tmp_path, at=(4,))
    assert said.startswith("differs: ema_output, at iteration ")
    assert "not registered: AveragedModel" in said


def test_a_generator_of_the_model_that_is_left_out_is_named(tmp_path):
    said = difference("own generator", 0, "noise", folder=tmp_path, at=(4,))
    assert said.startswith("differs: model.3.generator (not registered), at iteration ")


def test_a_generator_that_is_seeded_anew_after_the_resume_is_named(tmp_path):
    said = difference("dropout", 0, "numpy", folder=tmp_path, at=(4,))
    assert said.startswith("differs: rng.numpy, at iteration ")
    assert "seed before the session is opened" in said


def test_a_loader_that_draws_from_torchs_generator_at_each_iter_is_named(tmp_path):
    said = difference("dropout", 0, "iter", folder=tmp_path, at=(4,))
    assert said.startswith("differs: rng.torch, at iteration ")
    assert "generator=torch.Generator()" in said


def test_a_training_that_does_not_repeat_itself_is_told_from_one_that_does_not_resume(tmp_path):
    said = difference("dropout", 0, "unseeded model", folder=tmp_path, at=(4,))
    assert said.startswith("not repeatable: model.0.weight differs before the first iteration")
    assert "torch.manual_seed(0)" in said
    assert "nothing can be said of its resume" in said
