import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from ckptcache.cache import TrainingCache
from cli.conftest import ckptcache_cli, environment, save, terminal


def test_a_backup_and_the_way_back(cli, cli_json, cache, tmp_path):
    file = tmp_path / "all.tar"
    done = cli_json("backup", file)
    assert (done["path"], done["bytes"]) == (str(file), file.stat().st_size)
    assert set(done["checkpoints"]) == {cache.best, cache.worst, cache.other, cache.diverged}
    assert (done["records"], done["sessions"], done["damaged"], done["unrecorded"]) == (6, 2, {}, [])
    again = json.loads(ckptcache_cli("restore", file, "--cache-dir", tmp_path / "new", "--json").stdout)
    assert again["path"] == str(file)
    assert again["cache_dir"] == str(tmp_path / "new")
    assert again["added"] == done["checkpoints"]
    listed = json.loads(ckptcache_cli("ls", "--json", "--cache-dir", tmp_path / "new").stdout)
    assert [r["id"] for r in listed["checkpoints"]] == [r["id"] for r in cli_json("ls")["checkpoints"]]
    assert "damage is left" in ckptcache_cli("doctor", "--cache-dir", tmp_path / "new").stdout


def test_what_was_done_is_said_in_words(cli, tmp_path):
    said = cli("backup", tmp_path / "all.tar").stdout
    assert said.startswith(f"wrote {tmp_path / 'all.tar'} (")
    assert said.endswith("4 checkpoints, 6 records\n")
    said = ckptcache_cli("restore", tmp_path / "all.tar", "--cache-dir", tmp_path / "new").stdout
    assert said == f"restored 4 checkpoints to {tmp_path / 'new'}; now 6 records, 2 sessions\n"
    said = ckptcache_cli("restore", tmp_path / "all.tar", "--cache-dir", tmp_path / "new").stdout
    assert "restored 0 checkpoints" in said
    assert "4 there already" in said


def test_a_rollback_that_comes_along_is_said(cli, cache, tmp_path):
    cli("rollback", cache.worst)
    cli("backup", tmp_path / "all.tar")
    said = ckptcache_cli("restore", tmp_path / "all.tar", "--cache-dir", tmp_path / "new").stdout
    assert f"a rollback is in force: the next session goes on from {cache.worst}" in said


def test_a_checkpoint_is_no_backup_and_has_a_command_of_its_own(cache, tmp_path):
    path = cache.folder / "checkpoints" / f"{cache.best}.pt"
    said = ckptcache_cli("restore", path, "--cache-dir", tmp_path / "new", rc=1).stderr
    assert "it is a zip archive, as single checkpoints are, which `ckptcache import` takes" in said
    assert not (tmp_path / "new").exists()


def test_a_file_that_is_there_needs_overwrite(cli, tmp_path):
    (tmp_path / "all.tar").write_text("mine")
    assert "there already" in cli("backup", tmp_path / "all.tar", rc=1).stderr
    cli("backup", tmp_path / "all.tar", "--overwrite")


def test_a_damaged_checkpoint_is_left_out_and_the_exit_code_is_4(cli, cli_json, cache, tmp_path):
    path = cache.folder / "checkpoints" / f"{cache.best}.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    done = cli_json("backup", tmp_path / "all.tar", rc=4)
    assert list(done["damaged"]) == [cache.best]
    assert len(done["checkpoints"]) == 3
    told = cli("backup", tmp_path / "all.tar", "--overwrite", rc=4)
    assert "1 checkpoint left out" in told.stdout
    assert f"{cache.best} is left out of the backup" in told.stderr
    told = ckptcache_cli("restore", tmp_path / "all.tar", "--cache-dir", tmp_path / "new").stdout
    assert f"the backup lacks {cache.best}" in told


def test_a_backup_that_is_cut_short_is_4_and_leaves_nothing(cli, tmp_path):
    cli("backup", tmp_path / "all.tar")
    data = (tmp_path / "all.tar").read_bytes()
    (tmp_path / "all.tar").write_bytes(data[: len(data) // 2])
    refused = ckptcache_cli("restore", tmp_path / "all.tar", "--cache-dir", tmp_path / "new", rc=4)
    assert "it is cut short" in refused.stderr
    assert not (tmp_path / "new").exists()
    (tmp_path / "text").write_text("hello")
    assert "not a backup" in ckptcache_cli("restore", tmp_path / "text", "--cache-dir", tmp_path / "new", rc=1).stderr
    assert "no such file" in ckptcache_cli("restore", tmp_path / "none", "--cache-dir", tmp_path / "new", rc=1).stderr


def test_a_cache_that_is_in_use_is_refused_unless_merged(cli, tmp_path):
    cli("backup", tmp_path / "all.tar")
    with TrainingCache(tmp_path / "new") as other:
        save(other, 1, 9.0)
    refused = ckptcache_cli("restore", tmp_path / "all.tar", "--cache-dir", tmp_path / "new", rc=1)
    assert "--merge" in refused.stderr
    assert "--cache-dir" in refused.stderr
    said = ckptcache_cli("restore", tmp_path / "all.tar", "--merge", "--cache-dir", tmp_path / "new").stdout
    assert "restored 4 checkpoints" in said


def test_no_cache_is_3(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "There is no cache" in ckptcache_cli("backup", "all.tar", rc=3).stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("command", ["backup", "restore"])
def test_a_signal_ends_it_with_nothing_half_done(cache, tmp_path, number, code, command):
    with TrainingCache(cache.folder) as big:
        big.save({"x": torch.zeros(60_000_000)}, iteration=400, val_loss=1.0)
        if command == "restore":
            big.backup(tmp_path / "all.tar")
    folder = cache.folder if command == "backup" else tmp_path / "new"
    arguments = ["--cache-dir", str(folder), command, str(tmp_path / "all.tar")]
    child = subprocess.Popen(
        [sys.executable, "-m", "ckptcache.cli", *arguments], env=environment(), stderr=subprocess.PIPE, text=True
    )
    where = tmp_path if command == "backup" else folder / "checkpoints"
    while child.poll() is None and not list(where.glob("*.tmp")):
        time.sleep(0.001)
    child.send_signal(number)
    try:
        _, said = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == code, said
    assert "Traceback" not in said
    assert list(where.glob("*.tmp")) == []
    if command == "backup":
        assert not (tmp_path / "all.tar").exists()
    else:
        assert TrainingCache(folder).checkpoints(everything=True) == []
        ckptcache_cli(*arguments)
        assert len(TrainingCache(folder).checkpoints()) == 5


def test_on_a_terminal_it_reads_well(cache, tmp_path):
    code, shown = terminal(80, "--cache-dir", cache.folder, "backup", tmp_path / "all.tar")
    assert code == 0
    assert "4 checkpoints, 6 records" in shown
