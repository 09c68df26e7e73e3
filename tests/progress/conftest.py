"""Nobody's own git settings, and repositories to train in."""

from pathlib import Path

import pytest

from tests.conftest import requires
from tests.progress import repos


@pytest.fixture(autouse=True)
def _plain_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    requires("git")
    for name in ("GITHUB_TOKEN", "GITHUB_SERVER_URL", "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A bare repository with one commit."""
    return repos.bare(tmp_path / "origin.git")


@pytest.fixture
def clone(origin: Path, tmp_path: Path) -> Path:
    """A clone of it."""
    return repos.clone(origin, tmp_path / "clone")
