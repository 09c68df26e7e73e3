import json
import shutil
from types import SimpleNamespace

import pytest

from ckptcache.cache import TrainingCache
from ckptcache.metadata import SessionRecord
from cli.conftest import ckptcache_cli, save, terminal

OVER = "2026-01-02T03:04:05Z"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two sessions of one branch: 100 and 200, then 300 and 400."""
    folder = tmp_path_factory.mktemp("branches") / "cache"
    with TrainingCache(folder) as cache:
        first = cache.record_session(SessionRecord(id="sess_a", ended_at=OVER, stop_reason="finished"))
        a = save(cache, 100, 3.0, session=first)
        b = save(cache, 200, 2.0, session=first, parents=[a])
        second = cache.record_session(SessionRecord(id="sess_b", parent=b, ended_at=OVER, stop_reason="finished"))
        c = save(cache, 300, 1.5, session=second, parents=[b])
        d = save(cache, 400, 1.0, session=second, parents=[c])
    return SimpleNamespace(folder=folder, a=a, b=b, c=c, d=d)


@pytest.fixture
def cache(made, tmp_path):
    shutil.copytree(made.folder, tmp_path / "runs" / "cache")
    return SimpleNamespace(**{**vars(made), "folder": tmp_path / "runs" / "cache"})


def test_a_rollback_says_what_comes_next_and_what_is_marked(cli, cache):
    assert cli("rollback", cache.b).stdout.splitlines() == [
        f"The next session goes on from {cache.b} (iteration 200), on a new branch.",
        "2 checkpoints are marked as rolled back, and can still be named:",
        f"  {cache.c}",
        f"  {cache.d}",
        "Until something that descends from it is saved, `ckptcache rollback --undo` takes it back.",
    ]
    assert f"status        available, rolled back to {cache.b}" in cli("show", cache.d).stdout
    assert cli("best").stdout.startswith(cache.b)
    listed = cli("ls").stdout.splitlines()
    assert [line.split()[2] for line in listed[1:]] == [cache.b, cache.a, cache.d, cache.c]
    assert "rolled_back" in listed[0]
    assert "rollback" in listed[1]


def test_explain_agrees(cli_json, cli, cache):
    cli("rollback", cache.a)
    first, *rest = cli_json("explain")["checkpoints"]
    assert (first["id"], first["chosen"]) == (cache.a, True)
    assert first["reason"].startswith("rolled back to, as asked by `ckptcache rollback`")
    assert {r["id"]: r["rolled_back"] for r in rest} == dict.fromkeys((cache.b, cache.c, cache.d), cache.a)
    assert all(r["reason"].startswith(f"rolled back to {cache.a}") and not r["eligible"] for r in rest)


def test_json_holds_all_of_it(cli_json, cli, cache):
    found = cli_json("rollback", cache.c, "--dry-run")
    assert found["checkpoint"]["id"] == cache.c
    del found["checkpoint"]
    expected = {"undone": False, "marked": [cache.d], "unmarked": [], "replaced": None, "live": [], "dry_run": True}
    assert found == expected
    assert TrainingCache(cache.folder).names() == {}
    cli("rollback", cache.a)
    again = cli_json("rollback", cache.c)
    assert (again["replaced"], again["marked"], again["unmarked"]) == (cache.a, [], [cache.b, cache.c])
    undone = cli_json("rollback", "--undo")
    assert (undone["undone"], undone["unmarked"], undone["checkpoint"]["id"]) == (True, [cache.d], cache.c)


def test_what_would_be_is_said_so(cli, cache):
    assert cli("rollback", cache.c, "--dry-run").stdout.splitlines() == [
        f"The next session would go on from {cache.c} (iteration 300), on a new branch.",
        "1 checkpoint would be marked as rolled back, and can still be named:",
        f"  {cache.d}",
    ]
    cli("rollback", cache.c)
    assert cli("rollback", "--undo", "--dry-run").stdout.splitlines() == [
        f"The rollback to {cache.c} would be taken back.",
        "1 checkpoint would be no longer marked as rolled back:",
        f"  {cache.d}",
    ]
    assert "is taken back" in cli("rollback", "--undo").stdout


def test_a_session_that_runs_is_named(cli, cache):
    with TrainingCache(cache.folder) as held:
        held.record_session(SessionRecord(id="sess_live", parent=cache.d))
        held.ledger.hold("sess_live")
        assert "Session sess_live runs and goes on; what it saves is marked too." in cli("rollback", cache.b).stdout


@pytest.mark.parametrize("args", [(), ("ID", "--undo"), ("--dry-run",)])
def test_neither_or_both_is_wrong_usage(cli, args):
    assert "either the ID of a checkpoint or --undo" in cli("rollback", *args, rc=2).stderr


def test_what_can_not_be_rolled_back_to_is_3_and_says_why(cli, cli_json, cache):
    assert cli_json("rollback", "nope", rc=3)["error"]["type"] == "CheckpointNotFound"
    assert str(cache.folder) in cli("rollback", "nope", rc=3).stderr
    assert cli_json("rollback", "--undo", rc=3)["error"]["type"] == "NoRollback"
    (cache.folder / "checkpoints" / f"{cache.a}.pt").unlink()
    assert "is there and its file isn't (its file is gone)" in cli("rollback", cache.a, rc=3).stderr
    assert cli("rollback", "ckpt_", rc=2).stdout == ""
    assert TrainingCache(cache.folder).names() == {}


def test_a_mark_from_elsewhere_cannot_harm(cli, cache):
    index = json.loads((cache.folder / "metadata.json").read_text())
    index["names"]["rollback"] = {"checkpoint": "gone", "revision": 0, "before": {"x": None, cache.d: cache.a}}
    (cache.folder / "metadata.json").write_text(json.dumps(index))
    assert cli("best").stdout.startswith(cache.d)
    assert "The rollback to gone is taken back" in cli("rollback", "--undo").stdout
    assert TrainingCache(cache.folder).get(cache.d).rolled_back == cache.a


@pytest.mark.parametrize("columns", [40, 120])
def test_on_a_terminal_the_marks_are_in_the_list(cache, columns):
    ckptcache_cli("--cache-dir", cache.folder, "rollback", cache.b)
    code, text = terminal(columns, "--cache-dir", cache.folder, "ls")
    assert code == 0
    assert ("rolled back" in text) == (columns == 120)
