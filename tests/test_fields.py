import math

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptcache.metadata import _CHECKPOINT_KINDS, _SESSION_KINDS, CheckpointMetadata, SessionRecord
from ckptcache.values import MAX_COUNT, MAX_JSON_DEPTH

KINDS = {
    f"{kind.__name__}.{name}": (kinds[name])
    for kind, kinds in ((CheckpointMetadata, _CHECKPOINT_KINDS), (SessionRecord, _SESSION_KINDS))
    for name in kinds
}
ids = st.from_regex(r"\A[a-z0-9][a-z0-9._-]{0,5}\Z")
numbers = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, MAX_COUNT)
text = st.text(st.characters(codec="utf-8"), max_size=3)
points = st.lists(st.tuples(counts, numbers).map(list), max_size=3)
good = {
    "id": ids,
    "text": text,
    "count": counts,
    "number": numbers,
    "flag": st.booleans(),
    "ids": st.lists(ids, max_size=3),
    "texts": st.lists(text, max_size=3),
    "numbers": st.lists(numbers, max_size=3),
    "measures": st.dictionaries(text, numbers, max_size=3),
    "curves": st.dictionaries(text, points, max_size=3),
    "mapping": st.dictionaries(text, numbers | st.lists(numbers, max_size=2), max_size=3),
}
bad = (
    st.none()
    | st.sampled_from(
        ["nan", "-inf", "..", "a..b", "A", "a/b", "", "x" * 129, -1, MAX_COUNT + 1, 10**400, True, 1, 0.5]
    )
    | st.lists(st.none() | st.booleans() | st.integers(-1, 2) | text, max_size=2)
    | st.dictionaries(
        text, st.sampled_from(["nan", 1, None, True, [], {}, "ab", [1], [[1, 2.0]], [[0.5, 1.0]]]), max_size=2
    )
    | st.dictionaries(
        text,
        st.lists(
            st.sampled_from([[1, 2.0], [1, "nan"], [-1, 2.0], [1], [1, 2.0, 3], "ab", {}, 5, [True, 2.0], [1, 2]])
        ),
    )
)
columns = st.sampled_from(list(good.values())).flatmap(
    lambda values: st.lists(values, min_size=1, max_size=6) | st.lists(values | bad, min_size=1, max_size=6)
)


def one_by_one(kind, values):
    """What each value alone is read as; None where one of them is refused."""
    try:
        return [kind.one(value, "field") for value in values]
    except ValueError:
        return None


@pytest.mark.parametrize("name", KINDS)
@given(values=columns)
def test_a_column_is_read_at_once_only_as_each_of_its_values_would_be(name, values):
    at_once = KINDS[name].column(values)
    if at_once is not None:
        # repr tells 1 from 1.0 and from True, and a tuple from a list.
        assert repr(list(at_once)) == repr(one_by_one(KINDS[name], values))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("id", "ckpt_1"),
        ("notes", ""),
        ("iteration", MAX_COUNT),
        ("val_loss", 2.5),
        ("pinned", False),
        ("parents", ["a", "b"]),
        ("tags", []),
        ("learning_rate", [0.5]),
        ("metrics", {"accuracy": 0.5}),
        ("environment", {"torch": "2.13"}),
    ],
)
def test_what_checkpoints_usually_hold_is_read_at_once(name, value):
    assert _CHECKPOINT_KINDS[name].column([value] * 3) is not None


@pytest.mark.parametrize("hostile", ["a..b", "..", ".a", "A", "", "a/b", "a\n", "x" * 129, None, 5])
def test_one_hostile_id_in_a_column_is_seen(hostile):
    assert _CHECKPOINT_KINDS["session"].column(["a.", hostile, "b"]) is None
    assert _CHECKPOINT_KINDS["parents"].column([["a."], [], ["b", hostile]]) is None


@pytest.mark.parametrize(
    "curve", [{}, "", 5, None, [5], ["ab"], [[1]], [[1, 2.0, 3]], [{"a": 1, "b": 2}], [[1], [2.0, 1, 2.0]]]
)
def test_what_is_no_curve_is_seen_among_others(curve):
    curves = {"loss": [[0, 1.5]], "other": curve}
    assert _SESSION_KINDS["curves"].column([{}, curves]) is None
    with pytest.raises(ValueError, match=r"curves\.other must be a list of pairs"):
        SessionRecord.all_from_json([{"id": "a", "curves": {"loss": [[0, 1.5]]}}, {"id": "b", "curves": curves}])


def test_what_sessions_usually_hold_is_read_at_once():
    curves = [{"loss": [[0, 1.5], [10, 1.25]], "accuracy": []}, {}, {"loss": [[5, 2.0]]}]
    assert _SESSION_KINDS["curves"].column(curves) == [
        {"loss": ((0, 1.5), (10, 1.25)), "accuracy": ()},
        {},
        {"loss": ((5, 2.0),)},
    ]


@pytest.mark.parametrize("wrong", [0, 255, 256, 599])
def test_of_many_records_alike_each_is_read_in_its_place_and_a_wrong_one_found(wrong):
    documents = [{"id": f"x{number}", "iteration": number, "val_loss": number / 7} for number in range(600)]
    records = CheckpointMetadata.all_from_json(documents)
    assert [(r.id, r.iteration, r.val_loss) for r in records] == [(f"x{n}", n, n / 7) for n in range(600)]
    documents[wrong]["iteration"] = -1
    with pytest.raises(ValueError, match=r"iteration must be .*, not -1"):
        CheckpointMetadata.all_from_json(documents)


def test_a_curve_that_diverged_leaves_those_of_others_as_they_are():
    curves = [{"loss": [[0, 1.5]]}, {"loss": [[0, "nan"]]}, {"loss": [[3, 1]]}]
    read = SessionRecord.all_from_json([{"id": f"s{n}", "curves": c} for n, c in enumerate(curves)])
    assert read[0].curves == {"loss": ((0, 1.5),)}
    assert math.isnan(read[1].curves["loss"][0][1])
    assert repr(read[2].curves) == "{'loss': ((3, 1.0),)}"


def test_a_mapping_among_flat_ones_may_be_as_deep_as_json_is_kept_and_no_deeper():
    def nested(depth):
        return {"id": "x", "extra": orjson.loads('{"a":' * (depth + 1) + "1" + "}" * (depth + 1))}

    flat = {"id": "y", "extra": {"a": 1}}
    assert CheckpointMetadata.all_from_json([flat, nested(MAX_JSON_DEPTH)])[1].extra == nested(MAX_JSON_DEPTH)["extra"]
    with pytest.raises(ValueError, match=f"extra is nested more than {MAX_JSON_DEPTH} deep"):
        CheckpointMetadata.all_from_json([flat, nested(MAX_JSON_DEPTH + 1)])
