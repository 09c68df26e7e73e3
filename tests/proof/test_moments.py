"""Traces, as they are written and read, and what differs between two moments."""

import orjson
import pytest

from ckptcache.proof.moments import (
    BATCH,
    GENERATOR,
    LOADER,
    LOGGED,
    MODEL,
    OPTIMIZER,
    UNREGISTERED,
    Instruction,
    Kill,
    Leaves,
    Moment,
    findings,
    only_parts,
    read_trace,
)

KINDS = {"rng.numpy": GENERATOR, "loader.position": LOADER, "optimizer.state.0.exp_avg": OPTIMIZER, "model.w": MODEL}


def moment(changed=(), *, kinds=KINDS, **more):
    """A moment in which everything has its usual digest, but for what has changed."""
    digests = "".join(("1" if name in changed else "0") * 16 for name in kinds)
    return Moment(leaves=Leaves(kinds), digests=digests, **more)


def names(a, b, **options):
    return [f.name for f in findings(a, b, **options)]


def test_an_instruction_is_read_as_it_was_written():
    given = Instruction(
        trace="t", resume="auto", keeps_never=False, kill=Kill(session=2, at=7, save=5), until={1: 9, 2: 12}
    )
    assert Instruction.from_bytes(given.to_bytes()) == given
    alone = Instruction(trace="t", resume="latest", keeps_never=True)
    assert Instruction.from_bytes(alone.to_bytes()) == alone


def test_equal_moments_show_nothing():
    assert names(moment(), moment()) == []


def test_causes_come_before_effects():
    a = moment(batches=(("model", "x"),), logged={"loss": (0.5).hex()})
    b = moment(KINDS, batches=(("model", "y"),), logged={"loss": (0.25).hex()})
    found = findings(a, b)
    assert [f.name for f in found] == ["batch", "rng.numpy", "loss", *list(KINDS)[1:]]
    assert [f.kind for f in found] == [BATCH, GENERATOR, LOGGED, LOADER, OPTIMIZER, MODEL]
    assert found[2].how == "0.25, not 0.5"


def test_one_of_several_batches_is_told_by_its_number_and_a_batch_too_few_by_its_count():
    three = (("model", "x"), ("model", "y"), ("critic", "z"))
    found = findings(moment(batches=three), moment(batches=(*three[:2], ("critic", "other"))))
    assert [(f.name, f.how) for f in found] == [("batch 3 of 3", "what critic was called with")]
    assert findings(moment(batches=three), moment(batches=three[:2]))[0].how == "there are 2, not 3"


def test_a_loss_that_one_did_not_log_differs():
    assert findings(moment(logged={"loss": (1.0).hex()}), moment())[0].how == "not logged, not 1.0"


def test_a_loader_that_tells_otherwise_of_itself_counts_only_where_its_batches_do_not_speak_for_it():
    seen = {"batches": (("model", "x"),)}
    assert names(moment(**seen), moment({"loader.position"}, **seen)) == []
    assert names(moment(), moment({"loader.position"})) == ["loader.position"]
    assert names(moment(**seen), moment({"loader.position", "model.w"}, **seen)) == ["loader.position", "model.w"]


def test_what_is_ignored_does_not_count():
    assert names(moment(), moment({"rng.numpy"}), ignored=frozenset({"rng.numpy"})) == []


def test_what_only_one_has_differs_unless_nobody_registered_it():
    fewer = {name: kind for name, kind in KINDS.items() if kind != OPTIMIZER}
    assert [f.how for f in findings(moment(), moment(kinds=fewer))] == ["it is missing"]
    assert [f.how for f in findings(moment(kinds=fewer), moment())] == ["it should not be there"]
    stranger = {**KINDS, f"Adam{UNREGISTERED}.step": OPTIMIZER}
    assert names(moment(), moment(kinds=stranger)) == []


def test_a_moment_is_cut_down_to_parts_and_leaves_loaders_and_strangers_out():
    whole = moment(kinds={**KINDS, f"Adam{UNREGISTERED}.step": OPTIMIZER})
    assert list(only_parts(whole, ["rng", "model", "loader"]).state()) == ["rng.numpy", "model.w"]


def test_a_trace_is_read_up_to_the_line_that_a_kill_cut_short():
    usual = {"batches": [["model", "x"]], "logged": {"loss": (1.0).hex()}, "state": "0" * 16}
    lines = [
        {"kind": "leaves", "names": ["model.w"], "kinds": [MODEL]},
        {"kind": "start", "session": 1, "opened": {"iteration": 4, "from": "ckpt"}, **usual},
        {"kind": "step", "session": 1, "iteration": 5, **usual},
        {"kind": "saved", "session": 1, "saved": {"id": "c5", "iteration": 5}},
        {"kind": "leaves", "names": ["model.v"], "kinds": [MODEL]},
        {"kind": "step", "session": 1, "iteration": 6, **usual},
        {"kind": "end", "session": 1, "ended": {"stop_reason": "finished"}, **usual},
    ]
    data = b"".join(orjson.dumps({**line, "process": 7}) + b"\n" for line in lines) + b'{"kind": "st'
    (session,) = read_trace(data).values()
    assert (session.first, session.last) == (4, 6)
    assert [list(session.steps[i].state()) for i in (5, 6)] == [["model.w"], ["model.v"]]
    assert session.saved["id"] == "c5"
    assert session.end is not None
    assert read_trace(b"") == {}
    with pytest.raises(ValueError, match="several processes"):
        read_trace(data[: data.rindex(b"\n") + 1] + data.replace(b'"process":7', b'"process":8'))
