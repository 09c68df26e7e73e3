"""The judge of three stages: what it lets pass, and that it names each thing that is broken."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "scripts" / "check_persistence.py"
sys.path.insert(0, str(ROOT / "scripts"))
from check_persistence import (  # noqa: E402
    Stage,
    as_markdown,
    as_text,
    checkpoint_rows,
    expectations,
    report,
    spark,
)


def checkpoint(number: int, iteration: int, session: str) -> dict:
    record = {"iteration": iteration, "session": session, "sequence": number, "digest": f"blake3:{number}", "size": 500}
    return {**record, "val_loss": 5.0 - iteration / 10, "save_reason": "improved"}


def session(name: str, losses: list[float]) -> dict:
    return {"curves": {"val_loss": [[i, loss] for i, loss in enumerate(losses)], "accuracy": [[0, 0.1]]}}


def summary(name: str, start: int, end: int, first: float, parent: str | None = None) -> dict:
    numbers = {"start_iteration": start, "end_iteration": end, "first_val_loss": first, "last_val_loss": first - 1}
    return {"session": name, "resumed_from": parent, **numbers}


@pytest.fixture
def stages() -> list[Stage]:
    """Three stages as they should be."""
    checkpoints = {"c1": checkpoint(1, 5, "s1"), "c2": checkpoint(2, 10, "s1")}
    sessions = {"s1": session("s1", [5.0, 4.5, 4.0])}
    one = Stage(summary("s1", 0, 10, 5.0), {"checkpoints": dict(checkpoints), "sessions": dict(sessions)})
    checkpoints["c3"], sessions["s2"] = checkpoint(3, 20, "s2"), session("s2", [4.0, 3.0])
    two = Stage(summary("s2", 10, 20, 4.0, "c2"), {"checkpoints": dict(checkpoints), "sessions": dict(sessions)})
    checkpoints["c4"], sessions["s3"] = checkpoint(4, 10, "s3"), session("s3", [5.0, 4.0])
    three = Stage(summary("s3", 0, 10, 5.0), {"checkpoints": dict(checkpoints), "sessions": dict(sessions)})
    return [one, two, three]


def broken(stages: list[Stage]) -> list[str]:
    return [e.text for e in expectations(*stages, 10) if not e.holds]


def test_three_stages_as_they_should_be_hold(stages):
    assert broken(stages) == []


KEPT_BY_TWO = "all of stage 1's record is in stage 2's"
FIRST_BY_THREE, SECOND_BY_THREE = "all of stage 1's record is in stage 3's", "all of stage 2's record is in stage 3's"
HARM = [
    (0, "end_iteration", 9, ["stage 1 trains from 0 to 10"]),
    (0, "start_iteration", 3, ["stage 1 trains from 0 to 10"]),
    (1, "start_iteration", 0, ["stage 2 starts at 10"]),
    (1, "resumed_from", None, ["stage 2 resumes from a checkpoint of stage 1"]),
    (1, "resumed_from", "c3", ["stage 2 resumes from a checkpoint of stage 1"]),
    (1, "first_val_loss", 5.0, ["stage 2 starts at a lower loss than stage 1"]),
    (1, "first_val_loss", None, ["stage 2 starts at a lower loss than stage 1"]),
    (1, "first_val_loss", "nan", ["stage 2 starts at a lower loss than stage 1"]),
    (1, "end_iteration", 19, ["stage 2 gets to 20 or further"]),
    (2, "start_iteration", 10, ["stage 3 begins at 0, from no checkpoint"]),
    (2, "resumed_from", "c2", ["stage 3 begins at 0, from no checkpoint"]),
]


@pytest.mark.parametrize(("number", "key", "value", "expected"), HARM)
def test_a_summary_that_is_wrong_breaks_what_it_should(stages, number, key, value, expected):
    stages[number].summary[key] = value
    assert broken(stages) == expected


@pytest.mark.parametrize(
    ("number", "kind", "id", "expected"),
    [
        (1, "checkpoints", "c1", [KEPT_BY_TWO]),
        (1, "sessions", "s1", [KEPT_BY_TWO]),
        (2, "checkpoints", "c2", [FIRST_BY_THREE, SECOND_BY_THREE]),
        (2, "checkpoints", "c3", [SECOND_BY_THREE]),
        (2, "sessions", "s2", [SECOND_BY_THREE, "the last record holds all three sessions"]),
        (2, "sessions", "s3", ["the last record holds all three sessions"]),
    ],
)
def test_a_record_that_is_lost_is_named(stages, number, kind, id, expected):
    del stages[number].record[kind][id]
    assert broken(stages) == expected
    if "c" in id:
        assert any(f"{id} is lost" in e.seen for e in expectations(*stages, 10))


def test_a_digest_that_changed_is_no_record_that_was_kept(stages):
    stages[1].record["checkpoints"]["c1"] = {**stages[1].record["checkpoints"]["c1"], "digest": "blake3:0"}
    found = [e for e in expectations(*stages, 10) if not e.holds]
    assert [e.text for e in found] == [KEPT_BY_TWO, SECOND_BY_THREE]
    assert "c1 has another digest" in found[0].seen


def test_records_that_were_never_written_are_not_kept(stages):
    for stage in stages:
        stage.record.clear()
    assert "stage 1 saves, and its record says so" in broken(stages)
    assert {KEPT_BY_TWO, FIRST_BY_THREE, SECOND_BY_THREE} <= {*broken(stages)}


def test_a_curve_is_drawn_from_its_lowest_to_its_highest():
    assert spark([3.0, 2.0, 1.0]) == "█▅▁"
    assert spark([1.0, float("nan"), 1.0]) == "▁?▁"
    assert spark([]) == spark([float("inf")]) == ""
    assert len(spark([float(i) for i in range(1000)], width=30)) == 30


def test_tables_line_up_and_escape():
    rows = [["a", "bc"], ["def", "x|y"]]
    assert as_text(rows) == "a    bc\ndef  x|y\n"
    assert as_markdown(rows) == "| a | bc |\n| --- | --- |\n| def | x\\|y |\n"


def test_the_report_holds_verdict_checkpoints_sizes_and_curves(stages):
    text = report(stages, expectations(*stages, 10))
    assert "Yes: 11 of 11 expectations hold." in text
    assert "4 checkpoints of 3 sessions on record, 4 of them never evicted, 2,000 bytes" in text
    assert "| `c3` | 2 | 20 | 3.0000 | 500 | improved |" in text
    assert "| 1 | val_loss | 5.0000 | 4.0000 | █▅▁ |" in text
    assert [row[0] for row in checkpoint_rows(stages)[1:]] == ["`c1`", "`c2`", "`c3`", "`c4`"]
    stages[1].summary["start_iteration"] = 0
    assert "**No**: 10 of 11 expectations hold." in report(stages, expectations(*stages, 10))


# --- the command line ----------------------------------------------------------------------------


def written(folder: Path, stages: list[Stage]) -> list[str]:
    for number, stage in enumerate(stages, 1):
        (folder / str(number) / "cache").mkdir(parents=True)
        (folder / str(number) / "training_summary.json").write_text(json.dumps(stage.summary))
        (folder / str(number) / "cache" / "metadata.json").write_text(json.dumps(stage.record))
    return [str(folder / str(number)) for number in (1, 2, 3)]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Without site-packages: the machine that checks need have nothing installed.
    command = [sys.executable, "-I", "-S", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_ends_with_0_prints_the_table_and_appends_the_report(stages, tmp_path):
    page = tmp_path / "report.md"
    page.write_text("before\n")
    done = run(*written(tmp_path, stages), "--report", str(page))
    assert (done.returncode, done.stderr) == (0, "")
    assert "stage 2 starts at 10" in done.stdout
    assert page.read_text().startswith("before\n## Does training persist?")


def test_it_ends_with_1_and_names_each_broken_expectation(stages, tmp_path):
    harmed = copy.deepcopy(stages)
    harmed[1].summary.update(start_iteration=0, resumed_from=None)
    done = run(*written(tmp_path, harmed))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "broken: stage 2 starts at 10 (seen: 0)",
        "broken: stage 2 resumes from a checkpoint of stage 1 (seen: None)",
    ]


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_stage_that_cannot_be_read_is_a_sentence(stages, tmp_path, content):
    folders = written(tmp_path, stages)
    path = tmp_path / "2" / "cache" / "metadata.json"
    path.unlink() if content is None else path.write_text(content)
    done = run(*folders)
    assert done.returncode == 1
    assert str(path) in done.stderr
    assert "Traceback" not in done.stderr
