"""Signals that reach a training, sent to real processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from ckptcache.session import TrainingSession
from ckptcache.storage import locks
from tests.faults import end_of, start_child, wait_for, wait_until
from tests.jobs import Job, as_python_would, cache_at

ROOT = Path(__file__).parent.parent


def train(folder, *, in_step=None, objects=None, pause=0.0, **options):
    """A training in which nothing ends the loop; every step says that it was made."""
    job = Job()

    def step(session, done):
        (folder / f"step-{done}").touch()
        time.sleep(pause)
        if in_step is not None:
            in_step(session, done)

    return job.run(cache_at(folder / "cache"), 10**6, in_step=step, **options)


def started(folder, **options):
    """A child that trains, once it has made three steps."""
    pid = start_child(lambda: as_python_would(lambda: train(folder, **options)))
    wait_for(folder / "step-3")
    return pid


def the_session(folder):
    return cache_at(folder / "cache").sessions()[-1]


def the_reasons(folder):
    return [r.save_reason for r in sorted(cache_at(folder / "cache").checkpoints(), key=lambda r: r.order)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_after_the_step_and_ends_with_its_code(tmp_path, number, code):
    pid = started(tmp_path)
    os.kill(pid, number)
    assert end_of(pid) == code
    session = the_session(tmp_path)
    assert session.stop_reason == "signal"
    assert the_reasons(tmp_path) == ["signal"]
    (record,) = cache_at(tmp_path / "cache").checkpoints()
    steps = len(list(tmp_path.glob("step-*")))
    assert record.iteration == session.end_iteration == steps
    assert not list((tmp_path / "cache" / "sessions").glob("sess_*"))


def test_what_was_saved_on_a_signal_goes_on_exactly(tmp_path):
    pid = started(tmp_path)
    os.kill(pid, signal.SIGTERM)
    end_of(pid)
    stopped = cache_at(tmp_path / "cache").checkpoints()[0].iteration
    job = Job(seed=9)
    job.run(cache_at(tmp_path / "cache"), stopped + 3, resume="auto")
    whole = Job()
    whole.run(cache_at(tmp_path / "whole"), stopped + 3)
    assert job.losses == {step: whole.losses[step] for step in range(stopped, stopped + 3)}


def test_a_second_interrupt_ends_at_once(tmp_path):
    pid = started(tmp_path, in_step=lambda s, done: done == 4 and time.sleep(60))
    wait_for(tmp_path / "step-4")
    os.kill(pid, signal.SIGINT)
    time.sleep(0.2)
    began = time.monotonic()
    os.kill(pid, signal.SIGINT)
    assert end_of(pid) == 130
    assert time.monotonic() - began < 30
    assert the_session(tmp_path).stop_reason == "signal"
    assert the_reasons(tmp_path) == []


def test_an_interrupt_after_a_termination_ends_at_once(tmp_path):
    pid = started(tmp_path, in_step=lambda s, done: done == 4 and time.sleep(60))
    wait_for(tmp_path / "step-4")
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.2)
    os.kill(pid, signal.SIGINT)
    assert end_of(pid) == 130


def test_the_saving_signal_saves_and_goes_on(tmp_path):
    pid = started(tmp_path, pause=0.01)
    os.kill(pid, signal.SIGUSR1)
    wait_until(lambda: the_reasons(tmp_path) == ["signal"])
    saved = cache_at(tmp_path / "cache").checkpoints()[0].iteration
    wait_for(tmp_path / f"step-{saved + 5}")
    assert the_reasons(tmp_path) == ["signal"]
    os.kill(pid, signal.SIGTERM)
    assert end_of(pid) == 143
    assert the_reasons(tmp_path) == ["signal", "signal"]


def test_handlers_that_were_there_before_are_called_too_and_are_back_afterwards(tmp_path):
    def body():
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, lambda number, frame: (tmp_path / f"called-{number}").touch())

        def in_step(session, done):
            if done == 3:
                os.kill(os.getpid(), signal.SIGUSR1)
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(SystemExit, match="143"):
            train(tmp_path, in_step=in_step)
        os.kill(os.getpid(), signal.SIGINT)  # would raise KeyboardInterrupt if the handler had not come back

    assert end_of(start_child(body)) == 0
    called = {int(p.name.removeprefix("called-")) for p in tmp_path.glob("called-*")}
    assert called == {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}
    assert the_reasons(tmp_path) == ["signal"]


def test_a_handler_that_ends_the_program_ends_it_by_a_signal(tmp_path):
    def body():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        train(tmp_path, in_step=lambda s, done: done == 3 and os.kill(os.getpid(), signal.SIGTERM))

    assert end_of(start_child(lambda: as_python_would(body))) == 7
    assert the_session(tmp_path).stop_reason == "signal"
    assert the_reasons(tmp_path) == []


def test_the_default_handlers_are_back_after_a_session(tmp_path):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    Job().run(cache_at(tmp_path), 2)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_a_signal_is_not_lost_by_discarding(tmp_path):
    def in_step(session, done):
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            session.discard()

    pid = start_child(lambda: as_python_would(lambda: train(tmp_path, in_step=in_step)))
    assert end_of(pid) == 143
    assert cache_at(tmp_path / "cache").sessions() == []


def test_outside_of_the_main_thread_a_session_works_without_signals(tmp_path):
    done = []
    thread = threading.Thread(target=lambda: done.append(Job().run(cache_at(tmp_path), 3)))
    thread.start()
    thread.join()
    assert [(s.iteration, s.stop_reason) for s in done] == [(3, "finished")]


def test_no_checkpoint_is_made_inside_gradient_accumulation(tmp_path):
    """Both signals arrive between two of the backward passes of one step."""

    def body():
        job = Job()
        with TrainingSession(cache_at(tmp_path), **job.objects()) as session:
            for _ in session.steps(100):
                job.optimizer.zero_grad()
                for part in range(4):
                    inputs, targets = job.loader.next_batch()
                    torch.nn.functional.cross_entropy(job.model(inputs), targets.flatten()).backward()
                    if session.iteration == 2 and part == 1:
                        os.kill(os.getpid(), signal.SIGUSR1)
                        os.kill(os.getpid(), signal.SIGTERM)
                job.optimizer.step()

    assert end_of(start_child(lambda: as_python_would(body))) == 143
    (record,) = cache_at(tmp_path).checkpoints()
    assert (record.iteration, cache_at(tmp_path).load(record.id)["loader"]["position"]) == (3, 12)


def test_a_child_of_a_training_can_be_ended(tmp_path):
    def in_step(session, done):
        if done == 2:
            pid = os.fork()
            if pid == 0:
                (tmp_path / "child").touch()
                time.sleep(60)
                os._exit(0)
            wait_for(tmp_path / "child")
            for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
                os.kill(pid, number)
                time.sleep(0.1)
            assert end_of(pid) == -signal.SIGTERM
            session.stop()

    assert end_of(start_child(lambda: train(tmp_path, in_step=in_step))) == 0


def test_a_killed_session_is_known_to_be_dead_and_auto_goes_on_from_its_latest(tmp_path):
    pid = started(tmp_path, checkpoint_interval=2)
    (lease,) = (tmp_path / "cache" / "sessions").glob("sess_*.lock")
    assert locks.lease_state(lease) == "live"
    wait_for(tmp_path / "step-9")  # the save at 8 has begun, so that the one at 6 is over
    os.kill(pid, signal.SIGKILL)
    assert end_of(pid) == -signal.SIGKILL
    assert locks.lease_state(lease) == "dead"

    cache = cache_at(tmp_path / "cache")
    killed, latest = the_session(tmp_path), cache.get("latest")
    assert (killed.stop_reason, killed.ended_at) == (None, None)
    session = Job().run(cache, latest.iteration + 1, resume="auto")
    assert session.resumed_from.id == latest.id
    assert latest.iteration >= 6
    assert not lease.exists()


def test_auto_leaves_a_session_alone_that_is_still_running(tmp_path):
    pid = started(tmp_path, in_step=lambda s, done: done == 2 and s.checkpoint(val_loss=1.0), checkpoint_interval=5)
    wait_for(tmp_path / "step-6")
    try:
        session = Job().run(cache_at(tmp_path / "cache"), 3, resume="auto")
        assert session.start_iteration == 2  # the best, not the latest of the one that runs
    finally:
        os.kill(pid, signal.SIGKILL)
        end_of(pid)


PROGRAM = """
import sys, pathlib
from tests.jobs import Job, as_python_would, cache_at
folder = pathlib.Path(sys.argv[1])
job = Job()
job.run(cache_at(folder), 10**6, in_step=lambda s, done: (folder / f"step-{done}").touch())
"""


@pytest.mark.campaign  # two interpreters that import torch; the main job's tests end processes of their own as well
def test_a_whole_program_ends_with_the_codes_that_a_shell_expects(tmp_path):
    """What Python itself makes of it, in a process that nobody has prepared."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    numbers = (signal.SIGTERM, signal.SIGINT)
    programs = []
    for number in numbers:
        (tmp_path / number.name).mkdir()
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / number.name)]
        programs.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
    for number, program in zip(numbers, programs, strict=True):
        wait_for(tmp_path / number.name / "step-3", seconds=120)
        program.send_signal(number)
    # Python ends by the signal itself after a KeyboardInterrupt, which a shell shows as 130.
    assert [program.wait(60) for program in programs] == [143, -signal.SIGINT]
    for number in numbers:
        assert [r.save_reason for r in cache_at(tmp_path / number.name).checkpoints()] == ["signal"]
