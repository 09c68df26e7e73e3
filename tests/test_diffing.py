import copy
import json
import math
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from ckptcache import TrainingCache
from ckptcache.diffing import Side, Source, diff, model_parts, side, sides, tensor_diff
from ckptcache.errors import CheckpointDamaged, CheckpointMissing, CheckpointNotFound
from ckptcache.metadata import CheckpointMetadata, Fingerprint
from ckptcache.storage.index import Index
from tests.caches import Training, file_of, flip, listing, save


class _Catalog:
    """Of a catalogue, what a comparison looks at."""

    index = Index()


def as_side(state, id="a"):
    return Side(_Catalog(), CheckpointMetadata(id=id), state)


def differ(a, b):
    return diff(as_side(a), as_side(b, "b"))


def by_path(found):
    return {tensor.path: tensor for tensor in found.tensors}


@pytest.fixture
def two(tmp_path):
    """A cache with two checkpoints of one training, three steps apart, and their states."""
    training = Training()
    with TrainingCache(tmp_path / "cache") as cache:
        first, before = save(cache, 2.0, 3, state=training.objects), training.state
        training.train(3)
        second = save(cache, 1.0, 6, state=training.objects, parents=[first.id])
    return cache, (first, before), (second, training.state)


def test_two_checkpoints_of_a_training_are_measured_as_numpy_does(two):
    cache, (first, before), (second, after) = two
    found = diff(side(cache, first.id), side(cache, second.id))
    model = {tensor.name: tensor for tensor in found.model}
    assert set(model) == set(before["model"])
    for name, tensor in model.items():
        a, b = (np.asarray(state["model"][name], dtype=np.float64).ravel() for state in (before, after))
        measured = tensor.measure
        assert measured.change == pytest.approx(np.linalg.norm(b - a)), name
        assert measured.relative == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), nan_ok=True), name
        assert measured.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), nan_ok=True), name
    relative = [tensor.measure.relative for tensor in found.tensors if tensor.status == "changed"]
    assert relative == sorted(relative, reverse=True)
    assert {part.name: part.is_model for part in found.parts} == {"model": True, "optimizer": False, "scheduler": False}
    assert not found.identical


def test_the_totals_are_those_of_all_tensors_as_one_vector(two):
    cache, (first, before), (second, after) = two
    found = diff(side(cache, first.id), side(cache, second.id)).to_json()
    a, b = (
        np.concatenate([np.asarray(t, dtype=np.float64).ravel() for t in state["model"].values()])
        for state in (before, after)
    )
    sums = found["model_totals"]
    assert sums["change"] == pytest.approx(np.linalg.norm(b - a))
    assert sums["relative"] == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a))
    assert sums["cosine"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert (sums["elements"], sums["elements_changed"]) == (a.size, int((a != b).sum()))
    assert found["model_floating_totals"]["tensors"] == sums["tensors"] - 1
    json.dumps(found, allow_nan=False)


def test_a_checkpoint_is_identical_to_itself_and_read_once(two, monkeypatch):
    from ckptcache import diffing

    cache, (first, _), _ = two
    reads = []
    monkeypatch.setattr(diffing, "read", lambda *a, **k: reads.append(1) or read(*a, **k))
    from ckptcache.restoring import read

    a, b = sides(Source(cache, first.id), Source(cache, "latest"))
    assert len(reads) == 2
    a, b = sides(Source(cache, first.id), Source(cache, first.id))
    assert len(reads) == 3
    found = diff(a, b)
    assert found.identical
    assert {tensor.status for tensor in found.tensors} == {"same"}
    assert found.values == []


def test_the_same_state_saved_twice_is_identical(tmp_path):
    training = Training()
    with TrainingCache(tmp_path) as cache:
        first, second = (save(cache, 1.0, i, state=training.objects).id for i in (1, 2))
    assert diff(side(cache, first), side(cache, second)).identical


def test_tensors_that_one_side_lacks_or_has_in_another_shape_come_first():
    a = {"model": {"gone": torch.ones(2), "wide": torch.ones(2, 3), "w": torch.ones(2)}}
    b = {"model": {"new": torch.ones(2), "wide": torch.ones(3), "w": torch.zeros(2)}}
    found = differ(a, b)
    assert [(t.name, t.status) for t in found.tensors] == [
        ("gone", "only_a"),
        ("new", "only_b"),
        ("wide", "reshaped"),
        ("w", "changed"),
    ]
    wide = found.tensors[2].to_json()
    assert (wide["a"]["shape"], wide["b"]["shape"], wide["change"]) == ([2, 3], [3], None)


def test_nan_stands_above_infinity_and_that_above_numbers():
    base = {"model": {"nan": torch.ones(1), "inf": torch.zeros(1), "big": torch.ones(1), "small": torch.ones(1)}}
    after = copy.deepcopy(base)
    for name, value in {"nan": math.nan, "inf": 1.0, "big": 3.0, "small": 1.5}.items():
        after["model"][name].fill_(value)
    assert [t.name for t in differ(base, after).tensors] == ["nan", "inf", "big", "small"]


def test_another_dtype_is_said_and_measured():
    found = tensor_diff("model", "w", torch.ones(2), torch.ones(2, dtype=torch.float16))
    assert (found.status, found.a.dtype, found.b.dtype, found.measure.change) == ("changed", "float32", "float16", 0.0)


def test_bits_without_numbers_are_only_said_to_differ():
    a, b = (torch.tensor([n], dtype=torch.uint8).view(torch.float4_e2m1fn_x2) for n in (1, 2))
    assert tensor_diff("model", "w", a, a).status == "same"
    found = tensor_diff("model", "w", a, b)
    assert (found.status, found.measure) == ("unmeasured", None)


def test_the_model_goes_by_canonical_names():
    plain = {"model": {"0.weight": torch.ones(1)}}
    wrapped = {"model": {"module._orig_mod.0.weight": torch.ones(1)}}
    assert differ(plain, wrapped).identical


def test_a_compiled_model_saved_by_a_session_matches_the_plain_one(tmp_path):
    model = nn.Linear(2, 2)
    with TrainingCache(tmp_path) as cache:
        first = save(cache, 1.0, 1, state={"net": model})
        second = save(cache, 1.0, 2, state={"net": nn.DataParallel(model)})
    found = diff(side(cache, first.id), side(cache, second.id))
    assert found.identical
    assert [part.is_model for part in found.parts] == [True]


def test_parts_that_one_side_lacks_are_said():
    found = differ({"model": {"w": torch.ones(1)}, "ema": {"w": torch.ones(1)}}, {"model": {"w": torch.ones(1)}})
    ema = next(part for part in found.parts if part.name == "ema")
    assert (ema.in_a, ema.in_b, ema.identical) == (True, False, False)
    assert not found.identical


def test_values_are_compared_by_type_and_nan_is_nan():
    a = {"plain": {"n": 1, "x": math.nan, "s": "a", "flags": [True, {"deep": (1, 2)}], "t": torch.ones(1)}}
    b = {"plain": {"n": 1.0, "x": math.nan, "s": "b", "flags": [True, {"deep": (1, 3)}], "t": 5}}
    found = differ(a, b)
    assert {value.name: (value.to_json().get("a"), value.to_json().get("b")) for value in found.values} == {
        "n": (1, 1.0),
        "s": ("a", "b"),
        "flags.1.deep": ("(1, 2)", "(1, 3)"),
        "t": (None, 5),
    }
    assert [(t.name, t.status) for t in found.tensors] == [("t", "only_a")]


def test_lists_of_values_are_one_value():
    a = {"rng": {"python": (3, tuple(range(624)), None), "nan": [math.nan, 1]}}
    b = {"rng": {"python": (3, tuple(range(1, 625)), None), "nan": [math.nan, 1]}}
    found = differ(a, b)
    assert [value.name for value in found.values] == ["python.1"]
    assert [value.name for value in differ({"x": {"l": [1, 2]}}, {"x": {"l": [1, 2.0]}}).values] == ["l"]
    assert differ({"x": {"l": [1]}}, {"x": {"l": [1, 2]}}).parts[0].values_differing == 1


def test_an_optimizer_that_has_not_stepped_lacks_tensors_and_nothing_else():
    a = {"model": {}, "optimizer": {"state": {}, "param_groups": []}}
    b = {"model": {}, "optimizer": {"state": {0: {"step": torch.ones(())}}, "param_groups": []}}
    found = differ(a, b)
    assert [(t.path, t.status) for t in found.tensors] == [("optimizer.state.0.step", "only_b")]
    assert found.values == []


def test_values_that_json_cannot_hold_are_shown_as_text():
    a = {"x": {"b": b"\x00", "d": torch.float32, "c": 1 + 2j, "i": 2**60, "long": b"x" * 500}}
    b = {"x": {"b": b"\x01", "d": torch.float16, "c": 2 + 2j, "i": 2**61, "long": b"y" * 500}}
    shown = {value.name: value.to_json()["a"] for value in differ(a, b).values}
    assert shown["d"] == "torch.float32"
    assert shown["c"] == "(1+2j)"
    assert shown["i"] == str(2**60)
    assert len(shown["long"]) == 200
    json.dumps([value.to_json() for value in differ(a, b).values], allow_nan=False)


def test_arrays_are_compared_as_tensors(tmp_path):
    with TrainingCache(tmp_path) as cache:
        ids = [save(cache, 1.0, i, state={"model": {"w": np.arange(3.0) + i}}).id for i in (1, 2)]
    found = diff(side(cache, ids[0]), side(cache, ids[1]))
    assert [(t.name, t.measure.change) for t in found.model] == [("w", pytest.approx(math.sqrt(3)))]


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"net.w": "float32[1]"}, {"net"}),
        ({"net.w": "", "optimizer.state.0": "", "rng.torch": ""}, {"net"}),
        ({"optimizer.state.0": ""}, {"optimizer"}),
        (None, {"net", "w"}),
    ],
)
def test_the_model_is_what_the_fingerprint_names(parameters, expected):
    state = {"net": {}, "optimizer": {"state": {}, "param_groups": []}, "rng": {}, "w": 1}
    known = None if parameters is None else Fingerprint(parameters=parameters)
    assert model_parts(state, known) == expected
    assert model_parts({"model": {}, "other": {}}, None) == {"model"}


def test_progress_ends_with_all_bytes(two):
    cache, (first, _), (second, _) = two
    reads, compared = [], []
    a, b = sides(Source(cache, first.id), Source(cache, second.id), progress=lambda *told: reads.append(told))
    diff(a, b, progress=lambda *told: compared.append(told))
    assert reads == [(0, first.size + second.size), (first.size, first.size + second.size)]
    assert compared[-1][0] == compared[-1][1] > 0


# --- what cannot be read -------------------------------------------------------------------------


def test_a_missing_one_is_told_before_the_other_is_read(two):
    cache, (first, _), _ = two
    flip(file_of(cache, first))
    with pytest.raises(CheckpointNotFound, match="nobody"):
        sides(Source(cache, first.id), Source(cache, "nobody"))
    assert file_of(cache, first).exists()


def test_a_damaged_one_goes_to_quarantine_unless_it_lies_elsewhere(two, tmp_path):
    cache, (first, _), (second, _) = two
    flip(file_of(cache, first))
    shutil.copytree(cache.cache_dir, tmp_path / "elsewhere")
    elsewhere = TrainingCache(tmp_path / "elsewhere")
    before = listing(elsewhere.cache_dir)
    with pytest.raises(CheckpointDamaged):
        sides(Source(elsewhere, first.id, untouched=True), Source(cache, second.id))
    assert listing(elsewhere.cache_dir) == before
    with pytest.raises(CheckpointDamaged):
        side(cache, first.id)
    assert (cache.cache_dir / "quarantine" / f"{first.id}.pt").exists()
    with pytest.raises(CheckpointMissing, match="quarantined"):
        side(cache, first.id)


def test_a_file_cut_short_is_damaged(two):
    cache, (first, _), _ = two
    path = file_of(cache, first)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointDamaged):
        side(cache, first.id)


def test_an_evicted_one_says_why(two):
    cache, (first, _), _ = two
    with cache.ledger.change() as change:
        cache.ledger.evict(change, {first.id: "rank 9, too low"})
    with pytest.raises(CheckpointMissing, match="evicted: rank 9, too low"):
        side(cache, first.id)
