import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("required", [True, False])
def test_a_missing_tool_skips_the_test_or_fails_it(monkeypatch, requires, required):
    monkeypatch.setenv("CKPTCACHE_REQUIRE", "all" if required else "")
    outcome = pytest.fail.Exception if required else pytest.skip.Exception
    with pytest.raises(outcome, match="needs no-such-tool"):
        requires("no-such-tool")


def test_a_tool_that_is_here_lets_the_test_run(monkeypatch, requires):
    monkeypatch.setenv("CKPTCACHE_REQUIRE", "all")
    requires("sqlite3")
    requires("a loop device", found=True)
    with pytest.raises(pytest.fail.Exception, match="a loop device"):
        requires("a loop device", found=False)


def test_a_developers_own_settings_are_not_seen(pytestconfig):
    code = "import os, conftest; print(sorted(k for k in os.environ if k.startswith('CKPTCACHE_')))"
    environment = {**os.environ, "CKPTCACHE_DIR": "mine", "CKPTCACHE_REQUIRE": "all", "CKPTCACHE_HYPOTHESIS": "ci"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=pytestconfig.rootpath / "tests",
        env={k: v for k, v in environment.items() if k != "CKPTCACHE_PYTHON"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "['CKPTCACHE_HYPOTHESIS', 'CKPTCACHE_REQUIRE']", done.stderr
