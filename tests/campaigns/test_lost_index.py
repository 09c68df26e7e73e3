"""An index that is cut short, damaged or gone: rebuilt from the generation before and the sidecars, and kept aside."""

import json
import shutil
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import pytest

from ckptcache import TrainingCache
from ckptcache.errors import CkptCacheError, IndexTooNew
from ckptcache.metadata import SessionRecord
from tests.caches import ids, save, temporary_files
from tests.campaigns import variants
from tests.strategies import mutations

CAMPAIGN = "lost index"
INDEX = "metadata.json"


class Lost:
    """A cache whose index, or the generation before it, is replaced by something else again and again."""

    def __init__(self, folder: Path) -> None:
        self.template, self.folder = folder / "template", folder / "cache"
        with TrainingCache(self.template) as cache:
            session = cache.record_session(SessionRecord(id="sess_1"))
            for loss in (3.0, 2.0):
                save(cache, loss, iteration=int(loss), session=session, tags=["x"], model_config={"n_layer": loss})
            cache.name("best", "slot")
            cache.pin("best")
            save(cache, 1.0, iteration=1, extra={"mine": [1, 2]})
        self.known = {r.id: r.to_json() for r in cache.checkpoints()}
        self.index = (self.template / INDEX).read_bytes()

    def lay_out(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.template, self.folder)

    def judge(self, spoilt: bytes | None) -> bool:
        """Open, save and open again over this index, or none; returns whether it was taken for broken."""
        self.lay_out()
        (self.folder / INDEX).unlink() if spoilt is None else (self.folder / INDEX).write_bytes(spoilt)
        cache = TrainingCache(self.folder)
        assert self.known.keys() <= set(ids(cache.checkpoints(everything=True)))
        with cache:
            save(cache, 0.5, iteration=7)
        again = TrainingCache(self.folder)
        assert {*self.known} <= set(ids(again.checkpoints(everything=True)))
        json.loads((self.folder / INDEX).read_bytes())
        kept = list(self.folder.glob("quarantine/metadata*.json"))
        assert [path.read_bytes() for path in kept] in ([], [spoilt])
        assert temporary_files(self.folder) == []
        return bool(kept)

    def judge_whole(self, spoilt: bytes | None) -> None:
        """As `judge`, for one of which nothing is left: all that was in it is back."""
        assert self.judge(spoilt) == (spoilt is not None)
        cache = TrainingCache(self.folder)
        found = {r.id: r.to_json() for r in cache.checkpoints()}
        assert {id: found[id] for id in self.known} == self.known
        assert cache.names() == {"slot": next(id for id, r in self.known.items() if r["iteration"] == 2)}
        assert [s.id for s in cache.sessions()] == ["sess_1"]
        assert cache.doctor() == []

    def judge_all(self, spoilt: Iterable[bytes | None], variant: variants.Variant = nullcontext) -> int:
        count = 0
        with variant():
            for each in spoilt:
                self.judge_whole(each)
                count += 1
        return count


@pytest.mark.parametrize("every", [400, pytest.param(1, marks=pytest.mark.campaign)])
@pytest.mark.timeout(600)
def test_a_truncated_or_missing_index_is_rebuilt_whole(quick_path, counted, every):
    lost = Lost(quick_path)
    cut = [lost.index[:length] for length in range(0, len(lost.index.rstrip()), every)]
    counted(CAMPAIGN, "truncations", lost.judge_all([None, *cut]))


@pytest.mark.parametrize("count", [12, pytest.param(500, marks=pytest.mark.campaign)])
@pytest.mark.timeout(600)
def test_no_damage_to_the_index_loses_a_checkpoint_and_a_broken_one_is_kept_aside(quick_path, counted, count):
    lost, broken = Lost(quick_path), 0
    for spoilt in mutations(lost.index, count, seed=4):
        try:
            broken += lost.judge(spoilt)
        except IndexTooNew:
            assert b'"schema_version": 2' not in spoilt
    assert broken > count / 3
    counted(CAMPAIGN, "mutations", count)


def test_a_lost_index_shows_sidecars_that_nobody_reads(quick_path, counted):
    with pytest.raises((AssertionError, CkptCacheError)):
        Lost(quick_path).judge_all([None], variants.without_reading_sidecars)
    counted.caught(CAMPAIGN, variants.name_of(variants.without_reading_sidecars))
