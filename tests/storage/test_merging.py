import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from ckptcache.metadata import CheckpointMetadata
from ckptcache.storage.index import BY_CONTENT, Index, parse, serialise
from ckptcache.storage.merging import merge
from tests.storage.test_index import PARTS, PATH, contents, real_index, same
from tests.strategies import edits, indexes


@st.composite
def histories(draw, sides):
    base = draw(indexes())
    return base, *(draw(edits(base)) for _ in range(sides))


@given(histories(3))
def test_merging_is_associative(history):
    base, a, b, c = history
    assert same(merge(base, merge(base, a, b), c), merge(base, a, merge(base, b, c)))


@given(histories(2))
def test_merging_is_commutative(history):
    base, a, b = history
    assert same(merge(base, a, b), merge(base, b, a))


@given(histories(2))
def test_merging_is_idempotent(history):
    base, a, b = history
    merged = merge(base, a, b)
    assert same(merge(base, a, a), a)
    assert same(merge(base, merged, b), merged)
    assert same(merge(base, merged, merged), merged)


@given(histories(1))
def test_what_only_one_side_did_is_what_comes_out(history):
    base, a = history
    # Of what is named by its content nothing is removed, until nothing names it when the index is written.
    whole = dataclasses.replace(a, **{p: {**getattr(base, p), **getattr(a, p)} for p in BY_CONTENT})
    for merged in (merge(base, a, base), merge(base, base, a)):
        for part in PARTS:
            if part in BY_CONTENT:
                assert contents(merged)[part].keys() == contents(whole)[part].keys()
            else:
                assert contents(merged)[part] == contents(whole)[part]


@given(histories(2))
def test_nothing_that_one_side_changed_is_lost(history):
    base, ours, theirs = history
    before, left, right, merged = (contents(index) for index in (base, ours, theirs, merge(base, ours, theirs)))
    for part in PARTS:
        for key in {*before[part], *left[part], *right[part]}:
            original, changed = before[part].get(key), {left[part].get(key), right[part].get(key)}
            touched = changed - {original}
            outcome = merged[part].get(key)
            if part in BY_CONTENT:
                assert outcome in {left[part].get(key), right[part].get(key)}
                assert (outcome is None) == (key not in left[part] and key not in right[part])
            elif not touched:
                assert outcome == original
            elif touched == {None}:
                assert outcome is None
            else:
                assert outcome in touched - {None}


def test_a_change_outlives_a_removal_and_a_removal_outlives_rest():
    base = real_index()
    first, second, *_ = base.checkpoints
    ours, theirs = base.copy(), base.copy()
    ours.checkpoints[first] = ours.checkpoints[first].changed(pinned=True)
    del theirs.checkpoints[first], theirs.checkpoints[second]
    merged = merge(base, ours, theirs)
    assert merged.checkpoints[first].pinned
    assert second not in merged.checkpoints


def test_of_two_changes_the_higher_revision_counts():
    base = real_index()
    id = next(iter(base.checkpoints))
    ours, theirs = base.copy(), base.copy()
    ours.checkpoints[id] = base.checkpoints[id].changed(notes="z")
    theirs.checkpoints[id] = base.checkpoints[id].changed(notes="a").changed(pinned=True)
    assert merge(base, ours, theirs).checkpoints[id] is theirs.checkpoints[id]
    assert merge(base, theirs, ours).checkpoints[id] is theirs.checkpoints[id]


def test_a_diverged_record_that_nobody_touched_is_no_change():
    base = real_index()
    id = list(base.checkpoints)[1]
    reread, theirs = parse(serialise(base), PATH), base.copy()
    del theirs.checkpoints[id]
    assert id not in merge(base, reread, theirs).checkpoints


def test_merging_changes_none_of_its_parts():
    base = real_index()
    ours = base.copy()
    ours.checkpoints.popitem()
    before = [contents(index) for index in (base, ours)]
    merge(base, ours, base).checkpoints.clear()
    assert [contents(index) for index in (base, ours)] == before


def test_a_configuration_that_one_side_no_longer_names_stays_for_the_other():
    base, theirs = Index(), Index()
    name = base.store_config({"n_layer": 2})
    base.checkpoints["a"] = CheckpointMetadata(id="a", model_config=name)
    theirs = base.copy()
    theirs.checkpoints["b"] = CheckpointMetadata(id="b", model_config=name)
    merged = merge(base, Index(), theirs)
    assert set(merged.checkpoints) == {"b"}
    assert parse(serialise(merged), PATH).configs == {name: {"n_layer": 2}}
