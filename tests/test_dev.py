"""dev.py in small projects of their own, whose package needs nothing, so that no network is needed."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import dev  # noqa: E402

PYPROJECT = """\
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "ckptcache"
version = "0.1"
dependencies = {dependencies}

[project.optional-dependencies]
test = []
lint = []
workflows = []
bench = []
"""
BACKEND = """\
import base64, hashlib, pathlib, zipfile

def get_requires_for_build_editable(settings=None):
    return []

def build_editable(folder, settings=None, metadata=None):
    name, info = "ckptcache-0.1-py3-none-any.whl", "ckptcache-0.1.dist-info"
    about = "Metadata-Version: 2.1\\nName: ckptcache\\nVersion: 0.1\\n"
    about += "".join(f"Provides-Extra: {name}\\n" for name in ("test", "lint", "workflows", "bench"))
    wheel = "Wheel-Version: 1.0\\nGenerator: backend\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
    files = {"ckptcache.pth": str(pathlib.Path.cwd()), f"{info}/METADATA": about, f"{info}/WHEEL": wheel}
    record = ""
    with zipfile.ZipFile(pathlib.Path(folder, name), "w") as archive:
        for path, text in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            record += f"{path},sha256={digest},{len(text)}\\n"
            archive.writestr(path, text)
        archive.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\\n")
    return name
"""
SHOW = """\
import json, os, sys
print(json.dumps([sys.argv[1:], sys.prefix, os.getcwd(), os.environ.get("PYTHONPATH")]), flush=True)
if sys.argv[1:] == ["fail"]:
    sys.exit(7)
if sys.argv[1:] == ["wait"]:
    import signal, time
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(33))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(34))
    print("ready", flush=True)
    time.sleep(60)
"""


def make_project(folder: Path, dependencies: str = "[]") -> Path:
    scripts = folder / "scripts"
    scripts.mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "dev.py", scripts)
    (folder / "pyproject.toml").write_text(PYPROJECT.format(dependencies=dependencies))
    (folder / "constraints.txt").write_text("")
    (folder / "backend.py").write_text(BACKEND)
    (scripts / "train_cached.py").write_text(SHOW)
    return folder


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("CKPTCACHE_PYTHON", "PYTHONPATH", "VIRTUAL_ENV")}
    return {**kept, **more}


def run(project: Path, *arguments: str, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(project / "scripts" / "dev.py"), *arguments]
    return subprocess.run(
        command, cwd=cwd or project, env=environment(**more), capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project that is set up."""
    project = make_project(tmp_path_factory.mktemp("made"))
    done = run(project, "setup")
    assert done.returncode == 0, done.stderr
    assert "creating .venv" in done.stderr
    assert "installing" in done.stderr
    assert done.stdout == ""
    return project


@pytest.fixture
def project(tmp_path):
    return make_project(tmp_path / "project")


# --- .venv ---------------------------------------------------------------------------------------


def test_when_nothing_changed_nothing_is_done(made):
    stamp = made / ".venv" / dev.STAMP.name
    before = stamp.stat().st_mtime_ns
    done = run(made, "setup")
    assert (done.returncode, stamp.stat().st_mtime_ns) == (0, before)
    assert done.stderr == f"dev.py: ready: {made / '.venv' / 'bin' / 'python'}\n"


def test_the_package_is_installed_in_place(made):
    code = "import sys; print(any('made' in p for p in sys.path))"
    done = subprocess.run([made / ".venv" / "bin" / "python", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_a_changed_pyproject_is_installed_again_into_the_same_venv(made):
    marker = made / ".venv" / "marker"
    marker.touch()
    (made / "constraints.txt").write_text("# changed\n")
    done = run(made, "setup")
    assert done.returncode == 0, done.stderr
    assert "installing" in done.stderr
    assert "creating" not in done.stderr
    assert marker.exists()


@pytest.mark.parametrize("harm", ["no_python", "interrupted"])
def test_a_broken_or_half_made_venv_is_made_again(made, harm):
    venv = made / ".venv"
    stamp = venv / dev.STAMP.name
    if harm == "no_python":
        (venv / "bin" / "python").unlink()
    else:
        stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "state": "installing"}))
    done = run(made, "train")
    assert done.returncode == 0, done.stderr
    assert "making it again" in done.stderr
    assert json.loads(done.stdout)[1] == str(venv)


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_no_venv_of_its_own_is_never_removed(project, tmp_path, kind):
    venv, other = project / ".venv", tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("x")
    if kind == "folder":
        other.rename(venv)
    elif kind == "link":
        venv.symlink_to(other)
    else:
        venv.write_text("x")
    done = run(project, "setup")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "move it away" in done.stderr
    assert venv.is_file() or (venv / "precious").read_text() == "x"


def test_a_failing_pip_shows_its_tail_and_is_tried_again(project):
    (project / "backend.py").write_text("raise SystemExit('the backend is broken')")
    done = run(project, "setup")
    assert done.returncode == 1
    assert "the backend is broken" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("dev.py: pip could not install the packages (see above)")
    (project / "backend.py").write_text(BACKEND)
    done = run(project, "setup")
    assert done.returncode == 0, done.stderr
    assert "creating" not in done.stderr


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_stamp_cut_short_counts_as_an_install_cut_short(monkeypatch, tmp_path, text):
    monkeypatch.setattr(dev, "STAMP", tmp_path / "stamp")
    assert dev._read_stamp() == {}
    (tmp_path / "stamp").write_text(text)
    assert dev._read_stamp()["state"] == "installing"


def test_a_venv_without_pip_cannot_be_used(monkeypatch, tmp_path):
    monkeypatch.setattr(dev, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(dev, "STAMP", tmp_path / ".venv" / "stamp")
    assert dev._look() == dev.Found(False, False, None, {})
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    assert dev._look() == dev.Found(True, True, None, {})


READY = {"state": "ready", "python": "cpython 3.12 x86_64", "root": "/p", "inputs": "1"}


@pytest.mark.parametrize(
    ("found", "step"),
    [
        (dev.Found(False, False, None, {}), "create"),
        (dev.Found(True, False, None, {}), "foreign"),
        (dev.Found(True, False, None, {"state": "installing"}), "remake"),
        (dev.Found(True, True, None, {}), "remake"),
        (dev.Found(True, True, None, READY), "remake"),
        (dev.Found(True, True, dev._version(), {}), "install"),
        (dev.Found(True, True, "3.6", {}), "other_python"),
        (dev.Found(True, True, dev._version(), {**READY, "state": "installing"}), "remake"),
        (dev.Found(True, True, dev._version(), {**READY, "state": "failed"}), "install"),
        (dev.Found(True, True, dev._version(), {**READY, "python": "cpython 3.11 x86_64"}), "remake"),
        (dev.Found(True, True, dev._version(), {**READY, "root": "/moved"}), "remake"),
        (dev.Found(True, True, dev._version(), {**READY, "inputs": "2"}), "install"),
        (dev.Found(True, True, dev._version(), READY), "ready"),
    ],
)
def test_what_is_done_follows_from_what_is_found(found, step):
    assert dev.next_step(found, READY) == step


@pytest.mark.parametrize("name", ["venv", "ensurepip"])
def test_a_python_without_venv_says_so_in_a_sentence(project, name):
    # base_prefix: as for a Python that no system package belongs to, so that nothing is installed here.
    code = (
        "import importlib.util, runpy, sys\n"
        "real = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda n, *a: None if n == {name!r} else real(n, *a)\n"
        "sys.base_prefix = '/nowhere'\n"
        "sys.argv = ['dev.py', 'setup']\n"
        f"runpy.run_path({str(project / 'scripts' / 'dev.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "lacks venv or ensurepip" in done.stderr
    assert "apt-get install python3-venv" in done.stderr
    assert not (project / ".venv").exists()


# --- running -------------------------------------------------------------------------------------


def test_further_arguments_and_the_folder_are_passed_on(made, tmp_path):
    done = run(made, "train", "--max_iters", "100", "-v", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    arguments, prefix, folder, _ = json.loads(done.stdout)
    assert arguments == ["--max_iters", "100", "-v", "--help"]
    assert (prefix, folder) == (str(made / ".venv"), str(tmp_path))


def test_the_exit_code_is_passed_on(made):
    assert run(made, "train", "fail").returncode == 7


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 33), (signal.SIGINT, 34)])
def test_signals_reach_what_is_run(made, number, code):
    command = [sys.executable, str(made / "scripts" / "dev.py"), "train", "wait"]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline(), child.stdout.readline()]
        child.send_signal(number)
        assert child.wait(timeout=30) == code, lines


def test_a_signal_during_setup_ends_pip_and_all_below_it(project):
    # The backend keeps pip waiting, and notes who they are.
    note = "pathlib.Path('pids').write_text(f'{os.getpid()} {os.getppid()}')"
    (project / "backend.py").write_text(f"import os, pathlib, time\n{note}\ntime.sleep(60)\n")
    command = [sys.executable, str(project / "scripts" / "dev.py"), "setup"]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as child:
        pids = wait_for_text(project / "pids", 60).split()
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=30) == 143
    assert json.loads((project / ".venv" / dev.STAMP.name).read_text())["state"] == "installing"
    assert not [pid for pid in pids if is_running(pid)]


def wait_for_text(path: Path, seconds: float) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and (text := path.read_text()):
            return text
        time.sleep(0.05)
    raise TimeoutError(path)


def is_running(pid: str) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    ("arguments", "everything", "cores", "expected"),
    [
        (["-k", "index"], False, 1, ["-m", "not campaign", "-k", "index"]),
        ([], False, 2, ["-m", "not campaign", "-n", "2", "--dist", "worksteal"]),
        ([], True, 64, ["-n", "8", "--dist", "worksteal"]),
        (["--pdb"], False, 4, ["-m", "not campaign", "--pdb"]),
        (["-s", "tests/test_dev.py"], True, 4, ["-s", "tests/test_dev.py"]),
    ],
)
def test_pytest_is_run_on_the_cores_that_are_there(arguments, everything, cores, expected):
    assert dev.pytest_arguments(arguments, everything, cores) == ["-m", "pytest", *expected]


CONFIGURATION = """
[tool.ruff]
include = ["ckptcache/*.py"]

[tool.mypy]
files = ["ckptcache"]

[tool.pytest.ini_options]
testpaths = ["tests"]
markers = ["campaign: long"]
"""
TESTS = """\
import pytest

def test_quick(): ...

@pytest.mark.campaign
def test_long(): ...
"""


@pytest.fixture
def checked(project, requires):
    """A project with something to lint and to test."""
    for tool in ("ruff", "mypy"):
        requires(tool)
    for name, text in {
        "ckptcache/__init__.py": "x: int = 1\n",
        "tests/test_x.py": TESTS,
        "scripts/generate_docs.py": "",
        "pyproject.toml": (project / "pyproject.toml").read_text() + CONFIGURATION,
    }.items():
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text(text)
    return project


def closing_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout.splitlines()[-1]


def test_the_fast_tests_leave_the_campaigns_out(checked):
    done = run(checked, "test", CKPTCACHE_PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in closing_line(done)
    done = run(checked, "test", "-k", "nothing_like_it", CKPTCACHE_PYTHON=sys.executable)
    assert done.returncode == 5


def test_all_tests_run_after_lint_and_end_with_pytests_line(checked):
    done = run(checked, "test", "--all", CKPTCACHE_PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in closing_line(done)
    for check in ("ruff check", "ruff format --check", "mypy", "generated docs"):
        assert f"dev.py: {check}\n" in done.stderr


@pytest.mark.parametrize(
    ("path", "text", "failed"),
    [
        ("ckptcache/__init__.py", "import os\n", "ruff check"),
        ("ckptcache/__init__.py", "x: int=1\n", "ruff format --check"),
        ("ckptcache/__init__.py", 'x: int = "1"\n', "mypy"),
        ("scripts/generate_docs.py", "raise SystemExit(1)\n", "generated docs"),
    ],
)
def test_nothing_is_green_unless_all_is(checked, path, text, failed):
    (checked / path).write_text(text)
    done = run(checked, "test", "--all", CKPTCACHE_PYTHON=sys.executable)
    assert done.returncode == 1
    assert f"dev.py: failed: {failed}\n" in done.stderr
    assert "test session starts" not in done.stdout


def test_lint_tells_all_that_fails(checked):
    (checked / "ckptcache" / "__init__.py").write_text('import os\nx: int="1"\n')
    done = run(checked, "lint", CKPTCACHE_PYTHON=sys.executable)
    assert done.returncode == 1
    assert done.stderr.endswith("dev.py: failed: ruff check, ruff format --check, mypy\n")


def test_a_failing_campaign_fails_all(checked):
    (checked / "tests" / "test_x.py").write_text(TESTS.replace("test_long(): ...", "test_long(): assert 0"))
    assert run(checked, "test", CKPTCACHE_PYTHON=sys.executable).returncode == 0
    assert run(checked, "test", "--all", CKPTCACHE_PYTHON=sys.executable).returncode == 1


def test_no_benchmarks_yet_is_said(project):
    done = run(project, "bench")
    assert (done.returncode, done.stderr) == (1, "dev.py: there are no benchmarks yet.\n")


@pytest.fixture
def measured(made):
    (made / "scripts" / "bench").mkdir(exist_ok=True)
    (made / "scripts" / "bench" / "__main__.py").write_text(SHOW)
    yield made
    shutil.rmtree(made / "scripts" / "bench")
    (made / ".venv" / "ckptcache-bench.json").unlink(missing_ok=True)


def test_what_is_measured_beside_the_project_is_installed_once_and_for_those_benchmarks_alone(measured):
    for _ in range(2):
        done = run(measured, "bench", "index", "--json")
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    first, second = (run(measured, "bench", "index", "save") for _ in range(2))
    assert json.loads(first.stdout)[0] == json.loads(second.stdout)[0] == ["index", "save"]
    assert "those of bench" in first.stderr
    assert second.stderr == ""
    assert run(measured, "setup").stderr.startswith("dev.py: ready")


def test_it_is_installed_again_when_what_is_wanted_has_changed(measured):
    assert run(measured, "bench", "all").returncode == 0
    (measured / "constraints.txt").write_text("# changed once more\n")
    assert "those of bench" not in run(measured, "setup").stderr
    assert "those of bench" in run(measured, "bench", "all").stderr


EARLIER = """\
import pathlib, sys
there = pathlib.Path("there")
if "--check" in sys.argv:
    sys.exit(not there.exists())
if "{outcome}" == "fails":
    sys.exit("no such release")
there.touch()
"""


@pytest.mark.parametrize("outcome", ["succeeds", "fails"])
def test_an_earlier_torch_is_installed_once_and_its_want_stops_no_other_test(monkeypatch, tmp_path, capfd, outcome):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "earlier_torch.py").write_text(EARLIER.format(outcome=outcome))
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    python = dev.Interpreter(sys.executable, os.environ)
    monkeypatch.setenv("CKPTCACHE_PYTHON", sys.executable)
    dev._have_earlier_torch(python, False)
    assert capfd.readouterr().err == ""
    monkeypatch.delenv("CKPTCACHE_PYTHON")
    dev._have_earlier_torch(python, False)
    said = capfd.readouterr().err
    assert "installing an earlier torch" in said
    assert ("no such release" in said) == ("could not be installed" in said) == (outcome == "fails")
    dev._have_earlier_torch(python, False)
    assert (capfd.readouterr().err == "") == (outcome == "succeeds")


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["nope"], 2), (["setup", "now"], 2), (["lint", "x"], 2)])
def test_wrong_usage_ends_with_2(project, arguments, code):
    assert run(project, *arguments).returncode == code


@pytest.mark.parametrize("arguments", [["--help"], ["test", "--help"], ["setup", "-h"]])
def test_help_needs_no_setup(project, arguments):
    done = run(project, *arguments)
    assert done.returncode == 0
    assert "CKPTCACHE_PYTHON" in done.stdout
    assert not (project / ".venv").exists()


# --- another interpreter -------------------------------------------------------------------------


def test_the_chosen_interpreter_is_used_as_it_is(project):
    done = run(project, "train", "x", CKPTCACHE_PYTHON=sys.executable, PYTHONPATH="further")
    assert done.returncode == 0, done.stderr
    arguments, prefix, _, path = json.loads(done.stdout)
    assert (arguments, prefix) == (["x"], sys.prefix)
    assert path == os.pathsep.join([str(project), "further"])
    assert not (project / ".venv").exists()


def test_what_the_chosen_interpreter_lacks_is_told_in_a_sentence(tmp_path):
    project = make_project(tmp_path / "p", '["pytest>=1.0", "pytest-timeout>=99.5", "no-such-thing", "nor-this>=2"]')
    done = run(project, "train", CKPTCACHE_PYTHON=sys.executable)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    for part in ("pytest-timeout>=99.5 (it has", "no-such-thing, nor-this"):
        assert part in done.stderr
    assert "pytest>=1.0" not in done.stderr


@pytest.mark.parametrize("arguments", [("setup",), ("test", "--all")])
def test_programs_for_the_workflows_are_not_asked_of_the_chosen_interpreter(project, arguments):
    pyproject = project / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace("workflows = []", 'workflows = ["no-such-program"]'))
    done = run(project, *arguments, CKPTCACHE_PYTHON=sys.executable)
    assert "no-such-program" not in done.stderr


def test_what_setup_installs_is_what_the_project_declares():
    extras = dev.tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {*dev.EXTRAS} <= {*extras}
    # Elsewhere there are no wheels of them, and the setup must not break for that.
    assert all("; sys_platform == 'linux' and platform_machine == 'x86_64'" in line for line in extras["workflows"])


@pytest.mark.parametrize("name", ["no-such-python", "true"])
def test_a_chosen_interpreter_that_is_none_is_told(project, name):
    done = run(project, "train", CKPTCACHE_PYTHON=name)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "CKPTCACHE_PYTHON" in done.stderr


def test_what_is_needed_follows_from_pyproject():
    project = {
        "name": "ckptcache",
        "dependencies": ["torch>=2.10", "click"],
        "optional-dependencies": {"plots": ["matplotlib>=3.8"], "test": ["ckptcache[plots]", "pytest-xdist>=3.6,<5"]},
    }
    assert dev.requirements(project, ()) == {"torch": "2.10", "click": ""}
    assert dev.requirements(project, ("test",)) == {
        "torch": "2.10",
        "click": "",
        "matplotlib": "3.8",
        "pytest-xdist": "3.6",
    }


def test_a_vendors_build_counts_as_its_release():
    found = {"torch": "2.10.0a0+b4e4ee8", "numpy": "1.9", "click": "8.1.7"}
    lacking = dev.missing({"torch": "2.10", "numpy": "1.26", "click": "", "rich": "13"}, found)
    assert lacking == ["numpy>=1.26 (it has 1.9)", "rich"]


# --- older Pythons -------------------------------------------------------------------------------


def test_an_older_python_reads_it_and_is_told_what_is_needed():
    source = (ROOT / "scripts" / "dev.py").read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 6))
    code = f"import sys; sys.version_info = (3, 8, 1); exec(compile({source!r}, 'dev.py', 'exec'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("dev.py needs Python 3.11 or newer, and this is 3.8")
    assert done.stderr.count("\n") == 1
