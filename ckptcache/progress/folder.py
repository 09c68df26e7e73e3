"""`.training-progress/`: where everything lies that git holds of a training, and what it must not hold."""

import re
from dataclasses import dataclass
from pathlib import Path

from ckptcache.errors import InvalidRunName
from ckptcache.storage.index import INDEX_NAME

DEFAULT_FOLDER = ".training-progress"
SUMMARY_NAME = "training_summary.json"
CHART_NAME = "loss.svg"
PAGE_NAME = "README.md"
_RUN_NAME = re.compile(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")

IGNORED = (
    *("*.pt", "*.pth", "*.bin", "*.safetensors", "*.bundle"),
    *("*.db", "*.db-shm", "*.db-wal", "*.lock", "*.prev", "*.removed", "*.tmp"),
    # A session that is told no other place leaves its summary beside the index; the record's own is made of that.
    "*/cache/training_summary.json",
    *("checkpoints/", "data/", "exports/", "memory/", "quarantine/", "records/", "sessions/"),
)
"""What stays out of git: big, private to a machine, or made again from what is there."""

ATTRIBUTES = (
    f"{INDEX_NAME} merge=ckptcache",
    *(f"{name} merge=ckptcache-derived linguist-generated" for name in (PAGE_NAME, SUMMARY_NAME, CHART_NAME)),
)
"""How git merges what lies here, in clones where `progress init` has told it how."""


def is_run_name(name: str) -> bool:
    """Whether `name` may be a run's: it becomes a folder, and stands in keys and messages."""
    return _RUN_NAME.match(name) is not None and ".." not in name


def check_run_name(name: str) -> str:
    """`name`, or InvalidRunName."""
    if not is_run_name(name):
        raise InvalidRunName(name=name)
    return name


@dataclass(frozen=True, slots=True)
class Run:
    """Where one run's record lies. A run is a training with all its sessions, such as ``nanecho-cached-ci``."""

    root: Path
    name: str

    @property
    def cache_dir(self) -> Path:
        """The cache; git holds its index and nothing else of it."""
        return self.root / "cache"

    @property
    def index(self) -> Path:
        """`metadata.json`."""
        return self.cache_dir / INDEX_NAME

    @property
    def summary(self) -> Path:
        """`training_summary.json`, of the newest session."""
        return self.root / SUMMARY_NAME

    @property
    def chart(self) -> Path:
        """The loss over all sessions, as SVG."""
        return self.root / CHART_NAME


@dataclass(frozen=True, slots=True)
class ProgressFolder:
    """A folder like ``.training-progress``."""

    root: Path

    @property
    def page(self) -> Path:
        """`README.md`."""
        return self.root / PAGE_NAME

    def run(self, name: str) -> Run:
        """The run `name`, whether it is there or not. Raises InvalidRunName."""
        return Run(self.root / check_run_name(name), name)

    def runs(self) -> list[Run]:
        """The runs that have a cache here, by name; links are left out, since what is written must lie inside."""
        try:
            folders = sorted(p for p in self.root.iterdir() if p.is_dir() and not p.is_symlink())
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [Run(p, p.name) for p in folders if is_run_name(p.name) and (p / "cache").is_dir()]
