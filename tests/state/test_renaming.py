import pytest

from ckptcache.errors import InvalidValue
from ckptcache.state.renaming import check_key_map, idle, renamed

NAMES = ["encoder.0.weight", "encoder.0.bias", "encoders.w", "head.weight"]


def test_without_a_map_names_stay():
    assert renamed(NAMES, None) == {name: name for name in NAMES}


@pytest.mark.parametrize("old", ["encoder.", "encoder"])
def test_a_beginning_is_replaced_up_to_its_dot_and_not_within_a_name(old):
    assert renamed(NAMES, {old: "backbone" + "." * old.endswith(".")}) == {
        "encoder.0.weight": "backbone.0.weight",
        "encoder.0.bias": "backbone.0.bias",
        "encoders.w": "encoders.w",
        "head.weight": "head.weight",
    }


def test_an_exact_name_counts_before_a_beginning_and_a_longer_beginning_before_a_shorter_one():
    key_map = {"encoder.0.bias": "b", "encoder.0": "first", "encoder": "all", "head": None}
    assert renamed(NAMES, key_map) == {
        "encoder.0.weight": "first.weight",
        "encoder.0.bias": "b",
        "encoders.w": "encoders.w",
    }


def test_a_beginning_can_be_added_to_every_name_and_taken_off():
    assert renamed(["a.w"], {"": "model."}) == {"a.w": "model.a.w"}
    assert renamed(["model.a.w"], {"model.": ""}) == {"model.a.w": "a.w"}


def test_a_function_is_asked_name_by_name():
    def key_map(name):
        return None if name.startswith("head") else name.upper()

    assert renamed(NAMES, key_map) == {name: name.upper() for name in NAMES[:3]}


@pytest.mark.parametrize("key_map", [{"encoder.": "x.", "head.weight": "x.0.weight"}, lambda name: "x.0.weight"])
def test_two_names_that_become_one_are_named(key_map):
    with pytest.raises(InvalidValue, match=r"'encoder.0.weight' and .*'x.0.weight'"):
        renamed(NAMES, key_map)


def test_a_name_that_becomes_one_that_is_there_is_refused():
    with pytest.raises(InvalidValue, match=r"'encoder.0.weight' and 'head.weight' would both become 'head.weight'"):
        renamed(NAMES, {"encoder.0.weight": "head.weight"})


def test_a_function_that_gives_no_text_is_refused():
    with pytest.raises(InvalidValue, match=r"key_map cannot be 'wrong': of 'encoder.0.weight' it makes 7"):

        def wrong(name):
            return 7

        renamed(NAMES, wrong)


@pytest.mark.parametrize("key_map", ["encoder", 3, {"a": 1}, {1: "a"}, [("a", "b")]])
def test_what_is_no_map_is_refused(key_map):
    with pytest.raises(InvalidValue, match="key_map cannot be"):
        check_key_map(key_map)


def test_entries_that_mean_no_name_are_found():
    assert idle(NAMES, {"encodr.": "x.", "encoder.": "y.", "head.weight": "z", "head.bias": None}) == (
        "encodr.",
        "head.bias",
    )
    assert idle(NAMES, None) == idle(NAMES, str.upper) == ()
