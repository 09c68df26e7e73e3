import dataclasses
import gc
import json
import math
import os
import random
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptcache.errors import IndexDamaged, IndexTooNew, IndexUnreadable, InvalidValue
from ckptcache.metadata import CheckpointMetadata, Fingerprint, NamePointer, SessionRecord
from ckptcache.storage.index import (
    Index,
    IndexFile,
    Pieces,
    parse,
    read_index_bytes,
    serialise,
    upgrade_flat,
)
from ckptcache.storage.merging import merge
from ckptcache.values import MAX_COUNT, MAX_JSON_DEPTH
from tests.strategies import edits, indexes, mutations

PATH = Path("metadata.json")
PARTS = ("checkpoints", "sessions", "names", "configs", "fingerprints", "unknown")
BY_CONTENT = ("configs", "fingerprints")


def plain(entry):
    return entry.to_json() if hasattr(entry, "to_json") else entry


def contents(index):
    """What equality means here: the same keys, and the same JSON under each; so NaN equals NaN."""
    return {
        part: {
            key: orjson.dumps(plain(value), option=orjson.OPT_SORT_KEYS) for key, value in getattr(index, part).items()
        }
        for part in PARTS
    }


def same(left, right):
    return contents(left) == contents(right)


def parsed(document):
    return parse(orjson.dumps(document), PATH)


def real_index():
    """An index like one that a few days of training leave."""
    index = Index(unknown={"future": None})
    config = index.store_config({"n_layer": 2, "n_head": 2, "dropout": 0.1, "names": ["é", "模"]})
    fingerprint = index.store_fingerprint(Fingerprint(parameters={"w": "float32[2, 3]"}, optimizers={"o": {"n": 1}}))
    for number in range(4):
        id = f"ckpt_20260101_00000{number}_0000010{number}_abcdef01_0a0{number}"
        index.checkpoints[id] = CheckpointMetadata(
            id=id,
            sequence=number + 1,
            iteration=100 * number,
            session="sess_1",
            fingerprint=fingerprint,
            val_loss=[2.5, math.nan, None, -math.inf][number],
            model_config=config,
            size=1234 + number,
            learning_rate=(3e-4, 1e-4),
            metrics={"accuracy": 0.5},
            digest="blake3:" + "0f" * 32,
            environment={"torch": "2.13"},
            extra={"note": [1, {"a": 2}]},
            unknown={"later": [1]},
        )
    index.sessions["sess_1"] = SessionRecord(id="sess_1", sequence=5, curves={"val_loss": ((0, 2.5), (100, math.nan))})
    index.names["slot-1"] = NamePointer(checkpoint=next(iter(index.checkpoints)), revision=3)
    return index


# --- round trip ----------------------------------------------------------------------------------


@given(indexes())
def test_what_is_written_is_read_back(index):
    assert same(parse(serialise(index), PATH), index)


@given(indexes())
def test_what_is_read_is_written_as_it_was(index):
    data = serialise(index)
    assert serialise(parse(data, PATH)) == data


@given(indexes())
def test_but_for_curves_the_file_is_json_as_it_is_indented_everywhere(index):
    index.sessions = {id: dataclasses.replace(session, curves={}) for id, session in index.sessions.items()}
    data = serialise(index)
    assert data == orjson.dumps(
        orjson.loads(data), option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
    )


@given(st.data())
def test_what_is_known_from_the_last_time_changes_nothing(data):
    pieces, index = Pieces(), data.draw(indexes())
    for _ in range(3):
        assert serialise(index, pieces) == serialise(index)
        index = data.draw(edits(index))
    # A record that was away, and comes back as another under the same id.
    emptied = serialise(Index(), pieces)
    assert emptied == serialise(Index())
    assert serialise(index, pieces) == serialise(index)


def test_a_curve_that_is_not_finite_is_read_again():
    points = ((0, 1.5), (1, math.nan), (2, -math.inf), (3, 2.0))
    index = Index(sessions={"s": SessionRecord(id="s", curves={"null": points, "loss": points[:1]})})
    data = serialise(index)
    assert b'"null": [[0,1.5],[1,"nan"],[2,"-inf"],[3,2.0]]' in data
    assert same(parse(data, PATH), index)


@given(indexes(), st.randoms(use_true_random=False))
def test_the_bytes_don_t_depend_on_the_order_of_insertion(index, chance):
    shuffled = Index(
        **{part: dict(chance.sample(list(d.items()), len(d))) for part in PARTS if (d := getattr(index, part))}
    )
    assert serialise(shuffled) == serialise(index)


def test_a_record_without_nan_is_equal_to_the_one_that_was_written():
    index = real_index()
    index.checkpoints = {key: dataclasses.replace(r, val_loss=1.5) for key, r in index.checkpoints.items()}
    index.sessions = {}
    assert parse(serialise(index), PATH) == index


def test_losses_that_are_no_numbers_survive():
    losses = [r.val_loss for r in parse(serialise(real_index()), PATH).checkpoints.values()]
    assert losses[0] == 2.5
    assert math.isnan(losses[1])
    assert losses[2:] == [None, -math.inf]


def test_losses_that_are_no_numbers_survive_inside_the_user_s_own_values():
    record = CheckpointMetadata(id="a", extra={"curve": [1.0, math.nan, (math.inf,)], "deep": {"x": -math.inf}})
    read = parse(serialise(Index(checkpoints={"a": record})), PATH).checkpoints["a"]
    assert read.extra == {"curve": [1.0, "nan", ["inf"]], "deep": {"x": "-inf"}}


@pytest.mark.parametrize("field", ["save_reason", "notes", "created_at"])
def test_text_that_is_empty_stays_empty(field):
    record = CheckpointMetadata(id="a", **{field: ""})
    assert parse(serialise(Index(checkpoints={"a": record})), PATH).checkpoints["a"] == record


def test_a_session_s_empty_policy_stays_empty():
    session = SessionRecord(id="a", resume="")
    assert parse(serialise(Index(sessions={"a": session})), PATH).sessions["a"] == session


def test_configurations_that_nothing_names_are_dropped_and_others_kept():
    index = Index()
    index.store_config({"unused": 1})
    kept = index.store_config({"used": 1})
    index.sessions["s"] = SessionRecord(id="s", config=kept)
    assert parse(serialise(index), PATH).configs == {kept: {"used": 1}}


def test_unknown_fields_survive_a_round_trip_and_a_merge():
    document = orjson.loads(serialise(real_index()))
    document["invented_later"] = {"a": [1, None]}
    for part in ("checkpoints", "sessions"):
        for record in document[part].values():
            record["invented_later"] = {"b": None}
    index = parsed(document)
    merged = merge(index, index.copy(), Index())
    merged = merge(Index(), merged, index)
    again = orjson.loads(serialise(merged))
    assert again["invented_later"] == {"a": [1, None]}
    assert again["future"] is None
    assert all(r["invented_later"] == {"b": None} for p in ("checkpoints", "sessions") for r in again[p].values())


def test_what_has_no_json_form_is_refused_by_name():
    index = Index(checkpoints={"ckpt_a": CheckpointMetadata(id="ckpt_a", notes="\ud800")})
    with pytest.raises(InvalidValue, match="checkpoints/ckpt_a"):
        serialise(index)


@pytest.mark.parametrize("kind", [CheckpointMetadata, SessionRecord])
def test_a_record_that_is_read_is_like_one_that_is_made_and_shares_nothing_with_another(kind):
    first, second = kind.from_json({"id": "a"}), kind.from_json({"id": "a"})
    assert first == second == kind(id="a")
    for field in dataclasses.fields(kind):
        value = getattr(first, field.name)
        assert not isinstance(value, dict) or value is not getattr(second, field.name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.sequence = 5


def test_reading_leaves_the_garbage_collector_as_it_was():
    parse(serialise(real_index()), PATH)
    assert gc.isenabled()
    gc.disable()
    try:
        with pytest.raises(IndexDamaged):
            parse(b"[]", PATH)
        assert not gc.isenabled()
    finally:
        gc.enable()


@given(indexes())
def test_the_next_sequence_is_above_every_other_and_can_be_read_back(index):
    following = index.sequence + 1
    assert following > max([0, *(r.sequence for r in (*index.checkpoints.values(), *index.sessions.values()))])
    index.checkpoints["next"] = CheckpointMetadata(id="next", sequence=following)
    assert parse(serialise(index), PATH).checkpoints["next"].sequence == following


def test_the_greatest_sequence_and_revision_leave_room_for_another():
    record = CheckpointMetadata(id="a", sequence=MAX_COUNT, revision=MAX_COUNT)
    index = parse(serialise(Index(checkpoints={"a": record})), PATH)
    index.checkpoints["a"] = index.checkpoints["a"].changed(pinned=True)
    index.checkpoints["b"] = CheckpointMetadata(id="b", sequence=index.sequence + 1)
    assert parse(serialise(index), PATH).checkpoints["a"].pinned


# --- damage --------------------------------------------------------------------------------------


def opens_or_says_why(data):
    """The index in `data`, or None when it was refused; anything else that is raised fails the test."""
    try:
        index = parse(data, PATH)
    except (IndexDamaged, IndexTooNew) as error:
        said = str(error)
    else:
        assert same(parse(serialise(index), PATH), dropping_unused(index))
        return index
    assert "metadata.json" in said
    assert "\n" not in said
    return None


def dropping_unused(index):
    used = {s.config for s in index.sessions.values()}
    for r in index.checkpoints.values():
        used |= {r.model_config, r.training_config, r.data_config, r.fingerprint}
    kept = index.copy()
    kept.configs = {k: v for k, v in index.configs.items() if k in used}
    kept.fingerprints = {k: v for k, v in index.fingerprints.items() if k in used}
    return kept


def test_every_truncation_is_refused():
    data = serialise(real_index())
    for length in range(len(data.rstrip())):
        with pytest.raises(IndexDamaged):
            parse(data[:length], PATH)


def test_random_damage_is_refused_or_makes_another_valid_index():
    data = serialise(real_index())
    outcomes = [opens_or_says_why(changed) for changed in mutations(data, 700)]
    assert outcomes.count(None) > 300


def test_random_damage_to_the_oldest_layout_likewise():
    for changed in mutations(json.dumps(oldest(), indent=1).encode(), 500, seed=1):
        opens_or_says_why(changed)


HOSTILE = [
    *(None, True, False, -1, 0, 1, 2**53 + 1, 2**63, 2**64 - 1, -(2**63), 1.5, 1e308, -0.0, "", "nan", "x", "../../x"),
    *(
        [],
        [None],
        [[]],
        ["a", 1],
        {},
        {"a": None},
        {"id": "../x"},
        {"": {}},
        [[1, 2, 3]],
        [["a", "b"]],
        "\x00",
        "a" * 5000,
    ),
]


def places(value, path=()):
    """Every place in a JSON document."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


def put(document, path, value):
    document = orjson.loads(orjson.dumps(document))
    target = document
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return document


def test_a_wrong_value_in_any_place_is_refused_or_means_something():
    record = real_index()
    del record.checkpoints[next(iter(record.checkpoints))]
    full = orjson.loads(serialise(record))
    full["checkpoints"] = {
        "a": CheckpointMetadata(id="a").to_json(full=True),
        **dict([*full["checkpoints"].items()][:1]),
    }
    full["sessions"]["b"] = SessionRecord(id="b").to_json(full=True)
    for path in list(places(full))[1:]:
        for value in HOSTILE:
            opens_or_says_why(orjson.dumps(put(full, path, value)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 4096,
        b"null",
        b"[]",
        b"3",
        b'"text"',
        b"{",
        b'{"schema_version": 2}',
        b'{"schema_version": 2, "checkpoints": []}',
        b'{"schema_version": "2"}',
        b'{"schema_version": true}',
        b'{"schema_version": 0}',
        b'{"schema_version": 1}',
        b'{"schema_version": -5}',
        b'{"schema_version": 1e30}',
        b'{"a": ' * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a": {"iteration": 1' + b"0" * 5000 + b"}}",
        b'{"a": {"iteration": 1e400}}',
        b'{"a": {"iteration": Infinity}}',
        b'{"a": {"iteration": NaN}}',
        b'{"a": {"iteration": []}}',
        b'{"a": {"iteration": -3}}',
        b'{"a": {"val_loss": 1' + b"0" * 400 + b"}}",
        b'{"a": {"tags": "text"}}',
        b'{"a": {"metrics": [1]}}',
        b'{"a": NaN}',
        b"<<<<<<< HEAD\n{}\n=======\n{}\n>>>>>>> theirs\n",
        b"\xff\xfe{\x00}\x00" * 3,
        b'{"\xff": {}}',
    ],
    ids=lambda data: repr(data[:24]),
)
def test_what_is_no_index_is_refused(data):
    with pytest.raises(IndexDamaged):
        parse(data, PATH)


def test_conflict_markers_are_refused_wherever_they_stand():
    lines = serialise(real_index()).splitlines(keepends=True)
    for at in range(len(lines)):
        with pytest.raises(IndexDamaged):
            parse(b"".join([*lines[:at], b"<<<<<<< HEAD\n", lines[at], b"=======\n", *lines[at:]]), PATH)


@pytest.mark.parametrize("part", ["checkpoints", "sessions", "names", "configs", "fingerprints"])
def test_an_index_that_lost_a_part_is_damaged_and_not_empty(part):
    data = serialise(real_index())
    with pytest.raises(IndexDamaged, match=part):
        parse(data.replace(f'"{part}"'.encode(), b'"lost"'), PATH)


def test_an_index_that_lost_its_version_is_not_taken_for_the_oldest_layout():
    document = orjson.loads(serialise(real_index()))
    del document["schema_version"], document["future"]
    assert all(isinstance(part, dict) for part in document.values())
    with pytest.raises(IndexDamaged, match="schema_version"):
        parsed(document)


def test_a_byte_order_mark_is_refused():
    with pytest.raises(IndexDamaged):
        parse(b"\xef\xbb\xbf" + serialise(real_index()), PATH)


def test_of_a_doubled_key_the_last_counts():
    data = serialise(Index(names={"slot": NamePointer(checkpoint="a")})).replace(
        b'"checkpoint": "a"', b'"checkpoint": "a", "checkpoint": "b"'
    )
    assert parse(data, PATH).names["slot"].checkpoint == "b"


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("depth", [MAX_JSON_DEPTH + 2, 300, 900])
@pytest.mark.parametrize("place", ["extra", "environment", "unknown", "top", "configs"])
def test_nesting_that_could_not_be_written_again_is_refused(depth, place):
    document = orjson.loads(serialise(Index(checkpoints={"a": CheckpointMetadata(id="a")})))
    target = {"unknown": document["checkpoints"]["a"], "top": document, "configs": document["configs"]}.get(place)
    if target is None:
        target = document["checkpoints"]["a"][place] = {}
    target["x"] = None
    text = orjson.dumps(document).replace(b'"x":null', b'"x":' + b"[" * depth + b"]" * depth)
    with pytest.raises(IndexDamaged, match="nested"):
        parse(text, PATH)


def test_nesting_that_the_cache_itself_allows_is_read_back():
    index = Index(checkpoints={"a": CheckpointMetadata(id="a", extra={"x": nested(MAX_JSON_DEPTH - 1)})})
    assert same(parse(serialise(index), PATH), index)


@pytest.mark.parametrize("version", [3, 4, 2**53])
def test_a_newer_schema_is_refused_by_name(version):
    document = orjson.loads(serialise(real_index()))
    document["schema_version"] = version
    document["checkpoints"] = "in another form"
    with pytest.raises(IndexTooNew, match=f"{version}.*knows 2"):
        parsed(document)


@pytest.mark.parametrize(
    "id",
    [
        "",
        "..",
        "../x",
        "a/b",
        "/etc/passwd",
        "A",
        "a b",
        "-a",
        ".a",
        "a..b",
        "a\n",
        "a\x00",
        "é",
        "a" * 129,
        "a\\b",
        "con:",
    ],
)
@pytest.mark.parametrize("part", ["checkpoints", "sessions", "flat"])
def test_a_hostile_id_is_refused(id, part):
    document = orjson.loads(serialise(Index()))
    if part == "flat":
        document = {id: {"iteration": 1}}
    else:
        document[part][id] = {}
    with pytest.raises(IndexDamaged):
        parsed(document)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "best", "latest", "ckpt_1", "a b", "\x1b[31m", "a\n", "a" * 65])
def test_a_name_that_could_pass_for_something_else_is_refused(name):
    document = orjson.loads(serialise(Index()))
    document["names"][name] = {"checkpoint": "a"}
    with pytest.raises(IndexDamaged):
        parsed(document)


@pytest.mark.parametrize("revision", [True, -1, 2**60, 1.0, "1", []])
def test_a_pointer_s_revision_is_a_count(revision):
    document = orjson.loads(serialise(Index()))
    document["names"]["slot"] = {"checkpoint": "a", "revision": revision}
    with pytest.raises(IndexDamaged, match="revision"):
        parsed(document)


# --- the oldest layout ---------------------------------------------------------------------------


def oldest():
    """A cache of the oldest layout after two saves, the first of them diverged."""
    return {
        "ckpt_20240102_101010": {
            "checkpoint_id": "ckpt_20240102_101010",
            "created_at": "2024-01-02T10:10:10",
            "iteration": 500,
            "epoch": 2,
            "train_loss": 2.25,
            "val_loss": 2.5,
            "learning_rate": 0.0003,
            "model_config": {"n_layer": 4, "n_head": 2, "n_embd": 64},
            "training_config": {"batch_size": 16, "betas": [0.9, 0.95]},
            "data_config": {"dataset": "books"},
            "metrics": {"accuracy": 0.5, "perplexity": 12},
            "tags": ["baseline", "é"],
            "parent_checkpoint": "ckpt_20240101_090909",
            "notes": "the good one",
            "file_size_mb": 12.5,
            "quality_score": 0.75,
        },
        "ckpt_20240101_090909": {
            "checkpoint_id": "ckpt_20240101_090909",
            "created_at": "2024-01-01T09:09:09",
            "iteration": 100,
            "epoch": 0,
            "train_loss": math.nan,
            "val_loss": math.inf,
            "learning_rate": 0.0003,
            "model_config": {"n_layer": 4, "n_head": 2, "n_embd": 64},
            "training_config": {"dropout": math.nan},
            "data_config": {},
            "metrics": {},
            "tags": [],
            "parent_checkpoint": None,
            "notes": "",
            "file_size_mb": 12.5,
            "quality_score": math.nan,
        },
    }


def test_the_oldest_layout_is_upgraded_and_loses_nothing():
    index = parse(json.dumps(oldest()).encode(), PATH)
    first, second = sorted(index.checkpoints.values(), key=lambda record: record.order)
    assert (first.id, second.id) == ("ckpt_20240101_090909", "ckpt_20240102_101010")
    assert (second.created_at, second.iteration, second.epoch) == ("2024-01-02T10:10:10", 500, 2.0)
    assert (second.train_loss, second.val_loss, second.quality_score) == (2.25, 2.5, 0.75)
    assert second.learning_rate == (0.0003,)
    assert second.metrics == {"accuracy": 0.5, "perplexity": 12.0}
    assert (second.tags, second.notes, second.parents) == (("baseline", "é"), "the good one", (first.id,))
    assert index.configs[second.model_config] == {"n_layer": 4, "n_head": 2, "n_embd": 64}
    assert index.configs[second.training_config] == {"batch_size": 16, "betas": [0.9, 0.95]}
    assert index.configs[second.data_config] == {"dataset": "books"}
    assert second.extra == {"file_size_mb": 12.5}
    assert second.model_config == first.model_config


def test_a_diverged_loss_of_the_oldest_layout_stays_one():
    first = parse(json.dumps(oldest()).encode(), PATH).checkpoints["ckpt_20240101_090909"]
    assert math.isnan(first.train_loss)
    assert first.val_loss == math.inf
    assert math.isnan(first.quality_score)


def test_the_upgraded_index_is_written_in_the_new_layout():
    index = parse(json.dumps(oldest()).encode(), PATH)
    again = parse(serialise(index), PATH)
    assert orjson.loads(serialise(index))["schema_version"] == 2
    assert same(again, index)


def test_fields_that_are_unknown_in_the_oldest_layout_are_kept():
    document = oldest()
    document["ckpt_20240101_090909"] |= {"gpu": "A100", "history": [1, 2, {"x": math.nan}], "nothing": None}
    record = parse(json.dumps(document).encode(), PATH).checkpoints["ckpt_20240101_090909"]
    assert record.extra == {"file_size_mb": 12.5, "gpu": "A100", "history": [1, 2, {"x": "nan"}]}


def test_a_path_in_the_oldest_layout_is_dropped_and_a_hostile_parent_too():
    document = oldest()
    document["ckpt_20240101_090909"] |= {"file_path": "/etc/passwd", "path": "../../x", "parent_checkpoint": "../../x"}
    record = parse(json.dumps(document).encode(), PATH).checkpoints["ckpt_20240101_090909"]
    assert record.parents == ()
    assert "passwd" not in serialise(Index(checkpoints={record.id: record})).decode()
    assert "../" not in serialise(Index(checkpoints={record.id: record})).decode()


@pytest.mark.parametrize(("written", "read"), [(500.0, 500), ("500", 500), (None, 0), (7, 7)])
def test_old_writers_were_not_particular_about_whole_numbers(written, read):
    assert upgrade_flat({"a": {"iteration": written}}).checkpoints["a"].iteration == read


def test_a_record_of_the_oldest_layout_whose_id_cannot_be_one_is_left_out_loudly_beside_others(caplog):
    assert set(upgrade_flat({"a": {"iteration": 1}, "Epoch5": {"iteration": 5}}).checkpoints) == {"a"}
    assert "'Epoch5' is left out" in caplog.text
    with pytest.raises(ValueError, match="'Epoch5' is not a record"):
        upgrade_flat({"Epoch5": {"iteration": 5}})


def test_a_list_of_learning_rates_and_none_are_both_taken():
    index = upgrade_flat({"a": {"learning_rate": [0.1, 0.2]}, "b": {"learning_rate": None}})
    assert [index.checkpoints[id].learning_rate for id in "ab"] == [(0.1, 0.2), ()]


def test_half_a_surrogate_pair_in_a_note_costs_that_character_only():
    record = parse(b'{"a": {"notes": "x\\ud800y", "iteration": 3}}', PATH).checkpoints["a"]
    assert (record.notes, record.iteration) == ("x?y", 3)


def test_a_record_that_cannot_be_upgraded_is_named():
    with pytest.raises(IndexDamaged, match=r"'ckpt_20240101_090909'.*iteration"):
        parsed({"ckpt_20240101_090909": {"iteration": [1]}})


def test_a_configuration_of_the_oldest_layout_that_is_nested_too_deeply_is_refused():
    with pytest.raises(IndexDamaged, match=r"'a'.*nested"):
        parsed({"a": {"model_config": nested(100)}})


def test_an_empty_mapping_is_an_empty_cache_of_the_oldest_layout():
    assert parse(b"{}", PATH) == Index()


# --- the file ------------------------------------------------------------------------------------


def test_there_is_none_before_the_first_commit(tmp_path):
    assert IndexFile(tmp_path).read() is None


def test_a_commit_is_read_by_another_and_keeps_the_generation_before(tmp_path):
    first, second = Index(), real_index()
    file = IndexFile(tmp_path)
    for index in (first, second):
        with file.held():
            file.commit(index, writer="w")
    assert same(IndexFile(tmp_path).read(), second)
    assert parse(file.previous.read_bytes(), file.previous) == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metadata.json", "metadata.json.lock", "metadata.json.prev"]


def test_a_change_after_the_commit_is_not_in_what_is_read(tmp_path):
    file, index = IndexFile(tmp_path), real_index()
    with file.held():
        file.commit(index, writer="w")
    index.checkpoints.clear()
    assert len(file.read().checkpoints) == 4


def test_a_change_by_another_of_the_same_length_is_noticed(tmp_path):
    file = IndexFile(tmp_path)
    with file.held():
        file.commit(Index(names={"slot": NamePointer(checkpoint="a")}), writer="w")
    assert file.read().names["slot"].checkpoint == "a"
    file.path.write_bytes(serialise(Index(names={"slot": NamePointer(checkpoint="b")})))
    assert file.read().names["slot"].checkpoint == "b"


def test_an_index_that_cannot_be_written_leaves_the_committed_one(tmp_path):
    file = IndexFile(tmp_path)
    with file.held():
        file.commit(real_index(), writer="w")
        before = file.path.read_bytes()
        with pytest.raises(InvalidValue):
            file.commit(Index(unknown={"x": "\ud800"}), writer="w")
    assert file.path.read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("kind", ["link", "dangling", "folder", "fifo"])
def test_what_is_no_regular_file_is_no_index(tmp_path, kind):
    path = tmp_path / "metadata.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        target = tmp_path / "elsewhere.json"
        if kind == "link":
            target.write_bytes(serialise(Index()))
        path.symlink_to(target)
    with pytest.raises(IndexDamaged, match="it is not a regular file"):
        IndexFile(tmp_path).read()


def test_an_index_that_the_system_refuses_is_not_called_damaged(tmp_path):
    # A name that is too long stands for any refusal: as root, permissions refuse nothing.
    with pytest.raises(IndexUnreadable, match="name too long"):
        read_index_bytes(tmp_path / ("x" * 300))


def test_an_index_beyond_the_limit_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "metadata.json"
    with path.open("wb") as file:
        file.truncate(256 * 1024 * 1024 + 1)
    with pytest.raises(IndexDamaged, match="longer than"):
        read_index_bytes(path)


def test_an_index_beyond_the_limit_is_not_written(tmp_path, monkeypatch):
    file, index = IndexFile(tmp_path), real_index()
    monkeypatch.setattr("ckptcache.storage.index.MAX_INDEX_BYTES", len(serialise(index)))
    with file.held():
        file.commit(index, writer="w")
        before = file.path.read_bytes()
        index.unknown["later"] = "one more"
        with pytest.raises(InvalidValue, match="are read again; lower max_records"):
            file.commit(index, writer="w")
    assert file.path.read_bytes() == before
    assert not file.previous.exists()
    assert same(IndexFile(tmp_path).read(), real_index())


def test_damage_is_found_in_one_of_many_records():
    chance = random.Random(3)
    document = orjson.loads(serialise(real_index()))
    id = chance.choice(list(document["checkpoints"]))
    document["checkpoints"][id]["size"] = "1234"
    with pytest.raises(IndexDamaged, match="size"):
        parsed(document)
