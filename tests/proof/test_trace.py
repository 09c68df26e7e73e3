"""What a session records when it is asked to, what it does on the way, and that it records nothing otherwise."""

import copy
import io
import logging
import os
import re
import signal

import pytest
import torch
from torch import nn

from ckptcache.proof.moments import GENERATOR, LOADER, MODEL, OPTIMIZER, OTHER, VARIABLE, Instruction, Kill, read_trace
from ckptcache.proof.trace import Recorder, Trace, from_environment, kind_of
from ckptcache.session import TrainingSession
from tests.faults import run_child
from tests.jobs import Job, cache_at


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Ask for a trace; returns a function that reads it."""

    def ask(**given):
        usual = {"trace": str(tmp_path / "trace"), "resume": "latest", "keeps_never": True}
        (tmp_path / "instruction").write_bytes(Instruction(**{**usual, **given}).to_bytes())
        monkeypatch.setenv(VARIABLE, str(tmp_path / "instruction"))
        return lambda: read_trace((tmp_path / "trace").read_bytes())

    return ask


def test_without_an_instruction_nothing_is_recorded_and_no_model_is_hooked(tmp_path):
    assert type(from_environment()) is Trace
    job = Job()
    job.run(cache_at(tmp_path / "cache"), 2)
    assert not job.model._forward_pre_hooks


def test_each_iteration_has_its_batch_its_loss_its_state_and_its_generators(tmp_path, asked):
    read = asked()
    job = Job()
    job.run(cache_at(tmp_path / "cache"), 3)
    session = read()[1]
    assert list(session.steps) == [1, 2, 3]
    assert [m.logged["loss"] for m in session.steps.values()] == [job.losses[i].hex() for i in range(3)]
    assert [[name for name, _ in m.batches] for m in session.steps.values()] == [["model"]] * 3
    assert len({m.batches for m in session.steps.values()}) == 3
    kinds = session.steps[1].leaves.kinds
    assert {name: kind for name, kind in kinds.items() if kind == GENERATOR} == {
        "rng.python": GENERATOR,
        "rng.numpy": GENERATOR,
        "rng.torch": GENERATOR,
    }
    assert kinds["model.embed.weight"] == MODEL
    assert kinds["optimizer.state.0.exp_avg (model.embed.weight)"] == OPTIMIZER
    assert kinds["optimizer.param_groups.0.lr"] == OPTIMIZER
    assert kinds["scheduler.last_epoch"] == OTHER
    assert kinds["loader.position"] == LOADER
    assert session.opened["from"] is None
    assert session.ended == {"iteration": 3, "stop_reason": "finished"}
    assert not job.model._forward_pre_hooks


def test_recording_changes_nothing_that_is_trained(tmp_path, asked, monkeypatch):
    asked()
    traced = Job()
    traced.run(cache_at(tmp_path / "a"), 5)
    monkeypatch.delenv(VARIABLE)
    plain = Job()
    plain.run(cache_at(tmp_path / "b"), 5)
    assert traced.losses == plain.losses
    assert traced.draws == plain.draws


def test_it_tells_what_was_restored_what_was_fresh_and_what_was_not_used(tmp_path, asked):
    job = Job()
    with TrainingSession(cache_at(tmp_path / "cache"), **job.objects(), extra={"n": 1}) as session:
        for step in session.steps(2):
            job.train_step(step)
    read = asked()
    new = Job()
    with TrainingSession(cache_at(tmp_path / "cache"), **new.objects(), noise=torch.Generator()):
        pass
    opened = read()[1].opened
    assert opened["iteration"] == 2
    assert opened["from"].startswith("ckpt_")
    assert opened["restored"] == ["model", "optimizer", "scheduler", "loader"]
    assert opened["fresh"] == ["noise"]
    assert "extra" in opened["unused"]
    assert opened["loaders"] == ["loader"]


def test_the_policy_of_the_instruction_wins_and_says_so_but_never_may_stay(tmp_path, asked, caplog):
    Job().run(cache_at(tmp_path / "cache"), 2)
    asked(resume="latest")
    with caplog.at_level(logging.WARNING, "ckptcache"):
        assert TrainingSession(cache_at(tmp_path / "cache"), resume="best").resume == "latest"
    assert "ckptcache prove decides how this session resumes: latest, in place of best" in caplog.text
    assert TrainingSession(cache_at(tmp_path / "cache"), resume="never").resume == "never"
    asked(resume="auto", keeps_never=False)
    assert TrainingSession(cache_at(tmp_path / "cache"), resume="never").resume == "auto"


def test_it_saves_and_is_killed_where_it_was_told_to(tmp_path, asked):
    read = asked(kill=Kill(session=1, at=5, save=3))
    assert run_child(lambda: Job().run(cache_at(tmp_path / "cache"), 9)) == -signal.SIGKILL
    session = read()[1]
    assert session.last == 5
    assert session.end is None
    assert session.saved["iteration"] == 3
    assert cache_at(tmp_path / "cache").get("latest").id == session.saved["id"]


def test_it_stops_where_it_was_told_to(tmp_path, asked):
    read = asked(until={1: 4})
    job = Job()
    session = job.run(cache_at(tmp_path / "cache"), 9)
    assert session.iteration == 4
    assert session.stop_reason == "finished"
    assert read()[1].last == 4


def test_sessions_of_a_process_are_numbered(tmp_path, asked):
    read = asked()
    for name in ("a", "b"):
        Job().run(cache_at(tmp_path / name), 2)
    assert list(read()) == [1, 2]


def test_an_error_leaves_its_reason_and_no_state(tmp_path, asked):
    read = asked()

    def fail(session, iteration):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        Job().run(cache_at(tmp_path / "cache"), 3, in_step=fail)
    assert read()[1].ended["stop_reason"] == "error"


def test_what_is_registered_later_is_recorded_from_then_on(tmp_path, asked):
    read = asked()
    job = Job()
    late = nn.Linear(2, 2)
    with TrainingSession(cache_at(tmp_path / "cache"), **job.objects()) as session:
        session.register("late", late)
        for step in session.steps(1):
            job.train_step(step)
            late(torch.ones(1, 2))
    moment = read()[1].steps[1]
    assert [name for name, _ in moment.batches] == ["model", "late"]
    assert moment.leaves.kinds["late.weight"] == MODEL


def test_only_calls_in_training_mode_are_batches_and_no_child_records_any(tmp_path, asked):
    read = asked()
    model = nn.Linear(2, 2)
    with TrainingSession(cache_at(tmp_path / "cache"), model=model) as session:
        for _ in session.steps(1):
            model(input=torch.ones(1, 2))
            model.eval()(torch.zeros(1, 2))
            model.train()
            assert run_child(lambda: model(torch.ones(1, 2))) == 0
    assert len(read()[1].steps[1].batches) == 1


def test_a_copy_of_a_model_and_a_saved_one_bring_no_hook_that_records(tmp_path, asked):
    read = asked()
    model = nn.Linear(2, 2)
    with TrainingSession(cache_at(tmp_path / "cache"), model=model) as session:
        for _ in session.steps(1):
            copy.deepcopy(model)(torch.ones(1, 2))
            torch.save(model, io.BytesIO())
    assert read()[1].steps[1].batches == ()


# --- strangers -----------------------------------------------------------------------------------


class Drop(nn.Module):
    def __init__(self):
        super().__init__()
        self.noise = torch.Generator().manual_seed(1)


def strangers(read):
    named = {name for name in read()[1].steps[1].leaves.kinds if "(not registered)" in name}
    # Other tests of this process may have left such objects behind, which are counted.
    return named | {re.sub(r"-\d+(?= \()", "", name) for name in named}


def test_what_lives_beside_what_is_registered_is_named(tmp_path, asked):
    read = asked()
    model = nn.Sequential(nn.Linear(2, 2), Drop())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    average = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    wrapped = nn.Sequential(model)
    criterion = nn.CrossEntropyLoss()
    with TrainingSession(cache_at(tmp_path / "cache"), model=model, optimizer=optimizer) as session:
        for _ in session.steps(1):
            optimizer.step()
    found = strangers(read)
    assert "StepLR (not registered).last_epoch" in found
    assert "AveragedModel (not registered).module.weight" in found
    assert "model.1.noise (not registered)" in found
    owners = {name.partition(" ")[0].partition("-")[0] for name in found}
    assert not owners & {"Sequential", "Linear", "SGD", "CrossEntropyLoss", "Drop"}
    del scheduler, average, wrapped, criterion


def test_a_generator_that_is_registered_is_no_stranger(tmp_path, asked):
    read = asked()
    model = Drop()
    with TrainingSession(cache_at(tmp_path / "cache"), model=model, noise=model.noise) as session:
        for _ in session.steps(1):
            pass
    assert not any("model.noise" in name for name in strangers(read))


def test_objects_are_told_apart_by_what_they_are_to_a_training():
    parameter = nn.Parameter(torch.ones(1))
    assert kind_of(nn.Linear(1, 1)) == MODEL
    assert kind_of(torch.optim.SGD([parameter])) == OPTIMIZER
    assert kind_of(torch.Generator()) == GENERATOR
    assert kind_of(Job().loader) == LOADER
    assert kind_of(torch.utils.data.DataLoader([1, 2])) == LOADER
    for plain in ({"a": 1}, [1], torch.ones(2), "text", 3, torch.amp.GradScaler("cpu")):
        assert kind_of(plain) == OTHER


def test_a_child_that_was_forked_writes_nothing(tmp_path, asked):
    read = asked()
    job = Job()
    with TrainingSession(cache_at(tmp_path / "cache"), **job.objects()) as session:
        for step in session.steps(1):
            job.train_step(step)
            assert isinstance(session._trace, Recorder)
            assert run_child(lambda: session._trace.end(9, "finished")) == 0
    lines = (tmp_path / "trace").read_bytes()
    assert lines.count(b'"kind":"end"') == 1
    assert f'"process":{os.getpid()}'.encode() in lines
    assert read()[1].end is not None
