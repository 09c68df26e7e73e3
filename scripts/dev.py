"""Prepare the project's environment and run something in it: see `python3 scripts/dev.py --help`.

Only the standard library is used, so that a fresh clone and any Python from 3.11 on are enough (and no
syntax that 3.6 can't read, so that an older one still says what is needed). The
environment is `.venv` beside `pyproject.toml`. With CKPTCACHE_PYTHON set, that interpreter is used as
it is instead, with the project on PYTHONPATH, and nothing is ever installed: it is meant for machines
whose torch came with them, must not be replaced, and where often there is no network. (A virtual
environment on top of such an interpreter was rejected: it needs ensurepip and a network to be of use.)
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - whoever starts an older one should read a sentence
    sys.stderr.write(
        f"dev.py needs Python 3.11 or newer, and this is {sys.version_info[0]}.{sys.version_info[1]}: "
        "start it with a newer one, as in `python3.12 scripts/dev.py`.\n"
    )
    sys.exit(2)

import argparse
import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "ckptcache-setup.json"
MODULES = ("test", "lint")
EXTRAS = (*MODULES, "workflows")
PEERS = "bench"
"""The extra with what benchmarks measure beside the project; big, and installed only for those that do."""
WITH_PEERS = frozenset(("save", "loop", "restore", "all"))
"""The benchmarks that are."""
MOST_WORKERS = 8
TAIL_LINES = 30

HELP = """\
commands:
  setup            make .venv and install everything in it
  train [ARG...]   train with the cache: scripts/train_cached.py ARG...
  test [ARG...]    run the fast tests: pytest ARG..., without the campaigns
  test --all       lint, then run all tests, the campaigns among them
  lint             ruff check, ruff format --check, mypy, and whether the generated docs are up to date
  bench [ARG...]   run the benchmarks: scripts/bench ARG...

Each command first does what `setup` does, which takes no time when nothing has changed. `bench` and `test --all`
also install what is measured beside the project, the first time that it is wanted, and `test --all` an earlier torch.

environment:
  CKPTCACHE_PYTHON   an interpreter to use as it is, instead of .venv; nothing is installed there
  CKPTCACHE_REQUIRE  "all": tests fail, rather than be skipped, where a tool that they need is missing
"""


class Problem(Exception):
    """What stops dev.py, as one sentence with the way out."""

    def __init__(self, sentence: str, code: int = 1) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass(frozen=True)
class Interpreter:
    """The Python that runs the commands, and the environment that it is given."""

    path: str
    environment: Mapping[str, str]


def say(line: str) -> None:
    """One line on stderr; stdout belongs to what is run."""
    print(f"dev.py: {line}", file=sys.stderr, flush=True)


# --- running -------------------------------------------------------------------------------------


def run_quietly(
    command: Sequence[str], failure: str, verbose: bool, environment: Mapping[str, str] | None = None
) -> None:
    """Run `command`; its output is shown when `verbose`, and its tail when it fails.

    Raises:
        Problem: it exited with anything but 0; `failure` is the sentence.
    """
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if verbose else subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        text=True,
        errors="replace",
    )
    try:
        output, _ = child.communicate()
    except BaseException:
        _end(child)
        raise
    if child.returncode:
        sys.stderr.writelines(f"  {line}\n" for line in (output or "").splitlines()[-TAIL_LINES:])
        raise Problem(failure)


def _end(child: subprocess.Popen[str]) -> None:
    # What pip or apt-get have started is in their session, and goes with them.
    if os.name == "posix":
        os.killpg(child.pid, signal.SIGTERM)
    else:
        child.terminate()
    child.wait()


def become(python: Interpreter, arguments: Sequence[str], folder: Path | None = None) -> NoReturn:
    """Replace this process by `python` with `arguments`, so that signals and the exit code are its own."""
    sys.stdout.flush()
    sys.stderr.flush()
    if folder is not None:
        os.chdir(folder)
    if os.name == "posix":
        os.execve(python.path, [python.path, *arguments], dict(python.environment))  # noqa: S606
    sys.exit(_wait_for(subprocess.Popen([python.path, *arguments], env=dict(python.environment))))


def _wait_for(child: subprocess.Popen[bytes]) -> int:
    # Windows has no exec that keeps the console waiting; its Ctrl-C reaches the child by itself.
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            return child.wait()


# --- .venv ---------------------------------------------------------------------------------------


Step = Literal["ready", "install", "create", "remake", "foreign", "other_python"]


@dataclass(frozen=True)
class Found:
    """What stands at `.venv`.

    Attributes:
        entries: whether anything is there.
        is_venv: whether it has a pyvenv.cfg.
        python: its version, like "3.11"; None when it can't run or has no pip.
        stamp: what dev.py noted in it, or {}.
    """

    entries: bool
    is_venv: bool
    python: str | None
    stamp: Mapping[str, Any]


def next_step(found: Found, wanted: Mapping[str, Any]) -> Step:
    """What has to be done to `.venv`; only one that dev.py made, or that can't run, is made again."""
    if not found.entries:
        return "create"
    if not found.is_venv and not found.stamp:
        return "foreign"
    if found.python is None or found.stamp.get("state") == "installing":
        return "remake"
    if any(found.stamp.get(key, wanted[key]) != wanted[key] for key in ("python", "root")):
        return "remake"
    if not found.stamp and found.python != _version():
        return "other_python"
    return "ready" if found.stamp == wanted else "install"


def wanted_stamp() -> dict[str, Any]:
    """What the stamp of an up-to-date `.venv` says. The folder counts: an editable install points to it."""
    inputs = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        inputs.update((ROOT / name).read_bytes() + b"\0")
    kind = f"{sys.implementation.name} {_version()} {platform.machine()}"
    return {"state": "ready", "python": kind, "root": str(ROOT), "inputs": inputs.hexdigest()}


def prepare(verbose: bool, more: str | None = None) -> Interpreter:
    """The interpreter of an up-to-date `.venv`, made or mended first, with the extra `more` in it if one is given."""
    wanted = wanted_stamp()
    if _read_stamp() != wanted or not os.access(_venv_python(), os.X_OK) or not _has_more(more, wanted):
        try:
            with _one_at_a_time():
                _mend(wanted, verbose, more)
        except OSError as error:
            raise Problem(f"{VENV} could not be made ({error}): {_OTHER_WAY}.") from error
    bin_folder = str(_venv_python().parent)
    path = os.pathsep.join([bin_folder, os.environ.get("PATH", os.defpath)])
    return Interpreter(str(_venv_python()), {**os.environ, "PATH": path, "VIRTUAL_ENV": str(VENV)})


def _has_more(more: str | None, wanted: Mapping[str, Any]) -> bool:
    """Whether the extra `more` is there; it has a stamp of its own, so that no other command asks for it."""
    return more is None or _read_stamp(_stamp_of(more)) == wanted


def _stamp_of(extra: str) -> Path:
    return STAMP.with_name(f"ckptcache-{extra}.json")


_OTHER_WAY = "use a folder with room that you may write to, or set CKPTCACHE_PYTHON to an interpreter with the packages"


def _mend(wanted: Mapping[str, Any], verbose: bool, more: str | None = None) -> None:
    step = next_step(_look(), wanted)
    if step == "foreign":
        raise Problem(f"{VENV} is there and is no virtual environment: move it away, and start again.")
    if step == "other_python":
        raise Problem(
            f"{VENV} was made by someone else, with another Python than this {_version()}: "
            "start dev.py with that one, or move the folder away."
        )
    if step in ("create", "remake"):
        _create(step == "remake", verbose)
    if step != "ready":
        _install(wanted, EXTRAS, verbose)
    if more is not None and not _has_more(more, wanted):
        _install(wanted, (*EXTRAS, more), verbose)
        _write_stamp(wanted, _stamp_of(more))


def _look() -> Found:
    entries = VENV.is_symlink() or (VENV.exists() and (not VENV.is_dir() or any(VENV.iterdir())))
    return Found(entries, (VENV / "pyvenv.cfg").is_file(), _runnable_version(), _read_stamp())


def _runnable_version() -> str | None:
    code = "import pip, sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([_venv_python(), "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _create(remake: bool, verbose: bool) -> None:
    _need_venv_module(verbose)
    if remake:
        say(f"{VENV.name} is broken, half-made or of another Python; making it again")
        shutil.rmtree(VENV)
    say(f"creating {VENV.name}")
    VENV.mkdir(exist_ok=True)
    _write_stamp({"state": "installing"})
    # The base interpreter, since this may be the very .venv that has just been removed.
    base = getattr(sys, "_base_executable", None) or sys.executable
    run_quietly([base, "-m", "venv", str(VENV)], f"{VENV} could not be made (see above): {_OTHER_WAY}.", verbose)


def _install(wanted: Mapping[str, Any], extras: Sequence[str], verbose: bool) -> None:
    if STAMP.exists():
        # An install cut short leaves this behind, and what is found so is made again.
        _write_stamp({**wanted, "state": "installing"})
    what = "the packages" if extras == EXTRAS else f"the packages, and those of {extras[-1]}"
    say(f"installing {what} (the first time takes minutes)")
    requirement = f".[{','.join(extras)}]"
    pip = [str(_venv_python()), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    try:
        run_quietly(
            [*pip, "-c", "constraints.txt", "-e", requirement],
            "pip could not install the packages (see above): check the network, and start again.",
            verbose,
        )
    except Problem:
        _write_stamp({**wanted, "state": "failed"})
        raise
    _write_stamp(wanted)


def _need_venv_module(verbose: bool) -> None:
    if _has_venv():
        return
    if _can_apt():
        say("installing python3-venv, which this Python lacks")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        failure = "apt-get could not install python3-venv (see above): install it, and start again."
        run_quietly(["apt-get", "-q", "update"], failure, verbose, environment)
        install = ["apt-get", "-q", "install", "-y", "--no-install-recommends", "python3-venv"]
        run_quietly(install, failure, verbose, environment)
        importlib.invalidate_caches()
    if not _has_venv():
        raise Problem(
            f"This Python ({sys.executable}) lacks venv or ensurepip, which {VENV.name} is made with: install them "
            "(on Debian and Ubuntu: `apt-get install python3-venv`, as root), or start dev.py with another Python."
        )


def _has_venv() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("venv", "ensurepip"))


def _can_apt() -> bool:
    # The package serves the distribution's own Python only.
    own_python = os.name == "posix" and sys.base_prefix == "/usr"
    return own_python and os.geteuid() == 0 and Path("/etc/debian_version").exists() and bool(shutil.which("apt-get"))


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Keep a second dev.py from mending the same `.venv`; on Windows nothing does."""
    if os.name != "posix":
        yield
        return
    import fcntl

    # The lock is on a file that is there anyway; it ends with this process, however it ends.
    with (ROOT / "pyproject.toml").open("rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another dev.py is preparing {VENV.name}; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _venv_python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _version() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def _read_stamp(path: Path | None = None) -> dict[str, Any]:
    try:
        stamp = json.loads((path or STAMP).read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError:
        return {"state": "installing"}
    return stamp if isinstance(stamp, dict) else {"state": "installing"}


def _write_stamp(stamp: Mapping[str, Any], path: Path | None = None) -> None:
    (path or STAMP).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")


# --- another interpreter -------------------------------------------------------------------------


def chosen_interpreter(name: str, extras: Sequence[str]) -> Interpreter:
    """The interpreter `name` as it is, once it is seen to have what the project and `extras` need.

    Raises:
        Problem: it isn't there, is too old, or lacks packages; all of them are named.
    """
    path = shutil.which(name)
    if path is None:
        raise Problem(f"CKPTCACHE_PYTHON names {name!r}, which cannot be run: name an interpreter.", 2)
    before = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *([before] if before else [])])}
    needed = requirements(_project(), extras)
    version, found = _installed(path, list(needed), environment)
    if version < (3, 11):
        raise Problem(f"{path} is Python {version[0]}.{version[1]}, and 3.11 is needed: name a newer one.", 2)
    lacking = missing(needed, found)
    if lacking:
        raise Problem(
            f"{path} (CKPTCACHE_PYTHON) lacks {', '.join(lacking)}: install them there, "
            "put a folder that holds them on PYTHONPATH, or unset CKPTCACHE_PYTHON to use .venv."
        )
    return Interpreter(path, environment)


def requirements(project: Mapping[str, Any], extras: Sequence[str]) -> dict[str, str]:
    """Name of each distribution that `project` needs with `extras`, to its lowest version ("" for any)."""
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    found: dict[str, str] = {}
    for line in lines:
        name, inner, lowest = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?(?:>=([\w.]+))?", line).groups()  # type: ignore[union-attr]
        if name == project["name"]:
            found |= requirements({**project, "dependencies": []}, (inner or "").split(","))
        else:
            found[name] = lowest or ""
    return found


def missing(needed: Mapping[str, str], found: Mapping[str, str | None]) -> list[str]:
    """Those of `needed` that aren't in `found`, or are older there."""
    lacking = []
    for name, lowest in needed.items():
        version = found.get(name)
        if version is None:
            lacking.append(name)
        elif _release(version) < _release(lowest):
            lacking.append(f"{name}>={lowest} (it has {version})")
    return lacking


def _release(version: str) -> tuple[int, ...]:
    # A vendor's 2.10.0a0+abc counts as 2.10.0, since that is what such builds are labelled.
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", version)[0]))


def _installed(
    python: str, names: Sequence[str], environment: Mapping[str, str]
) -> tuple[tuple[int, int], dict[str, str | None]]:
    code = """
import json, sys
found = {}
if sys.version_info >= (3, 8):
    from importlib import metadata
    for name in sys.argv[1:]:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
print(json.dumps([sys.version_info[:2], found]))
"""
    done = subprocess.run(
        [python, "-c", code, *names], capture_output=True, text=True, check=False, env=dict(environment)
    )
    try:
        (major, minor), found = json.loads(done.stdout)
    except ValueError:
        raise Problem(f"{python} (CKPTCACHE_PYTHON) doesn't run as a Python: name another.", 2) from None
    return (major, minor), found


def _project() -> Mapping[str, Any]:
    project: Mapping[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project


# --- commands ------------------------------------------------------------------------------------


def interpreter(extras: Sequence[str], verbose: bool, more: str | None = None) -> Interpreter:
    """What runs a command: CKPTCACHE_PYTHON if it is set and has what `extras` need, else `.venv`'s, with `more`."""
    chosen = os.environ.get("CKPTCACHE_PYTHON")
    if chosen:
        return chosen_interpreter(chosen, extras)
    return prepare(verbose, more)


def setup(rest: list[str], verbose: bool) -> int:
    unknown = [argument for argument in rest if argument not in ("-v", "--verbose")]
    if unknown:
        raise Problem(f"setup takes no argument but -v, and got {unknown[0]!r}.", 2)
    python = interpreter(MODULES, verbose or bool(rest))
    say(f"ready: {python.path}")
    return 0


def train(rest: list[str], verbose: bool) -> int:
    script = ROOT / "scripts" / "train_cached.py"
    if not script.exists():
        raise Problem("scripts/train_cached.py is not there yet.")
    python = interpreter((), verbose)
    # It ends with the command to go on, which should be the one that was typed.
    name = Path(sys.orig_argv[0]).name
    python3, *words = sys.orig_argv[: len(sys.orig_argv) - len(rest)]
    typed = shlex.join([name if shutil.which(name) else python3, *words])
    become(Interpreter(python.path, {**python.environment, "CKPTCACHE_STARTED_BY": typed}), [str(script), *rest])


def test(rest: list[str], verbose: bool) -> int:
    everything = "--all" in rest
    # Of an interpreter that is used as it is, programs that only some tests start aren't asked for.
    python = interpreter(MODULES if everything else ("test",), verbose, PEERS if everything else None)
    if everything:
        if _lint(python):
            raise Problem("the tests were not run, because lint failed (see above).")
        # More examples for the property tests, where there is time for them.
        python = Interpreter(python.path, {"CKPTCACHE_HYPOTHESIS": "ci", **python.environment})
        _have_earlier_torch(python, verbose)
    become(python, pytest_arguments([a for a in rest if a != "--all"], everything, _cores()), ROOT)


def _have_earlier_torch(python: Interpreter, verbose: bool) -> None:
    """Install what some tests read our files with; where it can't be had, they say so themselves."""
    script = ROOT / "scripts" / "earlier_torch.py"
    if os.environ.get("CKPTCACHE_PYTHON") or not script.exists():
        return
    command = [python.path, str(script)]
    if subprocess.run([*command, "--check"], check=False).returncode:
        say("installing an earlier torch beside the project (the first time takes a minute)")
        try:
            run_quietly(command, "an earlier torch could not be installed (see above): check the network.", verbose)
        except Problem as problem:
            say(str(problem))


def pytest_arguments(rest: list[str], everything: bool, cores: int) -> list[str]:
    """How Python is to run pytest: what is in `rest` comes last, and so wins."""
    marks = [] if everything else ["-m", "not campaign"]
    alone = cores < 2 or not {"-s", "--capture=no", "--pdb", "--trace"}.isdisjoint(rest)
    # worksteal keeps neighbours on one worker, so that what they share is made once, until another runs dry.
    # loadgroup was rejected: pytest-xdist 3.8 ignores the groups under pytest 9.2, silently.
    spread = [] if alone else ["-n", str(min(cores, MOST_WORKERS)), "--dist", "worksteal"]
    return ["-m", "pytest", *marks, *spread, *rest]


def lint(rest: list[str], verbose: bool) -> int:
    if rest:
        raise Problem(f"lint takes no arguments, and got {rest[0]!r}.", 2)
    return _lint(interpreter(("lint",), verbose))


def _lint(python: Interpreter) -> int:
    checks = {
        "ruff check": ["-m", "ruff", "check"],
        "ruff format --check": ["-m", "ruff", "format", "--check"],
        "mypy": ["-m", "mypy"],
        "generated docs": ["scripts/generate_docs.py", "--check"],
    }
    failed = []
    for name, arguments in checks.items():
        say(name)
        if subprocess.run([python.path, *arguments], cwd=ROOT, env=python.environment, check=False).returncode:
            failed.append(name)
    if failed:
        say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def bench(rest: list[str], verbose: bool) -> int:
    folder = ROOT / "scripts" / "bench"
    if not (folder / "__main__.py").exists():
        raise Problem("there are no benchmarks yet.")
    # Of an interpreter that is used as it is, what isn't there is named in the tables.
    become(interpreter((), verbose, PEERS if WITH_PEERS & {*rest} else None), [str(folder), *rest])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


COMMANDS = {"setup": setup, "train": train, "test": test, "lint": lint, "bench": bench}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="dev.py",
        usage="dev.py [-h] [-v] {setup,train,test,lint,bench} [ARG...]",
        description="Prepare the project's environment, and run something in it.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("-v", "--verbose", action="store_true", help="show what pip prints")
    made.add_argument("command", choices=COMMANDS, metavar="command", help="see below")
    made.add_argument("rest", nargs=argparse.REMAINDER, metavar="ARG", help="passed on to what is run")
    return made


def main() -> int:
    # So that whatever setup has started is ended too; what is run in the end gets its own handler.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if len(sys.argv) == 1:
        parser().print_help(sys.stderr)
        return 2
    arguments = parser().parse_args()
    if arguments.command in ("setup", "test", "lint") and {"-h", "--help"} & set(arguments.rest):
        parser().print_help()
        return 0
    try:
        return COMMANDS[arguments.command](arguments.rest, arguments.verbose)
    except Problem as problem:
        say(str(problem))
        return problem.code
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from here")
        return 130


if __name__ == "__main__":
    sys.exit(main())
