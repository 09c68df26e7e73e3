import argparse
import dataclasses
import enum
import math
import string
from datetime import UTC, datetime
from pathlib import PurePosixPath

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptcache.errors import InvalidId, InvalidName, InvalidValue
from ckptcache.metadata import (
    CheckpointMetadata,
    Fingerprint,
    NamePointer,
    SessionRecord,
    check_id,
    check_name,
    is_valid_id,
    new_checkpoint_id,
    new_session_id,
    thin,
    utc_now,
)
from ckptcache.values import MAX_JSON_DEPTH, as_float, content_hash, decode_float, encode_float, jsonable
from tests.strategies import records

text = st.text(st.characters(codec="utf-8"), max_size=20)
ids = st.from_regex(r"\A[a-z0-9][a-z0-9_-]{0,20}\Z")
counts = st.integers(0, 2**53)
floats = st.floats()
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
mappings = st.dictionaries(text, plain, max_size=3)
unknown = st.dictionaries(text.map(lambda name: f"later_{name}"), plain, max_size=3)


def maybe(strategy):
    return st.none() | strategy


CHECKPOINT = {
    "id": ids,
    "sequence": counts,
    "revision": counts,
    "created_at": text,
    "session": maybe(ids),
    "parents": st.lists(ids, max_size=3).map(tuple),
    "iteration": counts,
    "epoch": maybe(floats),
    "train_loss": maybe(floats),
    "val_loss": maybe(floats),
    "last_val_loss": maybe(floats),
    "last_val_loss_iteration": maybe(counts),
    "learning_rate": st.lists(floats, max_size=3).map(tuple),
    "metrics": st.dictionaries(text, floats, max_size=3),
    "quality_score": maybe(floats),
    "save_reason": st.sampled_from(["improved", "interval", "final", "signal", "manual", "growth"]),
    "model_config": maybe(text.filter(bool)),
    "training_config": maybe(text.filter(bool)),
    "data_config": maybe(text.filter(bool)),
    "fingerprint": maybe(text.filter(bool)),
    "contents": st.lists(text, max_size=3).map(tuple),
    "tags": st.lists(text, max_size=3).map(tuple),
    "notes": text,
    "extra": mappings,
    "pinned": st.booleans(),
    "decision": maybe(st.sampled_from(["evicted", "quarantined"])),
    "decision_reason": maybe(text.filter(bool)),
    "rolled_back": maybe(ids),
    "size": maybe(counts),
    "digest": maybe(text.filter(bool)),
    "environment": mappings,
    "unknown": unknown,
}
checkpoints = st.builds(CheckpointMetadata, **CHECKPOINT)
curves = st.dictionaries(text, st.lists(st.tuples(counts, floats), max_size=4).map(tuple), max_size=3)
SESSION = {
    "id": ids,
    "sequence": counts,
    "revision": counts,
    "parent": maybe(ids),
    "resume": text.filter(bool),
    "reseeded": st.booleans(),
    "warm_start": st.booleans(),
    "config": maybe(text.filter(bool)),
    "started_at": text,
    "ended_at": maybe(text.filter(bool)),
    "start_iteration": counts,
    "end_iteration": counts,
    "first_val_loss": maybe(floats),
    "last_val_loss": maybe(floats),
    "best_val_loss": maybe(floats),
    "best_checkpoint": maybe(ids),
    "saved": counts,
    "evicted": counts,
    "failed_saves": counts,
    "seconds": floats,
    "stop_reason": maybe(text.filter(bool)),
    "rolled_back": maybe(ids),
    "curves": curves,
    "environment": mappings,
    "unknown": unknown,
}
sessions = st.builds(SessionRecord, **SESSION)


def through_json(record, *, full: bool = False):
    return type(record).from_json(orjson.loads(orjson.dumps(record.to_json(full=full))))


def same(a, b) -> bool:
    """Equal, NaN being equal to NaN."""
    return repr(a) == repr(b)


# --- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
@given(record=checkpoints | sessions)
def test_records_survive_json(record, full):
    assert same(through_json(record, full=full), record)


@given(record=checkpoints | sessions)
def test_the_json_of_a_record_is_stable(record):
    again = through_json(record)
    assert orjson.dumps(again.to_json(), option=orjson.OPT_SORT_KEYS) == orjson.dumps(
        record.to_json(), option=orjson.OPT_SORT_KEYS
    )


@pytest.mark.parametrize(("kind", "drawn"), [(CheckpointMetadata, CHECKPOINT), (SessionRecord, SESSION)])
def test_every_field_is_drawn_above(kind, drawn):
    # Or the round trips would say nothing of a field that is added later.
    assert set(drawn) == {f.name for f in dataclasses.fields(kind)}


def test_a_diverged_loss_is_told_from_an_unknown_one():
    kept = [through_json(CheckpointMetadata(id="x", val_loss=v)).val_loss for v in (None, math.inf, -math.inf)]
    assert kept == [None, math.inf, -math.inf]
    assert math.isnan(through_json(CheckpointMetadata(id="x", val_loss=math.nan)).val_loss)


def test_empty_fields_are_left_out_unless_asked_for():
    assert CheckpointMetadata(id="x", iteration=0, val_loss=0.0).to_json() == {
        "id": "x",
        "sequence": 0,
        "revision": 0,
        "iteration": 0,
        "val_loss": 0.0,
        "save_reason": "manual",
    }
    full = CheckpointMetadata(id="x").to_json(full=True)
    assert full.keys() == CheckpointMetadata.__dataclass_fields__.keys() - {"unknown"}


@given(st.lists(records(), max_size=6))
def test_many_records_are_read_as_each_alone_in_their_order(many):
    documents = [orjson.loads(orjson.dumps(record.to_json())) for record in many]
    together, alone = CheckpointMetadata.all_from_json(documents), map(CheckpointMetadata.from_json, documents)
    assert [r.to_json(full=True) for r in together] == [r.to_json(full=True) for r in alone]
    assert [r.id for r in together] == [r.id for r in many]


def test_what_records_lack_is_their_own():
    first, second = CheckpointMetadata.all_from_json([{"id": "a", "metrics": None}, {"id": "b", "metrics": None}])
    assert first.metrics is not second.metrics
    assert first.extra is not second.extra


def test_one_wrong_record_among_many_is_found():
    documents = [{"id": f"x{number}", "iteration": number} for number in range(9)]
    with pytest.raises(ValueError, match=r"iteration must be a whole number .*, not -1"):
        CheckpointMetadata.all_from_json([*documents, {"id": "y", "iteration": -1}])
    with pytest.raises(ValueError, match=r"iteration must be a whole number .*, not True"):
        CheckpointMetadata.all_from_json([*documents, {"id": "y", "iteration": True}])


def test_fields_of_a_later_version_survive_a_change():
    record = CheckpointMetadata.from_json({"id": "x", "colour": {"deep": [1, "blue"]}})
    changed = record.changed(pinned=True)
    assert changed.revision == 1
    assert changed.to_json()["colour"] == {"deep": [1, "blue"]}


@given(st.dictionaries(text, text, max_size=3), st.dictionaries(text, mappings, max_size=2))
def test_fingerprints_survive_json(parameters, optimizers):
    fingerprint = Fingerprint(parameters=parameters, optimizers=optimizers)
    assert Fingerprint.from_json(orjson.loads(orjson.dumps(fingerprint.to_json()))) == fingerprint


def test_pointers_survive_json():
    pointer = NamePointer(checkpoint="ckpt_1", revision=3)
    assert NamePointer.from_json(pointer.to_json()) == pointer
    assert pointer.to_json() == {"checkpoint": "ckpt_1", "revision": 3}
    rollback = dataclasses.replace(pointer, before={"ckpt_2": None, "ckpt_3": "ckpt_0"})
    assert NamePointer.from_json(rollback.to_json()) == rollback


@pytest.mark.parametrize("before", [[], "x", {"a": 3}, {"a": "../x"}, {"a": ["b"]}])
def test_a_rollback_whose_marks_cannot_be_put_back_is_refused(before):
    with pytest.raises(ValueError, match="before must map ids"):
        NamePointer.from_json({"checkpoint": "ckpt_1", "before": before})


def test_order_is_by_sequence_then_id():
    records = [CheckpointMetadata(id=i, sequence=s) for i, s in (("b", 2), ("z", 1), ("a", 2))]
    assert [r.id for r in sorted(records, key=lambda r: r.order)] == ["z", "a", "b"]


# --- hostile input -------------------------------------------------------------------------------

HOSTILE_IDS = [
    *(
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        "/etc/passwd",
        "a..b",
        ".hidden",
        "-rf",
        "_x",
        "A",
        "a b",
        "a\n",
        "a\0b",
        "ä",
    ),
    *("\u202ea", "a" * 129, "a:b", "a*", "~", "$HOME", "%2e%2e", None, 5, True, ["a"], {"a": 1}, b"a"),
]


@pytest.mark.parametrize("hostile", HOSTILE_IDS, ids=repr)
def test_hostile_ids_are_refused_wherever_they_stand(hostile):
    assert not is_valid_id(hostile)
    with pytest.raises(InvalidId):
        check_id(hostile)
    with pytest.raises(ValueError, match="pointer"):
        NamePointer.from_json({"checkpoint": hostile})
    for kind, fields in ((CheckpointMetadata, ("session",)), (SessionRecord, ("parent", "best_checkpoint"))):
        with pytest.raises(ValueError, match="id"):
            kind.from_json({"id": hostile})
        for field in fields if hostile is not None else ():
            with pytest.raises(ValueError, match=field):
                kind.from_json({"id": "x", field: hostile})
    with pytest.raises(ValueError, match="parents"):
        CheckpointMetadata.from_json({"id": "x", "parents": [hostile]})


HOSTILE_FIELDS = [
    *(("sequence", v) for v in (-1, 1.5, "1", True, [1], {})),
    *(("iteration", v) for v in (-1, "many", math.inf)),
    *(("size", v) for v in (-1, 0.5)),
    *(("val_loss", v) for v in ("NaN", "infinity", "1", True, [], {}, 10**400)),
    *(("learning_rate", v) for v in (0.1, ["fast"], {"0": 0.1}, "0.1")),
    *(("metrics", v) for v in ([1], {"accuracy": "high"}, {"accuracy": None}, "x")),
    *(("tags", v) for v in ("one", [1], {"a": 1})),
    *(("notes", v) for v in (5, ["a"], {"a": 1})),
    *(("pinned", v) for v in (1, "yes", 0)),
    *(("extra", v) for v in ([1], "x", 5)),
    *(("digest", v) for v in (5, ["blake3:00"])),
    *(("environment", v) for v in ([1], "x")),
]


@pytest.mark.parametrize(("field", "value"), HOSTILE_FIELDS, ids=repr)
def test_a_field_of_the_wrong_kind_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        CheckpointMetadata.from_json({"id": "x", field: value})


@pytest.mark.parametrize(
    "curves",
    [
        [1],
        {"loss": 5},
        {"loss": [1]},
        {"loss": [[1, 2, 3]]},
        {"loss": [[-1, 2]]},
        {"loss": [[0.5, 2]]},
        {"loss": [[1, "a"]]},
    ],
    ids=repr,
)
def test_curves_of_the_wrong_kind_are_refused(curves):
    with pytest.raises(ValueError, match="curves"):
        SessionRecord.from_json({"id": "x", "curves": curves})


@pytest.mark.parametrize("kind", [CheckpointMetadata, SessionRecord, NamePointer])
@pytest.mark.parametrize("data", [None, [], "x", 5, {}, {"id": None}, {"checkpoint": None}], ids=repr)
def test_what_is_no_record_at_all_is_refused(kind, data):
    with pytest.raises(ValueError):
        kind.from_json(data)


@pytest.mark.parametrize(
    "data", [None, [], "x", {"parameters": [1]}, {"parameters": {"w": 1}}, {"optimizers": {"adam": 1}}], ids=repr
)
def test_what_is_no_fingerprint_is_refused(data):
    with pytest.raises(ValueError, match="fingerprint"):
        Fingerprint.from_json(data)


@pytest.mark.parametrize("revision", [-1, True, "1", 0.5])
def test_a_pointer_with_a_wrong_revision_is_refused(revision):
    with pytest.raises(ValueError, match="revision"):
        NamePointer.from_json({"checkpoint": "x", "revision": revision})


@given(st.dictionaries(st.sampled_from(list(CheckpointMetadata(id="x").to_json(full=True))), plain))
def test_any_json_is_either_a_record_or_refused(data):
    try:
        record = CheckpointMetadata.from_json(data)
    except ValueError:
        return
    assert is_valid_id(record.id)


# --- ids, names, hashes --------------------------------------------------------------------------


def test_a_new_id_says_when_where_and_of_what():
    moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    made = new_checkpoint_id(500, "0123abcdef", now=moment)
    assert made.startswith("ckpt_20260102_030405_00000500_0123abcd_")
    assert is_valid_id(made)
    assert made != new_checkpoint_id(500, "0123abcdef", now=moment)
    assert new_session_id(now=moment).startswith("sess_20260102_030405_")
    assert is_valid_id(new_session_id())


@pytest.mark.parametrize("name", ["slot-1", "Best", "a", "v1.0", "a" * 64])
def test_names_that_can_be_given(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "best", "latest", "auto", "never", "rollback", "ckpt_x", "a" * 65, "a b", "-x", "../x", None, 5]
)
def test_names_that_cannot(name):
    with pytest.raises(InvalidName):
        check_name(name)


def test_a_hash_does_not_depend_on_the_order_of_keys():
    assert content_hash({"a": 1, "b": [1, 2]}) == content_hash({"b": [1, 2], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})
    assert set(content_hash({})) <= set(string.hexdigits)
    assert len(content_hash({})) == 16


def test_the_time_is_utc_in_whole_seconds():
    assert datetime.fromisoformat(utc_now()).tzinfo == UTC


# --- plain values --------------------------------------------------------------------------------


class Colour(enum.StrEnum):
    RED = "red"


class Mixed(str, enum.Enum):  # noqa: UP042 - as people write it
    BLUE = "blue"


@dataclasses.dataclass
class Inner:
    width: int
    folder: PurePosixPath


@dataclasses.dataclass
class Outer:
    inner: Inner
    rate: float


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Outer(Inner(3, PurePosixPath("a/b")), math.nan), {"inner": {"width": 3, "folder": "a/b"}, "rate": "nan"}),
        (argparse.Namespace(lr=0.1, betas=(0.9, 0.95)), {"lr": 0.1, "betas": [0.9, 0.95]}),
        ({1: {"deep": (1, 2)}}, {"1": {"deep": [1, 2]}}),
        ({3, 1, 2}, [1, 2, 3]),
        ({"b", 1}, ["b", 1]),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (np.bool_(True), True),
        (np.array([2.5]), 2.5),
        (np.str_("x"), "x"),
        (Colour.RED, "red"),
        (Mixed.BLUE, "blue"),
        (math.inf, "inf"),
        (True, True),
    ],
)
def test_values_are_made_plain(value, expected):
    made = jsonable(value)
    assert made == expected
    assert type(made) is type(expected)
    assert orjson.loads(orjson.dumps(made)) == expected


def test_what_torch_has_is_made_plain():
    torch = pytest.importorskip("torch")
    config = {
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "loss": torch.tensor(0.5),
        "one": torch.tensor([2]),
    }
    assert jsonable(config) == {"dtype": "torch.float32", "device": "cpu", "loss": 0.5, "one": 2}
    with pytest.raises(InvalidValue, match="weights"):
        jsonable({"weights": torch.zeros(3)})


@pytest.mark.parametrize(
    "value",
    [b"bytes", object(), 1j, 2**64, -(2**63) - 1, np.zeros(2), datetime.now(UTC), "\udc80", PurePosixPath("\udc80")],
)
def test_what_json_cannot_hold_is_refused_by_key(value):
    with pytest.raises(InvalidValue, match=r"settings\.deep\[1\] cannot be"):
        jsonable({"deep": [0, value]}, "settings")


def test_what_contains_itself_is_refused():
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(InvalidValue, match=f"more than {MAX_JSON_DEPTH} deep"):
        jsonable(endless)


@given(plain)
def test_plain_values_stay_as_they_are(value):
    assert same(jsonable(value), value)


@given(floats)
def test_floats_survive_their_encoding(value):
    assert same(decode_float(encode_float(value), "x"), value)


@pytest.mark.parametrize("value", [3, np.float32(3), np.array([3.0]), np.array(3), "3"])
def test_numbers_in_any_wrapping_become_floats(value):
    made = as_float(value, "loss")
    assert (type(made), made) == (float, 3.0)


@pytest.mark.parametrize("value", [None, "low", [1.0], np.zeros(2), 1j, 10**400, {}], ids=repr)
def test_what_is_no_number_is_refused_by_name(value):
    with pytest.raises(InvalidValue, match="loss cannot be"):
        as_float(value, "loss")


def test_tensors_become_floats():
    torch = pytest.importorskip("torch")
    assert as_float(torch.tensor([0.25], requires_grad=True), "loss") == 0.25
    with pytest.raises(InvalidValue, match="loss"):
        as_float(torch.zeros(2), "loss")


# --- curves --------------------------------------------------------------------------------------


@given(st.integers(0, 3000), st.integers(2, 300))
def test_thinning_keeps_the_ends_the_order_and_the_limit(length, limit):
    points = [(i, i / 2) for i in range(length)]
    kept = thin(points, limit)
    assert len(kept) == min(length, limit)
    assert [kept[:1], kept[-1:]] == [tuple(points[:1]), tuple(points[-1:])]
    assert list(kept) == sorted(set(kept))
    assert set(kept) <= set(points)


def test_thinning_spreads_evenly():
    kept = [i for i, _ in thin([(i, 0.0) for i in range(1001)], 11)]
    assert kept == list(range(0, 1001, 100))


@pytest.mark.parametrize(("limit", "kept"), [(0, ()), (1, ((2, 0.0),))])
def test_thinning_to_less_than_two_keeps_the_last(limit, kept):
    assert thin([(i, 0.0) for i in range(3)], limit) == kept
