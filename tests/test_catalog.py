from pathlib import Path

import pytest

from ckptcache import CacheConfig
from ckptcache.catalog import Catalog
from ckptcache.metadata import CheckpointMetadata, Fingerprint, NamePointer, SessionRecord
from ckptcache.policy.compatibility import Description
from ckptcache.storage.index import Index
from ckptcache.storage.reconcile import Observed

SMALL, LARGE = Fingerprint(parameters={"w": "float32[2]"}), Fingerprint(parameters={"w": "float32[3]"})


def catalog(*records: CheckpointMetadata, gone=(), index: Index | None = None, **settings) -> Catalog:
    index = index or Index()
    index.checkpoints |= {r.id: r for r in records}
    there = {r.id: 10 for r in records if r.id not in gone and r.decision is None}
    observed = Observed(available=there, missing=dict.fromkeys(gone, "its file is gone"))
    return Catalog(Path("cache"), index, observed, CacheConfig(**settings))


def record(id: str, loss: float | None, sequence: int = 0, **fields) -> CheckpointMetadata:
    return CheckpointMetadata(id=id, val_loss=loss, sequence=sequence, **fields)


def two_groups() -> tuple[Index, str, str]:
    index = Index()
    return index, index.store_fingerprint(SMALL), index.store_fingerprint(LARGE)


def names(records) -> list[str]:
    return [r.id for r in records]


def test_groups_stand_whole_one_after_another_the_one_used_last_first():
    index, small, large = two_groups()
    found = catalog(
        record("a", 9.0, 4, fingerprint=small),
        record("b", 8.0, 1, fingerprint=small),
        record("c", 1.0, 3, fingerprint=large),
        record("d", 2.0, 2, fingerprint=large),
        index=index,
    )
    assert names(found.ranked()) == ["b", "a", "c", "d"]


def test_checkpoints_that_differ_in_what_is_not_critical_are_ranked_together():
    index, small, _ = two_groups()
    configs = [index.store_config({"n_layer": 2, "dropout": dropout}) for dropout in (0.0, 0.1, 0.0)]
    losses = zip("abc", (3.0, 1.0, 2.0), configs, strict=True)
    found = catalog(*(record(id, loss, fingerprint=small, model_config=c) for id, loss, c in losses), index=index)
    assert [sorted(names(members)) for members in found.groups.values()] == [["a", "b", "c"]]
    assert names(found.ranked()) == ["b", "c", "a"]


def test_a_session_that_resumed_from_a_group_is_a_use_of_it():
    index, small, large = two_groups()
    index.sessions["sess"] = SessionRecord(id="sess", sequence=9, parent="a")
    found = catalog(record("a", 1.0, 1, fingerprint=small), record("b", 1.0, 2, fingerprint=large), index=index)
    assert names(found.ranked()) == ["a", "b"]


def test_what_best_tries_is_what_explain_calls_eligible():
    index, small, large = two_groups()
    fitting = [record(f"a{n}", 9.0 - n % 3, n, fingerprint=small, iteration=n) for n in range(6)]
    found = catalog(
        *fitting,
        record("b", 0.5, 9, fingerprint=large),
        record("c", float("nan"), 7, fingerprint=small),
        record("d", None, 8, fingerprint=small),
        record("e", 0.1, 10, fingerprint=small, decision="evicted"),
        gone=["a2"],
        index=index,
    )
    for needed in (Description(), Description(fingerprint=SMALL), Description(fingerprint=LARGE)):
        eligible = [e.record for e in found.explain(needed) if e.eligible]
        assert found.candidates(needed) == eligible
        assert found.best(needed).id == eligible[0].id
    assert names(found.candidates(Description(fingerprint=SMALL))) == ["a5", "a4", "a1", "a3", "a0", "d"]


def test_losing_a_file_changes_no_score():
    records = [record("a", 1.0, 1, metrics={"acc": 0.5}), record("b", 2.0, 2, metrics={"acc": 3.0})]
    whole, torn = catalog(*records), catalog(*records, gone=["b"])
    assert {id: s.quality for id, s in whole.scores.items()} == {id: s.quality for id, s in torn.scores.items()}
    assert names(torn.ranked()) == ["a"]
    assert names(torn.ranked(everything=True)) == ["a", "b"]


def test_every_record_has_one_status():
    found = catalog(
        record("a", 1.0),
        record("b", 1.0, decision="evicted"),
        record("c", 1.0, decision="quarantined"),
        record("d", 1.0),
        gone=["d"],
    )
    assert [found.status(r) for r in found.index.checkpoints.values()] == [
        *("available", "evicted", "quarantined"),
        "missing",
    ]


def test_explain_puts_what_would_be_tried_first_in_that_order_and_leaves_out_the_evicted():
    found = catalog(
        record("a", 3.0, 1),
        record("b", 1.0, 2),
        record("c", 0.5, 3),
        record("d", 0.1, 4, decision="evicted"),
        record("e", float("nan"), 5),
        gone=["c"],
    )
    explained = found.explain(Description())
    assert [(e.record.id, e.eligible, e.chosen) for e in explained] == [
        ("b", True, True),
        ("a", True, False),
        ("c", False, False),
        ("e", False, False),
    ]
    assert names(found.candidates(Description())) == ["b", "a"]


def test_records_beyond_the_limit_go_lowest_first_and_never_one_that_has_a_file_a_name_or_a_pin():
    index = Index(names={"slot": NamePointer(checkpoint="c")})
    found = catalog(
        record("a", 1.0, 1),
        record("b", 5.0, 2, decision="evicted"),
        record("c", 9.0, 3, decision="evicted"),
        record("d", 8.0, 4, pinned=True),
        record("e", 4.0, 5),
        record("f", None, 6, decision="evicted"),
        gone=["d", "e"],
        index=index,
        max_records=1,
    )
    assert found.surplus_records() == ["f", "b", "e"]
    assert catalog(record("a", 1.0), record("b", 2.0), max_records=1).surplus_records() == []


@pytest.mark.parametrize("settings", [{"quality_metrics": {"acc": "max"}}, {"best_fn": lambda r: 1.0}])
def test_nothing_is_said_of_unscored_metrics_where_the_user_has_decided(settings):
    records = [record("a", 1.0, metrics={"acc": 0.5, "tokens": 7.0})]
    assert catalog(*records).unscored_metrics() == ("tokens",)
    assert catalog(*records, **settings).unscored_metrics() == ()


@pytest.mark.parametrize("config", [[1, 2], "text", 3, None])
def test_a_configuration_that_is_no_mapping_declares_nothing(config):
    index = Index(configs={"odd": config, "both": {"model_config": config, "data_config": config}})
    index.sessions["s"] = SessionRecord(id="s", config="both")
    found = catalog(record("a", 1.0, model_config="odd", data_config="odd"), index=index)
    assert found.description(found.index.checkpoints["a"]) == Description()
    assert names(found.candidates(Description(model_config={"n_layer": 1}))) == ["a"]
    assert found.prevailing()[0] == Description()


def test_the_newest_session_says_what_prevails():
    index, small, large = two_groups()
    index.configs["c"] = {"model_config": {"n_layer": 9}}
    found = catalog(record("a", 1.0, 1, fingerprint=small), record("b", 1.0, 3, fingerprint=large), index=index)
    assert found.prevailing() == (Description(fingerprint=LARGE), index.checkpoints["b"])
    index.sessions["s"] = SessionRecord(id="s", sequence=2, parent="a")
    assert found.prevailing() == (Description(fingerprint=SMALL), index.sessions["s"])
    index.sessions["t"] = SessionRecord(id="t", sequence=4, parent="a", config="c")
    assert found.prevailing() == (Description(model_config={"n_layer": 9}), index.sessions["t"])
    index.checkpoints["d"] = record("d", 1.0, 5, fingerprint=large, session="t", decision="evicted")
    assert found.prevailing() == (Description(fingerprint=LARGE), index.sessions["t"])


def test_nothing_prevails_in_an_empty_cache():
    assert catalog().prevailing() == (Description(), None)
    index = Index(sessions={"s": SessionRecord(id="s")})
    assert catalog(index=index).prevailing() == (Description(), None)


def test_what_the_next_run_needs_is_not_told_by_what_was_rolled_back():
    index, small, large = two_groups()
    index.sessions["s"] = SessionRecord(id="s", sequence=1)
    index.sessions["t"] = SessionRecord(id="t", sequence=3, parent="a", rolled_back="a")
    found = catalog(
        record("a", 1.0, 2, fingerprint=small, session="s"),
        record("b", 0.5, 4, fingerprint=large, session="t", rolled_back="a"),
        index=index,
    )
    described, source = found.prevailing()
    assert (described.fingerprint, source) == (SMALL, index.sessions["s"])
    index.sessions.clear()
    assert found.prevailing()[1].id == "a"
