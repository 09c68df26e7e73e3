import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptcache.metadata import CheckpointMetadata, SessionRecord
from ckptcache.policy.branches import follows, lineage, marks_after, marks_of, marks_without, to_put_back

OVER = "2026-01-02T03:04:05Z"


def tree(*rows, sessions=()):
    """Checkpoints of rows (id, session, parents), in their order, and sessions of rows (id, parent, ended)."""
    made = [
        CheckpointMetadata(id=id, sequence=order, session=session, parents=tuple(parents))
        for order, (id, session, *parents) in enumerate(rows)
    ]
    ran = [SessionRecord(id=id, parent=parent, ended_at=OVER if ended else None) for id, parent, ended in sessions]
    return {r.id: r for r in made}, {s.id: s for s in ran}


def rolled_back(checkpoints, sessions, target, marks=None):
    before = marks or marks_of([*checkpoints.values(), *sessions.values()])
    after = marks_after(checkpoints, sessions, target, before)
    return {id: mark for id, mark in after.items() if mark is not None}


TWO_BRANCHES = tree(
    *(("a", "s"), ("b", "s", "a"), ("c", "s", "b"), ("d", "t", "b"), ("e", "t", "d"), ("f", "u", "c"), ("x", None)),
    sessions=[("s", None, True), ("t", "b", True), ("u", "c", True)],
)


def test_all_that_descends_is_marked_and_nothing_else():
    assert rolled_back(*TWO_BRANCHES, "b") == dict.fromkeys("cdeftu", "b")
    assert rolled_back(*TWO_BRANCHES, "c") == dict.fromkeys("fu", "c")
    assert rolled_back(*TWO_BRANCHES, "f") == {}


def test_what_is_marked_already_keeps_its_mark_and_the_way_to_the_target_loses_its():
    checkpoints, sessions = TWO_BRANCHES
    first = marks_after(checkpoints, sessions, "b", marks_of([*checkpoints.values(), *sessions.values()]))
    assert rolled_back(checkpoints, sessions, "a", first) == {**dict.fromkeys("cdeftu", "b"), "b": "a"}
    assert rolled_back(checkpoints, sessions, "c", first) == {**dict.fromkeys("deft", "b"), "u": "b"}


def test_where_a_parents_record_is_gone_the_session_tells():
    checkpoints, sessions = tree(
        *(("a", "s", "gone0"), ("b", "s", "gone1"), ("c", "t", "gone2"), ("d", "t", "gone3"), ("e", None, "gone4")),
        sessions=[("s", None, True), ("t", "b", True)],
    )
    found = lineage(checkpoints, sessions)
    assert found.parents == {"a": (), "b": ("a",), "c": ("b",), "d": ("c",), "e": ()}
    assert found.descendants("a") == {"b", "c", "d"}
    assert found.ancestors("d") == {"a", "b", "c"}


def test_a_session_that_runs_is_marked_with_what_it_goes_on_from():
    checkpoints, sessions = tree(("a", "s"), ("b", "s", "a"), sessions=[("s", None, False), ("t", "a", False)])
    assert rolled_back(checkpoints, sessions, "a") == dict.fromkeys("bst", "a")
    assert rolled_back(checkpoints, sessions, "b") == {"s": "b"}


def test_circles_and_ones_own_parent_end():
    checkpoints, sessions = tree(("a", "s", "a", "c"), ("b", "s", "a"), ("c", "s", "b"), sessions=[("s", "c", True)])
    assert lineage(checkpoints, sessions).descendants("a") == {"b", "c"}
    assert rolled_back(checkpoints, sessions, "a") == {}
    assert not follows(checkpoints["a"], "x", checkpoints)


def test_a_descendant_follows_unless_something_on_the_way_was_rolled_back():
    checkpoints, _ = TWO_BRANCHES
    new = CheckpointMetadata(id="n", parents=("e",))
    assert follows(new, "b", checkpoints)
    assert not follows(new, "c", checkpoints)
    marked = {**checkpoints, "d": checkpoints["d"].changed(rolled_back="b")}
    assert not follows(new, "b", marked)
    assert follows(CheckpointMetadata(id="n", parents=("b",)), "b", marked)
    assert not follows(new.changed(rolled_back="b"), "b", checkpoints)


def test_what_a_session_saved_since_is_as_its_session_was():
    checkpoints, sessions = tree(("a", "s"), ("b", "s", "a"), ("c", "s", "b"), sessions=[("s", None, False)])
    checkpoints = {id: r.changed(rolled_back="a") if id != "a" else r for id, r in checkpoints.items()}
    sessions = {"s": sessions["s"].changed(rolled_back="a")}
    assert set(marks_without(checkpoints, sessions, "a", {"b": None, "s": None}).values()) == {None}
    kept = marks_without(checkpoints, sessions, "a", {"b": None})
    assert kept == {"a": None, "b": None, "c": "a", "s": "a"}


graphs = st.lists(st.tuples(st.sampled_from("st"), st.lists(st.sampled_from("abcdefgh"), max_size=2)), max_size=8)


@given(graphs, st.data())
def test_a_rollback_marks_no_ancestor_and_undoing_it_puts_back_what_was(graph, data):
    rows = [(id, session, *parents) for id, (session, parents) in zip("abcdefgh", graph, strict=False)]
    checkpoints, sessions = tree(*rows, sessions=[("s", "b", True), ("t", None, False)])
    if not checkpoints:
        return
    marks = marks_of([*checkpoints.values(), *sessions.values()])
    for _ in range(2):
        target = data.draw(st.sampled_from(sorted(checkpoints)))
        after = marks_after(checkpoints, sessions, target, marks)
        found = lineage(checkpoints, sessions)
        assert all(after[id] is None for id in {target, *found.ancestors(target)})
        assert all(after[id] for id in found.descendants(target) - found.ancestors(target))
        before = to_put_back(marks, after, target)
        marked = {id: r.changed(rolled_back=after[id]) for id, r in checkpoints.items()}
        ran = {id: s.changed(rolled_back=after[id]) for id, s in sessions.items()}
        assert marks_without(marked, ran, target, before) == marks
        marks = after


@pytest.mark.parametrize("shape", ["chain", "star"])
def test_ten_thousand_checkpoints_take_no_time(shape):
    rows = [(f"c{i:05}", "s", f"c{i - 1 if shape == 'chain' else 0:05}") for i in range(10_000)]
    checkpoints, sessions = tree(*rows, sessions=[("s", None, True)])
    began = time.perf_counter()
    assert len(rolled_back(checkpoints, sessions, "c00000")) == 9_999
    assert time.perf_counter() - began < 2
