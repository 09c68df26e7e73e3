"""What campaigns share."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where there is one: a thousand syncs take a minute on a disk, and what they are for is
    proved by the power cuts."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="ckptcache-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)
