"""Power that is cut at any instant, on a real file system: what was acknowledged is there afterwards.

An ext4 in a file is shut down without its journal being flushed, unmounted, mounted again and
verified; the writer notes what was acknowledged on another file system.
"""

import json
import os
import random
import signal
import time
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from ckptcache import TrainingCache
from ckptcache.errors import CkptCacheError
from tests.caches import ids, save, temporary_files, tiny
from tests.campaigns import variants
from tests.campaigns.disks import Ext4
from tests.faults import end_of, start_child, wait_for, wait_until

CAMPAIGN = "power cuts"
LIMIT = 4
SIZES = (4, 3000, 60_000)
MOST_SAVES = 5
"""That are acknowledged before a cut; then, at any moment of the next one."""


def opened(folder: Path) -> TrainingCache:
    return TrainingCache(folder, max_checkpoints=LIMIT)


class Writer:
    """A process that saves, evicts and names until the power goes; its notes lie elsewhere.

    Args:
        folder: the cache, on the disk that is cut.
        notes: a file on another one.
        seed: what it does is drawn from.
        size: elements of the states; another number is another group, and so another best.
    """

    def __init__(self, folder: Path, notes: Path, seed: int, size: int) -> None:
        self.folder, self.notes, self.draw, self.size = folder, notes, random.Random(seed), size

    def write(self, variant: variants.Variant) -> None:
        fd = os.open(self.notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        with variant(), opened(self.folder) as cache:
            for iteration in count(1):
                os.write(fd, self.act(cache, iteration))

    def act(self, cache: TrainingCache, iteration: int) -> bytes:
        """Save, at once or in the background, and now and then move a name; returns what is then acknowledged."""
        loss, blocking = self.draw.uniform(0.1, 9.0), self.draw.random() < 0.5
        record = save(cache, loss, iteration, state=tiny(loss, self.size), blocking=blocking)
        cache.wait_until_finished()
        said: dict[str, Any] = {"saved": record.id, "loss": loss}
        if iteration % 3 == 0:
            cache.name(record.id, "slot")
            said["named"] = record.id
        return json.dumps(said).encode() + b"\n"

    def wait(self) -> None:
        """Until some saves are acknowledged, and then for a part of the time that one takes, or no time at all."""
        wanted, began = self.draw.randrange(MOST_SAVES), time.monotonic()
        wait_until(lambda: self.notes.read_bytes().count(b"\n") >= wanted, what="nothing was saved", pause=0.0005)
        if self.draw.random() < 0.75:
            time.sleep(self.draw.uniform(0, (time.monotonic() - began) / (wanted + 1)))

    def acknowledged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.notes.read_text().splitlines()]


def cut(disk: Ext4, writer: Writer, variant: variants.Variant) -> None:
    """Let a writer write until the power goes, and start the machine again."""
    writer.notes.touch()
    pid = start_child(lambda: writer.write(variant))
    try:
        wait_for(writer.folder)
        writer.wait()
        disk.cut()
    finally:
        os.kill(pid, signal.SIGKILL)
        end_of(pid)
    disk.take_out()
    disk.put_in()


def check(writer: Writer, said: list[dict[str, Any]]) -> None:
    """Everything acknowledged is there, or was evicted for something better; what is there is whole; work goes on."""
    cache = opened(writer.folder)
    records = {r.id: r for r in cache.checkpoints(everything=True)}
    there = set(ids(cache.checkpoints()))
    for each in said:
        id = each["saved"]
        assert id in records, f"{id} was forgotten"
        assert id in there or records[id].decision == "evicted", f"{id} was lost"
    for id in there:
        assert set(cache.load(id)["w"].tolist()) == set(tiny(records[id].val_loss)["w"].tolist())
    if said:
        assert cache.best().val_loss <= min(each["loss"] for each in said)
    if named := [each["named"] for each in said if "named" in each]:
        assert "slot" in cache.names(), "the name was lost"
        assert records[cache.names()["slot"]].sequence >= records[named[-1]].sequence
    check_goes_on(cache, writer.size)


def check_goes_on(cache: TrainingCache, size: int) -> None:
    record = save(cache, 9.5, iteration=10**6, state=tiny(9.5, size))
    assert cache.get("latest").id == record.id
    cache.close()
    assert temporary_files(cache.cache_dir) == []
    assert {f.kind for f in cache.doctor()} <= {"lease"}
    available = set(ids(cache.checkpoints()))
    assert {path.stem for path in cache.cache_dir.glob("checkpoints/*.pt")} == available
    assert len(available) <= LIMIT


def campaign(disk: Ext4, folder: Path, cuts: int, variant: variants.Variant = nullcontext) -> int:
    """Cut so often, in a cache that goes on and, one time in four, in a new one; returns what was acknowledged."""
    said: list[dict[str, Any]] = []
    total = 0
    for number in range(cuts):
        place, which = divmod(number, 4)
        said = said if which else []
        writer = Writer(disk.root / f"cache-{place}", folder / f"notes-{number}", number, SIZES[place % len(SIZES)])
        cut(disk, writer, variant)
        total += len(writer.acknowledged())
        said += writer.acknowledged()
        check(writer, said)
    return total


@pytest.mark.parametrize("cuts", [10, pytest.param(200, marks=pytest.mark.campaign)])
@pytest.mark.timeout(900)
def test_what_was_acknowledged_survives_a_power_cut(disk, tmp_path, counted, cuts):
    acknowledged = campaign(disk, tmp_path, cuts)
    assert acknowledged >= cuts
    counted(CAMPAIGN, "cuts", cuts)
    counted(CAMPAIGN, "saves acknowledged before them", acknowledged)


@pytest.mark.parametrize("variant", [variants.without_file_sync, variants.without_folder_sync])
@pytest.mark.timeout(300)
def test_a_power_cut_shows_a_sync_that_is_missing(disk, tmp_path, counted, variant):
    with pytest.raises((AssertionError, CkptCacheError)):
        campaign(disk, tmp_path, 60, variant)
    counted.caught(CAMPAIGN, variants.name_of(variant))
