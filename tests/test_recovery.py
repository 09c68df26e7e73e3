"""A training that diverges goes back to the best good checkpoint by itself, and stops when that doesn't help."""

import math

import pytest
import torch
from torch import nn

from ckptcache.cache import TrainingCache
from ckptcache.errors import CacheDirNotWritable, IndexUnreadable
from ckptcache.policy.divergence import DivergenceGuard
from ckptcache.recovery import Recovery
from ckptcache.session import TrainingSession
from ckptcache.trainer import CachedTrainer
from tests.jobs import Job, cache_at, differences
from tests.test_trainer import Batches, loss_of, made

GUARD = DivergenceGuard()


@pytest.fixture
def cache(tmp_path):
    return cache_at(tmp_path / "cache", max_checkpoints=50)


class Spoilt:
    """A loss that is NaN at some iterations, as often as is said; what is trained from it is NaN as well."""

    def __init__(self, *iterations, times=1):
        self.left = dict.fromkeys(iterations, times)

    def __call__(self, session, loss):
        if self.left.get(session.iteration, 0) > 0:
            self.left[session.iteration] -= 1
            return loss * math.nan
        return loss


def train(cache, iterations, spoil, *, every=2, job=None, guard=GUARD, **options):
    """A loop of one's own: a checkpoint with a falling loss every few steps."""
    job = job or Job()
    with TrainingSession(cache, **job.objects(), divergence_guard=guard, **options) as session:
        for step in session.steps(iterations):
            loss = spoil(session, job.train_step(step))
            if loss.isnan():
                with torch.no_grad():
                    job.model.out.weight.fill_(math.nan)
            session.log(loss=loss)
            if (step + 1) % every == 0:
                session.checkpoint(val_loss=5.0 / (step + 1))
    return session, job


def branches(cache):
    """Of each session: where it started and ended, why, and at which iteration of which session its parent lies."""
    records = {r.id: r for r in cache.checkpoints(everything=True)}
    number = {session.id: i for i, session in enumerate(cache.sessions())}
    return [
        (s.start_iteration, s.end_iteration, s.stop_reason, number[records[s.parent].session] if s.parent else None)
        for s in cache.sessions()
    ]


def test_a_nan_is_left_behind_and_the_training_ends_where_it_was_to_end(cache):
    session, job = train(cache, 12, Spoilt(7))
    assert branches(cache) == [(0, 7, "diverged", None), (6, 12, "finished", 0)]
    assert session.recoveries == 1
    assert session.stop_reason == "finished"
    assert job.model.out.weight.isfinite().all()
    assert all(r.iteration <= 12 for r in cache.checkpoints())
    state = cache.load("latest")["model"]
    assert all(value.isfinite().all() for value in state.values())


def test_what_it_goes_back_to_is_exact_and_what_comes_then_is_other_batches(cache):
    seen = {}

    def look(divergence):
        seen["state"] = {name: part.state_dict() for name, part in job.objects().items() if name != "loader"}
        seen["state"] = torch.utils._pytree.tree_map(
            lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, seen["state"]
        )
        seen["from"] = divergence.resumed_from

    job = Job()
    session = TrainingSession(cache, **job.objects(), divergence_guard=GUARD)
    session.on("diverged", look)
    spoil, first = Spoilt(5), {}
    with session:
        for step in session.steps(8):
            loss = spoil(session, job.train_step(step))
            first.setdefault(step, job.batches[step])
            session.log(loss=loss)
            if step == 3:
                session.checkpoint(val_loss=1.0)
    saved = cache.load(seen["from"].id)
    assert seen["from"].iteration == 4
    assert not list(differences(seen["state"], {name: saved[name] for name in seen["state"]}))
    assert job.batches[4] != first[4], "the batch that was trained on at the same iteration is another"
    assert cache.sessions()[1].reseeded


def test_the_first_time_keeps_the_learning_rate_the_second_lowers_it_the_third_stops(cache):
    told, rates = [], []
    job = Job()
    session = TrainingSession(cache, **job.objects(), divergence_guard=GUARD)
    session.on("diverged", told.append)
    with session:
        for step in session.steps(50):
            loss = job.train_step(step)
            rates.append(job.scheduler.base_lrs[0])
            session.log(loss=loss * math.nan if step == 4 else loss)
            if step == 1:
                session.checkpoint(val_loss=2.0)
    assert [(d.iteration, d.learning_rate_factor, d.stops) for d in told] == [
        (5, 1.0, False),
        (5, 0.1, False),
        (5, 1.0, True),
    ]
    assert rates == pytest.approx([0.01] * 5 + [0.01] * 3 + [0.001] * 3)
    assert session.stop_reason == "diverged"
    assert [s[:3] for s in branches(cache)] == [(0, 5, "diverged"), (2, 5, "diverged"), (2, 5, "diverged")]
    assert [r.iteration for r in cache.checkpoints()] == [2], "what diverged is not saved"
    assert "stops: the loss is nan at iteration 5" in str(told[-1])


def test_beyond_the_trouble_the_count_begins_anew(cache):
    session, _ = train(cache, 30, Spoilt(5, 11, 17, 23))
    assert session.stop_reason == "finished"
    assert session.recoveries == 4


def test_the_count_begins_anew_where_nothing_is_ever_evaluated_too(cache):
    job, spoil, factors = Job(), Spoilt(6, 16, 26), []
    session = TrainingSession(cache, **job.objects(), divergence_guard=GUARD, checkpoint_interval=2)
    session.on("diverged", lambda divergence: factors.append(divergence.learning_rate_factor))
    with session:
        for step in session.steps(32):
            session.log(loss=spoil(session, job.train_step(step)))
            cache.wait_until_finished()
    assert session.stop_reason == "finished"
    assert factors == [1.0, 1.0, 1.0]


def test_before_the_first_checkpoint_it_goes_back_to_the_start(cache):
    job = Job()
    whole = {name: part.state_dict() for name, part in job.objects().items()}
    start = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, whole)
    seen = []
    session = TrainingSession(cache, **job.objects(), divergence_guard=GUARD)

    def look(divergence):
        seen.append((divergence.resumed_from, list(differences(start["model"], job.model.state_dict()))))

    session.on("diverged", look)
    spoil = Spoilt(3)
    with session:
        for step in session.steps(6):
            session.log(loss=spoil(session, job.train_step(step)))
    assert seen == [(None, [])]
    assert branches(cache) == [(0, 3, "diverged", None), (0, 6, "finished", None)]


def test_a_spike_goes_back_to_before_it_began(cache):
    job = Job()
    spikes = []
    with TrainingSession(cache, **job.objects(), divergence_guard=GUARD, checkpoint_interval=1) as session:
        for step in session.steps(60):
            loss = job.train_step(step)
            if step >= 30 and len(spikes) < GUARD.patience:
                spikes.append(step)
                loss = loss * 100
            session.log(loss=loss)
    assert spikes == list(range(30, 30 + GUARD.patience))
    starts = [s.start_iteration for s in cache.sessions()]
    assert starts == [0, 29], "what was saved while it rose, and what it rose from, is passed over"


def test_nothing_is_saved_between_the_first_sign_and_the_way_back(cache):
    job = Job()
    with TrainingSession(cache, **job.objects(), divergence_guard=GUARD) as session:
        for step in session.steps(3):
            session.log(loss=job.train_step(step) * (math.nan if step == 1 and session.recoveries == 0 else 1))
            record = session.checkpoint()
            assert (record is None) == (step == 1 and session.recoveries == 0)


def test_without_a_guard_a_loop_of_ones_own_is_left_alone(cache):
    session, _ = train(cache, 6, Spoilt(3), guard=None)
    assert session.recoveries == 0
    assert len(cache.sessions()) == 1


def test_a_resumed_training_knows_what_is_usual_from_the_session_before(cache):
    job = Job()
    job.run(cache, 30)
    other = Job()
    with TrainingSession(cache, **other.objects(), divergence_guard=GUARD) as session:
        for step in session.steps(60):
            loss = other.train_step(step)
            session.log(loss=loss * 50 if session.recoveries == 0 else loss)
    assert session.recoveries == 1
    assert [s.start_iteration for s in cache.sessions()] == [0, 30, 30]
    assert cache.sessions()[1].end_iteration == 30 + GUARD.patience


def test_the_leases_of_left_branches_are_given_back(cache):
    session, _ = train(cache, 8, Spoilt(5))
    assert session.is_closed
    assert not list((cache.cache_dir / "sessions").glob("sess_*"))
    assert cache.doctor() == []


def test_plain_values_go_back_too(cache):
    job, seen = Job(), []
    session = TrainingSession(cache, **job.objects(), divergence_guard=GUARD, count=0)
    session.on("diverged", lambda _: seen.append(session.values["count"]))
    spoil = Spoilt(5)
    with session:
        for step in session.steps(6):
            session.values["count"] += 1
            session.log(loss=spoil(session, job.train_step(step)))
            if step == 2:
                session.checkpoint(val_loss=1.0)
    assert seen == [3]


@pytest.mark.parametrize(("every", "logged_every"), [(1, 1), (2, 5)])
def test_a_checkpoint_whose_weights_are_broken_already_is_not_gone_back_to(cache, every, logged_every):
    job, broken = Job(), []
    with TrainingSession(cache, **job.objects(), divergence_guard=GUARD, checkpoint_interval=every) as session:
        for step in session.steps(25):
            loss = job.train_step(step)
            if step == 15 and not broken:
                broken.append(step)
                with torch.no_grad():
                    job.model.out.weight.fill_(math.nan)
            if step % logged_every == 0:
                session.log(loss=loss)
    assert session.stop_reason == "finished"
    assert session.recoveries == 1
    assert session.start_iteration <= 15
    assert job.model.out.weight.isfinite().all()


def test_the_second_try_does_not_begin_where_the_first_one_went_wrong(cache):
    job = Job()
    with TrainingSession(cache, **job.objects(), divergence_guard=GUARD, checkpoint_interval=2) as session:
        for step in session.steps(40):
            loss = job.train_step(step)
            session.log(loss=loss * 100 if step >= 30 and session.recoveries < 2 else loss)
    starts = [s.start_iteration for s in cache.sessions()]
    assert len(starts) == 3
    assert max(starts) <= 30, "what was saved while it rose is passed over at the second try too"


def test_another_training_in_the_same_cache_is_nothing_to_go_back_to(cache):
    train(cache, 20, Spoilt())
    session, _ = train(cache, 8, Spoilt(3), every=100, resume="never")
    assert session.iteration == 8
    assert session.resumed_from is None
    assert session.recoveries == 1


def test_a_session_resumed_from_goes_on_from_what_that_came_from(cache):
    first, _ = train(cache, 6, Spoilt())
    session, _ = train(cache, 12, Spoilt(7), every=100, resume="latest")
    assert session.start_iteration == 6
    assert session.resumed_from.session == first.id


def test_the_start_may_be_gone_back_to_twice_with_all_that_belongs_to_it(cache):
    model, seen = nn.Linear(2, 1), []
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)  # keeps sums from the beginning, and adds to them
    session = TrainingSession(cache, model=model, optimizer=optimizer, divergence_guard=GUARD, count=0)
    look = lambda _: seen.append((session.values["count"], float(optimizer.state[model.weight]["sum"].sum())))  # noqa: E731
    session.on("diverged", look)
    with session:
        for step in session.steps(6):
            loss = model(torch.ones(3, 2)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.values["count"] += 1
            session.log(loss=loss * math.nan if step == 4 and session.recoveries < 2 else loss)
    assert seen == [(0, 0.0), (0, 0.0)]


def test_what_was_registered_after_the_start_goes_back_to_it_too(cache):
    job, sums = Job(), torch.zeros(2)
    with TrainingSession(cache, **job.objects(), divergence_guard=GUARD) as session:
        for step in session.steps(6):
            if step == 1 and session.recoveries == 0:
                session.register("sums", sums)
            if step == 3 and session.recoveries == 0:
                sums.fill_(math.nan)
            session.log(loss=job.train_step(step) + sums.sum())
    assert session.recoveries == 1
    assert sums.tolist() == [0.0, 0.0]


def test_gradients_that_are_nan_are_forgotten(cache):
    job, seen = Job(), []
    session = TrainingSession(cache, **job.objects(), divergence_guard=GUARD, checkpoint_interval=1)
    session.on("diverged", lambda _: seen.extend(p.grad for p in job.model.parameters()))
    with session:
        for step in session.steps(6):
            session.log(loss=job.train_step(step) * (math.nan if step == 3 and session.recoveries == 0 else 1))
            if step == 3 and session.recoveries == 0:
                for parameter in job.model.parameters():
                    parameter.grad.fill_(math.nan)
    assert seen
    assert all(grad is None for grad in seen)


def test_a_loop_left_because_it_has_diverged_did_not_finish(cache):
    job = Job()
    with TrainingSession(cache, **job.objects(), divergence_guard=GUARD) as session:
        for step in session.steps(6):
            job.train_step(step)
            session.log(loss=math.nan if step == 3 else 1.0)
            if step == 3:
                break
    assert session.stop_reason == "diverged"
    assert not cache.checkpoints()


def test_a_full_disk_at_the_way_back_ends_the_session_that_was_open(cache, monkeypatch):
    job, hold = Job(), cache.ledger.hold
    with (
        pytest.raises(CacheDirNotWritable),
        TrainingSession(cache, **job.objects(), divergence_guard=GUARD) as session,
    ):
        for step in session.steps(6):
            session.log(loss=job.train_step(step) * (math.nan if step == 3 else 1))
            if step == 1:
                session.checkpoint(val_loss=1.0)
                cache.wait_until_finished()
            if step == 3:
                monkeypatch.setattr(cache.ledger, "hold", lambda owner: refuse(owner, session.id, hold))
    assert session.stop_reason == "error"
    assert session.iteration == 4
    assert [s.stop_reason for s in cache.sessions()] == ["error"]
    assert not list((cache.cache_dir / "sessions").glob("sess_*"))


def test_discarding_leaves_nothing_of_the_branches_that_were_left(cache):
    job = Job()
    session = TrainingSession(cache, **job.objects(), divergence_guard=GUARD, checkpoint_interval=2).start()
    for step in session.steps(8):
        session.log(loss=job.train_step(step) * (math.nan if step == 5 and session.recoveries == 0 else 1))
    assert session.recoveries == 1
    session.discard()
    assert cache.sessions() == []
    assert cache.checkpoints() == []


def refuse(owner, known, hold):
    if owner != known and owner.startswith("sess_"):
        raise CacheDirNotWritable(path="sessions", reason="no space left on device")
    return hold(owner)


# --- CachedTrainer -------------------------------------------------------------------------------


def test_a_trainer_recovers_by_itself_and_draws_its_batches_from_where_it_went_back(tmp_path):
    calls = []

    def loss(model, batch):
        calls.append(1)
        value = loss_of(model, batch)
        return value * math.nan if len(calls) == 13 else value

    trainer = made(tmp_path, max_iters=20, loss=loss)
    summary = trainer.train()
    assert (summary["stop_reason"], summary["end_iteration"]) == ("finished", 20)
    sessions = trainer.session.cache.sessions()
    assert [(s.start_iteration, s.end_iteration, s.stop_reason) for s in sessions] == [
        (0, 13, "diverged"),
        (10, 20, "finished"),
    ]
    assert trainer.batches.position == 20
    assert (trainer.starting_iteration, trainer.last_iteration) == (0, 20)
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_an_evaluation_after_the_last_step_that_has_diverged_is_recovered_from_as_well(tmp_path):
    seen = []

    def evaluate(model):
        seen.append(1)
        return math.nan if len(seen) == 4 else 1.0 / len(seen)

    trainer = made(tmp_path, max_iters=12, evaluate=evaluate)
    summary = trainer.train()
    assert (summary["stop_reason"], summary["end_iteration"]) == ("finished", 12)
    assert trainer.session.recoveries == 1


def test_a_learning_rate_ten_times_too_high_is_lowered_and_the_branches_show_it(tmp_path):
    """Least squares: gradient descent at 0.3 converges, and beyond 2 / curvature, which is 1, it must diverge."""
    examples = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    examples = torch.linalg.qr(examples)[0] * 8.0  # curvature 2 in every direction
    targets = examples @ torch.ones(4, 1)

    def squares(model, batch):
        return nn.functional.mse_loss(model(examples), targets)

    def trainer_of(lr, **options):
        model = nn.Linear(4, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        given = {"loss": squares, "batches": [0] * 7, "evaluate": lambda m: squares(m, 0), "eval_interval": 5}
        return CachedTrainer(model, optimizer, cache=cache_at(tmp_path, max_checkpoints=50), **given, **options)

    trainer_of(0.3, max_iters=10).train()
    trainer, told = trainer_of(3.0, max_iters=60, overrides={"lr": 3.0}), []
    trainer.session.on("diverged", told.append)
    summary = trainer.train()
    assert [d.learning_rate_factor for d in told] == [1.0, 0.1]
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.3)
    assert (summary["stop_reason"], summary["end_iteration"]) == ("finished", 60)
    assert summary["last_val_loss"] < trainer.resumed_from.val_loss / 1e6
    assert [s[0] for s in branches(trainer.session.cache)] == [0, 10, 10, 10]
    assert [s[2:] for s in branches(trainer.session.cache)] == [
        ("finished", None),
        *[("diverged", 0)] * 2,
        ("finished", 0),
    ]


def test_a_scaler_overflow_is_no_divergence(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    calls = []

    def loss(model, batch):
        calls.append(1)
        value = loss_of(model, batch)
        return value * math.inf if len(calls) in (3, 9) else value

    trainer = made(tmp_path, max_iters=20, loss=loss, scaler=scaler)
    trainer.train()
    assert trainer.session.recoveries == 0
    assert trainer.session.iteration == 20


def test_a_guarded_training_that_does_not_diverge_is_the_same_as_an_unguarded_one(tmp_path):
    ended = []
    for guard in (GUARD, None):
        trainer = made(tmp_path / str(guard is None), divergence_guard=guard, max_iters=30)
        trainer.train()
        ended.append(trainer.model.state_dict())
    assert not list(differences(*ended))


# --- what it leaves behind -----------------------------------------------------------------------


def spoilt_weights(cache, iterations, **options):
    """A training whose weights are NaN from the 9th step on, and whose loss says so one step later."""
    job = Job()
    with TrainingSession(cache, **job.objects(), checkpoint_interval=1, **options) as session:
        for step in session.steps(iterations):
            loss = job.train_step(step)
            session.log(loss=loss if job.model.out.weight.isfinite().all() else loss * math.nan)
            if step == 8:
                with torch.no_grad():
                    job.model.out.weight.fill_(math.nan)
    return session


@pytest.mark.parametrize("resume", ["best", "latest", "auto"])
def test_what_was_saved_of_the_trouble_is_kept_and_nobody_resumes_from_it_unasked(cache, resume):
    session = spoilt_weights(cache, 30, divergence_guard=GUARD)
    assert session.stop_reason == "diverged"
    left = [r for r in cache.checkpoints() if r.rolled_back is not None]
    assert {r.iteration for r in left} == {9}
    assert all(cache.load(r.id)["model"]["out.weight"].isnan().any() for r in left)
    job = Job()
    with TrainingSession(cache, **job.objects(), resume=resume) as session:
        assert session.start_iteration < 9
        assert job.model.out.weight.isfinite().all()


def test_what_was_saved_of_the_trouble_is_marked_when_training_goes_on_as_well(cache):
    job, spoilt = Job(), []
    with TrainingSession(cache, **job.objects(), checkpoint_interval=1, divergence_guard=GUARD) as session:
        for step in session.steps(14):
            loss = job.train_step(step)
            session.log(loss=loss if job.model.out.weight.isfinite().all() else loss * math.nan)
            if step == 8 and not spoilt:
                spoilt.append(session.id)
                with torch.no_grad():
                    job.model.out.weight.fill_(math.nan)
    assert (session.stop_reason, session.recoveries) == ("finished", 1)
    left = [(r.iteration, r.session, r.rolled_back) for r in cache.checkpoints() if r.rolled_back is not None]
    assert left == [(9, spoilt[0], cache.sessions()[1].parent)]


def test_a_checkpoint_from_which_training_diverges_at_once_is_not_tried_again(cache):
    spoilt_weights(cache, 9)
    assert cache.get("latest").iteration == 9, "without a guard, and without another step, nobody has noticed"
    job = Job()
    with TrainingSession(cache, **job.objects(), resume="latest", divergence_guard=GUARD) as session:
        for step in session.steps(14):
            loss = job.train_step(step)
            session.log(loss=loss if job.model.out.weight.isfinite().all() else loss * math.nan)
    assert (session.stop_reason, session.iteration, session.recoveries) == ("finished", 14, 1)
    assert [s.start_iteration for s in cache.sessions()] == [0, 9, 8]


class Ahead(Batches):
    """Gives batches by an iterator that knows its own place, as a loader with workers does."""

    def __iter__(self):
        for place in range(self.position, 10_000):
            self.position = place
            yield super().__next__()


def test_what_an_iterator_has_drawn_ahead_belongs_to_the_branch_that_was_left(tmp_path):
    calls = []

    def loss(model, batch):
        calls.append(1)
        return loss_of(model, batch) * (math.nan if len(calls) == 13 else 1)

    trainer = made(tmp_path, max_iters=20, loss=loss, batches=Ahead())
    trainer.train()
    assert trainer.session.recoveries == 1
    assert trainer.batches.position == 20, "10 before the checkpoint, and 10 after it"


def test_a_disk_that_refuses_the_marks_does_not_keep_it_from_stopping(cache, monkeypatch, caplog):
    def refused(self, **options):
        raise IndexUnreadable(path=cache.cache_dir, reason="input/output error")

    job = Job()
    with TrainingSession(cache, **job.objects(), divergence_guard=GUARD) as session:
        monkeypatch.setattr(
            Recovery, "next_factor", lambda self: monkeypatch.setattr(TrainingCache, "checkpoints", refused)
        )
        for step in session.steps(6):
            session.log(loss=job.train_step(step) * (math.nan if step == 3 else 1))
    assert session.stop_reason == "diverged"
    assert "the checkpoints that have diverged could not be marked" in caplog.text
