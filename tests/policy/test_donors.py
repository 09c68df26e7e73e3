import pytest

from ckptcache.policy.donors import donor_order, may_give, share_given

NEEDED = {"m.w": "float32[4, 6]", "m.b": "float32[6]", "m.s": "float32[]"}


@pytest.mark.parametrize(
    ("saved", "grows", "share"),
    [
        (NEEDED, False, 1.0),
        ({}, False, 0.0),
        ({"m.b": "float32[6]"}, False, 6 / 31),
        ({"m.b": "bfloat16[6]", "m.x": "float32[99]"}, False, 6 / 31),
        ({"m.s": "float32[]"}, True, 1 / 31),
        ({"m.w": "float32[2, 3]"}, False, 0.0),
        ({"m.w": "float32[2, 3]"}, True, 6 / 31),
        ({"m.w": "float32[2, 7]"}, True, 0.0),
        ({"m.w": "float32[6]"}, True, 0.0),
    ],
)
def test_the_share_counts_elements_of_what_fits_or_can_grow(saved, grows, share):
    assert share_given(saved, NEEDED, grows=grows) == pytest.approx(share)


def test_of_nothing_needed_nothing_is_given():
    assert share_given(NEEDED, {}) == 0.0


def test_other_data_come_before_partial_ones_and_of_these_the_larger_share():
    ranked = [("partial", 0.3), ("other_data", 0.1), ("partial", 0.9), ("exact", 0.0), ("incompatible", 1.0)]
    by_order = sorted(ranked, key=lambda pair: donor_order(*pair))
    assert by_order == [("exact", 0.0), ("other_data", 0.1), ("partial", 0.9), ("partial", 0.3), ("incompatible", 1.0)]


@pytest.mark.parametrize("kind", ["exact", "other_data", "partial"])
def test_what_fits_in_part_may_give(kind):
    assert may_give(kind, 0.0, renames=False, grows=False)


def test_what_fits_by_no_name_may_give_only_where_names_or_sizes_change():
    assert not may_give("incompatible", 0.5, renames=False, grows=False)
    assert may_give("incompatible", 0.5, renames=True, grows=False)
    assert may_give("incompatible", 0.5, renames=False, grows=True)
    assert not may_give("incompatible", 0.0, renames=True, grows=True)
