import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptcache.config import CRITICAL_PARAMS
from ckptcache.metadata import Fingerprint
from ckptcache.policy.compatibility import (
    NOT_IDENTITY,
    Description,
    architecture_key,
    group_of,
    judge,
    validation_key,
)

TENSORS = {"wte.weight": "float32[65, 64]", "lm_head.weight": "float32[65, 64]", "h.0.attn.weight": "float32[192, 64]"}
ADAM = {"adamw": {"class": "AdamW", "groups": [2, 1]}}
GPT = {"n_layer": 1, "n_head": 4, "n_embd": 64, "vocab_size": 65, "block_size": 32, "dropout": 0.1}
TEXT = {"kind": "char", "vocab_size": 65, "val_digest": "blake3:aa", "batch_size": 12, "data_dir": "data"}


def fingerprint(parameters=TENSORS, optimizers=ADAM):
    return Fingerprint(parameters=parameters, optimizers=optimizers)


def described(fingerprint_=None, model=GPT, data=TEXT):
    return Description(fingerprint_ or fingerprint(), model, data)


def verdict(saved, needed, critical=CRITICAL_PARAMS):
    return judge(saved, needed, critical)


SAVED = described()

# --- the architecture ----------------------------------------------------------------------------


def test_the_same_model_and_data_fit_exactly():
    found = verdict(SAVED, described())
    assert (found.kind, found.comparable, found.differences, found.reason) == ("exact", True, (), "fits")


def test_equal_shapes_with_another_head_count_are_another_architecture():
    found = verdict(SAVED, described(model=GPT | {"n_head": 8}))
    assert found.kind == "partial"
    assert str(found.differences[0]) == "n_head: saved 4, needed 8"
    assert "n_head: saved 4, needed 8" in found.reason
    assert group_of(SAVED, CRITICAL_PARAMS) != group_of(described(model=GPT | {"n_head": 8}), CRITICAL_PARAMS)


@pytest.mark.parametrize(
    "changed",
    [
        TENSORS | {"wte.weight": "float32[100, 64]"},
        TENSORS | {"wte.weight": "bfloat16[65, 64]"},
        TENSORS | {"extra.bias": "float32[64]"},
        {name: spec for name, spec in TENSORS.items() if name != "wte.weight"},
    ],
    ids=["shape", "dtype", "more", "fewer"],
)
def test_a_model_without_critical_keys_is_told_from_another_by_its_tensors(changed):
    saved, needed = described(model={"hidden": 64}), described(fingerprint(changed), model={"hidden": 64})
    found = verdict(saved, needed)
    assert found.kind == "partial"
    assert [d.what for d in found.differences] == ["parameter"]
    assert group_of(saved, CRITICAL_PARAMS) != group_of(needed, CRITICAL_PARAMS)
    assert verdict(saved, saved).kind == "exact"


def test_a_tensor_difference_says_what_was_saved_and_what_is_needed():
    found = verdict(SAVED, described(fingerprint(TENSORS | {"wte.weight": "float32[9, 64]", "new": "float32[1]"})))
    assert "wte.weight: saved float32[65, 64], needed float32[9, 64]" in found.reason
    assert "new: saved absent, needed float32[1]" in found.reason


def test_without_a_tensor_in_common_nothing_fits():
    found = verdict(SAVED, described(fingerprint({"conv.weight": "float32[3, 3]"}), model={"layers": 2}))
    assert found.kind == "incompatible"
    assert found.reason.startswith("does not fit: ")


def test_a_name_in_common_without_its_shape_gives_nothing():
    assert verdict(SAVED, described(fingerprint({"wte.weight": "float32[9, 9]"}))).kind == "incompatible"


@pytest.mark.parametrize("side", ["saved", "needed"])
def test_an_unknown_fingerprint_leaves_the_critical_parameters_to_decide(side):
    bare = Description(None, GPT, TEXT)
    other = Description(None, GPT | {"n_embd": 128}, TEXT)
    sides = (bare, SAVED) if side == "saved" else (SAVED, bare)
    assert verdict(*sides).kind == "exact"
    assert verdict(*sides).checked
    sides = (other, SAVED) if side == "saved" else (SAVED, other)
    assert verdict(*sides).kind == "incompatible"


@pytest.mark.parametrize("model", [None, {"hidden": 64}], ids=["undeclared", "without critical keys"])
def test_what_could_not_be_checked_is_said(model):
    found = verdict(Description(None, model, None), Description(None, model, None))
    assert (found.kind, found.checked) == ("exact", False)
    assert "neither the fingerprint nor the critical parameters" in found.reason


def test_a_critical_key_on_one_side_only_rejects_where_both_declared_a_configuration():
    without = {key: value for key, value in GPT.items() if key != "n_head"}
    assert verdict(described(model=without), SAVED).kind == "partial"
    assert "n_head: saved absent, needed 4" in verdict(described(model=without), SAVED).reason
    assert verdict(SAVED, described(model=without)).kind == "partial"
    assert verdict(described(model=None), SAVED).kind == "exact"
    assert verdict(described(model=without), described(model=without)).kind == "exact"


def test_other_keys_are_listed_and_do_not_reject_unless_all_are_critical():
    needed = described(model=GPT | {"dropout": 0.2})
    found = verdict(SAVED, needed)
    assert found.kind == "exact"
    assert [d.rejects for d in found.differences] == [False]
    assert "dropout: saved 0.1, needed 0.2" in found.reason
    assert group_of(SAVED, CRITICAL_PARAMS) == group_of(needed, CRITICAL_PARAMS)
    assert verdict(SAVED, needed, "all").kind == "partial"
    assert group_of(SAVED, "all") != group_of(needed, "all")


@pytest.mark.parametrize(
    ("a", "b"), [(4, 4.0), ([1, 2], (1, 2)), ({"x": 1, "y": 2.0}, {"y": 2, "x": 1.0}), (0.0, -0.0)]
)
def test_equal_values_in_other_clothes_are_equal(a, b):
    saved, needed = described(model=GPT | {"n_head": a}), described(model=GPT | {"n_head": b})
    assert verdict(saved, needed).kind == "exact"
    assert architecture_key(saved, CRITICAL_PARAMS) == architecture_key(needed, CRITICAL_PARAMS)


@pytest.mark.parametrize(("a", "b"), [(1, True), (0, False), ("4", 4), (None, 0), (4, 4.5), ([1, 2], [2, 1])])
def test_values_of_another_kind_are_not_equal(a, b):
    saved, needed = described(model=GPT | {"n_head": a}), described(model=GPT | {"n_head": b})
    assert verdict(saved, needed).kind == "partial"
    assert architecture_key(saved, CRITICAL_PARAMS) != architecture_key(needed, CRITICAL_PARAMS)


def test_a_long_list_of_differences_is_cut_short_with_its_number():
    needed = fingerprint({f"layer.{i}": "float32[1]" for i in range(100)})
    reason = verdict(described(fingerprint(TENSORS | {"layer.0": "float32[1]"})), described(needed)).reason
    assert reason.endswith("; and 99 more")
    assert len(reason) < 300
    long = verdict(SAVED, described(model=GPT | {"n_layer": list(range(1000))})).reason
    assert len(long) < 200


def test_the_configuration_is_named_before_the_tensors_that_follow_from_it():
    needed = described(fingerprint(TENSORS | {"wte.weight": "float32[65, 8]"}), GPT | {"n_embd": 8, "dropout": 0.0})
    assert [d.name for d in verdict(SAVED, needed).differences] == ["n_embd", "wte.weight", "dropout"]


# --- the optimizer -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizers",
    [
        {"adamw": {"class": "SGD", "groups": [2, 1]}},
        {"adamw": {"class": "AdamW", "groups": [3]}},
        ADAM | {"muon": {"class": "Muon", "groups": [1]}},
    ],
    ids=["class", "groups", "lacking"],
)
def test_a_model_that_fits_with_an_optimizer_that_does_not_is_partial(optimizers):
    found = verdict(SAVED, described(fingerprint(optimizers=optimizers)))
    assert found.kind == "partial"
    assert [d.what for d in found.differences] == ["optimizer"]
    assert found.reason.startswith("fits only in part: optimizer ")


def test_an_optimizer_that_is_not_needed_is_no_obstacle():
    found = verdict(SAVED, described(fingerprint(optimizers={})))
    assert (found.kind, found.differences) == ("exact", ())
    assert architecture_key(SAVED, ()) == architecture_key(described(fingerprint(optimizers={})), ())


# --- the data ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", sorted(NOT_IDENTITY - {"val_digest"}))
def test_what_does_not_say_what_the_data_means_does_not_reject(key):
    saved, needed = described(data=TEXT | {key: 1}), described(data=TEXT | {key: 2})
    found = verdict(saved, needed)
    assert (found.kind, found.comparable) == ("exact", True)
    assert f"data {key}: saved 1, needed 2" in found.reason
    assert group_of(saved, CRITICAL_PARAMS) == group_of(needed, CRITICAL_PARAMS)


def test_another_tokenisation_is_other_data():
    found = verdict(SAVED, described(data=TEXT | {"kind": "bpe"}))
    assert (found.kind, found.comparable) == ("other_data", False)
    assert found.reason == "fits the model, but not the data: data kind: saved 'char', needed 'bpe'"


def test_other_validation_bytes_are_resumable_but_not_comparable():
    needed = described(data=TEXT | {"val_digest": "blake3:bb"})
    found = verdict(SAVED, needed)
    assert (found.kind, found.comparable) == ("exact", False)
    assert "other validation data" in found.reason
    assert group_of(SAVED, CRITICAL_PARAMS) != group_of(needed, CRITICAL_PARAMS)


def test_data_without_digests_are_comparable_and_undeclared_data_is_not_compared():
    plain = {"kind": "char"}
    assert verdict(described(data=plain), described(data=plain)).comparable
    assert verdict(described(data=None), described(data=None)).comparable
    assert not verdict(described(data=TEXT), described(data=plain)).comparable
    assert verdict(described(data=None), SAVED).kind == "exact"
    assert not verdict(described(data=None), SAVED).comparable


def test_a_model_that_does_not_fit_counts_for_more_than_its_data():
    found = verdict(SAVED, described(model=GPT | {"n_head": 2}, data=TEXT | {"kind": "bpe"}))
    assert found.kind == "partial"
    assert [d.name for d in found.differences] == ["n_head", "kind"]


# --- keys ----------------------------------------------------------------------------------------


def test_keys_do_not_depend_on_the_order_of_declaration():
    turned = described(
        fingerprint(dict(reversed(TENSORS.items()))), dict(reversed(GPT.items())), dict(reversed(TEXT.items()))
    )
    assert group_of(turned, CRITICAL_PARAMS) == group_of(SAVED, CRITICAL_PARAMS)
    assert hash(group_of(turned, tuple(reversed(CRITICAL_PARAMS)))) == hash(group_of(SAVED, CRITICAL_PARAMS))


def test_keys_are_16_hex_digits_and_nothing_declared_is_no_key():
    assert len(bytes.fromhex(architecture_key(SAVED, CRITICAL_PARAMS))) == 8
    assert len(bytes.fromhex(validation_key(TEXT))) == 8
    assert validation_key(None) is None
    assert validation_key({}) is None
    assert validation_key({"batch_size": 4}) is None
    assert validation_key({"val_digest": "blake3:aa"}) is not None


def test_an_unknown_fingerprint_is_no_empty_one():
    assert architecture_key(Description(None, GPT, None), ()) != architecture_key(Description(Fingerprint()), ())


values = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([1.0, 0.5, "1"]))
configs = st.dictionaries(
    st.sampled_from(["n_head", "n_layer", "kind", "val_digest", "batch_size"]), values, max_size=4
)
descriptions = st.builds(
    lambda tensors, model, data: Description(Fingerprint(parameters=tensors), model, data),
    st.dictionaries(st.sampled_from("ab"), st.sampled_from(["float32[1]", "float32[2]"])),
    configs,
    configs,
)


@given(descriptions, descriptions)
def test_groups_and_verdicts_agree_where_everything_is_declared(saved, needed):
    found, group, other = verdict(saved, needed), group_of(saved, CRITICAL_PARAMS), group_of(needed, CRITICAL_PARAMS)
    assert (group.architecture == other.architecture) == (found.kind in ("exact", "other_data"))
    assert (group.validation == other.validation) <= found.comparable
    assert found.reason


@given(descriptions, descriptions)
def test_a_verdict_is_the_same_both_ways(saved, needed):
    there, back = verdict(saved, needed), verdict(needed, saved)
    assert (there.kind, there.comparable, len(there.differences)) == (back.kind, back.comparable, len(back.differences))


@given(descriptions)
def test_whatever_was_saved_fits_itself(description):
    assert verdict(description, description).kind == "exact"
