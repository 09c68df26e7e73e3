import json
import subprocess
import sys

import click
import pytest

import ckptcache
from ckptcache.cli import main
from cli.conftest import ckptcache_cli, environment, process

READING = [
    *("ls", "ls --all", "show best", "best", "explain", "sessions", "stats", "doctor --no-verify", "prune --dry-run"),
    "rerank --quality-weight-loss 0.5",
    "compare latest sess_a",
]
MARKING = ["pin best", "unpin best", "name best slot", "unname slot", "tag best x", "note best x"]


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def test_reading_changes_nothing_on_the_disk(cli, cache):
    before = contents(cache.folder)
    for command in [*READING, "doctor"]:
        cli(*command.split())
    assert contents(cache.folder) == before


@pytest.mark.parametrize("command", [*READING, *MARKING])
def test_json_is_one_document_alone_on_stdout(cli, command):
    if command == "unname slot":
        cli("name", "best", "slot")
    result = cli(*command.split(), "--json")
    assert isinstance(json.loads(result.stdout), dict)


def test_torch_and_rich_are_not_imported_to_list_or_to_mark(cache):
    script = f"""
import sys
from ckptcache.cli import main
for command in {[*READING, *MARKING]!r}:
    for form in ([], ["--json"]):
        try:
            main(["--cache-dir", {str(cache.folder)!r}, *command.split(), *form], prog_name="ckptcache")
        except SystemExit as end:
            loaded = {{"torch", "numpy", "rich"}} & set(sys.modules)
            print(command, end.code, *loaded, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment(), check=True)
    ended = [line.split() for line in done.stderr.splitlines() if not line.startswith("ckptcache: ")]
    assert len(ended) == 2 * len(READING + MARKING)
    assert [words for words in ended if words[-1] not in ("0", "4", "3")] == []


def test_streams_and_exit_codes_of_a_real_process(cache):
    listed = process("--cache-dir", cache.folder, "ls")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert cache.best in listed.stdout
    unknown = process("--cache-dir", cache.folder, "show", "nope", "--json")
    assert unknown.returncode == 3
    assert json.loads(unknown.stdout)["error"]["type"] == "CheckpointNotFound"
    assert unknown.stderr.startswith("ckptcache: error: ")
    usage = process("ls", "--bogus", "--json")
    assert usage.returncode == 2
    assert json.loads(usage.stdout)["error"]["type"] == "NoSuchOption"
    assert "No such option" in usage.stderr


@pytest.mark.parametrize("command", ["ls --json", "explain", "doctor --no-verify"])
def test_a_reader_that_goes_away_is_no_error(cache, command):
    shell = f'{sys.executable} -m ckptcache.cli --cache-dir {cache.folder} {command} | true; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.strip() == "0"
    assert "roken" not in done.stderr
    assert "Traceback" not in done.stderr


def test_any_encoding_will_do(cache):
    for encoding in ("ascii", "latin-1"):
        done = process("--cache-dir", cache.folder, "explain", env={"PYTHONIOENCODING": encoding}, errors="replace")
        assert done.returncode == 0, done.stderr
        # click writes UTF-8 where the locale says ASCII.
        assert ("0.7 × loss_score" if encoding == "ascii" else "0.7 \ufffd loss_score") in done.stdout


def test_warnings_go_to_stderr_once(cli, cache):
    from ckptcache.cache import TrainingCache
    from cli.conftest import save

    with TrainingCache(cache.folder) as own:
        save(own, 400, 2.0, metrics={"accuracy": 0.5, "tokens": 1e6})
    said = cli("explain").stderr
    assert said.startswith("ckptcache: warning: recorded and not scored")
    assert "because not every checkpoint has one in [0, 1]: tokens;" in said
    assert said.count("\n") == 1


def test_the_version_is_printed():
    assert ckptcache_cli("--version").stdout == f"ckptcache {ckptcache.__version__}\n"


def test_every_command_has_help_with_an_example():
    for name in main.list_commands(click.Context(main)):
        text = ckptcache_cli(name, "--help").stdout
        assert f"ckptcache {name} " in text
        assert "Example:\n" in text, name
        assert "--json" in text or name == "completion"
    for name, command in main.commands["progress"].commands.items():
        assert "--json" in ckptcache_cli("progress", name, "--help").stdout
        assert command.short_help
    assert "..." not in ckptcache_cli("--help").stdout.split("Options:")[1]


# --- a folder that can't be written, or read -----------------------------------------------------


@pytest.fixture
def foreign(cache):
    """The cache, which may be looked at, and not written."""
    for path in (cache.folder, *cache.folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield cache.folder
    for path in (cache.folder, *cache.folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


# Root without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, which PR_CAPBSET_DROP takes from what it executes.
BOUND = """
import ctypes, os, sys
for capability in (1, 2):
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)
os.execv(sys.executable, [sys.executable, "-m", "ckptcache.cli", *sys.argv[1:]])
"""


def as_another(*args):
    """Run as somebody whom permissions bind, whoever runs the tests."""
    command = [sys.executable, "-c", BOUND, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)


def test_a_read_only_folder_can_be_looked_at(foreign, cache):
    for command in READING:
        done = as_another("--cache-dir", foreign, *command.split())
        assert done.returncode == 0, (command, done.stderr)
        assert done.stderr == ""
        assert done.stdout != ""


def test_a_read_only_folder_refuses_marks_in_one_line(foreign):
    for command in ["pin best", "name best x", "prune --max-checkpoints 1", "doctor --repair --no-verify"]:
        done = as_another("--cache-dir", foreign, *command.split())
        assert done.returncode == 1, (command, done.stderr)
        assert done.stderr.startswith(f"ckptcache: error: Nothing can be written in {foreign}")
        assert done.stderr.count("\n") == 1


def test_an_index_that_may_not_be_read_is_said_in_one_line(foreign):
    (foreign / "metadata.json").chmod(0o000)
    done = as_another("--cache-dir", foreign, "ls", "--json")
    assert done.returncode == 1
    assert done.stderr.startswith("ckptcache: error: ")
    assert f"{foreign}/metadata.json (permission denied)" in done.stderr
    assert done.stderr.count("\n") == 1
    assert json.loads(done.stdout)["error"]["type"] == "IndexUnreadable"


@pytest.mark.parametrize("folder", [".", "checkpoints"])
def test_a_folder_that_may_not_be_looked_into_is_said_in_one_line(foreign, folder):
    (foreign / folder).chmod(0o000)
    done = as_another("--cache-dir", foreign, "ls", "--json")
    (foreign / folder).chmod(0o555)
    assert done.returncode == 1
    assert done.stderr.startswith("ckptcache: error: ")
    assert "ermission denied" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(json.loads(done.stdout)) == ["error"]


def test_a_lease_that_cannot_be_tried_is_not_guessed_at(foreign):
    dies = (
        "import os\nfrom ckptcache.cache import TrainingCache\n"
        f"cache = TrainingCache({str(foreign)!r})\ncache.ledger.hold('sess_b')\nos._exit(0)"
    )
    for path in (foreign, foreign / "sessions"):
        path.chmod(0o755)
    subprocess.run([sys.executable, "-c", dies], env=environment(), check=True)
    assert process("--cache-dir", foreign, "sessions").stdout.count("cut short") == 1
    (foreign / "sessions" / "sess_b.lock").chmod(0o444)
    (foreign / "sessions").chmod(0o555)
    found = json.loads(as_another("--cache-dir", foreign, "sessions", "--json").stdout)
    assert {s["id"]: s["state"] for s in found["sessions"]} == {"sess_a": "finished", "sess_b": "unknown"}
