"""A repository whose workflows act runs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.workflows.acting import Github, copy_of_sources, has


@pytest.fixture
def github(tmp_path: Path, requires: Callable[..., None]) -> Github:
    """This project's own repository, not yet published: its files lie in `ckptcache`."""
    for tool in ("act", "git", "bash"):
        requires(tool, found=has(tool))
    copy_of_sources(tmp_path / "ckptcache")
    return Github(tmp_path)
