import re
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptcache import words

IDS = st.lists(st.from_regex(re.compile(r"\A[a-z0-9][a-z0-9_]{0,12}\Z")), min_size=1, max_size=12, unique=True)
NOW = datetime(2026, 1, 2, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((None, ""), (0.0, "0.0000"), (2.34567, "2.3457"), (-1.5, "-1.5000"), (1.5e-7, "1.5e-07")),
        *((123456.0, "1.235e+05"), (float("nan"), "nan"), (float("-inf"), "-inf")),
    ],
)
def test_numbers(value, text):
    assert words.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((None, ""), (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_234_567, "1.23 MB"), (999_700, "1 MB")),
        *((20_000_000_000, "20 GB"), (5 * 10**15, "5e+03 TB")),
    ],
)
def test_sizes_in_powers_of_1000(value, text):
    assert words.size(value) == text


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("2026-01-02T11:59:30Z", "30 s ago"),
        ("2026-01-02T11:58:00+00:00", "2 min ago"),
        ("2026-01-02T09:00:00", "3 h ago"),
        ("2025-12-31T12:00:00Z", "2 days ago"),
        ("2024-12-31T12:00:00Z", "2024-12-31"),
        ("2027-01-01T00:00:00Z", "2027-01-01"),
        ("yesterday", "yesterday"),
        ("", ""),
    ],
)
def test_ages(written, text):
    assert words.age(written, NOW) == text


def test_a_curve_is_drawn_from_lowest_to_highest():
    assert words.sparkline([3, 2, 1], 8) == "█▅▁"
    assert words.sparkline([1.0, float("nan"), 1.0], 8) == "▁▁"
    assert words.sparkline([5.0], 8) == ""
    assert words.sparkline([], 8) == ""
    assert len(words.sparkline(range(200), 8)) == 8
    assert words.sparkline(range(200), 8) == "▁▂▃▄▅▆▇█"


def test_a_configuration_in_one_line():
    assert words.settings({"a": 1, "b": {"c": [1.0, "x"]}, "d": None}) == "a 1, b {c [1, x]}, d None"
    assert words.settings(None) == ""


@given(IDS, st.lists(st.from_regex(re.compile(r"\A[a-z]{1,4}\Z")), max_size=4))
def test_a_short_id_stands_for_one_checkpoint_only(ids, names):
    for id, short in words.short_ids(ids, ids, names).items():
        assert id.startswith(short)
        # As it is looked up: an id as it is, then a name, then a prefix that only one has.
        assert short == id or (
            short not in {*names, "best", "latest"} and [i for i in ids if i.startswith(short)] == [id]
        )


def test_short_ids_end_where_a_part_ends():
    ids = [f"ckpt_20260102_030405_{i:08d}_0123abcd_{i:04x}" for i in range(3)]
    assert words.short_ids(ids, ids)[ids[1]] == "ckpt_20260102_030405_00000001"
    assert words.short_ids(ids[:1], ids[:1])[ids[0]] == "ckpt_20260102_030405"
    assert words.short_ids(ids[:1], ids)[ids[0]] == "ckpt_20260102_030405_00000000"
