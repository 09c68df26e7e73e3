from hypothesis import given
from hypothesis import strategies as st

from ckptcache.cli.tables import ALWAYS, Column, fitting, needed_width, table


def test_the_least_dear_columns_go_first_and_short_cells_come_before():
    columns = [
        Column("id", ["x" * 20], short=["x" * 10]),
        Column("a", ["a" * 10], keep=10),
        Column("b", ["b" * 30], keep=50),
        Column("c", ["c" * 5], keep=20),
    ]
    titles = lambda room: [c.title for c in fitting(columns, room)]  # noqa: E731
    assert titles(80) == ["id", "a", "b", "c"]
    assert fitting(columns, 70)[0].cells == ["x" * 10]
    assert titles(50) == ["id", "b", "c"]
    # What is too wide leaves its room to what is narrower.
    assert titles(30) == ["id", "a"] or titles(30) == ["id", "a", "c"]
    assert titles(5) == ["id"]


@given(
    st.lists(st.tuples(st.text("ab", max_size=20), st.integers(1, ALWAYS)), min_size=1, max_size=6), st.integers(1, 120)
)
def test_what_fits_fits_or_is_indispensable(cells, room):
    columns = [Column(f"c{i}", [cell], keep=keep) for i, (cell, keep) in enumerate(cells)]
    chosen = fitting(columns, room)
    assert needed_width(chosen) <= room or all(c.keep == ALWAYS for c in chosen)
    assert [c for c in columns if c in chosen] == chosen


def test_a_table_in_a_pipe_is_aligned_and_harmless():
    lines = table([Column("val loss", ["1.0", ""]), Column("note", ["a\x1b[1m\nb", "é"])])
    assert lines == ["val_loss  note", r"1.0       a\x1b[1m\x0ab", "-         é"]
    assert table([Column("id", [])]) == []
