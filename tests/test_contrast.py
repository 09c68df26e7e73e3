import math

import pytest
from hypothesis import given

from ckptcache import contrast
from ckptcache.contrast import ABSENT, Pair, Relation, relation, varying
from ckptcache.metadata import CheckpointMetadata, SessionRecord
from ckptcache.storage.index import Index
from tests import strategies


def line(*steps):
    """Records by id, of ``(id, parent, iteration)`` in the order in which they were saved."""
    made = [
        CheckpointMetadata(id=id, sequence=n, iteration=iteration, parents=(parent,) if parent else ())
        for n, (id, parent, iteration) in enumerate(steps, start=1)
    ]
    return {record.id: record for record in made}


TREE = line(
    ("root", None, 10), ("trunk", "root", 20), ("left", "trunk", 30), ("right", "trunk", 25), ("far", "right", 60)
)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("left", "left", Relation("same", "left", 0, (0, 0))),
        ("root", "far", Relation("ancestor", "root", 50, (0, 50))),
        ("far", "trunk", Relation("descendant", "trunk", -40, (40, 0))),
        ("left", "far", Relation("branches", "trunk", 30, (10, 40))),
    ],
)
def test_how_two_of_a_tree_stand_to_each_other(a, b, expected):
    assert relation(TREE[a], TREE[b], TREE) == expected


def test_two_fresh_starts_are_unrelated():
    records = line(("a", None, 1), ("b", None, 5))
    assert relation(records["a"], records["b"], records) == Relation("unrelated", None, 4, None)


def test_behind_a_record_that_is_gone_nothing_is_known():
    records = line(("a", "gone", 1), ("b", None, 5))
    assert relation(records["a"], records["b"], records).kind == "unknown"


def test_a_common_ancestor_whose_record_is_gone_is_still_named():
    records = line(("a", "gone", 1), ("b", "gone", 5))
    assert relation(records["a"], records["b"], records) == Relation("branches", "gone", 4, None)


def test_records_of_another_cache_fill_in_what_one_lacks():
    alone = {"far": TREE["far"]}
    assert relation(TREE["root"], TREE["far"], alone).kind == "unknown"
    assert relation(TREE["root"], TREE["far"], {**alone, "right": TREE["right"], "trunk": TREE["trunk"]}).kind == (
        "ancestor"
    )


def test_parents_that_go_round_in_a_circle_end():
    records = line(("a", "b", 1), ("b", "a", 2), ("c", "c", 3))
    assert relation(records["a"], records["b"], records).common in ("a", "b")
    assert relation(records["a"], records["c"], records).kind == "unrelated"


def test_keys_that_differ_are_given_with_every_value():
    a = {"n": 1, "same": 2, "optimizer": {"lr": 0.1, "betas": [1, 2]}, "gone": None}
    b = {"n": True, "same": 2, "optimizer": {"lr": 0.2, "betas": [1, 2]}}
    assert varying([a, b]) == {"n": (1, True), "optimizer.lr": (0.1, 0.2), "gone": (None, ABSENT)}
    assert varying([a, a, b])["optimizer.lr"] == (0.1, 0.1, 0.2)
    assert varying([a]) == {}


def test_what_is_no_mapping_counts_as_empty():
    assert varying([None, {"a": {}}, [1]]) == {"a": (ABSENT, {}, ABSENT)}


@given(strategies.json_mappings)
def test_a_mapping_does_not_differ_from_itself(mapping):
    assert varying([mapping, dict(mapping)]) == {}


def test_a_change_is_said_where_it_means_something():
    assert Pair(2.0, 1.5).change == -0.5
    assert Pair(None, 1.0).change is None
    assert Pair(1.0, math.nan).change is None
    assert Pair(math.inf, math.nan).to_json() == {"a": "inf", "b": "nan", "change": None}


def test_a_session_is_known_by_its_declaration_or_its_newest_checkpoint():
    index = Index()
    declared = index.store_config({"model_config": {"n": 1}})
    own = index.store_config({"n": 2})
    index.checkpoints = {"c": CheckpointMetadata(id="c", session="silent", model_config=own)}
    assert contrast.configs_of(index, SessionRecord(id="s", config=declared)) == {"model_config": {"n": 1}}
    assert contrast.configs_of(index, SessionRecord(id="silent")) == {"model_config": {"n": 2}}
    assert contrast.configs_of(index, SessionRecord(id="nobody", config="gone")) == {}


@given(strategies.records("ckpt_a"), strategies.records("ckpt_b"))
def test_whatever_two_records_hold_there_is_an_answer_that_json_holds(a, b):
    import orjson

    index = Index(checkpoints={a.id: a, b.id: b})
    orjson.dumps(contrast.record_diff(a, b, index, index).to_json())


def test_a_record_says_which_numbers_moved():
    a = CheckpointMetadata(id="a", iteration=3, val_loss=2.0, metrics={"acc": 0.5, "old": 1.0}, learning_rate=(0.1,))
    b = CheckpointMetadata(id="b", iteration=5, val_loss=math.nan, metrics={"acc": 0.75}, environment={"torch": "2"})
    found = contrast.record_diff(a, b, Index(), Index()).to_json()
    assert found["iteration"] == {"a": 3, "b": 5, "change": 2}
    assert found["losses"] == {"val_loss": {"a": 2.0, "b": "nan", "change": None}}
    assert found["metrics"]["acc"] == {"a": 0.5, "b": 0.75, "change": 0.25}
    assert found["metrics"]["old"] == {"a": 1.0, "b": None, "change": None}
    assert found["learning_rate"] == {"a": [0.1], "b": []}
    assert found["environment"] == [{"key": "torch", "b": "2"}]
