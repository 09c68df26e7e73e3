"""Files that are read by the release of torch before the pinned one, in plain `torch.load`, and files that it wrote."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ckptcache import TrainingCache
from ckptcache.state.arena import Arena
from ckptcache.storage import ptfile, ptplan
from tests.caches import file_of
from tests.campaigns import plain_torch, variants
from tests.campaigns.plain_torch import LARGE, described
from tests.jobs import Job

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import earlier_torch

CAMPAIGN = "torch releases"


@pytest.fixture
def earlier(requires: Callable[..., None]) -> Callable[..., dict[str, Any]]:
    """Runs `plain_torch` with the earlier release; gives what it says of each file."""
    requires(
        f"torch {earlier_torch.RELEASE} beside this one (python scripts/earlier_torch.py)",
        found=earlier_torch.is_ready(),
    )

    def run(act: str, *paths: Path) -> dict[str, Any]:
        command = [sys.executable, plain_torch.__file__, act, *map(str, paths)]
        done = subprocess.run(
            command, env=earlier_torch.environment(), capture_output=True, text=True, check=False, timeout=200
        )
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert said["release"].split("+")[0] == earlier_torch.RELEASE
        return {Path(path).name: found for path, found in said["files"].items()}

    return run


# --- what we write -------------------------------------------------------------------------------


@contextmanager
def no_memory_for_a_copy() -> Iterator[None]:
    with patch.object(Arena, "take", lambda *_, **__: None):
        yield


@contextmanager
def nothing_planned() -> Iterator[None]:
    def unplannable(*_: Any) -> None:
        raise ptfile.Unplannable

    with patch.object(ptplan, "plan", unplannable):
        yield


WAYS = {
    "blocking": (True, nullcontext),
    "in the background": (False, nullcontext),
    "streamed": (False, no_memory_for_a_copy),
    "by torch": (True, nothing_planned),
}


def write_all(folder: Path) -> dict[str, list[list[Any]]]:
    """Files of every way of writing, small and large, below `folder`; what each has to hold, by its name."""
    wanted = {}
    with TrainingCache(folder / "cache", max_checkpoints=100) as cache:
        for way, (blocking, how) in WAYS.items():
            for size in (0, LARGE):
                state = plain_torch.state()
                state["odd"]["large"] = torch.arange(float(size))
                path = folder / f"{way}, {size}.pt"
                wanted[path.name] = described(state)
                with how():
                    record = cache.save(state, iteration=1, val_loss=1.0, blocking=blocking)
                    cache.wait_until_finished()
                shutil.copy(file_of(cache, record), path)
        cache.export(record.id, folder / "exported.pt")
        wanted["exported.pt"] = described(dict(cache.load(record.id)["model"]))
        wanted |= write_in_a_session(folder)
    return wanted


def write_in_a_session(folder: Path) -> dict[str, list[list[Any]]]:
    """With all that a session adds of its own: the generators of Python, NumPy and torch, and its counters."""
    cache, path = TrainingCache(folder / "session"), folder / "of a session.pt"
    Job().run(cache, 3)
    shutil.copy(file_of(cache, cache.get("latest")), path)
    return {path.name: described(ptfile.read(path).state)}


def compare(found: dict[str, Any], wanted: dict[str, list[list[Any]]]) -> int:
    """Every value is there as it was, whether mapped or not, in its order; returns how many."""
    assert found.keys() == wanted.keys()
    for name, leaves in wanted.items():
        for how, said in found[name].items():
            assert without_header(said) == json.loads(json.dumps(leaves)), f"{name} is not the same {how}"
    return sum(map(len, wanted.values()))


def without_header(leaves: list[list[Any]]) -> list[list[Any]]:
    is_whole = any(leaf[0] == f"/{ptfile.HEADER!r}" for leaf in leaves)
    rest = [leaf for leaf in leaves if not leaf[0].startswith(f"/{ptfile.HEADER!r}")]
    return [["", rest[0][1], rest[0][2] - is_whole], *rest[1:]]


@pytest.mark.campaign
def test_the_release_before_reads_every_file_with_plain_torch_load(tmp_path, counted, earlier):
    wanted = write_all(tmp_path)
    assert len(wanted) == 2 * len(WAYS) + 2
    assert max((tmp_path / name).stat().st_size for name in wanted) > ptplan._BLOCK
    values = compare(earlier("read", *(tmp_path / name for name in wanted)), wanted)
    counted(CAMPAIGN, "files read by the one before", len(wanted))
    counted(CAMPAIGN, "values compared in them", values)


@pytest.mark.campaign
def test_the_release_before_shows_what_only_a_later_one_can_rebuild(tmp_path, counted, earlier):
    state, path = {"w": torch.ones(3)}, tmp_path / "a.pt"
    with TrainingCache(tmp_path / "cache") as cache, variants.rebuilding_by_what_is_new():
        record = cache.save(state, iteration=1)
    shutil.copy(file_of(cache, record), path)
    with pytest.raises(AssertionError, match="_rebuild_tensor_anew"):
        compare(earlier("read", path), {"a.pt": described(state)})
    counted.caught(CAMPAIGN, variants.name_of(variants.rebuilding_by_what_is_new))


# --- what it wrote -------------------------------------------------------------------------------


@pytest.mark.campaign
def test_files_of_the_release_before_are_imported_and_adopted_as_they_were(tmp_path, counted, earlier):
    paths = [tmp_path / "small.pt", tmp_path / "large.pt"]
    saved = {name: found["saved"] for name, found in earlier("write", *paths).items()}
    with TrainingCache(tmp_path / "imported") as cache:
        loaded = {path.name: {"loaded": described(cache.load(cache.import_(path).id))} for path in paths}
    values = compare(jsonable(loaded), saved)
    adopted = tmp_path / "adopted"
    (adopted / "checkpoints").mkdir(parents=True)
    for path in paths:
        os.link(path, adopted / "checkpoints" / path.name)
    with TrainingCache(adopted) as cache:
        cache.doctor(repair=True)
        loaded = {f"{r.id}.pt": {"loaded": described(cache.load(r.id))} for r in cache.checkpoints()}
    values += compare(jsonable(loaded), saved)
    counted(CAMPAIGN, "files taken over from the one before", 2 * len(paths))
    counted(CAMPAIGN, "values compared in them", values)


def jsonable(found: Any) -> Any:
    return json.loads(json.dumps(found))


def test_the_release_before_is_before_the_pinned_one():
    pinned = re.search(r"^torch==(\S+)$", (earlier_torch.ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert [*map(int, earlier_torch.RELEASE.split("."))] < [*map(int, pinned.split("."))]
