"""Going back to a checkpoint: what comes next goes on from there, and what came after it stays."""

import logging

import pytest
import torch

from ckptcache.cache import TrainingCache
from ckptcache.errors import AmbiguousId, CheckpointMissing, CheckpointNotFound, InvalidName, NoRollback
from ckptcache.metadata import SessionRecord
from ckptcache.session import TrainingSession
from tests.caches import file_of, flip, ids, save, tiny
from tests.jobs import Job, cache_at, differences


@pytest.fixture
def cache(tmp_path):
    return cache_at(tmp_path / "cache", max_checkpoints=50)


def evaluate_every_2(session, step):
    if step % 2 == 0:
        session.checkpoint(val_loss=10.0 - step)


def train(cache, iters, **options):
    """A session that saves an ever better checkpoint at every second iteration."""
    job = Job()
    return job, job.run(cache, iters, in_step=evaluate_every_2, **options)


def at(cache, iteration, **fields):
    """The first checkpoint of an iteration, in their order."""
    found = [r for r in cache.checkpoints(everything=True) if r.iteration == iteration]
    return min((r for r in found if all(getattr(r, k) == v for k, v in fields.items())), key=lambda r: r.order)


def marks(cache):
    return {r.id: r.rolled_back for r in cache.checkpoints(everything=True)}


def marked(cache):
    return {id for id, mark in marks(cache).items() if mark is not None}


@pytest.fixture
def trained(cache):
    """Two sessions: iterations 2 and 4, then 6 and 8."""
    train(cache, 4)
    train(cache, 8)
    return cache


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", ["best", "latest", "auto"])
def test_the_next_session_goes_on_from_there_on_a_branch_of_its_own(trained, resume):
    target, later = at(trained, 4), {at(trained, i).id for i in (6, 8)}
    saved = trained.load(target.id)
    done = trained.rollback(target.id)
    assert (done.checkpoint.id, set(done.marked), done.unmarked) == (target.id, later, ())
    assert trained.names() == {"rollback": target.id}
    assert trained.best().id == target.id

    job = Job(seed=9)
    with TrainingSession(trained, **job.objects(), resume=resume) as session:
        assert session.resumed_from.id == target.id
        assert list(differences(dict(job.model.state_dict()), dict(saved["model"]))) == []
        assert session.start_iteration == 4
        assert trained.names() == {"rollback": target.id}
        for step in session.steps(8):
            job.train_step(step)
            if step == 4:
                first = session.checkpoint()
                trained.wait_until_finished()
                assert trained.names() == {}
    assert session.record.parent == target.id
    assert first.parents == (target.id,)
    assert marked(trained) == later
    assert later <= set(ids(trained.checkpoints()))
    assert trained.best().id == target.id  # by its loss: 6.0, those after it being marked
    assert trained.get("latest").session == session.id


def test_it_is_said_and_other_batches_come(trained):
    first = Job()
    first.run(cache_at(trained.cache_dir), 12, resume=at(trained, 4).id)
    trained.rollback(at(trained, 4).id)
    for resume in ("latest", "best"):
        job = Job()
        with TrainingSession(trained, **job.objects(), resume=resume) as session:
            for step in session.steps(6):
                job.train_step(step)
                break
            session.discard()
        assert session.record.reseeded
        note = f"rolled back to {at(trained, 4).id}, as asked by `ckptcache rollback`"
        assert any(note in m for m in session.messages)
        assert any("reseeded" in m and "rollback asks for another branch" in m for m in session.messages)
        assert any("as asked by the rollback" in m for m in session.messages)
        assert job.batches[4] != first.batches[4]
        trained.rollback(at(trained, 4).id)


def test_an_id_is_exact_while_a_rollback_is_in_force_and_ends_it(trained):
    target = at(trained, 4)
    trained.rollback(target.id)
    session = Job().run(trained, 6, resume=target.id)
    assert not session.record.reseeded
    assert trained.names() == {}


def test_the_best_afterwards_is_never_a_marked_one(trained):
    target, later = at(trained, 2), {at(trained, i).id for i in (4, 6, 8)}
    trained.rollback(target.id)
    train(trained, 3)
    order = ids(trained.checkpoints())
    assert set(order[-3:]) == later
    explained = {e.record.id: e for e in trained.explain()}
    assert not any(explained[id].eligible or explained[id].chosen for id in later)
    assert all(explained[id].reason.startswith(f"rolled back to {target.id}") for id in later)
    assert trained.best().id == target.id
    for resume in ("best", "latest", "auto"):
        with TrainingSession(trained, **Job().objects(), resume=resume) as session:
            assert session.resumed_from.id not in later
            session.discard()


def test_a_marked_one_can_be_named_pinned_exported_and_resumed_from_by_its_id(trained, tmp_path):
    later = at(trained, 8)
    trained.rollback(at(trained, 4).id)
    trained.name(later.id, "slot")
    trained.pin(later.id)
    assert trained.export("slot", tmp_path / "model.pt").exists()
    session = Job().run(trained, 10, resume="slot")
    assert session.start_iteration == 8
    new = at(trained, 10)
    assert new.rolled_back is None  # somebody wanted it
    assert trained.names()["rollback"] == at(trained, 4).id  # and it isn't what the rollback waits for


def test_a_session_killed_before_it_saved_leaves_it_in_force(trained):
    target = at(trained, 4)
    trained.rollback(target.id)
    with pytest.raises(RuntimeError), TrainingSession(trained, **Job().objects()):
        raise RuntimeError("as good as killed")
    assert trained.names() == {"rollback": target.id}
    with TrainingSession(trained, **Job().objects(), resume="never") as session:
        session.checkpoint(val_loss=30.0)
    assert trained.names() == {"rollback": target.id}  # a fresh start is no descendant
    assert train(trained, 6)[1].start_iteration == 4


def test_what_was_undone_is_as_if_it_had_never_been(trained):
    before = {r.id: r.rolled_back for r in trained.checkpoints()}
    order, best = ids(trained.checkpoints()), trained.best().id
    trained.rollback(at(trained, 2).id)
    undone = trained.undo_rollback()
    assert undone.undone
    assert set(undone.unmarked) == {at(trained, i).id for i in (4, 6, 8)}
    assert (marks(trained), ids(trained.checkpoints()), trained.best().id) == (before, order, best)
    assert trained.names() == {}
    assert all(s.rolled_back is None for s in trained.sessions())
    assert train(trained, 10)[1].start_iteration == 8
    with pytest.raises(NoRollback):
        trained.undo_rollback()


def test_one_that_training_has_followed_is_not_undone(trained):
    trained.rollback(at(trained, 4).id)
    train(trained, 6)
    with pytest.raises(NoRollback, match="gone on from it"):
        trained.undo_rollback()


# --- several -------------------------------------------------------------------------------------


def test_one_that_nothing_followed_is_replaced(trained):
    first, second = at(trained, 2), at(trained, 6)
    trained.rollback(first.id)
    done = trained.rollback(second.id)
    assert done.replaced == first.id
    assert marks(trained) == {**dict.fromkeys(marks(trained)), at(trained, 8).id: second.id}
    trained.undo_rollback()
    assert (marked(trained), trained.names()) == (set(), {})


def test_twice_to_the_same_is_once(trained):
    trained.rollback(at(trained, 4).id)
    before = marks(trained)
    assert trained.rollback(at(trained, 4).id).marked == ()
    assert marks(trained) == before
    trained.undo_rollback()
    assert marked(trained) == set()


def test_back_to_the_branch_that_was_left(trained):
    trained.rollback(at(trained, 2).id)
    train(trained, 3)  # another branch: iteration 3
    other = at(trained, 3)
    done = trained.rollback(at(trained, 6).id)
    assert set(done.unmarked) == {at(trained, 4).id, at(trained, 6).id}
    assert marked(trained) == {at(trained, 8).id}  # and the other branch is none of its descendants
    assert marks(trained)[other.id] is None
    assert train(trained, 7)[1].start_iteration == 6
    trained.rollback(at(trained, 2).id)
    assert marks(trained)[at(trained, 8).id] == at(trained, 2).id  # its own mark, from the first time
    trained.undo_rollback()
    assert marked(trained) == {at(trained, 8).id}


# --- sessions that run ---------------------------------------------------------------------------


def test_a_session_that_runs_goes_on_and_what_it_saves_is_marked(trained):
    target = at(trained, 4)
    other = cache_at(trained.cache_dir, max_checkpoints=50)
    job = Job()
    with TrainingSession(trained, **job.objects(), resume="latest") as session:
        done = other.rollback(target.id)
        assert done.live == (session.id,)
        for step in session.steps(10):
            job.train_step(step)
    late = at(other, 10)
    assert late.rolled_back == target.id
    assert late.parents == (at(other, 8).id,)
    assert other.names() == {"rollback": target.id}
    kept = next(s for s in other.sessions() if s.id == session.id)
    assert (kept.rolled_back, kept.stop_reason, kept.end_iteration) == (target.id, "finished", 10)
    other.undo_rollback()
    assert marked(other) == set()
    assert all(s.rolled_back is None for s in other.sessions())


def test_the_rest_of_the_session_that_saved_it_is_left_behind_too(cache):
    job = Job()
    with TrainingSession(cache, **job.objects()) as session:
        for step in session.steps(4):
            job.train_step(step)
            if step == 1:
                target = session.checkpoint(val_loss=1.0)
                cache.wait_until_finished()
                cache_at(cache.cache_dir).rollback(target.id)
    assert at(cache, 4).rolled_back == target.id
    assert cache.names() == {"rollback": target.id}
    assert train(cache, 6)[1].start_iteration == 2
    assert marked(cache) == {at(cache, 4, session=session.id).id}


# --- what can't be -------------------------------------------------------------------------------


def test_what_is_not_there_is_refused_and_nothing_is_marked(trained, tmp_path):
    foreign = save(TrainingCache(tmp_path / "other"), 1.0).id
    with pytest.raises(CheckpointNotFound, match=str(trained.cache_dir)):
        trained.rollback(foreign)
    with pytest.raises(AmbiguousId):
        trained.rollback("ckpt_")
    evicted, gone = at(trained, 2), at(trained, 6)
    with trained.ledger.change() as change:
        trained.ledger.evict(change, {evicted.id: "rank 9, the lowest"})
    file_of(trained, gone).unlink()
    for id, reason in ((evicted.id, "rank 9"), (gone.id, "gone")):
        with pytest.raises(CheckpointMissing) as refused:
            trained.rollback(id)
        assert f"The record of {id} is there and its file isn't (" in str(refused.value)
        assert reason in str(refused.value)
        assert "choose another checkpoint" in str(refused.value)
    assert (marked(trained), trained.names()) == (set(), {})


def test_nothing_is_made_for_a_refusal(tmp_path):
    cache = TrainingCache(tmp_path / "none")
    with pytest.raises(CheckpointNotFound):
        cache.rollback("x")
    with pytest.raises(NoRollback):
        cache.undo_rollback()
    assert not (tmp_path / "none").exists()


def test_the_name_is_nobodys_to_give_or_take(trained):
    trained.rollback(at(trained, 4).id)
    with pytest.raises(InvalidName):
        trained.name("best", "rollback")
    with pytest.raises(InvalidName, match="--undo"):
        trained.unname("rollback")
    assert trained.get("rollback").id == at(trained, 4).id
    assert Job().run(trained, 5, resume="rollback").start_iteration == 4


def test_a_dry_run_says_the_same_and_changes_nothing(trained):
    index = (trained.cache_dir / "metadata.json").read_bytes()
    planned = trained.rollback(at(trained, 4).id, dry_run=True)
    assert (trained.cache_dir / "metadata.json").read_bytes() == index
    assert planned == trained.rollback(at(trained, 4).id)
    planned = trained.undo_rollback(dry_run=True)
    assert trained.names() != {}
    assert planned == trained.undo_rollback()


def test_one_that_is_damaged_is_passed_over_loudly_each_time(trained, caplog):
    target = at(trained, 4)
    trained.rollback(target.id)
    flip(file_of(trained, target))
    for reason in ("differs", "quarantined"):
        caplog.clear()
        with TrainingSession(trained, **Job().objects()) as session:
            assert session.resumed_from.id == at(trained, 2).id
            session.discard()
        warned = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        assert any(target.id in line and reason in line for line in warned)
    assert any("--undo" in line for line in warned)
    assert trained.names() == {"rollback": target.id}


def test_one_that_does_not_fit_is_passed_over_loudly(trained, caplog):
    target = at(trained, 4)
    trained.rollback(target.id)
    with TrainingSession(trained, model=torch.nn.Linear(3, 3)) as session:
        assert session.resumed_from is None
    assert any(target.id in r.getMessage() and "does not fit" in r.getMessage() for r in caplog.records)
    assert any("was rolled back to, and can't be resumed from" in line for line in session.messages)


def test_one_that_diverged_is_gone_on_from_if_asked_for(cache):
    save(cache, 1.0, iteration=1)
    bad = save(cache, float("nan"), iteration=2)
    cache.rollback(bad.id)
    assert cache.restore(tiny()) is not None
    assert cache.best().id == bad.id


# --- what stays ----------------------------------------------------------------------------------


def test_it_evicts_nothing_and_what_is_marked_goes_first(tmp_path):
    cache = TrainingCache(tmp_path / "c", max_checkpoints=4, min_improvement_threshold=0.0)
    first = save(cache, 5.0, iteration=1)
    second = save(cache, 4.0, iteration=2, parents=[first.id])
    for loss in (3.0, 2.0):
        save(cache, loss, iteration=3, parents=[second.id])
    cache.rollback(first.id)
    assert len(cache.checkpoints()) == 4
    new = save(cache, 6.0, iteration=2, parents=[first.id])
    assert cache.names() == {}
    assert len(cache.checkpoints()) == 4
    assert set(cache.last_evicted) == {second.id}
    assert ids(cache.checkpoints())[:2] == [first.id, new.id]
    save(cache, 7.0, iteration=3, parents=[new.id])
    save(cache, 8.0, iteration=4, parents=[new.id])
    assert marked(cache).isdisjoint(ids(cache.checkpoints()))


def test_what_was_rolled_back_to_is_protected_as_long_as_that_is_in_force(tmp_path):
    cache = TrainingCache(tmp_path / "c", max_checkpoints=2)
    worst = save(cache, 9.0, iteration=1)
    save(cache, 1.0, iteration=2, parents=[worst.id])
    cache.rollback(worst.id)
    for loss in (2.0, 3.0, 4.0):
        save(cache, loss, iteration=9)
    assert worst.id in ids(cache.checkpoints())
    assert cache.prune(dry_run=True).kept[worst.id].startswith("named rollback")


def test_a_new_branch_is_compared_with_what_is_left_of_its_group(trained):
    trained.rollback(at(trained, 2).id)
    record = trained.save(tiny(), iteration=3, val_loss=9.0, if_improved=True)
    assert record is not None
    job = Job()
    with TrainingSession(trained, **job.objects()) as session:
        for step in session.steps(3):
            job.train_step(step)
        # 7.0 improves on the 8.0 that was rolled back to, though what is left behind had 2.0.
        assert session.checkpoint(val_loss=7.0) is not None


def test_sessions_saved_outside_do_not_end_it(trained):
    target = at(trained, 4)
    trained.rollback(target.id)
    with_no_parents = trained.record_session(SessionRecord(id="sess_other"))
    save(trained, 1.0, session=with_no_parents)
    assert trained.names() == {"rollback": target.id}
    save(trained, 1.0, parents=[target.id])
    assert trained.names() == {}


def test_what_was_left_behind_is_not_missed_when_its_file_is_gone(trained, caplog):
    last = at(trained, 8)
    trained.rollback(at(trained, 4).id)
    train(trained, 5)
    file_of(trained, last).unlink()
    for resume in ("best", "latest"):
        with TrainingSession(trained, **Job().objects(), resume=resume) as session:
            session.discard()
        assert not any("would have come first" in line for line in session.messages)


def test_the_latest_is_not_what_was_left_behind(trained):
    trained.rollback(at(trained, 4).id)
    assert trained.get("latest").id == at(trained, 4).id
    assert trained.ledger.view().index.names["rollback"].revision == 0
    trained.rollback(at(trained, 6).id)
    assert trained.get("latest").id == at(trained, 6).id
    assert trained.ledger.view().index.names["rollback"].revision == 1  # so that it wins a merge with the one before
