import dataclasses
import html
import math
import re

import pytest
from hypothesis import given, settings

from ckptcache.metadata import CheckpointMetadata, NamePointer
from ckptcache.progress import page
from ckptcache.progress.markdown import code, printable, prose, word
from ckptcache.progress.views import view_of
from ckptcache.storage.index import Index
from tests.progress.runs import HOSTILE, add_session, hostile_run, run
from tests.strategies import indexes


def tables(text):
    """Each table as rows of cells, by the words of its first title row; every row must be as wide as its rule."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("| "):
            rows.append([cell.strip(" ").replace("\u00a0", " ") for cell in line.strip("|").split("|")])
        elif rows:
            assert {len(row) for row in rows} == {len(rows[1])}, rows
            found.append(rows)
            rows = []
    return {tuple(rows[0]): rows[2:] for rows in found}


def table(text, first):
    return next(rows for titles, rows in tables(text).items() if titles[0] == first)


def test_the_page_begins_with_all_runs():
    text = page.readme([run(3, name="a", kept=1), run(1, name="b")])
    assert text.startswith("# Training progress\n")
    assert text.count("`ckptcache progress`") == 1
    assert table(text, "run") == [
        ["[a](#a)", "3", "120", "val loss 1.3158 at iteration 120", "1", "3"],
        ["[b](#b)", "1", "40", "val loss 2.7778 at iteration 40", "1", "1"],
    ]
    assert re.findall("^## (.*)$", text, re.MULTILINE) == ["a", "b"]
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


def test_the_best_is_named_with_what_goes_on_from_it():
    text = page.readme([run(3)])
    assert "**Best: val loss 1.3158 at iteration 120** (`ckpt_20260102_000002`, available)." in text
    assert "A training whose cache is `.training-progress/ci/cache` goes on from it." in text
    assert "`elsewhere/ci/cache`" in page.readme([run(3)], folder="elsewhere")


def test_when_the_best_is_only_recorded_the_next_is_named():
    index = run(3).index
    best = max(index.checkpoints)
    text = page.readme([view_of("ci", index, frozenset(index.checkpoints) - {best})])
    assert "(`ckpt_20260102_000002`, only recorded)" in text
    assert (
        "goes on from `ckpt_20260102_000001` (iteration 80, val loss 1.7857), the best that is kept and fits." in text
    )
    assert "starts afresh: no file that fits is kept." in page.readme([run(3, kept=0)])


def test_the_last_session_is_compared_with_the_one_before():
    view = run(2)
    last = view.sessions[0]
    view.index.sessions[last.id] = dataclasses.replace(last, seconds=1.0, stop_reason=None)
    rows = {row[0]: row[1:] for row in table(page.readme([view]), "")}
    assert rows["session"][:2] == ["`sess_20260102_000001`", "`sess_20260102_000000`"]
    assert rows["went on from"] == ["`ckpt_20260102_000000`", "a fresh start", ""]
    assert rows["iterations"] == ["40 to 80", "0 to 40", "+0 steps"]
    view.index.sessions[last.id] = dataclasses.replace(last, warm_start=True)
    rows = {row[0]: row[1:] for row in table(page.readme([view]), "")}
    assert rows["went on from"] == ["`ckpt_20260102_000000` (weights)", "a fresh start", ""]
    view.index.sessions[last.id] = dataclasses.replace(last, warm_start=True, parent=None)
    rows = {row[0]: row[1:] for row in table(page.readme([view]), "")}
    assert rows["went on from"][0] == "weights of another cache"
    view.index.sessions[last.id] = dataclasses.replace(last, seconds=1.0, stop_reason=None)
    rows = {row[0]: row[1:] for row in table(page.readme([view]), "")}
    assert rows["last val loss"] == ["1.7857", "2.7778", "-0.9921 (-35.7 %)"]
    assert rows["seconds"] == ["1", "2", "-50.0 %"]
    assert rows["iterations per second"] == ["40", "20", "+100.0 %"]
    assert rows["ended"] == ["cut short", "finished", ""]


def test_sessions_that_were_configured_differently_are_said_to_be():
    view = run(2)
    for session, config in zip(view.sessions, ("0", "1"), strict=True):
        view.index.sessions[session.id] = dataclasses.replace(session, config=config)
    assert "The two were configured differently." in page.readme([view])
    assert "differently" not in page.readme([run(2)])


def test_one_session_stands_alone():
    text = page.readme([run(1)])
    assert "### The last session\n" in text
    assert ["iterations", "0 to 40"] in table(text, "")


def test_a_loss_that_diverged_has_no_change():
    index = Index()
    add_session(index, [2.0])
    add_session(index, [math.nan])
    rows = {row[0]: row[1:] for row in table(page.readme([view_of("ci", index, frozenset())]), "")}
    assert rows["last val loss"] == ["nan", "2.0000", ""]


def test_sessions_and_checkpoints_are_listed_and_the_rest_counted():
    text = page.readme([run(30, kept=5)])
    sessions, checkpoints = table(text, "session"), table(text, "checkpoint")
    assert [row[0] for row in sessions] == [f"`sess_20260102_{i:06d}`" for i in range(29, 9, -1)]
    assert [row[0] for row in checkpoints] == [f"`ckpt_20260102_{i:06d}`" for i in range(29, 9, -1)]
    assert [row[4] for row in checkpoints] == ["available"] * 5 + ["only recorded"] * 15
    assert checkpoints[0][5:] == ["**best**", "final", "1.56 MB"]
    assert "And 10 older sessions." in text
    assert "And 10 more checkpoints." in text


@pytest.mark.parametrize("decision", ["evicted", "quarantined"])
def test_decisions_and_marks_stand_in_the_table(decision):
    view = run(3)
    id = min(view.index.checkpoints)
    record = view.index.checkpoints[id]
    view.index.checkpoints[id] = dataclasses.replace(record, decision=decision, pinned=True, val_loss=None)
    view.index.names["slot-1"] = NamePointer(checkpoint=id)
    row = table(page.readme([view]), "checkpoint")[-1]
    assert row[2:6] == ["-", "", decision, "pinned, `slot-1`"]


def test_the_picture_is_linked_where_there_is_one():
    image, block = "](ci/loss.svg)", "xychart-beta"
    assert image in page.readme([run(2)])
    assert block not in page.readme([run(2)])
    assert image not in page.readme([run(2)], charts=())
    assert block in page.readme([run(2)], charts=())
    assert image not in page.readme([view_of("ci", Index(), frozenset())])


def test_a_long_lineage_is_folded_away():
    assert "<details>" not in page.readme([run(4)])
    assert "<details>" in page.readme([run(5)])


def test_runs_with_little_in_them():
    assert "There is no run yet." in page.readme([])
    assert "No checkpoint has been saved yet." in page.readme([view_of("ci", Index(), frozenset())])
    index = Index()
    add_session(index, [math.nan, math.inf])
    text = page.readme([view_of("ci", index, frozenset(index.checkpoints))])
    assert "No checkpoint has a finite validation loss yet. A training whose cache" in text
    assert "starts afresh" in text
    index.sessions.clear()
    assert "### Sessions" not in page.readme([view_of("ci", index, frozenset())])


def test_a_run_that_was_never_evaluated_goes_on_from_its_latest():
    index = Index(checkpoints={"ckpt_a": CheckpointMetadata(id="ckpt_a", iteration=7)})
    text = page.readme([view_of("ci", index, frozenset({"ckpt_a"}))])
    assert "goes on from `ckpt_a` (iteration 7, not evaluated)" in text


def test_the_page_stays_short_and_says_nothing_of_when_it_was_made():
    text = page.readme([run(1000, 3)])
    assert len(text) < 20_000
    assert not re.search(r"\d{4}-\d\d-\d\d", text)


def test_the_report_of_a_job():
    text = page.job_report(run(30), ["Restored 9 checkpoints from <b>a</b>.", "Line\nbreak"])
    assert text.startswith("## Training: ci\n\n- Restored 9 checkpoints from &#60;b&#62;a&#60;/b&#62;.\n- Line break\n")
    assert "The next session goes on from it." in text
    assert "```mermaid\n%%{init" in text
    assert len(table(text, "session")) == len(table(text, "checkpoint")) == 10
    assert ".svg" not in text
    assert page.job_report(view_of("ci", Index(), frozenset())).endswith("No checkpoint has been saved yet.\n")


# --- hostile text --------------------------------------------------------------------------------


def check_harmless(text):
    """Nothing of an index stands outside the words, tables and blocks that are ours."""
    tables(text)
    inside = False
    for line in text.splitlines():
        if line.startswith("```"):
            inside = not inside
        elif not inside:
            tags = set(re.findall(r"<[^>]*>", line))
            assert tags <= {"<code>", "</code>", "<details>", "</details>", "<summary>", "</summary>"}, line
            assert not re.match("#+ (?!Training|ci|hostile|`|The last|Sessions|Checkpoints|Which)", line), line
            # What is left when our own code spans are gone holds no markup but ours.
            left = re.sub(r"`[^`]*`|<code>[^<]*</code>", "", line)
            assert "`" not in left, line
            assert not re.search(r"(?<!&)#\d|@|\$|\]\((?!#|ci/|hostile/)", left), line
    assert not inside


def test_hostile_text_stays_text():
    for text in (page.readme([hostile_run()]), page.job_report(hostile_run(), [HOSTILE])):
        check_harmless(text)
        assert "script&#62;" in text
        assert "<script" not in text


@given(indexes())
@settings(max_examples=100, deadline=None)
def test_any_index_gives_a_page(index):
    view = view_of("ci", index, frozenset(index.checkpoints))
    check_harmless(page.readme([view]))
    check_harmless(page.job_report(view))


def test_code_reads_as_it_was_written():
    assert code("ckpt_a-1.b") == "`ckpt_a-1.b`"
    for text in ("a`b", "a|b", "<b>", "*a*", "&amp;", "_a_", "\\", "[x](y)", "www.a.b"):
        made = code(text)
        assert html.unescape(made.removeprefix("<code>").removesuffix("</code>")).strip("`") == text
        assert "|" not in made
    assert (code(""), word("max_seconds"), word("x`")) == ("", "max_seconds", "<code>x&#96;</code>")
    assert html.unescape(prose("It cost 3 % of `a|b`.")) == "It cost 3 % of `a|b`."


def test_what_is_not_seen_is_not_shown():
    assert printable("a\u202eb\u200bc\x1b[2J\r\nd") == "a b c [2J d"
    assert len(printable("x" * 1000)) == 80
