"""Workflows run for real by act, on this machine: each job in a clean copy of the repository, nothing from a network.

`origin` is a bare repository on the disk, as is what stands for GitHub's cache and artifacts: see actions/README.md.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
ACTIONS = Path(__file__).resolve().parent / "actions"
PINNED = re.compile(r"uses: ([\w-]+/[\w-]+)(?:/[\w./-]+)?@(\w+)")
OWN_ACTION = "OWNER/ckptcache@COMMIT"
SOURCES = (".github", "ckptcache", "scripts", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")
TOKEN = "a-token-that-nothing-takes"  # noqa: S105
IDENTITY = {f"GIT_{who}_{what}": "someone@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
# What a step writes to its summary, act keeps for the length of the step.
KEEP_SUMMARIES = """\
unset BASH_ENV
trap 'cat "$GITHUB_STEP_SUMMARY" >>"$STAND_INS/summaries/$GITHUB_RUN_ID-$GITHUB_JOB.md" 2>/dev/null' EXIT
"""


def search_path() -> str:
    """Where programs are looked for: beside this Python, which is where act and zizmor are installed, and then PATH."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def has(program: str) -> bool:
    """Whether `program` is there."""
    return shutil.which(program, path=search_path()) is not None


def copy_of_sources(folder: Path) -> Path:
    """The project as it stands here, in `folder`."""
    folder.mkdir(parents=True)
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def git(folder: Path, *arguments: str) -> str:
    """What git prints; it has to work."""
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        env={**os.environ, **IDENTITY},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"git {' '.join(arguments)}: {done.stderr}"
    return done.stdout.strip()


@dataclass(frozen=True)
class Ended:
    """How a run of a workflow ended."""

    code: int
    log: str

    def result_of(self, job: str) -> str | None:
        """ "succeeded" or "failed", and None for a job that was skipped. `job` is a part of its name."""
        found = re.findall(rf"^\[[^\]]*{re.escape(job)}[^\]]*\] 🏁  Job (\w+)", self.log, re.M)
        return found[-1] if found else None


@dataclass
class Github:
    """A repository, and the machines that run its workflows.

    Attributes:
        folder: where everything lies.
        environment: what every job sees beside the usual.
    """

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    runs: int = 0

    @property
    def origin(self) -> Path:
        return self.folder / "origin.git"

    @property
    def stand_ins(self) -> Path:
        return self.folder / "stand-ins"

    def publish(self, tree: Path) -> None:
        """Make what lies in `tree` the first commit of the repository."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.stand_ins / "summaries").mkdir(parents=True)
        (self.stand_ins / "hook.sh").write_text(KEEP_SUMMARIES)
        git(self.folder, "init", "-q", "--bare", "-b", "main", str(self.origin))
        git(tree, "init", "-q", "-b", "main")
        git(tree, "add", "-A")
        git(tree, "commit", "-q", "-m", "Begin")
        git(tree, "push", "-q", str(self.origin), "main")

    # --- running ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def started(
        self, workflow: str, event: str = "workflow_dispatch", inputs: Mapping[str, str] | None = None, **more: str
    ) -> Iterator["subprocess.Popen[str]"]:
        """act, running; ended with all that it has started if the test doesn't wait for it."""
        self.runs += 1
        clone = self.folder / f"clone-{self.runs}"
        # As shallow as actions/checkout makes it.
        git(self.folder, "clone", "-q", "--depth", "1", f"file://{self.origin}", str(clone))
        payload = {"pull_request": {"number": 7, "head": {"ref": "topic"}, "base": {"ref": "main"}}}
        event_file = self.folder / f"event-{self.runs}.json"
        event_file.write_text(json.dumps(payload if event == "pull_request" else {}))
        command = ["act", event, "-W", f".github/workflows/{workflow}", "-P", "ubuntu-latest=-self-hosted"]
        command += ["--secret", f"GITHUB_TOKEN={TOKEN}", "--insecure-secrets"]  # so that it would be seen in the log
        command += ["--no-cache-server", "--action-cache-path", str(self.folder / "act")]
        command += ["--env", f"GITHUB_RUN_ID={1000 + self.runs}", "--env", f"BASH_ENV={self.stand_ins / 'hook.sh'}"]
        # For a pull request inputs would stand in the way of the event.
        command += ["-e", str(event_file)] if event == "pull_request" else []
        for name, value in (inputs or {}).items():
            command += ["--input", f"{name}={value}"]
        for place, stand_in in self._local_repositories(clone).items():
            command += ["--local-repository", f"{place}={stand_in}"]
        with (self.folder / f"log-{self.runs}.txt").open("w") as log:
            process = subprocess.Popen(
                command, cwd=clone, env=self._environment(more), stdout=log, stderr=subprocess.STDOUT, text=True,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            try:
                yield process
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def run(
        self, workflow: str, event: str = "workflow_dispatch", inputs: Mapping[str, str] | None = None, **more: str
    ) -> Ended:
        """Run a workflow to its end."""
        with self.started(workflow, event, inputs, **more) as process:
            process.wait(timeout=240)
        return self.ended(process)

    def ended(self, process: "subprocess.Popen[str]") -> Ended:
        """How the last run ended."""
        return Ended(process.returncode, (self.folder / f"log-{self.runs}.txt").read_text())

    def _local_repositories(self, clone: Path) -> dict[str, Path]:
        """Each `owner/repository@ref` that the workflows use, with what stands in for it."""
        texts = [path.read_text() for root in (clone, ROOT) for path in (root / ".github").rglob("*.yml")]
        found = {match for text in texts for match in PINNED.findall(text)}
        places = {f"{name}@{ref}": ACTIONS / name.split("/")[1] for name, ref in found if name != "actions/checkout"}
        return {**places, OWN_ACTION: self.folder / "ckptcache"}

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        kept = {k: os.environ[k] for k in ("LANG", "LC_ALL", "TMPDIR") if k in os.environ}
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        own = {
            "PATH": search_path(),
            "PYTHONPATH": str(ROOT),
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home / "cache"),
            "XDG_CONFIG_HOME": str(home / "config"),
            "STAND_INS": str(self.stand_ins),
            "OMP_NUM_THREADS": "1",
            "TERM": "dumb",  # act gives its steps a terminal, which GitHub does not
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        return {**kept, **own, **self.environment, **more}

    # --- what it left ----------------------------------------------------------------------------

    def branches(self) -> list[str]:
        """The branches of the repository."""
        return git(self.origin, "for-each-ref", "--format=%(refname:short)", "refs/heads").split()

    def subjects(self, branch: str = "main") -> list[str]:
        """The first lines of its commits, the newest first."""
        return git(self.origin, "log", "--format=%s", branch).splitlines()

    def file(self, path: str, branch: str = "main") -> str:
        """A file of the repository."""
        return git(self.origin, "show", f"{branch}:{path}")

    def summary(self, run: str, progress_dir: str = ".training-progress") -> dict[str, Any]:
        """The `training_summary.json` of `run` that was committed last."""
        return json.loads(self.file(f"{progress_dir}/{run}/training_summary.json"))

    def record(self, run: str, progress_dir: str = ".training-progress") -> dict[str, Any]:
        """The `metadata.json` of `run` that was committed last."""
        return json.loads(self.file(f"{progress_dir}/{run}/cache/metadata.json"))

    def caches(self) -> list[str]:
        """Keys of what the cache keeps, the newest last."""
        return [(folder / "key").read_text() for folder in sorted((self.stand_ins / "cache").glob("*"))]

    def artifacts(self) -> dict[str, Path]:
        """The artifacts of the last run: name to folder."""
        return {folder.name: folder for folder in (self.stand_ins / "artifacts" / str(1000 + self.runs)).glob("*")}

    def job_summary(self, job: str, run: int | None = None) -> str:
        """What the steps of a job wrote to their summaries, spaces that hold words together being as others."""
        path = self.stand_ins / "summaries" / f"{1000 + (run or self.runs)}-{job}.md"
        return path.read_text().replace("\N{NO-BREAK SPACE}", " ")
