"""Loading where nothing can be written, on a read-only mount and as a user without rights: all that looks works."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from ckptcache import TrainingCache
from ckptcache.errors import CkptCacheError
from tests.caches import NOBODY, as_nobody, file_of, flip, ids, let_in, save, tiny
from tests.campaigns import variants
from tests.campaigns.disks import Ext4
from tests.faults import run_child

CAMPAIGN = "read-only"


def filled(folder: Path, *, readable: bool = True) -> TrainingCache:
    """Three checkpoints, the best of which is damaged; all but the owner may read, or nobody else."""
    with TrainingCache(folder / "cache") as cache:
        for loss in (3.0, 1.0, 2.0):
            save(cache, loss, iteration=int(loss))
        cache.name("latest", "slot")
    flip(file_of(cache, cache.best()))
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o755 if path.is_dir() else 0o644) if readable else 0o700)
    return cache


def read(folder: Path) -> None:
    """Everything that looks; the damaged one is passed over, and where it can't be set aside it stays."""
    cache = TrainingCache(folder / "cache")
    target = tiny(-1.0)
    restored = cache.restore(target)
    assert restored is not None
    assert (restored.record.val_loss, target["w"].tolist()) == (2.0, [2.0] * 4)
    assert any("passed over" in note for note in restored.notes)
    assert cache.load(restored.record.id)["w"].tolist() == [2.0] * 4
    assert set(cache.names()) == {"slot"}
    assert len(cache.checkpoints()) == 3
    assert [f.kind for f in cache.doctor()] == ["damaged"]
    assert len(cache.explain(tiny())) == 3
    cache.stats()
    cache.prune(dry_run=True)
    cache.close()


def refuse(folder: Path) -> None:
    """Everything that writes says that it can't, in our words, and where."""
    cache = TrainingCache(folder / "cache")
    acts: list[Callable[[], object]] = [
        lambda: save(cache, 0.5),
        lambda: cache.save(tiny(0.5), iteration=9, blocking=False),
        lambda: cache.pin("best"),
        lambda: cache.name("best", "other"),
        lambda: cache.unname("slot"),
        lambda: cache.tag("best", "x"),
        lambda: cache.note("best", "x"),
        lambda: cache.prune(),
        lambda: cache.doctor(repair=True),
    ]
    for act in acts:
        with pytest.raises(CkptCacheError, match=str(folder)):
            act()
            cache.wait_until_finished()


def listing(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        str(path): (path.lstat().st_mtime_ns, path.lstat().st_ino, path.read_bytes() if path.is_file() else b"")
        for path in folder.rglob("*")
    }


def looked_at(disk: Ext4, who: Callable[[Callable[[], object]], int], variant: variants.Variant = nullcontext) -> None:
    """Mount what was filled read-only, and let somebody look and then try to write."""
    filled(disk.root)
    before = listing(disk.root)
    disk.take_out()
    disk.put_in("ro")
    let_in(disk.root.parent)

    def body() -> None:
        with variant():
            read(disk.root)
        refuse(disk.root)

    assert who(body) == 0
    assert listing(disk.root) == before


@pytest.mark.parametrize("who", [run_child, as_nobody], ids=["root", "nobody"])
def test_a_read_only_file_system_is_read_from(disk, counted, who):
    looked_at(disk, who)
    counted(CAMPAIGN, "kinds of users on read-only mounts", 1)


def test_a_user_who_may_only_read_reads(quick_path, counted, requires):
    requires("root")
    filled(quick_path)
    before = listing(quick_path)
    let_in(quick_path)
    assert as_nobody(lambda: (read(quick_path), refuse(quick_path))) == 0
    assert listing(quick_path) == before
    counted(CAMPAIGN, "users without rights to write", 1)


def test_a_user_with_a_cache_of_his_own_does_everything(quick_path, counted, requires):
    requires("root")
    let_in(quick_path)
    os.chown(quick_path, NOBODY, NOBODY)

    def body() -> None:
        filled(quick_path)
        cache = TrainingCache(quick_path / "cache")
        assert cache.restore(tiny()).record.val_loss == 2.0
        save(cache, 0.5)
        cache.prune()
        cache.close()
        assert cache.doctor() == []

    assert as_nobody(body) == 0
    assert {path.stat().st_uid for path in quick_path.rglob("*")} == {NOBODY}
    counted(CAMPAIGN, "users without rights", 1)


def test_a_user_who_may_not_even_read_is_told_so(quick_path, counted, requires):
    requires("root")
    filled(quick_path, readable=False)

    def body() -> None:
        for act in (lambda c: c.checkpoints(), lambda c: c.restore(tiny()), lambda c: c.best(), lambda c: save(c, 1.0)):
            with pytest.raises(CkptCacheError, match=str(quick_path)):
                act(TrainingCache(quick_path / "cache"))

    before = listing(quick_path)
    assert as_nobody(body) == 0
    assert listing(quick_path) == before
    assert len(ids(TrainingCache(quick_path / "cache").checkpoints())) == 3
    counted(CAMPAIGN, "users without rights to read", 1)


def test_a_read_only_mount_shows_who_writes_to_read(disk, counted):
    with pytest.raises(AssertionError):
        looked_at(disk, run_child, variants.locking_to_look)
    counted.caught(CAMPAIGN, variants.name_of(variants.locking_to_look))
