"""Judgements over traces that are made by hand: what is to blame, where it is found first, and why."""

from ckptcache.proof.judging import by_itself, judge
from ckptcache.proof.moments import (
    GENERATOR,
    LOADER,
    MODEL,
    OPTIMIZER,
    OTHER,
    UNREGISTERED,
    Kill,
    Leaves,
    Moment,
    SessionTrace,
)

KINDS = {
    "rng.python": GENERATOR,
    "rng.torch": GENERATOR,
    "loader.position": LOADER,
    "optimizer.param_groups.0.lr": OPTIMIZER,
    "model.w": MODEL,
}
KILL = Kill(session=1, at=5, save=4)


def moment(iteration, changed=None, *, batch="b", logged=None, kinds=KINDS):
    """The state of an iteration: digests that tell of it, and other ones for what has changed."""
    state = dict.fromkeys(kinds, f"{iteration:016d}") | {
        name: f"{value:0>16}" for name, value in (changed or {}).items()
    }
    batches = () if batch is None else (("model", f"{batch}{iteration}"),)
    loss = iteration / 8 if logged is None else logged
    return Moment(
        batches=batches, logged={"loss": float(loss).hex()}, leaves=Leaves(kinds), digests="".join(state.values())
    )


def opened(iteration=0, **more):
    parts = ["rng", "loader", "optimizer", "model"]
    usual = {"from": None, "iteration": iteration, "parts": parts, "fresh": [], "loaders": ["loader"], "messages": []}
    return {**usual, **({"from": f"c{iteration}"} if iteration else {}), **more}


def session(first=0, last=8, at=None, *, number=1, stop="finished", **more):
    """A session's trace; `at` gives moments in place of the usual ones."""
    steps = {i: (at or {}).get(i) or moment(i) for i in range(first + 1, last + 1)}
    start = (at or {}).get(first) or moment(first, batch=None)
    end = moment(last, batch=None)
    return SessionTrace(
        number=number,
        opened=opened(first, **more),
        start=start,
        steps=steps,
        end=end,
        ended={"stop_reason": stop},
        saved={"id": "c4", "iteration": 4},
    )


def judged(resumed, *, whole=None, killed=None, kill=KILL):
    runs = [{s.number: s} for s in (whole or session(), killed or session(last=5), resumed)]
    return judge(*runs, kill).difference


def first(difference):
    return difference.found[0].name


def test_the_same_from_the_kill_to_the_end_is_identical():
    assert judged(session(4)) is None


def test_the_first_thing_by_iteration_is_named_and_within_it_by_cause():
    found = judged(session(4, at={6: moment(6, {"model.w": 1}), 7: moment(7, {"model.w": 1}, batch="x")}))
    assert (first(found), found.iteration, found.is_resume) == ("model.w", 6, True)
    found = judged(session(4, at={7: moment(7, {"model.w": 1}, batch="x")}))
    assert (first(found), found.iteration) == ("batch", 7)
    assert [f.name for f in found.found] == ["batch", "model.w"]


def test_what_was_restored_otherwise_is_found_before_any_step():
    found = judged(session(4, at={4: moment(4, {"model.w": 1}, batch=None)}))
    assert first(found) == "model.w"
    assert "right after the resume" in found.when
    assert "does load_state_dict put back all" in found.hint
    found = judged(session(4, at={4: moment(4, {"model.w": 1}, batch=None)}, fresh=["model"]))
    assert found.hint == "model is not in the checkpoint, and so began anew"


def test_a_checkpoint_that_the_program_saved_in_the_midst_of_an_iteration_need_not_be_the_state_after_it():
    other = session(4, at={4: moment(4, {"model.w": 1}, batch=None)}, **{"from": "c4_of_its_own"})
    assert judged(other) is None


def test_a_loader_is_not_asked_right_after_the_resume():
    kinds = {name: kind for name, kind in KINDS.items() if kind != LOADER}
    assert judged(session(4, at={4: moment(4, batch=None, kinds=kinds)})) is None


def test_a_resume_that_began_anew_is_told_with_its_reasons():
    found = judged(session(0, messages=["starts fresh: no checkpoint fits", "  n_head: saved 2, needed 4"]))
    assert first(found) == "the start"
    assert "n_head: saved 2, needed 4" in found.hint


def test_a_run_that_ends_early_is_told_unless_its_time_was_up():
    found = judged(session(4, 7))
    assert (first(found), found.found[0].how) == ("the length", "it ends after iteration 7, not 8")
    assert judged(session(4, 7, stop="max_seconds")) is None


def test_the_end_counts_as_well():
    resumed = session(4)
    resumed.end = moment(8, {"model.w": 1}, batch=None)
    found = judged(resumed)
    assert (first(found), found.iteration) == ("model.w", None)
    resumed.ended = {"stop_reason": "max_seconds"}
    assert judged(resumed) is None


def test_a_training_that_does_not_repeat_itself_is_not_blamed_on_the_resume():
    killed = session(last=5, at={3: moment(3, {"rng.torch": 1}, batch="x")})
    found = judged(session(4), killed=killed)
    assert (first(found), found.iteration, found.is_resume) == ("batch", 3, False)
    assert "rng.torch differed" in found.hint
    assert "torch.manual_seed(0)" in found.hint


def test_of_generators_without_a_seed_the_one_that_was_drawn_from_is_blamed():
    unseeded = {0: moment(0, {"rng.python": 7, "rng.torch": 1}, batch=None)}
    killed = session(last=2, at={**unseeded, 1: moment(1, {"rng.python": 7, "rng.torch": 2}, logged=9)})
    whole = session(at={0: moment(0, {"rng.python": 8}, batch=None), 1: moment(1, {"rng.python": 8})})
    found = by_itself({1: whole}, {1: killed})
    assert found is not None
    assert "rng.torch differed" in found.hint
    assert "rng.python" not in found.hint


def test_a_generator_without_a_seed_from_which_nothing_is_drawn_does_no_harm():
    def run(first, last, state):
        return session(
            first,
            last,
            at={i: moment(i, {"rng.python": state}, batch="b" if i > first else None) for i in range(first, last + 1)},
        )

    assert judged(run(4, 8, 2), whole=run(0, 8, 1), killed=run(0, 5, 2)) is None
    found = judged(run(4, 8, 3), whole=run(0, 8, 1), killed=run(0, 5, 2))
    assert first(found) == "rng.python"
    assert "right after the resume" in found.when


def test_without_a_seed_nor_a_generator_that_differs_other_causes_are_named():
    found = by_itself({1: session()}, {1: session(at={3: moment(3, batch="x")})})
    assert found is not None
    assert "use_deterministic_algorithms" in found.hint


def test_later_sessions_of_the_process_are_compared_too():
    two = {1: session(), 2: session(number=2)}
    resumed = {1: session(4), 2: session(number=2, at={3: moment(3, {"model.w": 1})})}
    found = judge(two, {1: session(last=5)}, resumed, KILL).difference
    assert (found.session, found.iteration, first(found)) == (2, 3, "model.w")
    assert judge(two, {1: session(last=5)}, {1: session(4)}, KILL).difference.found[0].how == "it was never opened"


def test_a_later_session_that_begins_or_ends_elsewhere_is_no_likeness_unless_time_was_up_before():
    two, killed = {1: session(), 2: session(number=2)}, {1: session(last=5)}
    found = judge(two, killed, {1: session(4), 2: session(8, 8, number=2)}, KILL).difference
    assert (found.session, found.found[0].how) == (2, "it begins at iteration 8, not 0")
    found = judge(two, killed, {1: session(4), 2: session(0, 6, number=2)}, KILL).difference
    assert (found.session, found.found[0].how) == (2, "it ends after iteration 6, not 8")
    short = {1: session(4, 6, stop="max_seconds"), 2: session(6, 8, number=2)}
    assert judge(two, killed, short, KILL).difference is None


# --- hints ---------------------------------------------------------------------------------------


def hint(changed=None, *, batch="b", logged=None, kinds=KINDS, **more):
    other = moment(5, changed, batch=batch, logged=logged, kinds=kinds)
    whole = session(at={i: moment(i, kinds=kinds) for i in range(1, 9)})
    killed = session(last=5, at={i: moment(i, kinds=kinds) for i in range(1, 6)})
    kept = {i: moment(i, kinds=kinds) for i in range(6, 9)}
    return judged(session(4, at={5: other, **kept}, **more), whole=whole, killed=killed).hint


def test_batches_that_differ_ask_for_a_loader_that_is_registered_restored_and_complete():
    assert "no loader or sampler is registered" in hint(batch="x", loaders=[])
    assert "loader is not in the checkpoint c4" in hint(batch="x", fresh=["loader"])
    assert "its state must hold epoch, order and position" in hint(batch="x")
    assert "rng.torch differed as well" in hint({"rng.torch": 1}, batch="x")


def test_generators_that_differ_say_who_may_have_drawn():
    assert "generator=torch.Generator()" in hint({"rng.torch": 1})
    assert "seed before the session is opened" in hint({"rng.python": 1})


def test_a_loss_alone_asks_for_what_is_not_registered():
    assert "what is logged depends on something that isn't registered" in hint(logged=9)
    assert "something that isn't registered takes part in the loss" in hint({"model.w": 1}, logged=9)


def test_a_part_that_was_not_in_the_checkpoint_is_named():
    assert hint({"optimizer.param_groups.0.lr": 1}, fresh=["optimizer"]).startswith(
        "optimizer is not in the checkpoint"
    )


def test_a_learning_rate_asks_for_its_scheduler():
    assert "is the scheduler registered" in hint({"optimizer.param_groups.0.lr": 1})
    assert "What the program sets must follow from `step`" in hint({"optimizer.param_groups.0.lr": 1})
    kinds = {**KINDS, "early_stopping.best": OTHER}
    assert "does its state_dict hold everything" in hint({"early_stopping.best": 1}, kinds=kinds)


def test_a_step_that_differs_alone_asks_for_gradients_that_are_kept():
    assert "zero_grad() in each" in hint({"model.w": 1})


def test_what_nobody_registered_is_named_first_or_last():
    name = f"StepLR{UNREGISTERED}.last_epoch"
    kinds = {**KINDS, name: OTHER}
    assert hint({name: 1, "model.w": 1}, kinds=kinds).startswith(
        "StepLR takes part in the training and is not registered"
    )
    assert hint({name: 1}, kinds=kinds, logged=9).endswith("not registered: StepLR")


def test_an_optimizer_that_nobody_registered_is_named_before_the_scheduler_that_follows_it():
    lost = f"AdamW{UNREGISTERED}.state.0.step"
    kinds = {"scheduler._last_lr": OTHER, lost: OPTIMIZER}
    changed = {5: moment(5, dict.fromkeys(kinds, 1), kinds=kinds)}
    usual = {i: moment(i, kinds=kinds) for i in range(9)}
    found = judged(session(4, at={**usual, **changed}), whole=session(at=usual), killed=session(last=5, at=usual))
    assert first(found) == lost
    assert found.hint.startswith("AdamW takes part in the training and is not registered")
