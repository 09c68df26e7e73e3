import subprocess
import sys

import pytest

from cli.conftest import ckptcache_cli, environment


def complete(folder, *typed):
    """What bash is offered for the last of the words `typed`."""
    words = ["ckptcache", "--cache-dir", str(folder), *typed]
    quoted = " ".join(f"'{w}'" if w == "" else w for w in words)
    env = environment(_CKPTCACHE_COMPLETE="bash_complete", COMP_WORDS=quoted, COMP_CWORD=str(len(words) - 1))
    command = [sys.executable, "-m", "ckptcache.cli"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.stderr == ""
    return [line.split(",", 1)[1] for line in done.stdout.splitlines() if line]


def test_ids_and_names_are_completed(cache):
    assert complete(cache.folder, "show", "rel") == ["release-1"]
    assert set(complete(cache.folder, "pin", "ckpt")) == {cache.best, cache.worst, cache.other, cache.diverged}
    assert {"best", "latest", "release-1"} <= set(complete(cache.folder, "export", ""))
    assert complete(cache.folder, "explain", "--like", "rel") == ["release-1"]
    assert complete(cache.folder, "unname", "") == ["release-1"]


def test_commands_and_options_are_completed(cache):
    assert complete(cache.folder, "pru") == ["prune"]
    assert complete(cache.folder, "progress", "re") == ["restore"]
    assert "--dry-run" in complete(cache.folder, "prune", "--d")


def test_without_a_cache_nothing_is_offered_and_nothing_said(tmp_path):
    assert complete(tmp_path / "none", "show", "") == []
    (tmp_path / "metadata.json").write_text("junk")
    assert complete(tmp_path, "show", "") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell(shell):
    script = ckptcache_cli("completion", shell).stdout
    assert "_CKPTCACHE_COMPLETE" in script
    assert "ckptcache" in script


def test_bash_takes_the_script():
    script = ckptcache_cli("completion", "bash").stdout
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unknown_shell_is_refused():
    assert "tcsh" in ckptcache_cli("completion", "tcsh", rc=2).stderr
