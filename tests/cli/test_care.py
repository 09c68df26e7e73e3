import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from ckptcache.cache import TrainingCache
from ckptcache.metadata import SessionRecord
from cli.conftest import ckptcache_cli, environment, save, terminal
from tests.caches import listing

# --- stats ---------------------------------------------------------------------------------------


def test_stats_counts_and_names_the_limits(cli, cli_json):
    found = cli_json("stats")
    counted = {name: found[name] for name in ("checkpoints", "records", "evicted", "missing", "named", "sessions")}
    assert counted == {"checkpoints": 4, "records": 6, "evicted": 1, "missing": 1, "named": 1, "sessions": 2}
    text = cli("stats").stdout
    assert "checkpoints    4 (limit 10, default)\n" in text
    assert "records        6 (1 evicted, 1 missing)\n" in text


def test_stats_says_where_a_limit_comes_from(cli, monkeypatch):
    monkeypatch.setenv("CKPTCACHE_MAX_CHECKPOINTS", "7")
    assert "(limit 7, CKPTCACHE_MAX_CHECKPOINTS)" in cli("stats").stdout


# --- doctor --------------------------------------------------------------------------------------


@pytest.fixture
def healthy(tmp_path):
    with TrainingCache(tmp_path / "healthy") as cache:
        ids = [save(cache, 1, 2.0), save(cache, 2, 1.0)]
    return tmp_path / "healthy", ids


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_healthy_cache_is_in_order(healthy):
    folder, _ = healthy
    assert ckptcache_cli("doctor", "--cache-dir", folder).stdout == "Everything is in order.\n"
    found = json.loads(ckptcache_cli("doctor", "--cache-dir", folder, "--json").stdout)
    assert found == {"findings": [], "damaged": False, "verified": True}


def test_damage_is_found_then_repaired_then_gone(healthy):
    folder, (first, second) = healthy
    flip_a_bit(folder / "checkpoints" / f"{first}.pt")
    found = ckptcache_cli("doctor", "--cache-dir", folder, rc=4)
    assert found.stdout.startswith(f"damage   damaged    {first}: ")
    assert "`ckptcache doctor --repair`" in found.stdout
    assert (folder / "checkpoints" / f"{first}.pt").exists()
    mended = json.loads(ckptcache_cli("doctor", "--cache-dir", folder, "--repair", "--json").stdout)
    assert [(f["subject"], f["repaired"]) for f in mended["findings"]] == [(first, True)]
    assert (folder / "quarantine" / f"{first}.pt").exists()
    assert ckptcache_cli("doctor", "--cache-dir", folder).stdout == "Everything is in order.\n"
    assert json.loads(ckptcache_cli("best", "--cache-dir", folder, "--json").stdout)["checkpoint"]["id"] == second


def test_without_verifying_a_flipped_bit_stays_unseen(healthy):
    folder, (first, _) = healthy
    flip_a_bit(folder / "checkpoints" / f"{first}.pt")
    text = ckptcache_cli("doctor", "--cache-dir", folder, "--no-verify").stdout
    assert text == "Everything is in order; the files were not read.\n"


def test_a_missing_file_is_said_and_is_no_damage(cli, cache):
    assert f"{cache.missing}: its file is gone" in cli("doctor").stdout
    assert "No damage is left." in cli("doctor", "--repair").stdout


def test_a_clone_that_holds_only_the_index_is_in_order(healthy):
    folder, _ = healthy
    shutil.rmtree(folder / "checkpoints")
    assert "No damage is left." in ckptcache_cli("doctor", "--cache-dir", folder).stdout


def test_an_index_with_conflict_markers_is_read_around_and_repaired(healthy):
    folder, ids = healthy
    index = folder / "metadata.json"
    index.write_text("<<<<<<< ours\n" + index.read_text() + "=======\n>>>>>>> theirs\n")
    listed = ckptcache_cli("ls", "--cache-dir", folder, "--json")
    assert {r["id"] for r in json.loads(listed.stdout)["checkpoints"]} == set(ids)
    assert listed.stderr.startswith("ckptcache: warning: The index ")
    assert "doctor --repair" in listed.stderr
    assert index.read_text().startswith("<<<<<<<")
    looked_twice = ckptcache_cli("prune", "--dry-run", "--cache-dir", folder)
    assert looked_twice.stderr == listed.stderr
    ckptcache_cli("doctor", "--cache-dir", folder, rc=4)
    ckptcache_cli("doctor", "--cache-dir", folder, "--repair")
    after = ckptcache_cli("ls", "--cache-dir", folder, "--json")
    assert {r["id"] for r in json.loads(after.stdout)["checkpoints"]} == set(ids)
    assert after.stderr == ""


@pytest.mark.parametrize(
    ("content", "code", "kind"),
    [
        ("<<<<<<< ours\n", 4, "IndexDamaged"),
        ('{"schema_version": 2, "checkpoints": {"a": {"val_loss": NaN}}}', 4, "IndexDamaged"),
        ('{"schema_version": 99, "checkpoints": {}}', 1, "IndexTooNew"),
        ("", 4, "IndexDamaged"),
        ("[]", 4, "IndexDamaged"),
        ('{"schema_version": 2, "checkpoints": {"../../x": {}}}', 4, "IndexDamaged"),
        ('{"schema_version": 2, "checkpoints": [1]}', 4, "IndexDamaged"),
    ],
)
def test_a_bad_index_with_nothing_behind_it_is_said_and_left_alone(tmp_path, content, code, kind):
    (tmp_path / "metadata.json").write_text(content)
    for command in ("ls", "best", "explain", "sessions", "stats", "show x", "prune --dry-run", "pin x"):
        result = ckptcache_cli("--cache-dir", tmp_path, *command.split(), "--json", rc=code)
        assert json.loads(result.stdout)["error"]["type"] == kind
        assert result.stderr.startswith("ckptcache: error: The index ")
    assert (tmp_path / "metadata.json").read_text() == content


# --- prune ---------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_go_and_removes_nothing(cli, cli_json, cache):
    before = sorted(cache.folder.rglob("*"))
    plan = cli_json("prune", "--dry-run", "--max-checkpoints", "2")
    assert plan["dry_run"] is True
    assert plan["limits"]["max_checkpoints"] == 2
    assert set(plan["kept"]) | set(plan["evicted"]) == {cache.best, cache.worst, cache.other, cache.diverged}
    assert "named release-1" in plan["kept"][cache.best]
    lines = cli("prune", "--dry-run", "--max-checkpoints", "2").stdout.splitlines()
    gone = {line.split()[1] for line in lines if line.startswith("go ")}
    assert gone == set(plan["evicted"])
    assert sorted(cache.folder.rglob("*")) == before


def test_pruning_does_what_the_dry_run_said(cli_json, cache):
    planned = cli_json("prune", "--dry-run", "--max-checkpoints", "2")["evicted"]
    assert cli_json("prune", "--max-checkpoints", "2")["evicted"] == planned != {}
    left = {r["id"] for r in cli_json("ls")["checkpoints"]}
    assert left == {cache.best, cache.worst, cache.other, cache.diverged} - set(planned)


@pytest.mark.parametrize(
    "wrong", [("--max-checkpoints", "0"), ("--max-checkpoints", "x"), ("--max-cache-size-gb", "-1")]
)
def test_a_limit_that_makes_no_sense_is_refused(cli, wrong):
    assert cli("prune", *wrong, rc=2).stdout == ""


# --- rerank --------------------------------------------------------------------------------------


def test_rerank_shows_what_would_move(tmp_path):
    with TrainingCache(tmp_path) as cache:
        careful = save(cache, 1, 1.0, metrics={"accuracy": 0.1})
        lucky = save(cache, 2, 1.2, metrics={"accuracy": 0.9})
    given = ("rerank", "--cache-dir", tmp_path, "--quality-weight-loss", "1", "--quality-weight-metrics", "0")
    moves = json.loads(ckptcache_cli(*given, "--json").stdout)["moves"]
    assert [(m["id"], m["place_before"], m["place_after"]) for m in moves] == [(careful, 2, 1), (lucky, 1, 2)]
    assert ckptcache_cli(*given).stdout.splitlines()[1].split()[:3] == [careful, "2", "1"]
    declared = ckptcache_cli("rerank", "--cache-dir", tmp_path, "--quality-metric", "accuracy=min", "--json")
    assert json.loads(declared.stdout)["settings"] == {"quality_metrics": {"accuracy": "min"}}


def test_rerank_says_which_metric_no_checkpoint_has(tmp_path):
    with TrainingCache(tmp_path) as cache:
        save(cache, 1, 1.0, metrics={"accuracy": 0.1})
    given = ("rerank", "--cache-dir", tmp_path, "--quality-metric", "accuracy=max")
    assert ckptcache_cli(*given).stderr == ""
    done = ckptcache_cli(*given, "--quality-metric", "acuracy=max", "--json")
    assert done.stderr == "ckptcache: warning: no checkpoint has a metric 'acuracy'; there is accuracy\n"
    assert len(json.loads(done.stdout)["moves"]) == 1


def test_rerank_counts_places_within_each_group_and_changes_nothing(cli, cli_json, cache):
    before = listing(cache.folder)
    given = (
        "rerank",
        "--quality-weight-loss",
        "0",
        "--quality-weight-metrics",
        "1",
        "--quality-metric",
        "accuracy=min",
    )
    found = cli_json(*given)
    places = {m["id"]: (m["place_before"], m["place_after"]) for m in found["moves"]}
    assert places[cache.best] == (1, 2)
    assert places[cache.worst] == (2, 1)
    assert places[cache.other] == (1, 1)
    groups = {m["id"]: m["group"] for m in found["moves"]}
    assert groups[cache.best] == groups[cache.worst] != groups[cache.other]
    lines = cli(*given).stdout.splitlines()
    assert lines[0].split()[0] == "group"
    assert {line.split()[0] for line in lines[1:]} == {"A", "B"}
    assert listing(cache.folder) == before


def test_rerank_says_which_would_be_the_best(tmp_path):
    with TrainingCache(tmp_path) as cache:
        careful = save(cache, 1, 1.0, metrics={"accuracy": 0.1})
        lucky = save(cache, 2, 1.2, metrics={"accuracy": 0.9})
    given = ("--cache-dir", tmp_path, "rerank", "--quality-weight-loss", "1", "--quality-weight-metrics", "0")
    found = json.loads(ckptcache_cli(*given, "--json").stdout)
    assert found["best"] == {"before": lucky, "after": careful}
    assert found["settings_before"] == {"quality_weight_loss": 0.7, "quality_weight_metrics": 0.3}
    _, text = terminal(160, *given)
    assert re.search(
        r"2 of 2 checkpoints would move. The best would be ckpt_\S+, not ckpt_\S+. Nothing was changed", text
    )
    _, text = terminal(120, "--cache-dir", tmp_path, "rerank", "--quality-weight-loss", "0.6")
    assert "0 of 2 checkpoints would move. The best stays ckpt_" in text


def test_rerank_of_an_empty_cache_moves_nothing(tmp_path):
    with TrainingCache(tmp_path) as cache:
        cache.record_session(SessionRecord(id="s"))
    done = ckptcache_cli("--cache-dir", tmp_path, "rerank", "--quality-weight-loss", "0.5", "--json")
    assert json.loads(done.stdout)["best"] == {"before": None, "after": None}


@pytest.mark.parametrize(
    "wrong", [(), ("--quality-metric", "accuracy"), ("--quality-metric", "=max"), ("--quality-weight-loss", "-1")]
)
def test_rerank_refuses_what_makes_no_sense(cli, wrong):
    assert cli("rerank", *wrong, rc=2).stdout == ""


# --- being interrupted ---------------------------------------------------------------------------


def test_an_interrupted_command_ends_with_130_and_one_line(healthy):
    folder, _ = healthy
    waits = (
        "import time, ckptcache.checkup as c\n"
        "def slow(*a, **k):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "c.stats = slow\n"
        "from ckptcache.cli import main\nmain(prog_name='ckptcache')"
    )
    command = [sys.executable, "-c", waits, "stats", "--cache-dir", str(folder)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert said.strip() == "ckptcache: error: interrupted"
