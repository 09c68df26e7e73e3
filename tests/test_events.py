"""What a session tells those who asked to hear of it."""

import errno
import logging

import pytest
import torch

from ckptcache.errors import CacheDirNotWritable, InvalidValue
from ckptcache.events import Events
from ckptcache.policy.divergence import DivergenceGuard
from ckptcache.session import TrainingSession
from tests.faults import FailingSystem, swapped
from tests.jobs import Job, cache_at

EVENTS = ("resumed", "saved", "evicted", "diverged", "save_failed", "stopped")


@pytest.fixture
def cache(tmp_path):
    return cache_at(tmp_path / "cache", max_checkpoints=2)


class Heard:
    """Everything that a session tells, in its order."""

    def __init__(self, session):
        self.told = []
        for event in EVENTS:
            session.on(event, lambda what, event=event: self.told.append((event, what)))

    def of(self, event):
        return [what for name, what in self.told if name == event]


def listened(cache, iterations, **options):
    job = Job()
    session = TrainingSession(cache, **job.objects(), **options)
    heard = Heard(session)
    with session:
        for step in session.steps(iterations):
            session.log(loss=job.train_step(step))
            session.checkpoint(val_loss=10.0 / (step + 1))
    return session, heard


def test_what_is_saved_is_told_once_it_is_durable_and_what_goes_for_it_with_the_reason(cache):
    _, heard = listened(cache, 4)
    saved, evicted = heard.of("saved"), heard.of("evicted")
    assert [record.iteration for record in saved] == [1, 2, 3, 4]
    assert all(record.size and record.digest for record in saved)
    assert [set(what) for what in evicted] == [{saved[0].id}, {saved[1].id}]
    assert all(reason for what in evicted for reason in what.values())
    assert heard.of("stopped") == ["finished"]
    assert heard.told[-1][0] == "stopped"


def test_a_save_in_the_background_is_told_of_while_training_goes_on(cache):
    job, seen = Job(), []
    session = TrainingSession(cache, **job.objects())
    session.on("saved", lambda record: seen.append((record.iteration, session.iteration)))
    with session:
        for step in session.steps(3):
            job.train_step(step)
            if step == 0:
                session.checkpoint()
                cache.wait_until_finished()
    assert seen[0] == (1, 1)


def test_a_resume_is_told_at_entry_and_a_fresh_start_is_none(cache):
    _, first = listened(cache, 2)
    second, heard = listened(cache, 3, resume="latest")
    assert first.of("resumed") == []
    assert heard.of("resumed") == [second.resumed_from]
    assert heard.told[0][0] == "resumed"


def test_a_save_that_fails_is_told_with_its_error(cache):
    job = Job()
    session = TrainingSession(cache, **job.objects())
    heard = Heard(session)
    with session:
        for step in session.steps(2):
            job.train_step(step)
            if step == 0:
                with swapped(FailingSystem(0, errno.ENOSPC, "fsync")) as system:
                    session.checkpoint()
                    cache.wait_until_finished()
                    assert system.hit
    assert [type(error) for error in heard.of("save_failed")] == [CacheDirNotWritable]
    assert len(heard.of("saved")) == 1


def test_a_handler_that_raises_is_reported_and_the_others_and_the_training_go_on(cache, caplog):
    job, heard = Job(), []
    session = TrainingSession(cache, **job.objects())

    def broken(record):
        raise RuntimeError("no network")

    session.on("saved", broken)
    session.on("saved", heard.append)
    with caplog.at_level(logging.ERROR), session:
        for step in session.steps(2):
            job.train_step(step)
    assert len(heard) == 1
    assert session.iteration == 2
    assert session.record.failed_saves == 0
    assert "of 'saved' raised RuntimeError: no network" in caplog.text
    assert "broken" in caplog.text


def test_an_interrupt_in_a_handler_is_no_failure_of_it(cache):
    def interrupt(_):
        raise KeyboardInterrupt

    events = Events()
    events.on("saved", interrupt)
    with pytest.raises(KeyboardInterrupt):
        events.emit("saved", None)


@pytest.mark.parametrize(("event", "handler"), [("save", print), ("saved", None)])
def test_an_unknown_event_or_what_cannot_be_called_is_refused(cache, event, handler):
    with pytest.raises(InvalidValue, match=r"one of resumed, saved|can't be called"):
        TrainingSession(cache).on(event, handler)


def test_a_divergence_is_told_with_what_is_done_about_it(cache):
    job = Job()
    session = TrainingSession(cache, **job.objects(), divergence_guard=DivergenceGuard())
    heard, spoilt = Heard(session), []
    with session:
        for step in session.steps(6):
            loss = job.train_step(step)
            if step == 3 and not spoilt:
                spoilt.append(loss)
                loss = torch.tensor(float("nan"))
            session.log(loss=loss)
            if step == 1:
                session.checkpoint(val_loss=2.0)
    [divergence] = heard.of("diverged")
    assert divergence.reason == "the loss is nan at iteration 4"
    assert divergence.resumed_from.iteration == 2
    assert not divergence.stops
    assert session.iteration == 6
