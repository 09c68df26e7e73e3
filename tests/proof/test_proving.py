"""Proofs of real trainings: where they kill, what they leave behind, and how they end when a run fails."""

import math
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ckptcache.cache import TrainingCache
from ckptcache.errors import InvalidValue, NothingToProve, ProofFailed
from ckptcache.policy.divergence import DivergenceGuard
from ckptcache.proof.moments import Leaves, Moment, SessionTrace
from ckptcache.proof.proving import command_launcher, plan_kills, prove
from ckptcache.session import TrainingSession
from ckptcache.state.rng import seed_everything
from ckptcache.testing import _function_launcher
from tests.faults import run_child, wait_until
from tests.jobs import Job

MOMENT = Moment(leaves=Leaves({}))


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """The place for temporary files, which a proof must leave as empty as it was."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def forked(function, *args):
    return _function_launcher(function, args, "fork")


def session(first, last, number=1):
    steps = dict.fromkeys(range(first + 1, last + 1), MOMENT)
    return SessionTrace(number=number, opened={"iteration": first}, start=MOMENT, steps=steps)


# --- where it kills ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_iterations_are_drawn_by_the_seed_between_the_second_and_the_last_but_one(seed):
    plan = plan_kills({1: session(0, 12)}, kills=5, seed=seed)
    assert plan == plan_kills({1: session(0, 12)}, kills=5, seed=seed)
    points = [kill.at for kill in plan]
    assert points == sorted(set(points))
    assert len(points) == 5
    assert all(2 <= kill.at <= 11 and max(1, kill.at - 2) <= kill.save <= kill.at for kill in plan)
    assert len({plan_kills({1: session(0, 12)}, kills=3, seed=other) for other in range(5)}) > 1


def test_there_are_no_more_kills_than_iterations_to_kill_at():
    assert [kill.at for kill in plan_kills({1: session(0, 3)}, kills=9)] == [2]


def test_given_iterations_are_taken_in_order_and_once_and_must_be_there():
    plan = plan_kills({1: session(10, 20)}, kills=3, at=(20, 11, 20))
    assert [kill.at for kill in plan] == [11, 20]
    assert plan[0].save == 11
    for wrong in (10, 21, -1):
        with pytest.raises(InvalidValue, match="the iterations 11 to 20"):
            plan_kills({1: session(10, 20)}, kills=3, at=(wrong,))


def test_the_first_session_that_is_long_enough_is_killed():
    runs = {1: session(0, 2), 2: session(0, 9, 2), 3: session(0, 9, 3)}
    assert {kill.session for kill in plan_kills(runs, kills=3)} == {2}


def test_too_short_a_training_and_one_without_a_session_prove_nothing():
    with pytest.raises(NothingToProve, match="the longest session did 2 iterations, and it takes 3"):
        plan_kills({1: session(0, 2)}, kills=3)
    with pytest.raises(NothingToProve, match="opened no TrainingSession"):
        plan_kills({}, kills=3)


# --- real ones -----------------------------------------------------------------------------------


def usual(folder, iterations=8):
    cache = TrainingCache(Path(folder) / "cache", min_improvement_threshold=0.0)
    Job().run(cache, iterations, resume="never", summary_path=Path(folder) / "summary.json")


def test_a_training_with_all_sources_of_chance_is_identical_and_leaves_nothing(tmp_path, scratch):
    told = []
    verdict = prove(forked(usual, tmp_path), kills=2, seed=1, told=lambda *what: told.append(what))
    assert verdict.word == "identical"
    assert verdict.difference is None
    assert [text.startswith(word) for (text, _, _), word in zip(told, ["und", "run that was"], strict=False)] == [
        True
    ] * 2
    assert [(number, total) for _, number, total in told] == [(i, 5) for i in range(5)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scratch"]
    assert list(scratch.iterdir()) == []
    lines = verdict.lines()
    (a, b), (x, y) = ([getattr(t, n) for t in verdict.attempts] for n in ("killed_at", "resumed_at"))
    assert lines[0] == f"identical: 8 iterations, killed at {a} and {b}, resumed from {x} and {y} (latest)"
    assert "3 generators, what was logged (loss), the batches" in lines[1]
    assert verdict.to_json()["verdict"] == "identical"
    assert verdict.to_json()["difference"] is None


def test_what_is_kept_says_where(tmp_path, scratch):
    verdict = prove(forked(usual, tmp_path), kills=1, keep=True)
    assert verdict.folder is not None
    assert verdict.folder.parent == scratch.resolve()
    assert {"1.trace", "1.log", "1.json", "3.trace"} <= {p.name for p in verdict.folder.iterdir()}
    assert verdict.lines()[-1] == f"everything is kept in {verdict.folder}"
    assert list(verdict.folder.rglob("*.pt"))


def test_a_cache_that_is_there_already_decides_nothing(tmp_path):
    usual(tmp_path, 5)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert prove(forked(usual, tmp_path), kills=1).iterations == 8
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def two_stages(folder):
    """A short session, one that is killed, and one after it that begins from another cache."""
    for name, iterations in (("short", 2), ("long", 6), ("after", 4)):
        Job().run(TrainingCache(Path(folder) / name), iterations)


def test_of_several_sessions_the_first_long_one_is_killed_and_all_are_compared(tmp_path):
    verdict = prove(forked(two_stages, tmp_path), kills=2)
    assert verdict.word == "identical"
    assert verdict.iterations == 6


def in_parts(folder):
    """One training in a loop of sessions, each going on from the one before."""
    for end in (4, 8):
        seed_everything(end)
        job = Job()
        job.run(TrainingCache(Path(folder) / "cache"), end)


def test_sessions_that_go_on_from_each_other_are_one_training(tmp_path):
    verdict = prove(forked(in_parts, tmp_path), at=(2, 3))
    assert verdict.word == "identical"


def one_after_the_other(folder):
    """Two trainings of their own in one cache, both begun anew whatever is there."""
    for iterations in (6, 9):
        Job(seed=iterations).run(TrainingCache(Path(folder) / "cache"), iterations, resume="never")


@pytest.mark.parametrize("resume", ["latest", "id"])
def test_a_session_after_the_one_that_is_killed_begins_as_it_does_in_the_undisturbed_run(tmp_path, resume):
    verdict = prove(forked(one_after_the_other, tmp_path), at=(3,), resume=resume)
    assert verdict.word == "identical", verdict.lines()


def spoilt(folder):
    """Its loss is NaN once; the guard goes back from there, and on with other batches."""
    job = Job()
    with TrainingSession(
        TrainingCache(Path(folder) / "cache"),
        **job.objects(),
        checkpoint_interval=2,
        divergence_guard=DivergenceGuard(),
    ) as session:
        for step in session.steps(10):
            loss = job.train_step(step)
            is_spoilt = step == 6 and not session.recoveries
            session.log(loss=math.nan if is_spoilt else loss)


def test_a_training_that_diverges_and_goes_back_is_proved_up_to_there(tmp_path):
    verdict = prove(forked(spoilt, tmp_path), at=(3, 6))
    assert verdict.word == "identical", verdict.lines()
    assert verdict.iterations == 6
    assert verdict.lines()[-1].startswith("after iteration 6 the undisturbed run diverged and went back")
    assert verdict.to_json()["diverged"] is True
    with pytest.raises(InvalidValue, match="the iterations 1 to 6"):
        prove(forked(spoilt, tmp_path), at=(8,))


def grown_from(folder, donor):
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cache = TrainingCache(Path(folder) / "cache")
    with TrainingSession(cache, model=model, optimizer=optimizer, warm_start=donor) as session:
        assert session.resumed_from or len(session.warm_start_report.taken) == 2
        for step in session.steps(6):
            loss = model(torch.full((3, 4), float(step))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.log(loss=loss)


def test_a_warm_start_from_a_cache_elsewhere_is_proved_and_leaves_that_alone(tmp_path):
    donor = tmp_path / "donor"
    id = TrainingCache(donor).save({"model": nn.Linear(4, 2)}, iteration=5, val_loss=1.0).id
    before = {p: p.read_bytes() for p in donor.rglob("*") if p.is_file()}
    assert prove(forked(grown_from, tmp_path, f"{donor}:{id}"), kills=1).word == "identical"
    assert {p: p.read_bytes() for p in donor.rglob("*") if p.is_file()} == before


def test_a_warm_start_from_its_own_cache_is_proved_where_the_folder_is_named(tmp_path):
    id = TrainingCache(tmp_path / "cache").save({"model": nn.Linear(4, 2)}, iteration=5, val_loss=1.0).id
    assert prove(forked(grown_from, tmp_path, f"{tmp_path / 'cache'}:{id}"), kills=1).word == "identical"
    assert [record.id for record in TrainingCache(tmp_path / "cache").checkpoints()] == [id]


def two_caches(folder):
    """The second training takes its weights from what the first has left elsewhere."""
    donor = Path(folder) / "donor"
    TrainingCache(donor).save({"model": nn.Linear(4, 2)}, iteration=5, val_loss=1.0)
    grown_from(folder, f"{donor}:best")


def test_a_warm_start_from_a_cache_that_the_run_itself_has_made_finds_it_in_the_scratch_folder(tmp_path):
    seed_everything(3)
    assert prove(forked(two_caches, tmp_path), kills=1).word == "identical"
    assert not (tmp_path / "donor").exists()


def forgets(folder):
    job = Job()
    given = {name: value for name, value in job.objects().items() if name != "loader"}
    with TrainingSession(TrainingCache(Path(folder) / "cache"), **given) as session:
        for step in session.steps(8):
            session.log(loss=job.train_step(step))


def test_a_difference_ends_the_proof_and_is_told_to_programs_too(tmp_path, scratch):
    verdict = prove(forked(forgets, tmp_path), at=(4, 5, 6))
    assert verdict.word == "differs"
    assert len(verdict.attempts) == 1
    found = verdict.to_json()
    assert found["difference"]["first"] == "batch"
    assert found["difference"]["iteration"] == found["kills"][0]["resumed_at"] + 1
    assert found["kills"][0]["identical"] is False
    assert "no loader or sampler is registered" in found["difference"]["hint"]
    assert verdict.lines()[-1] == "  repeat it with --at 4 --seed 0"
    assert list(scratch.iterdir()) == []


def saves_before_the_scheduler(folder):
    job = Job()
    with TrainingSession(TrainingCache(Path(folder) / "cache"), **job.objects()) as session:
        for step in session.steps(8):
            rate = job.scheduler.state_dict()
            session.log(loss=job.train_step(step))
            after = job.scheduler.state_dict()
            job.scheduler.load_state_dict(rate)
            session.checkpoint()
            job.scheduler.load_state_dict(after)


def test_a_checkpoint_that_the_program_takes_before_the_iteration_is_over_is_found(tmp_path):
    lines = prove(forked(saves_before_the_scheduler, tmp_path), kills=1).lines()
    assert lines[0].startswith("differs: scheduler.last_epoch, at iteration ")
    assert "was the iteration over when the program saved?" in "\n".join(lines)


def sometimes_short(folder):
    usual(folder, 8 if not any(Path(folder).glob("run-*")) else 3)
    (Path(folder) / f"run-{os.getpid()}").touch()


def test_a_run_that_ends_before_it_is_killed_is_no_proof(tmp_path, scratch):
    with pytest.raises(ProofFailed, match="killed at iteration 7 could not be made: it ended by itself before that"):
        prove(forked(sometimes_short, tmp_path), at=(7,))
    assert list(scratch.iterdir()) == []


def fails(folder):
    print("on stdout")
    raise RuntimeError("out of luck")


def test_a_run_that_fails_shows_what_it_wrote_at_last(tmp_path):
    with pytest.raises(ProofFailed) as caught:
        prove(forked(fails, tmp_path))
    assert "it ended with 1; it wrote at last:\n" in str(caught.value)
    assert "  | RuntimeError: out of luck" in str(caught.value)


def in_two_processes(folder):
    run_child(lambda: usual(folder, 3))
    usual(folder, 3)


def test_a_training_of_several_processes_says_that_it_cannot_be_proved(tmp_path, scratch):
    with pytest.raises(ProofFailed, match="several processes opened sessions"):
        prove(forked(in_two_processes, tmp_path))
    assert list(scratch.iterdir()) == []


def unlimited(folder):
    Path(folder, "pid").write_text(str(os.getpid()))
    time.sleep(600)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_run_that_takes_too_long_is_ended(tmp_path, scratch):
    with pytest.raises(ProofFailed, match="it took more than 1 seconds"):
        prove(forked(unlimited, tmp_path), timeout=1)
    assert not is_running(int((tmp_path / "pid").read_text()))
    assert list(scratch.iterdir()) == []


def test_ctrl_c_ends_the_run_and_leaves_nothing(tmp_path, scratch):
    def interrupt():
        wait_until((tmp_path / "pid").exists)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        prove(command_launcher([sys.executable, "-c", f"open({str(tmp_path / 'pid')!r}, 'x'); input()\nwhile 1: pass"]))
    assert list(scratch.iterdir()) == []


def leaves_a_worker(folder):
    if os.fork() == 0:
        Path(folder, "worker").write_text(str(os.getpid()))
        time.sleep(600)
        os._exit(0)
    wait_until(Path(folder, "worker").exists)
    fails(folder)


def test_what_a_run_has_started_ends_with_it(tmp_path):
    with pytest.raises(ProofFailed):
        prove(forked(leaves_a_worker, tmp_path))
    pid = int((tmp_path / "worker").read_text())
    wait_until(lambda: not is_running(pid) or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z")


def test_a_command_that_is_not_there_says_so():
    with pytest.raises(ProofFailed, match="no-such-command could not be started"):
        prove(command_launcher(["no-such-command"]))


def unseeded(folder, uses_it, keeps_gradients=False):
    random.seed()
    np.random.seed()
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cache = TrainingCache(Path(folder) / "cache")
    with TrainingSession(cache, model=model, optimizer=optimizer) as session:
        for _ in session.steps(5):
            loss = model(torch.full((2, 4), random.random() if uses_it else 0.5)).sum()
            loss.backward()
            optimizer.step()
            if not keeps_gradients:
                optimizer.zero_grad()
            session.log(loss=loss)


def test_gradients_that_are_kept_from_one_step_to_the_next_are_the_cause_that_is_named(tmp_path):
    lines = prove(forked(unseeded, tmp_path, False, True), kills=1).lines()
    assert lines[0].startswith("differs: model.weight, at iteration ")
    assert "zero_grad()" in "\n".join(lines)


@pytest.mark.parametrize("uses_it", [True, False])
def test_a_generator_without_a_seed_counts_only_where_it_is_used(uses_it, tmp_path):
    verdict = prove(forked(unseeded, tmp_path, uses_it), kills=1)
    lines = verdict.lines()
    if uses_it:
        assert lines[0].startswith("not repeatable: batch differs at iteration 1")
        assert "random.seed(0)" in "\n".join(lines)
        assert "numpy" not in "\n".join(lines)
    else:
        assert verdict.word == "identical", lines


def draws_from_chance(folder):
    seed_everything(0)
    generator = random.SystemRandom()
    model = torch.nn.Linear(2, 1)
    with TrainingSession(TrainingCache(Path(folder) / "cache"), model=model) as session:
        for _ in session.steps(5):
            session.log(loss=generator.random())


def test_a_program_that_calls_no_model_says_that_the_batches_were_not_seen(tmp_path):
    verdict = prove(forked(draws_from_chance, tmp_path), kills=1)
    assert verdict.word == "not_repeatable"
    assert not verdict.batches
    assert "use_deterministic_algorithms" in "\n".join(verdict.lines())
