"""When to end a training so that its last save is in time."""

import math
import time

from ckptcache.deadline import Deadline
from ckptcache.session import TrainingSession
from tests.jobs import Job, cache_at


def test_without_a_limit_it_is_never_due():
    deadline = Deadline(None)
    deadline.stepped(1e9)
    assert not deadline.is_due(math.inf - 1) or deadline.seconds == math.inf
    assert not deadline.is_due(1e12)


def test_one_more_step_and_the_last_save_must_fit():
    deadline = Deadline(100.0)
    deadline.stepped(2.0)
    deadline.stepped(3.0)
    deadline.saved(10.0)
    assert deadline.reserve == 13.0
    assert not deadline.is_due(86.9)
    assert deadline.is_due(87.0)


def test_the_first_step_in_which_things_are_compiled_counts_only_until_there_is_another():
    deadline = Deadline(100.0)
    deadline.stepped(60.0)
    assert deadline.is_due(60.0)
    deadline.stepped(1.0)
    assert not deadline.is_due(61.0)


def test_at_least_one_step_is_made_however_little_time_there_is():
    deadline = Deadline(1.0)
    deadline.saved(50.0)
    assert not deadline.is_due(0.9)
    assert deadline.is_due(1.0)


def test_a_session_ends_within_its_seconds_with_its_last_save(tmp_path):
    job, cache = Job(), cache_at(tmp_path / "cache")
    began = time.monotonic()
    with TrainingSession(cache, **job.objects(), max_seconds=2.0) as session:
        for step in session.steps(10_000):
            job.train_step(step)
            time.sleep(0.4)
    assert time.monotonic() - began < 2.0
    assert session.stop_reason == "max_seconds"
    assert session.iteration >= 2
    assert cache.get("latest").iteration == session.iteration
    assert cache.sessions()[-1].stop_reason == "max_seconds"
