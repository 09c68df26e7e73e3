import dataclasses
import time
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptcache.metadata import CheckpointMetadata
from ckptcache.policy.retention import Candidate, plan, protections

UNLIMITED = 10**18


def candidate(id, group="g", rank=0, *, size=10, sequence=0, session=None, pinned=False, used=0):
    record = CheckpointMetadata(id=id, sequence=sequence, session=session, pinned=pinned)
    return Candidate(record=record, size=size, group=group, rank=rank, last_used=(used, ""))


def tail(group, count, *, used=0, size=10):
    return [candidate(f"{group}{i}", group, i, used=used, size=size, sequence=i) for i in range(count)]


def evict(candidates, keep, protected=(), max_bytes=UNLIMITED):
    return plan(candidates, dict.fromkeys(protected, "asked for"), max_checkpoints=keep, max_bytes=max_bytes)


def protect(candidates, **changes):
    settings = {"names": {}, "current_group": "none", "live_sessions": (), "live_parents": {}, "keep_latest": 0}
    return protections(candidates, **(settings | changes))


# --- protection ----------------------------------------------------------------------------------


def test_the_named_and_the_pinned_are_protected():
    found = protect([candidate("a"), candidate("b", pinned=True), candidate("c")], names={"slot-1": "a", "x": "gone"})
    assert found == {"a": "named slot-1", "b": "pinned"}


def test_the_best_of_the_current_group_is_protected_and_no_other_best():
    candidates = [*tail("g", 3), *tail("h", 3)]
    assert protect(candidates, current_group="g") == {"g0": "best of the current group"}


def test_a_diverged_one_is_never_the_best():
    assert protect(tail("g", 3), current_group="g", diverged=["g0"]) == {"g1": "best of the current group"}
    assert protect(tail("g", 2), current_group="g", diverged=["g0", "g1"]) == {}


def test_the_latest_of_every_live_session_and_of_the_newest_are_protected():
    rows = [("a", 1, "live"), ("b", 2, "live"), ("c", 3, "old"), ("d", 4, "new"), ("e", 5, "new")]
    candidates = [candidate(id, sequence=sequence, session=session) for id, sequence, session in rows]
    found = protect(candidates, live_sessions={"live"}, keep_latest=1)
    assert found == {"b": "latest of the live session live", "e": "latest of the newest session new"}
    assert set(protect(candidates, live_sessions={"live"}, keep_latest=5)) == {"a", "b", "d", "e"}
    assert protect(candidates, live_sessions={"live"}, keep_latest=0) == {}


def test_what_was_saved_by_hand_counts_as_a_session_of_its_own():
    candidates = [candidate("a", sequence=1), candidate("b", sequence=2), candidate("c", sequence=0, session="s")]
    assert protect(candidates, keep_latest=1) == {"b": "latest saved outside of a session"}


def test_the_parent_of_a_live_session_is_protected():
    assert protect([candidate("a"), candidate("b")], live_parents={"a": "s"}) == {"a": "parent of live session s"}


def test_all_reasons_are_given():
    found = protect([candidate("a", pinned=True)], names={"y": "a", "x": "a"}, current_group="g", keep_latest=1)
    assert found["a"] == "named x, named y, pinned, best of the current group, latest saved outside of a session"


def test_nothing_is_protected_where_nothing_is():
    assert protect([], names={"x": "a"}, current_group="g", live_sessions={"s"}, keep_latest=2) == {}


# --- the plan ------------------------------------------------------------------------------------


def test_within_the_limits_everything_stays():
    found = evict(tail("g", 3), keep=3, max_bytes=30)
    assert (set(found.kept), found.evicted, found.over_limit) == ({"g0", "g1", "g2"}, {}, None)


def test_the_lowest_go_first():
    assert list(evict(tail("g", 5), keep=2).evicted) == ["g4", "g3", "g2"]


def test_pruning_by_size_keeps_the_best():
    found = evict(tail("g", 5, size=100), keep=10, max_bytes=250)
    assert set(found.kept) == {"g0", "g1"}
    assert "500 bytes exceed max_cache_size_gb" in found.evicted["g4"]


def test_a_reason_names_the_rank_and_the_limit():
    reason = evict(tail("g", 3), keep=2, max_bytes=5).evicted["g2"]
    assert reason.startswith("rank 3, the lowest of its group that may go: 3 checkpoints exceed max_checkpoints 2 and ")


def test_the_longest_tail_gives_first():
    assert list(evict([*tail("a", 2), *tail("b", 4)], keep=3).evicted) == ["b3", "b2", "a1"]


def test_the_longest_tail_gives_first_even_when_it_was_used_last():
    assert list(evict([*tail("a", 4, used=9), *tail("b", 2, used=0)], keep=4).evicted) == ["a3", "a2"]


def test_a_groups_best_is_no_part_of_its_tail():
    candidates = [*tail("a", 3, used=0), *tail("b", 3, used=1)]
    assert list(evict(candidates, keep=5, protected=["a0"]).evicted) == ["a2"]


def test_of_equal_tails_the_least_recently_used_gives():
    assert list(evict([*tail("a", 2, used=1), *tail("b", 2, used=0)], keep=3).evicted) == ["b1"]
    assert list(evict([*tail("a", 2, used=0), *tail("b", 2, used=1)], keep=3).evicted) == ["a1"]


def test_lone_ones_go_last_and_the_least_recently_used_first():
    candidates = [*tail("a", 1, used=3), *tail("b", 1, used=1), *tail("c", 3, used=0)]
    found = evict(candidates, keep=1, protected=["c0"])
    assert list(found.evicted) == ["c2", "c1", "b0", "a0"]
    assert found.evicted["b0"].startswith("the last of the least recently used group")


def rolled_back(candidates, *places):
    marked = {c.id: dataclasses.replace(c, record=c.record.changed(rolled_back="r")) for c in candidates}
    return [marked[c.id] if i in places else c for i, c in enumerate(candidates)]


def test_what_was_rolled_back_goes_before_all_others_and_not_unless_something_must():
    candidates = rolled_back([*tail("a", 4), *tail("b", 2)], 2, 5)
    assert evict(candidates, keep=6).evicted == {}
    found = evict(candidates, keep=3)
    assert list(found.evicted) == ["a2", "b1", "a3"]
    assert found.evicted["a2"] == "rolled back to r: 6 checkpoints exceed max_checkpoints 3"
    assert list(evict(candidates, keep=3, protected=["a2"]).evicted) == ["b1", "a3", "a1"]
    assert list(evict(rolled_back([*tail("a", 3), *tail("b", 1)], 3), keep=3).evicted) == ["b0"]


def test_what_was_rolled_back_is_neither_the_best_nor_the_newest_and_a_live_sessions_latest_all_the_same():
    rows = [("a", 0, 1, "old"), ("b", 1, 2, "new"), ("c", 2, 3, "new")]
    made = [candidate(id, rank=rank, sequence=order, session=session) for id, rank, order, session in rows]
    candidates = rolled_back(made, 1, 2)
    assert protect(candidates, keep_latest=1) == {"a": "latest of the newest session old"}
    assert protect(candidates, keep_latest=1, live_sessions={"new"})["c"] == "latest of the live session new"
    assert "c" in protect(rolled_back(made, 2), names={"x": "c"})
    assert protect(rolled_back(made, 0), current_group="g") == {"b": "best of the current group"}
    assert protect(rolled_back(made, 0, 1, 2), current_group="g", keep_latest=1) == {}


def test_protected_ones_do_not_make_a_tail():
    candidates = [*tail("a", 6), *tail("b", 3)]
    found = evict(candidates, keep=7, protected=["a1", "a2", "a3", "a4"])
    assert list(found.evicted) == ["b2", "a5"]


def test_a_group_with_protected_members_gives_its_best_before_another_gives_its_only_one():
    found = evict([*tail("a", 2, used=9), *tail("b", 1, used=0)], keep=2, protected=["a1"])
    assert list(found.evicted) == ["a0"]


def test_what_is_protected_stays_above_a_limit_with_a_warning_that_names_it():
    found = evict(tail("g", 4), keep=2, protected=["g1", "g2", "g3"])
    assert set(found.kept) == {"g1", "g2", "g3"}
    assert found.over_limit == "3 checkpoints exceed max_checkpoints 2, all of them protected"
    assert found.kept["g3"] == "asked for"
    assert "30 bytes" in evict(tail("g", 3), keep=9, protected=["g0", "g1", "g2"], max_bytes=20).over_limit


def test_ten_thousand_are_planned_without_delay():
    candidates = [candidate(f"c{i:05}", f"g{i % 300}", i // 300, used=i % 300, sequence=i) for i in range(10_000)]
    start = time.process_time()
    protected = protect(candidates, current_group="g7", names={"x": "c00001"}, keep_latest=3)
    found = plan(candidates, protected, max_checkpoints=10, max_bytes=UNLIMITED)
    assert len(found.kept) == 10
    # A quadratic plan takes minutes; the bound is far from both, as this is no measurement.
    assert time.process_time() - start < 10


# --- properties ----------------------------------------------------------------------------------


@st.composite
def situations(draw):
    rows = draw(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 50), st.booleans()), max_size=14))
    used = {group: draw(st.integers(0, 2)) for group in "abcd"}
    seen = Counter()
    candidates, protected = [], {}
    for i, (group, size, is_protected) in enumerate(rows):
        candidates.append(candidate(f"id{i}", group, seen[group], size=size, sequence=i, used=used[group]))
        seen[group] += 1
        if is_protected and draw(st.booleans()):
            protected[f"id{i}"] = "asked for"
    return candidates, protected, {"max_checkpoints": draw(st.integers(1, 12)), "max_bytes": draw(st.integers(0, 400))}


def exceeds(candidates, limits):
    return len(candidates) > limits["max_checkpoints"] or sum(c.size for c in candidates) > limits["max_bytes"]


@given(situations())
def test_a_limit_is_exceeded_only_by_what_is_protected(situation):
    candidates, protected, limits = situation
    found = plan(candidates, protected, **limits)
    kept = [c for c in candidates if c.id in found.kept]
    assert exceeds(kept, limits) == (found.over_limit is not None)
    if found.over_limit:
        assert set(found.kept) <= set(protected)


@given(situations())
def test_everything_is_kept_or_evicted_and_the_protected_are_kept(situation):
    candidates, protected, limits = situation
    found = plan(candidates, protected, **limits)
    assert set(found.kept) | set(found.evicted) == {c.id for c in candidates}
    assert not set(found.kept) & set(found.evicted)
    assert not set(found.evicted) & set(protected)
    assert all([*found.kept.values(), *found.evicted.values()])


@given(situations())
def test_no_more_goes_than_must(situation):
    candidates, protected, limits = situation
    found = plan(candidates, protected, **limits)
    if found.evicted:
        last = list(found.evicted)[-1]
        assert exceeds([c for c in candidates if c.id in found.kept or c.id == last], limits)


@given(situations())
def test_no_group_loses_its_only_one_while_another_has_a_tail(situation):
    candidates, protected, limits = situation
    by_id = {c.id: c for c in candidates}
    left = defaultdict(dict)
    for c in candidates:
        left[c.group][c.id] = c
    for id in plan(candidates, protected, **limits).evicted:
        group = by_id[id].group
        if len(left[group]) == 1:
            assert all(len(g) <= 1 or set(g) <= set(protected) for g in left.values())
        lowest = max((c for c in left[group].values() if c.id not in protected), key=lambda c: c.rank)
        assert lowest.id == id
        del left[group][id]


@given(situations())
def test_planning_again_evicts_nothing(situation):
    candidates, protected, limits = situation
    found = plan(candidates, protected, **limits)
    again = plan([c for c in candidates if c.id in found.kept], protected, **limits)
    assert (set(again.kept), again.evicted, again.over_limit) == (set(found.kept), {}, found.over_limit)


@given(situations(), st.randoms())
def test_the_order_of_the_candidates_plays_no_part(situation, random):
    candidates, protected, limits = situation
    shuffled = random.sample(candidates, len(candidates))
    one, other = plan(candidates, protected, **limits), plan(shuffled, protected, **limits)
    assert list(one.evicted.items()) == list(other.evicted.items())
    assert one == other
    settings = {"current_group": "a", "keep_latest": 2, "names": {"n": "id1"}, "live_sessions": {"s"}}
    assert protect(candidates, **settings) == protect(shuffled, **settings)


@pytest.mark.parametrize("limits", [{"max_checkpoints": 1, "max_bytes": 0}, {"max_checkpoints": 1, "max_bytes": 100}])
def test_planning_for_nothing_gives_nothing(limits):
    found = plan([], {"gone": "named x"}, **limits)
    assert (found.kept, found.evicted, found.over_limit) == ({}, {}, None)
