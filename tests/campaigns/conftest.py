"""What campaigns share."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.campaigns.disks import Ext4, Requires, inserted, need_mounts


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


@pytest.fixture
def disk(tmp_path: Path, requires: Requires) -> Iterator[Ext4]:
    """A file system of its own, really mounted."""
    need_mounts(requires, "mkfs.ext4")
    disk = inserted(Ext4(tmp_path), requires)
    yield disk
    disk.close()
