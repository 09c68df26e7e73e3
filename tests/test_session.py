"""One process's stretch of training: resuming exactly, saving when it should, and leaving a record."""

import copy
import errno
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from torch import nn

from ckptcache.cache import TrainingCache
from ckptcache.errors import (
    CacheDirNotWritable,
    CheckpointNotFound,
    DuplicateName,
    InvalidValue,
    NotRestorable,
    NotSavable,
    SaveFailed,
    SessionClosed,
)
from ckptcache.session import TrainingSession
from ckptcache.state.restore import apply
from ckptcache.state.rng import capture_rng, restore_rng
from ckptcache.storage.ptfile import HEADER
from ckptcache.values import MAX_CONFIG_DEPTH
from tests.faults import FailingSystem, run_child, swapped, wait_until
from tests.jobs import Job, cache_at, differences

SUMMARY_KEYS = [
    *("session", "parent", "resumed_from", "start_iteration", "end_iteration"),
    *("first_val_loss", "last_val_loss", "best_val_loss", "best_checkpoint"),
    *("saved", "evicted", "failed_saves", "seconds", "iterations_per_second", "stop_reason", "cache_dir"),
]


@pytest.fixture
def cache(tmp_path):
    return cache_at(tmp_path / "cache", max_checkpoints=50)


def reasons(cache):
    records = sorted(cache.checkpoints(everything=True), key=lambda r: r.order)
    return [(r.iteration, r.save_reason) for r in records]


def summary_file(cache):
    return json.loads((cache.cache_dir / "training_summary.json").read_text())


# --- resuming ------------------------------------------------------------------------------------


def test_a_first_session_starts_at_0_and_the_next_goes_on_from_its_end(cache):
    first = Job().run(cache, 5)
    seen = []
    second = Job().run(cache, 8, in_step=lambda session, done: seen.append((session.iteration, done)))

    assert (first.start_iteration, first.resumed_from) == (0, None)
    assert "starts fresh: there is nothing to resume from" in first.messages
    assert (second.start_iteration, second.iteration) == (5, 8)
    assert second.resumed_from.iteration == 5
    assert seen == [(6, 6), (7, 7), (8, 8)]


def whole_run(tmp_path, iterations, **options):
    job = Job()
    job.run(cache_at(tmp_path / "whole"), iterations, **options)
    return job, job.state()


def in_a_child_killed_at(cache_dir, iteration, **options):
    """A session in a process of its own, which dies by SIGKILL once `iteration` steps are made."""

    def body():
        def kill(session, done):
            if done == iteration:
                session.cache.wait_until_finished()
                os.kill(os.getpid(), signal.SIGKILL)

        Job().run(cache_at(cache_dir), 100, in_step=kill, **options)

    assert run_child(body) == -signal.SIGKILL


@pytest.mark.parametrize("resume", ["best", "latest", "auto", "id"])
def test_a_session_that_was_killed_and_resumed_equals_one_that_never_stopped(tmp_path, resume):
    whole, state = whole_run(tmp_path, 12, checkpoint_interval=4)
    in_a_child_killed_at(tmp_path / "cache", 6, checkpoint_interval=4)
    cache = cache_at(tmp_path / "cache")
    (last,) = cache.checkpoints()

    job = Job(seed=99)  # other weights and generators than were saved, so that nothing agrees by chance
    session = job.run(cache, 12, resume=last.id if resume == "id" else resume, checkpoint_interval=4)

    assert session.start_iteration == 4
    assert not list(differences(job.state(), state))
    assert job.losses == {step: whole.losses[step] for step in range(4, 12)}
    assert job.batches == {step: whole.batches[step] for step in range(4, 12)}
    assert job.draws == {step: whole.draws[step] for step in range(4, 12)}


def test_many_stops_change_nothing(tmp_path):
    whole, state = whole_run(tmp_path, 12)
    losses = {}
    for end in (1, 2, 5, 11, 12):
        job = Job(seed=3 if end == 1 else end)
        job.run(cache_at(tmp_path / "cache"), end, resume="latest")
        losses |= job.losses
    assert losses == whole.losses
    assert not list(differences(job.state(), state))


def test_sessions_that_resume_the_same_best_see_different_batches_and_latest_repeats(tmp_path):
    cache = cache_at(tmp_path, max_checkpoints=50)
    Job().run(cache, 3, in_step=lambda s, done: done == 3 and s.checkpoint(val_loss=1.0))
    best = cache.best()

    def branch(resume):
        job = Job()
        session = job.run(cache, 6, resume=resume, in_step=lambda s, done: s.evaluated(2.0))
        assert session.resumed_from.id == best.id
        return tuple(map(tuple, job.batches.values())), session

    runs = [branch("best") for _ in range(5)]
    assert len({batches for batches, _ in runs}) == 5
    assert [session.record.reseeded for _, session in runs] == [False, True, True, True, True]
    assert any("reseeded" in line for line in runs[1][1].messages)
    assert [s.reseeded for s in cache.sessions()] == [False, False, True, True, True, True]
    assert branch(best.id)[0] == branch(best.id)[0] == runs[0][0]


def test_the_session_that_goes_on_from_latest_repeats_exactly(tmp_path):
    cache = cache_at(tmp_path)
    Job().run(cache, 3)

    def branch():
        job = Job()
        with TrainingSession(cache, **job.objects(), resume="latest") as session:
            for step in session.steps(5):
                job.train_step(step)
            session.discard()
        return job.batches

    assert branch() == branch()


def test_the_best_whose_own_session_went_on_is_reseeded(cache):
    evaluate = {2: 1.0, 4: 3.0}
    Job().run(cache, 4, in_step=lambda s, done: done in evaluate and s.checkpoint(val_loss=evaluate[done]))
    session = Job().run(cache, 3)
    assert session.start_iteration == 2
    assert any("its own session went on to iteration 4" in line for line in session.messages)
    assert any("choose that one with resume=latest" in line for line in session.messages)


def test_registered_generators_are_reseeded_too(cache):
    def draws(number):
        generators = {
            "a": torch.Generator().manual_seed(1),
            "b": np.random.default_rng(1),
            "c": random.Random(1),
            "d": np.random.RandomState(1),
        }
        job = Job()
        with TrainingSession(cache, **job.objects(), **generators) as session:
            for step in session.steps(2 + number):
                job.train_step(step)
                session.evaluated(1.0 + step)
            drawn = [float(torch.rand((), generator=generators["a"])), generators["b"].random()]
            return [*drawn, generators["c"].random(), generators["d"].random_sample()]

    draws(0)
    first, second = draws(1), draws(1)
    assert all(x != y for x, y in zip(first, second, strict=True))


def test_two_that_start_at_once_from_the_same_best_see_different_batches(cache):
    Job().run(cache, 3)
    first, second = Job(), Job()
    opened = [TrainingSession(cache, **job.objects()) for job in (first, second)]
    # Both have read the index before either is in it.
    entered = []
    record = cache.record_session

    def record_later(session, *configs):
        entered.append(session)
        if len(entered) == 1:
            opened[1].__enter__()
        return record(session, *configs)

    cache.record_session = record_later
    opened[0].__enter__()
    cache.record_session = record
    assert first.loader.next_batch()[0].tolist() != second.loader.next_batch()[0].tolist()
    assert [session.record.reseeded for session in opened] == [True, False]
    for session in opened:
        session.discard()


def generators():
    return {"torch": torch.Generator(), "numpy": np.random.default_rng(1), "python": random.Random(1)}


def test_what_is_registered_after_a_restore_is_reported_as_restored(cache):
    with TrainingSession(cache, **Job().objects(), sums=torch.ones(2)) as session:
        for step in session.steps(2):
            session.log(loss=1.0 / (step + 1))
    sums = torch.zeros(2)
    with TrainingSession(cache, **Job().objects()) as session:
        assert session.report.unused == ("sums",)
        session.register("sums", sums)
        assert session.report.unused == ()
        assert "sums" in session.report.restored
    assert sums.tolist() == [1.0, 1.0]


def test_what_is_registered_in_a_reseeded_session_is_reseeded_too(cache):
    def drawn(resume):
        made = generators()
        with TrainingSession(cache, **Job().objects(), resume=resume) as session:
            session.register("made", made)
            reseeded = session.record.reseeded
            session.discard()
        numbers = (torch.rand((), generator=made["torch"]).item(), made["numpy"].random(), made["python"].random())
        return reseeded, numbers

    Job().run(cache, 2, in_step=lambda s, done: done == 1 and s.checkpoint(val_loss=1.0), made=generators())
    (reseeded, one), (_, other) = drawn("best"), drawn("best")
    assert reseeded
    assert all(a != b for a, b in zip(one, other, strict=True))
    assert drawn("latest") == drawn("latest")


def test_fresh_starts_and_another_model_leave_everything_that_is_there(cache):
    Job().run(cache, 4)
    before = {r.id for r in cache.checkpoints()}
    fresh = Job().run(cache, 2, resume="never")
    assert fresh.start_iteration == 0

    wider = nn.Linear(3, 7)
    with TrainingSession(cache, model=wider, resume="best") as session:
        assert session.resumed_from is None
        assert any("does not fit" in line for line in session.messages)
    assert before <= {r.id for r in cache.checkpoints()}


def test_why_others_were_passed_over_is_told(cache):
    with TrainingSession(cache, model=nn.Linear(3, 7)) as session:
        session.checkpoint()
    Job().run(cache, 2)
    messages = Job().run(cache, 3).messages
    assert any("passed over 1 checkpoint" in m and "model.embed.weight: saved absent" in m for m in messages)
    assert any("iteration 2, not evaluated, the only one that fits" in line for line in messages)


def test_what_resume_names_must_exist_and_nothing_is_written_otherwise(tmp_path):
    with (
        pytest.raises(CheckpointNotFound),
        TrainingSession(cache_at(tmp_path / "c"), model=nn.Linear(1, 1), resume="x"),
    ):
        pass
    assert not (tmp_path / "c").exists()


class Asked(nn.Linear):
    asked = 0

    def state_dict(self, *args, **kwargs):
        self.asked += 1
        return super().state_dict(*args, **kwargs)


def test_the_memory_of_the_first_save_is_taken_after_the_first_step_without_asking_for_any_state(tmp_path):
    cache, model = cache_at(tmp_path), Asked(1024, 1024)
    optimizer = torch.optim.AdamW(model.parameters())
    with TrainingSession(cache, resume="never") as session:
        session.register("model", model)
        session.register("optimizer", optimizer)
        sizes, asked = [], []
        for _ in session.steps(3):
            sizes.append(cache._background()._arena.size)
            asked.append(model.asked)
            model(torch.ones(1, 1024)).sum().backward()
            optimizer.step()
    assert sizes[0] == 0
    assert sizes[1] == sizes[2] > 3 * 4 * 1024**2
    assert len(set(asked)) == 1


def test_a_session_is_entered_once_and_closed_for_good(cache):
    session = Job().run(cache, 1)
    with pytest.raises(SessionClosed):
        session.__enter__()
    for call in (session.checkpoint, lambda: next(session.steps(3)), lambda: session.register("x", {})):
        with pytest.raises(SessionClosed):
            call()


# --- which iteration -----------------------------------------------------------------------------


def test_a_checkpoint_knows_whether_the_step_was_made(cache):
    job = Job()
    with TrainingSession(cache, **job.objects()) as session:
        for step in session.steps(2):
            before = session.checkpoint()
            job.train_step(step)
            after = session.checkpoint()
            assert (before.iteration, after.iteration) == (step, step + 1)


def test_breaking_out_counts_what_was_trained_and_saves_it(cache):
    def run(train):
        job = Job()
        with TrainingSession(cache, **job.objects(), resume="latest") as session:
            for step in session.steps(10):
                if train:
                    job.train_step(step)
                break
        return session

    assert run(train=True).iteration == 1
    assert reasons(cache) == [(1, "final")]
    assert run(train=False).iteration == 1
    assert reasons(cache) == [(1, "final")]


def test_a_loop_that_is_held_on_to_and_left_is_counted(cache):
    job = Job()
    with TrainingSession(cache, **job.objects()) as session:
        steps = session.steps(10)
        for step in steps:
            job.train_step(step)
            if step == 2:
                break
    assert session.record.end_iteration == 3
    assert reasons(cache) == [(3, "final")]
    steps.close()


def test_loops_within_a_loop_go_on_where_earlier_sessions_stopped(cache):
    def run(epochs):
        job = Job()
        with TrainingSession(cache, **job.objects(), checkpoint_interval=2) as session:
            for epoch in range(epochs):
                for step in session.steps((epoch + 1) * 2):
                    job.train_step(step)
        return session, sorted(job.losses)

    assert run(2)[1] == [0, 1, 2, 3]
    session, steps = run(4)
    assert steps == [4, 5, 6, 7]
    assert session.stop_reason == "finished"
    assert reasons(cache) == [(2, "interval"), (4, "final"), (6, "interval"), (8, "final")]


def test_session_iters_counts_from_where_the_session_started(cache):
    for end in (3, 6, 8):
        job = Job()
        with TrainingSession(cache, **job.objects()) as session:
            for step in session.steps(8, session_iters=3):
                job.train_step(step)
        assert session.iteration == end


def test_nothing_to_do(cache):
    Job().run(cache, 4)
    before = reasons(cache)
    session = Job().run(cache, 4)
    assert session.stop_reason == "nothing_to_do"
    assert summary_file(cache)["stop_reason"] == "nothing_to_do"
    assert reasons(cache) == before


def test_max_seconds_stops_after_a_step_and_saves(cache):
    session = Job().run(cache, 10**6, max_seconds=1.0)
    assert session.stop_reason == "max_seconds"
    assert 0 < session.iteration < 10**6
    assert reasons(cache) == [(session.iteration, "final")]


def test_who_starts_a_training_can_limit_it_by_the_environment(cache, monkeypatch):
    monkeypatch.setenv("CKPTCACHE_MAX_SECONDS", "0.5")
    session = Job().run(cache, 10**6)
    assert session.stop_reason == "max_seconds"
    assert reasons(cache) == [(session.iteration, "final")]


@pytest.mark.parametrize(("text", "given", "limit"), [("5", None, 5.0), ("5", 9.0, 9.0), ("", None, None)])
def test_an_argument_wins_over_the_environment_where_empty_is_no_limit(cache, monkeypatch, text, given, limit):
    monkeypatch.setenv("CKPTCACHE_MAX_SECONDS", text)
    assert TrainingSession(cache, model=nn.Linear(1, 1), max_seconds=given).max_seconds == limit


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan"])
def test_a_limit_from_the_environment_that_does_not_work_is_refused_by_its_name(cache, monkeypatch, text):
    monkeypatch.setenv("CKPTCACHE_MAX_SECONDS", text)
    with pytest.raises(InvalidValue, match=f"CKPTCACHE_MAX_SECONDS cannot be '{text}'"):
        TrainingSession(cache, model=nn.Linear(1, 1))


def test_stop_ends_the_loop(cache):
    session = Job().run(cache, 100, in_step=lambda s, done: done == 3 and s.stop())
    assert (session.iteration, session.stop_reason) == (3, "finished")


# --- when it saves -------------------------------------------------------------------------------


def test_an_evaluation_is_saved_when_it_improves_by_the_threshold(tmp_path):
    cache = TrainingCache(tmp_path, min_improvement_threshold=0.01, max_checkpoints=50)
    losses = [2.0, 2.5, 1.99, 1.9, 1.9, 1.0]  # quality rises by 0.3 %, then by 3.4 %, not at all, by 45 %
    saved = []
    Job().run(cache, 6, in_step=lambda s, done: saved.append(s.checkpoint(val_loss=losses[done - 1])))
    assert [record is not None for record in saved] == [True, False, False, True, False, True]
    assert reasons(cache) == [(1, "improved"), (4, "improved"), (6, "improved")]


def test_an_interval_and_the_end_are_saved_always_and_nothing_twice(cache):
    worse = {2: 1.0, 4: 5.0, 5: 5.0, 6: 5.0}
    in_step = lambda s, done: done in worse and s.checkpoint(val_loss=worse[done])  # noqa: E731
    Job().run(cache, 7, in_step=in_step, checkpoint_interval=2)
    assert reasons(cache) == [(2, "improved"), (4, "interval"), (6, "interval"), (7, "final")]


def test_an_evaluation_after_the_last_step_is_in_the_checkpoint_though_an_interval_fell_there(cache):
    job = Job()
    with TrainingSession(cache, **job.objects(), checkpoint_interval=2) as session:
        for step in session.steps(4):
            job.train_step(step)
        session.checkpoint(val_loss=1.5)
    assert [(r.iteration, r.val_loss) for r in sorted(cache.checkpoints(), key=lambda r: r.order)] == [
        (2, None),
        (4, 1.5),
    ]
    assert session.record.best_checkpoint == cache.best().id


def test_manual_and_growth_save_wherever_they_are_asked_for(cache):
    def in_step(session, done):
        if done == 2:
            assert session.checkpoint() is not None
            assert session.checkpoint(save_reason="growth") is not None

    Job().run(cache, 3, in_step=in_step)
    assert reasons(cache) == [(2, "manual"), (2, "growth"), (3, "final")]


def test_losses_are_carried_to_saves_between_evaluations_and_into_the_next_session(cache):
    Job().run(cache, 5, in_step=lambda s, done: done == 2 and s.evaluated(1.5, {"accuracy": 0.5}))
    record = cache.get("latest")
    assert (record.val_loss, record.last_val_loss, record.last_val_loss_iteration) == (None, 1.5, 2)
    assert record.metrics == {}

    Job().run(cache, 6, resume="latest")
    record = cache.get("latest")
    assert (record.iteration, record.last_val_loss, record.last_val_loss_iteration) == (6, 1.5, 2)

    Job().run(cache, 7, resume="latest", in_step=lambda s, done: s.evaluated(1.25))
    assert cache.get("latest").val_loss == 1.25
    Job().run(cache, 8, resume="latest")
    assert (cache.get("latest").last_val_loss, cache.get("latest").last_val_loss_iteration) == (1.25, 7)


def test_a_loss_on_other_validation_data_is_not_carried(cache):
    data = {"kind": "text", "val_digest": "a"}
    Job().run(cache, 2, data_config=data, in_step=lambda s, done: s.evaluated(1.5))
    session = Job().run(cache, 3, data_config={**data, "val_digest": "b"})
    assert session.start_iteration == 2
    assert cache.get("latest").last_val_loss is None
    assert any("the first evaluation sets the baseline" in line for line in session.messages)


def test_metrics_without_a_loss_are_recorded(cache):
    Job().run(cache, 1, in_step=lambda s, done: s.checkpoint(metrics={"accuracy": torch.tensor(0.75)}))
    assert cache.get("latest").metrics == {"accuracy": 0.75}


def test_what_is_said_with_a_checkpoint_is_kept(cache):
    Job().run(
        cache, 1, in_step=lambda s, done: s.checkpoint(epoch=0.5, extra={"note": "first", "lr": torch.tensor(0.5)})
    )
    record = cache.get("latest")
    assert (record.epoch, record.extra) == (0.5, {"note": "first", "lr": 0.5})


def test_parents_form_a_line_through_sessions(cache):
    Job().run(cache, 4, checkpoint_interval=2)
    Job().run(cache, 6)
    line = sorted(cache.checkpoints(), key=lambda r: r.order)
    assert [r.parents for r in line] == [(), (line[0].id,), (line[1].id,)]
    assert [s.parent for s in cache.sessions()] == [None, line[1].id]


def test_best_checkpoint_is_the_best_that_was_saved(tmp_path):
    cache = TrainingCache(tmp_path, min_improvement_threshold=0.05)
    losses = {1: 1.0, 2: 0.99, 3: 0.995}  # the second is better, and not by enough to be saved
    session = Job().run(cache, 3, in_step=lambda s, done: s.checkpoint(val_loss=losses[done]))
    assert session.record.best_val_loss == 0.99
    assert cache.get(session.record.best_checkpoint).iteration == 3


def test_best_checkpoint_is_the_parent_where_nothing_got_better(cache):
    Job().run(cache, 1, in_step=lambda s, done: s.checkpoint(val_loss=1.0))
    job = Job()
    with TrainingSession(cache, **job.objects()) as session:
        session.evaluated(1.0)
        for step in session.steps(3):
            job.train_step(step)
            session.checkpoint(val_loss=2.0)
    assert (session.record.best_val_loss, session.record.best_checkpoint) == (1.0, session.resumed_from.id)


# --- logging -------------------------------------------------------------------------------------


def test_tensors_are_logged_as_they_are_at_the_call(cache):
    buffer = torch.zeros((), requires_grad=False)

    def in_step(session, done):
        buffer.fill_(done)
        session.log(value=buffer, weight=torch.ones(1, 1, requires_grad=True) * done)

    Job().run(cache, 3, in_step=in_step)
    curves = cache.sessions()[0].curves
    assert curves["value"] == curves["weight"] == ((1, 1.0), (2, 2.0), (3, 3.0))
    assert [i for i, _ in curves["loss"]] == [1, 2, 3]
    assert cache.get("latest").train_loss == pytest.approx(curves["loss"][-1][1], rel=1e-5)  # curves keep six digits


@pytest.mark.parametrize("value", [torch.zeros(2), "much", None, [1.0]])
def test_what_is_no_number_is_refused_at_once(cache, value):
    with pytest.raises(InvalidValue, match="loss"):
        Job().run(cache, 1, in_step=lambda s, done: s.log(loss=value))


def test_curves_are_thinned_to_200_points_with_the_first_and_the_last(cache):
    with TrainingSession(cache, model=nn.Linear(1, 1)) as session:
        for step in session.steps(3333):
            session.log(loss=step / 2)
    points = cache.sessions()[0].curves["loss"]
    assert len(points) <= 200
    assert (points[0], points[-1]) == ((1, 0.0), (3333, 1666.0))
    assert all(value == (i - 1) / 2 for i, value in points)
    gaps = np.diff([i for i, _ in points])
    assert gaps.max() <= 3 * np.median(gaps)


# --- objects -------------------------------------------------------------------------------------


class Pair:
    """A GAN's two networks, an average of one, and other things that have a state."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.objects = {
            "generator": nn.Linear(4, 4),
            "critic": nn.Linear(4, 1),
            "average": torch.optim.swa_utils.AveragedModel(nn.Linear(4, 4)),
            "notes": {"count": seed, "names": ["a"] * seed, "table": np.full(3, seed), "t": torch.full((2,), seed)},
            "noise": torch.Generator().manual_seed(seed),
            "order": np.random.default_rng(seed),
            "dice": random.Random(seed),
        }
        self.objects["opt_g"] = torch.optim.Adam(self.objects["generator"].parameters(), lr=0.1 * seed)
        self.objects["opt_c"] = torch.optim.SGD(self.objects["critic"].parameters(), lr=0.2 * seed, momentum=0.9)

    def train(self):
        noise = torch.rand((8, 4), generator=self.objects["noise"])
        for network, optimizer in (("generator", "opt_g"), ("critic", "opt_c")):
            self.objects[optimizer].zero_grad()
            self.objects[network](noise).square().mean().backward()
            self.objects[optimizer].step()
        self.objects["average"].update_parameters(self.objects["generator"])
        self.objects["notes"]["count"] += 1

    def state(self):
        values = {k: v.state_dict() for k, v in self.objects.items() if hasattr(v, "state_dict")}
        drawn = [self.objects["order"].random(), self.objects["dice"].random()]
        noise = torch.rand(1, generator=self.objects["noise"])
        notes = {**self.objects["notes"], "table": self.objects["notes"]["table"].tolist()}
        return {**values, "notes": notes, "drawn": drawn, "noise": noise}


def test_registered_objects_come_back_by_their_names(cache):
    first, second = Pair(1), Pair(2)
    with TrainingSession(cache, **first.objects) as session:
        for _ in session.steps(3):
            first.train()
        assert session.iteration == 3  # two optimizers, one iteration
    with TrainingSession(cache, **second.objects) as session:
        assert session.start_iteration == 3
        assert not list(differences(second.state(), first.state()))
    assert set(cache.get("latest").contents) == {*first.objects, "rng"}


def test_what_is_registered_after_the_resume_is_restored_then(cache):
    first, second = Pair(1), Pair(2)
    with TrainingSession(cache, **first.objects) as session:
        for _ in session.steps(3):
            first.train()
    late = {name: second.objects.pop(name) for name in ("average", "notes", "noise", "opt_c")}
    with TrainingSession(cache, **second.objects) as session:
        assert session.start_iteration == 3
        for name, value in late.items():
            session.register(name, value)
        second.objects |= late
        assert not list(differences(second.state(), first.state()))
        session.register("fresh", {"x": 1})
        assert set(session.checkpoint().contents) == {*second.objects, "fresh", "rng"}


def test_what_does_not_fit_its_saved_state_is_not_registered(cache):
    with TrainingSession(cache, model=nn.Linear(2, 2), table={"t": torch.zeros(3)}) as session:
        session.checkpoint()
    with TrainingSession(cache, model=nn.Linear(2, 2)) as session:
        other = {"t": torch.ones(4)}
        with pytest.raises(NotRestorable, match="table"):
            session.register("table", other)
        assert other["t"].tolist() == [1.0] * 4
        session.register("table", {"t": torch.ones(3)})


@pytest.mark.parametrize("name", ["model", "rng", HEADER])
def test_names_are_given_once(cache, name):
    with TrainingSession(cache, model=nn.Linear(1, 1)) as session, pytest.raises(DuplicateName, match=name):
        session.register(name, {})


def test_the_generators_name_is_taken(cache):
    with pytest.raises(DuplicateName, match="rng"):
        TrainingSession(cache, model=nn.Linear(1, 1), rng={})


def test_a_configuration_as_deep_as_is_allowed_is_read_again(cache):
    config = []
    for _ in range(MAX_CONFIG_DEPTH - 1):
        config = [config]
    Job().run(cache, 1, model_config={"deep": config})
    assert Job().run(cache_at(cache.cache_dir), 2, model_config={"deep": config}).start_iteration == 1
    with pytest.raises(InvalidValue, match="nested"):
        TrainingSession(cache, model_config={"deep": [config]})


@pytest.mark.parametrize("value", [{1}, (1, {2}), frozenset({1})], ids=str)
def test_what_cannot_be_filled_in_place_is_refused_with_the_way_out(cache, value):
    with pytest.raises((InvalidValue, NotSavable), match=r"epoch") as caught:
        TrainingSession(cache, **Job().objects(), epoch=value).__enter__()
    assert "epoch" in (caught.value.fields.get("name"), caught.value.fields.get("key"))
    assert not cache.cache_dir.exists()
    with TrainingSession(cache, **Job().objects()) as session:
        with pytest.raises((InvalidValue, NotSavable), match="epoch"):
            session.register("epoch", value)
        session.register("epoch", {"again": 1})


def test_a_value_that_cannot_be_filled_is_restored_by_nobody_else_either(cache):
    with pytest.raises(InvalidValue, match=r"^epoch cannot be .*dict.*checkpoint\(extra="):
        cache.restore({"epoch": 3})


# --- plain values --------------------------------------------------------------------------------

VALUES = {
    "epoch": 3,
    "best": 0.25,
    "name": "three",
    "pair": (1, 2.5),
    "nothing": None,
    "half": np.float32(0.5),
    "size": torch.Size([1]),
}


def test_plain_values_are_saved_as_they_are_at_the_save_and_come_back(cache):
    with TrainingSession(cache, **Job().objects(), epoch=0) as session:
        assert session.register("best", 9.5) == 9.5
        session.values.update(VALUES)
        session.checkpoint()
        session.values["epoch"] = 4
    assert cache.load("latest")["values"]["epoch"] == 3, "nothing was trained, so that there is no last save"
    with TrainingSession(cache, **Job().objects(), epoch=0) as session:
        assert session.values == VALUES
        assert session.register("best", 9.5) == 0.25, "what was saved holds"
        assert session.register("late", 7) == 7, "what was not saved is as the program gave it"
        assert "restored: model, optimizer, scheduler, loader, rng, values" in session.messages


def test_values_of_a_checkpoint_are_there_whether_the_program_registers_them_or_not(cache):
    with TrainingSession(cache, **Job().objects(), epoch=5) as session:
        session.checkpoint()
    with TrainingSession(cache, **Job().objects()) as session:
        assert session.values == {"epoch": 5}


@pytest.mark.parametrize("name", ["epoch", "model", "values"])
def test_a_plain_value_needs_a_name_of_its_own(cache, name):
    with TrainingSession(cache, **Job().objects(), epoch=5) as session:
        with pytest.raises(DuplicateName, match=name):
            session.register(name, 1)
        assert session.values == {"epoch": 5}


def test_a_plain_value_that_cannot_be_read_back_is_refused(cache):
    with TrainingSession(cache, **Job().objects()) as session:
        with pytest.raises(NotSavable, match=r"values\.seed"):
            session.register("seed", 1 << 5000)
        assert session.values == {}


def test_numpy_arrays_are_filled_in_place(cache):
    counts = np.arange(6, dtype=np.int16).reshape(2, 3)
    with TrainingSession(cache, model=nn.Linear(1, 1), counts=counts) as session:
        session.checkpoint()
    other = np.zeros((2, 3), np.int16)
    with TrainingSession(cache, model=nn.Linear(1, 1), counts=other):
        assert (other == counts).all()


class Picky:
    """Saves what it then refuses."""

    def state_dict(self):
        return {"mood": 1}

    def load_state_dict(self, state):
        raise RuntimeError("not today")


def test_a_fresh_start_says_what_was_tried_and_failed(cache):
    Job().run(cache, 1, picky=Picky())
    session = Job().run(cache, 2, picky=Picky())
    assert session.start_iteration == 0
    [line] = [line for line in session.messages if "is passed over" in line]
    assert "'picky' could not be restored" in line
    assert "not today" in line
    assert cache.restore({"model": Job().model}, resume="never") is None
    assert cache.last_notes == ()


class Wide(torch.optim.Optimizer):
    """Keeps its state in float32 whatever its parameters are."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("average", torch.zeros(p.shape)).add_(p.detach().float() / 3)
                self.state[p].setdefault("history", [torch.zeros(p.shape)])[0].add_(1 / 3)


def test_an_optimizer_state_wider_than_its_parameters_comes_back_bit_for_bit(cache):
    def made():
        model = nn.Linear(4, 3, dtype=torch.bfloat16)
        return {"model": model, "optimizer": Wide(model.parameters())}

    first, second, third = made(), made(), made()
    first["optimizer"].step()
    record = cache.save(first, iteration=1)
    cache.restore(second)
    assert not list(differences(second["optimizer"].state_dict(), first["optimizer"].state_dict()))

    third["optimizer"].step()
    before = copy.deepcopy(third["optimizer"].state_dict())
    with pytest.raises(NotRestorable):
        apply({**third, "model": nn.Linear(1, 1)}, cache.load(record.id), id=record.id)
    assert not list(differences(third["optimizer"].state_dict(), before))


def test_a_mapping_comes_back_exactly_and_lacks_no_live_object(cache):
    def made(**more):
        return {"best": 1.0, "seen": [1], "inner": {"kept": 1, **more}, **more}

    Job().run(cache, 1, progress=made())
    progress = made(late=5)
    Job().run(cache, 2, progress=progress)
    assert progress == made()
    live = made(late=torch.zeros(2))
    session = Job().run(cache, 3, progress=live)
    assert session.start_iteration == 0
    assert any("late was not saved" in line for line in session.messages)
    assert set(live) == {"best", "seen", "inner", "late"}


def test_a_part_named_rng_must_be_the_global_generators(cache):
    with pytest.raises(NotSavable, match="rng"):
        cache.save({"rng": torch.Generator()}, iteration=1)
    assert cache.save({"rng": capture_rng()}, iteration=1).contents == ("rng",)


def test_the_generators_of_a_device_that_is_not_here_are_left_out():
    state = capture_rng()
    expected = torch.rand(())
    absent = {} if torch.backends.mps.is_available() else {"mps": torch.zeros(4, dtype=torch.uint8)}
    restore_rng({**state, **absent})
    assert torch.equal(torch.rand(()), expected)


def test_a_misspelt_argument_and_an_unknown_reason_are_refused(cache):
    with TrainingSession(cache, **Job().objects()) as session:
        with pytest.raises(TypeError):
            session.checkpoint(valloss=1.0)
        with pytest.raises(InvalidValue, match="finished, max_seconds, signal, diverged, error"):
            session.stop("bored")
        session.stop("diverged")
    assert session.stop_reason == "diverged"


def test_a_session_logs_what_it_found_and_that_nothing_is_left(cache, caplog):
    caplog.set_level(logging.INFO, "ckptcache")
    first = Job().run(cache, 2)
    assert first.messages
    assert [m for m in caplog.messages if m in first.messages] == list(first.messages)
    caplog.clear()
    second = Job().run(cache, 2)
    assert [m for m in caplog.messages if m in second.messages] == list(second.messages)
    assert "nothing is left to do: iteration 2 of 2" in caplog.messages


HEARD = """
import logging, sys, torch
from ckptcache import TrainingCache, TrainingSession
for number in range(3):
    if number == 2:
        logging.basicConfig(level=logging.INFO)
    model = torch.nn.Linear(2, 1)
    with TrainingSession(TrainingCache(sys.argv[1]), model=model) as session:
        for _ in session.steps(2):
            pass
    print("--", file=sys.stderr)
"""


def test_a_program_without_logging_hears_it_once_and_one_with_logging_only_through_that(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HEARD, str(tmp_path / "c")], capture_output=True, text=True, check=True, timeout=120
    )
    first, second, third, _ = done.stderr.split("--\n")
    assert "starts fresh: there is nothing to resume from\n" in first
    assert second.count("\nresumes from ckpt_") == 1
    assert second.endswith("\nnothing is left to do: iteration 2 of 2\n")
    assert third.count("resumes from ckpt_") == third.count("INFO:ckptcache:resumes from ckpt_") == 1


def test_what_cannot_be_read_back_is_refused_at_entry_and_leaves_nothing(tmp_path):
    cache = cache_at(tmp_path / "c")
    with pytest.raises(NotSavable, match=r"things\.when"):
        TrainingSession(cache, model=nn.Linear(1, 1), things={"when": Path()}).__enter__()
    assert not cache.cache_dir.exists()


@pytest.mark.parametrize(
    "option",
    [{"checkpoint_interval": 0}, {"max_seconds": -1.0}, {"training_config": {"f": print}}, {"model_config": object()}],
)
def test_options_that_do_not_work_are_refused_before_anything_begins(cache, option):
    with pytest.raises(InvalidValue, match=next(iter(option))):
        TrainingSession(cache, model=nn.Linear(1, 1), **option)


# --- how it ends ---------------------------------------------------------------------------------


def test_the_summary_has_its_keys_and_says_what_the_record_says(cache):
    Job().run(cache, 3, in_step=lambda s, done: s.checkpoint(val_loss=4.0 - done))
    session = Job().run(cache, 5, in_step=lambda s, done: s.checkpoint(val_loss=4.0 - done))
    summary = summary_file(cache)
    assert list(summary) == SUMMARY_KEYS
    assert summary == session.summary()
    assert (summary["start_iteration"], summary["end_iteration"]) == (3, 5)
    assert (summary["first_val_loss"], summary["best_val_loss"], summary["last_val_loss"]) == (0.0, -1.0, -1.0)
    assert summary["parent"] == summary["resumed_from"] == session.resumed_from.id
    assert (summary["saved"], summary["stop_reason"]) == (2, "finished")
    record = cache.sessions()[-1]
    assert record == session.record
    assert record.seconds == summary["seconds"] > 0
    assert summary["iterations_per_second"] == pytest.approx(2 / record.seconds, rel=0.01)


def test_a_diverged_loss_is_told_from_none_in_the_summary(cache):
    session = Job().run(cache, 2, in_step=lambda s, done: s.checkpoint(val_loss=float("nan")))
    assert summary_file(cache)["last_val_loss"] == "nan"
    assert session.summary()["best_val_loss"] is None
    assert Job().run(cache, 1).start_iteration == 0


def test_the_summary_goes_where_it_is_asked_for(cache, tmp_path):
    Job().run(cache, 1, summary_path=str(tmp_path / "new" / "s.json"))
    assert orjson.loads((tmp_path / "new" / "s.json").read_bytes())["end_iteration"] == 1
    assert not (cache.cache_dir / "training_summary.json").exists()


def test_a_summary_that_cannot_be_written_is_said_and_costs_nothing_else(cache, tmp_path, caplog):
    (tmp_path / "file").write_text("mine")
    session = Job().run(cache, 2, summary_path=tmp_path / "file" / "summary.json")
    assert "summary.json could not be written" in caplog.text
    assert session.stop_reason == "finished"
    assert cache.get("latest").iteration == 2


def test_what_was_evicted_is_counted(tmp_path):
    cache = cache_at(tmp_path, max_checkpoints=2)
    session = Job().run(cache, 5, checkpoint_interval=1)
    assert (session.record.saved, session.record.evicted) == (5, 3)
    assert cache.sessions()[0].evicted == 3


def test_an_exception_saves_nothing_and_names_the_last_checkpoint(cache, caplog):
    def in_step(session, done):
        if done == 5:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Job().run(cache, 9, in_step=in_step, checkpoint_interval=2)
    (record,) = cache.sessions()
    assert (record.stop_reason, record.ended_at is None) == ("error", False)
    assert reasons(cache) == [(2, "interval"), (4, "interval")]
    assert cache.get("latest").id in caplog.text
    assert Job().run(cache, 6, resume="auto").start_iteration == 4


def test_an_exception_before_the_first_checkpoint_says_that_there_is_none(cache, caplog):
    with pytest.raises(ZeroDivisionError):
        Job().run(cache, 9, in_step=lambda s, done: 1 / 0)
    assert "no checkpoint was saved" in caplog.text


def test_discard_keeps_nothing_of_the_session(cache):
    Job().run(cache, 2)
    before = reasons(cache)
    (cache.cache_dir / "training_summary.json").unlink()

    def in_step(session, done):
        if done == 6:
            session.discard()  # an iteration at which the loop would save

    session = Job().run(cache, 10, in_step=in_step, checkpoint_interval=2)
    assert session.iteration == 6
    assert reasons(cache) == before
    assert len(cache.sessions()) == 1
    assert not (cache.cache_dir / "training_summary.json").exists()
    assert not list((cache.cache_dir / "sessions").glob("sess_*"))
    assert len(list((cache.cache_dir / "checkpoints").glob("*.pt"))) == 1
    with pytest.raises(SessionClosed):
        session.discard()


def test_discard_spares_what_is_pinned_named_or_a_parent(cache):
    def in_step(session, done):
        if done == 2:
            cache.pin(session.checkpoint().id)
        if done == 3:
            cache.name(session.checkpoint().id, "mine")
        if done == 4:
            parent = session.checkpoint()
            session.checkpoint()
            Job().run(cache, 5, resume=parent.id)
        if done == 5:
            session.discard()

    session = Job().run(cache, 9, in_step=in_step)
    own = {r.iteration for r in cache.checkpoints() if r.session == session.id}
    assert own == {2, 3, 4}
    kept = next(s for s in cache.sessions() if s.id == session.id)
    assert (kept.stop_reason, kept.ended_at is None) == ("discarded", False)


# --- when saving fails ---------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["create", "write", "fsync", "replace"])
def test_a_failed_save_is_counted_and_survived(cache, operation, caplog):
    def in_step(session, done):
        if done == 2:
            with swapped(FailingSystem(0, errno.ENOSPC, operation)) as failing:
                record = session.checkpoint(save_reason="interval")
                cache.wait_until_finished()
            assert failing.hit
            assert record is None or record.id not in [r.id for r in cache.checkpoints(everything=True)]

    session = Job().run(cache, 4, in_step=in_step)
    assert session.record.failed_saves == 1
    assert summary_file(cache)["failed_saves"] == 1
    assert reasons(cache) == [(4, "final")]
    assert "no space left" in caplog.text
    assert not list(cache.cache_dir.rglob("*.tmp"))


def test_a_save_that_failed_for_a_reason_nobody_foresaw_is_not_counted_as_saved(cache, monkeypatch, caplog):
    def broken(*_):
        raise ZeroDivisionError("unforeseen")

    job = Job()
    with pytest.raises(ZeroDivisionError), TrainingSession(cache, **job.objects()) as session:
        for step in session.steps(3):
            job.train_step(step)
            if step == 1:
                cache.wait_until_finished()
                monkeypatch.setattr("ckptcache.saving.ptfile.write", broken)
            session.checkpoint(val_loss=3.0 - step)
    kept = [r.id for r in cache.checkpoints()]
    assert (session.record.saved, session.record.failed_saves, [session.record.best_checkpoint]) == (1, 1, kept)
    assert f"the last checkpoint is {kept[0]}" in caplog.text


def test_a_last_save_that_was_interrupted_is_no_finish(cache, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    job = Job()
    with pytest.raises(KeyboardInterrupt), TrainingSession(cache, **job.objects()) as session:
        for step in session.steps(2):
            job.train_step(step)
        monkeypatch.setattr("ckptcache.saving.ptfile.write", interrupted)
    assert (session.record.saved, session.record.stop_reason) == (0, "signal")
    assert summary_file(cache)["stop_reason"] == "signal"


def test_an_iteration_at_which_two_saves_failed_counts_once(cache):
    with swapped(FailingSystem(0, errno.ENOSPC, "write", lasting=True)) as failing:
        failing.at = 10**9
        job = Job()
        with TrainingSession(cache, **job.objects(), checkpoint_interval=2) as session:
            for step in session.steps(4):
                job.train_step(step)
                if step == 1:
                    failing.at = 0
                    assert session.checkpoint(val_loss=1.0) is None
                if step == 2:
                    failing.at = 10**9
    assert failing.hit
    assert session.record.failed_saves == 1


def test_a_full_disk_during_all_of_the_training_ends_in_an_error(cache):
    Job().run(cache, 1)
    job = Job()
    session = TrainingSession(cache, **job.objects(), checkpoint_interval=2)
    with pytest.raises(SaveFailed), session:
        for step in session.steps(5):
            job.train_step(step)
            if step == 2:
                cache.wait_until_finished()
                full = swapped(FailingSystem(0, errno.ENOSPC, "write", lasting=True))
                full.__enter__()
    full.__exit__(None, None, None)
    assert (session.record.failed_saves, session.record.stop_reason) == (2, "error")
    assert reasons(cache) == [(1, "final"), (2, "interval")]
    assert len(job.losses) == 4


def test_a_real_full_disk(tmp_path, requires):
    requires("root")
    requires("mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    requires("a tmpfs", mounted.returncode == 0)
    try:
        with pytest.raises(SaveFailed, match=r"free|no space"):
            Job().run(cache_at(disk / "cache"), 2, in_step=lambda s, done: done == 1 and fill(disk, leave=2_000))
        assert not list(disk.rglob("*.pt*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def fill(disk, leave):
    status = os.statvfs(disk)
    (disk / "filler").write_bytes(b"x" * max(0, status.f_bavail * status.f_frsize - leave))


def test_a_save_of_somebody_else_that_failed_does_not_cost_the_last_one(cache):
    job = Job()
    with TrainingSession(cache, **job.objects()) as session:
        for step in session.steps(2):
            job.train_step(step)
        cache.ledger.hold(cache.ledger.writer)  # whose lease is synced too
        with swapped(FailingSystem(0, errno.ENOSPC, "fsync")) as failing:
            cache.save({"x": torch.zeros(2)}, iteration=1, blocking=False)
            wait_until(lambda: failing.hit)
    assert session.record.failed_saves == 0
    assert reasons(cache) == [(2, "final")]
    with pytest.raises(SaveFailed, match="no space left"):
        cache.wait_until_finished()


def test_a_second_reason_to_save_tries_again_what_has_failed_meanwhile(cache):
    def in_step(session, done):
        if done == 2:
            with swapped(FailingSystem(0, errno.ENOSPC, "replace")):
                session.checkpoint(save_reason="interval")
                cache.wait_until_finished()
            session.checkpoint(save_reason="interval")

    session = Job().run(cache, 4, in_step=in_step)
    assert (session.record.saved, session.record.failed_saves) == (2, 1)
    assert reasons(cache) == [(2, "interval"), (4, "final")]


def test_a_session_counts_what_its_own_saves_evicted(tmp_path):
    cache, job = cache_at(tmp_path, max_checkpoints=2, auto_cleanup=False), Job()
    for iteration in range(5):
        cache.save({"x": torch.zeros(2)}, iteration=iteration, val_loss=1.0)
    pruned = 0
    with TrainingSession(cache, **job.objects()) as session:
        for step in session.steps(2):
            job.train_step(step)
            session.checkpoint(val_loss=1.0)
            pruned += len(cache.prune().evicted)
    assert pruned > 0
    assert (session.record.saved, session.record.evicted) == (2, 0)


def test_a_folder_that_cannot_be_written_is_said_at_entry(tmp_path):
    with (
        swapped(FailingSystem(0, errno.EACCES, "mkdir")),
        pytest.raises(CacheDirNotWritable, match="permission denied"),
        TrainingSession(cache_at(tmp_path / "c"), model=nn.Linear(1, 1)),
    ):
        pass


# --- beside each other ---------------------------------------------------------------------------


def test_two_sessions_in_one_cache_at_once(cache):
    first, second = Job(), Job(seed=4)
    one = TrainingSession(cache, **first.objects(), checkpoint_interval=2)
    two = TrainingSession(cache, **second.objects(), checkpoint_interval=3, resume="never")
    with one, two:
        for i, j in zip(one.steps(6), two.steps(6), strict=True):
            first.train_step(i)
            second.train_step(j)
    assert [s.stop_reason for s in cache.sessions()] == ["finished", "finished"]
    for session, expected in ((one, {2, 4, 6}), (two, {3, 6})):
        assert {r.iteration for r in cache.checkpoints() if r.session == session.id} == expected


def test_threads_have_sessions_of_their_own(cache):
    errors = []

    def run(width):
        try:
            model = nn.Linear(width, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with TrainingSession(cache, model=model, optimizer=optimizer, checkpoint_interval=2) as session:
                for _ in session.steps(6):
                    optimizer.step()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(width,)) for width in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(cache.checkpoints()) == 9


def test_the_parent_of_a_live_session_stays_until_it_has_saved(tmp_path):
    cache = cache_at(tmp_path, max_checkpoints=1)
    Job().run(cache, 2, in_step=lambda s, done: done == 2 and s.checkpoint(val_loss=5.0))
    job = Job()
    with TrainingSession(cache, **job.objects()) as session:
        Job().run(cache_at(tmp_path, max_checkpoints=1), 3, resume="never", checkpoint_interval=1)
        assert session.resumed_from.id in {r.id for r in cache.checkpoints()}
        session.discard()


def test_auto_goes_on_from_the_latest_of_what_was_cut_short_and_else_from_the_best(tmp_path):
    losses = {2: 1.0, 4: 9.0}
    in_step = lambda s, done: done in losses and s.checkpoint(val_loss=losses[done])  # noqa: E731

    def body():
        def step(session, done):
            in_step(session, done)
            if done == 5:
                session.cache.wait_until_finished()
                os.kill(os.getpid(), signal.SIGKILL)

        Job().run(cache_at(tmp_path), 9, in_step=step, checkpoint_interval=4)

    assert run_child(body) == -signal.SIGKILL
    lease = next((tmp_path / "sessions").glob("sess_*.lock"))
    cache = cache_at(tmp_path)
    session = Job().run(cache, 6, resume="auto")
    assert session.start_iteration == 4
    assert any("was cut short (killed)" in line for line in session.messages)
    assert not lease.exists()
    assert Job().run(cache, 7, resume="auto").start_iteration == 2


def test_logging_a_million_values_holds_few(cache):
    session = TrainingSession(cache, model=nn.Linear(1, 1))
    with session:
        for i in range(50_000):
            session.log(loss=float(i))
        assert sys.getsizeof(session._stretch.tally.curves._points["loss"]) < 20_000
        session.discard()


@pytest.fixture(autouse=True)
def _log_level(caplog):
    caplog.set_level(logging.INFO, logger="ckptcache")
