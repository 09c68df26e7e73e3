import dataclasses
import math
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import HealthCheck, given, settings

from ckptcache.metadata import SessionRecord
from ckptcache.progress import chart, losses
from ckptcache.progress.views import view_of
from ckptcache.storage.index import Index
from tests.caches import python
from tests.progress.runs import add_session, hostile_run, last_checkpoint, run
from tests.strategies import indexes

PROGRAM = """
from tests.progress.runs import run
from ckptcache.progress import chart, lineage, page
import hashlib, sys
view = run(9, 30)
made = (chart.svg(view), chart.xychart(view), lineage.mermaid(view), page.readme([view]), page.job_report(view))
print(hashlib.sha256(repr(made).encode()).hexdigest(), "torch" in sys.modules)
"""


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}text")]  # noqa: S314


def numbers(block, place=0):
    return [float(number) for number in re.findall(r"line \[(.*)\]", block)[place].split(", ")]


def test_the_picture_names_the_newest_sessions_the_lowest_loss_and_how_many_are_older():
    shown = texts(chart.svg(run(9)))
    assert [t for t in shown if t.startswith("sess_")] == [f"sess_20260102_{i:06d}" for i in range(8, 2, -1)]
    assert "3 older sessions" in shown
    assert "lowest: 0.5102 at 360" in shown
    assert {"iteration", "val loss", "resumed here"} <= set(shown)


def test_a_fresh_start_is_not_marked_as_resumed():
    assert "resumed here" not in texts(chart.svg(run(1)))


def test_the_newest_of_many_sessions_are_drawn_once_more_where_there_is_room():
    assert "the newest sessions" in texts(chart.svg(run(40)))
    assert "the newest sessions" not in texts(chart.svg(run(8)))
    index = Index()
    for number in range(40):
        add_session(index, [1.0 + number, 2.0 + number], parent=last_checkpoint(index) if number else None)
    assert "the newest sessions" not in texts(chart.svg(view_of("ci", index, frozenset())))


def test_what_is_not_finite_is_left_out():
    index = Index()
    add_session(index, [3.0, math.nan, math.inf, 2.0, -math.inf, 1e300])
    view = view_of("ci", index, frozenset())
    assert losses.points(view.sessions[0]) == [(0, 3.0), (30, 2.0)]
    svg = chart.svg(view)
    assert b"nan" not in svg
    assert "lowest: 2.0000 at 30" in texts(svg)


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf, math.nan]])
def test_without_a_finite_loss_nothing_is_drawn(values):
    index = Index()
    add_session(index, values)
    view = view_of("ci", index, frozenset())
    assert (chart.svg(view), chart.xychart(view), chart.is_drawable(view)) == (None, None, False)


def test_one_evaluation_is_a_picture_but_no_mermaid_chart():
    view = run(1, 1)
    assert chart.svg(view) is not None
    assert chart.xychart(view) is None


def test_without_matplotlib_there_is_no_picture(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert chart.svg(run(2)) is None


def test_two_processes_give_the_same_bytes_and_torch_is_not_needed():
    done = [python(PROGRAM, PYTHONHASHSEED=seed) for seed in ("1", "2")]
    assert [d.returncode for d in done] == [0, 0], done[0].stderr
    assert done[0].stdout == done[1].stdout
    assert done[0].stdout.endswith("False\n")


def test_a_users_matplotlib_settings_change_nothing_and_stay():
    import matplotlib

    usual = chart.svg(run(3))
    with matplotlib.rc_context({"lines.linewidth": 9, "axes.facecolor": "black", "svg.fonttype": "path"}):
        assert chart.svg(run(3)) == usual
        assert matplotlib.rcParams["lines.linewidth"] == 9


@pytest.mark.parametrize(("sessions", "each", "most"), [(20, 200, 25_000), (300, 20, 25_000), (1000, 20, 30_000)])
def test_it_stays_small(sessions, each, most):
    view = run(sessions, each)
    assert len(chart.svg(view)) < most
    assert len(chart.xychart(view)) < 1_500


def test_the_mermaid_chart_has_the_losses_in_their_order_and_the_lowest_so_far():
    index = Index()
    add_session(index, [4.0, 2.0])
    add_session(index, [3.0, 1.0, math.nan])
    block = chart.xychart(view_of("ci", index, frozenset()))
    assert numbers(block) == [4.0, 2.0, 3.0, 1.0]
    assert numbers(block, 1) == [4.0, 2.0, 2.0, 1.0]
    assert "1 --> 4" in block
    assert 'y-axis "val loss" 0.8500 --> 4.1500' in block


def test_the_mermaid_chart_keeps_the_lowest_of_what_it_leaves_out():
    index = Index()
    add_session(index, [0.5 if i == 501 else 5.0 for i in range(1000)])
    block = chart.xychart(view_of("ci", index, frozenset()))
    assert len(numbers(block)) == 40
    assert numbers(block, 1)[-1] == 0.5


def test_losses_on_other_data_are_not_mixed():
    index = Index()
    add_session(index, [0.1, 0.1])
    old = index.checkpoints[last_checkpoint(index)]
    index.checkpoints[old.id] = dataclasses.replace(old, data_config=index.store_config({"val_digest": "other"}))
    add_session(index, [4.0, 3.0])
    view = view_of("ci", index, frozenset())
    assert numbers(chart.xychart(view)) == [4.0, 3.0]
    assert "lowest: 3.0000 at 10" in texts(chart.svg(view))


@pytest.mark.parametrize("values", [[1e-9, 2e-9], [-3.0, -2.0], [1e11, 1.0], [2.0, 2.0], [0.0, 0.0]])
def test_mermaid_reads_no_exponents(values):
    index = Index()
    add_session(index, values)
    block = chart.xychart(view_of("ci", index, frozenset()))
    assert not re.search(r"\d[eE][+-]?\d", block)
    low, high = re.search(r'loss" (\S+) --> (\S+)', block).groups()
    assert float(low) < float(high)


def test_a_wide_range_is_drawn_by_its_logarithm():
    index = Index()
    add_session(index, [1000.0, 10.0, 1.0])
    shown = texts(chart.svg(view_of("ci", index, frozenset())))
    assert {"1", "10", "100", "1000"} <= set(shown)


def test_hostile_text_stays_text():
    svg = chart.svg(hostile_run())
    ElementTree.fromstring(svg)  # noqa: S314
    assert b"<script" not in svg
    block = chart.xychart(hostile_run())
    assert "script" not in block
    assert "`" not in block


@given(indexes())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_index_can_be_drawn(index):
    index.sessions["odd"] = SessionRecord(id="odd", curves={"val_loss": ((2**53, 5e-324), (0, 9e11), (7, 1.0))})
    svg = chart.svg(view_of("ci", index, frozenset(index.checkpoints)))
    assert svg is not None
    ElementTree.fromstring(svg)  # noqa: S314
