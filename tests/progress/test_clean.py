import dataclasses
from datetime import UTC, datetime, timedelta

import pytest

from ckptcache.metadata import CheckpointMetadata, NamePointer, SessionRecord
from ckptcache.progress.clean import clean, plan
from ckptcache.progress.commit import commit
from ckptcache.progress.restore import open_ledger
from ckptcache.progress.views import view_of
from ckptcache.storage.index import Index
from tests.progress import repos
from tests.progress.repos import committed, folder, run_of, train

NOW = datetime(2026, 6, 1, tzinfo=UTC)


def index_of(count):
    """One checkpoint and one session a day, the oldest first, each better than the one before."""
    index = Index()
    for day in range(count):
        at = (NOW - timedelta(days=count - day)).strftime("%Y-%m-%dT%H:%M:%SZ")
        parent = f"c{day - 1}" if day else None
        index.sessions[f"s{day}"] = SessionRecord(id=f"s{day}", sequence=2 * day, started_at=at, parent=parent)
        index.checkpoints[f"c{day}"] = CheckpointMetadata(
            id=f"c{day}", sequence=2 * day + 1, created_at=at, session=f"s{day}", val_loss=9.0 - day, iteration=day
        )
    return index


def gone(index, available=frozenset(), *, older_than_days=None, max_records=None):
    view = view_of("a-run", index, available)
    return plan(view, older_than_days=older_than_days, max_records=max_records, now=NOW)


def test_what_is_older_goes():
    cleaning = gone(index_of(6), older_than_days=3.5)
    assert set(cleaning.checkpoints) == {"c0", "c1", "c2"}
    assert cleaning.checkpoints["c0"] == "older than 3.5 days"


def test_what_is_beyond_the_newest_goes():
    cleaning = gone(index_of(6), max_records=2)
    assert set(cleaning.checkpoints) == {"c0", "c1", "c2", "c3"}
    assert set(cleaning.sessions) == {"s0", "s1", "s2"}  # s4 stays, and came from c3 of s3


@pytest.mark.parametrize("keep", ["best", "latest", "available", "pinned", "named"])
def test_what_is_needed_stays(keep):
    index, available = index_of(6), frozenset()
    old = "c0" if keep != "latest" else "c5"
    record = index.checkpoints[old]
    if keep == "best":
        index.checkpoints[old] = dataclasses.replace(record, val_loss=0.1)
    if keep == "latest":
        index.checkpoints[old] = dataclasses.replace(record, val_loss=99.0)
    if keep == "pinned":
        index.checkpoints[old] = dataclasses.replace(record, pinned=True)
    if keep == "named":
        index.names["slot"] = NamePointer(checkpoint=old)
    if keep == "available":
        available = frozenset({old})
    cleaning = gone(index, available, max_records=0)
    assert old not in cleaning.checkpoints
    assert keep.removesuffix("d")[:4] in cleaning.kept[old] or keep == "available"
    assert index.checkpoints[old].session not in cleaning.sessions


def test_a_time_that_cannot_be_read_is_not_old():
    index = index_of(3)
    index.checkpoints["c0"] = dataclasses.replace(index.checkpoints["c0"], created_at="yesterday")
    assert set(gone(index, older_than_days=1.5).checkpoints) == {"c1"}


def test_a_dry_run_changes_nothing_and_the_real_one_reaches_the_branch(origin, clone):
    old = train(clone, [3.0, 2.5])
    new = train(clone, [2.0])
    files = run_of(clone).cache_dir / "checkpoints"
    for id in old.ids:
        (files / f"{id}.pt").unlink()
    commit(folder(clone))
    before = run_of(clone).index.read_bytes()
    planned = clean(run_of(clone), older_than_days=None, max_records=1, dry_run=True)
    assert set(planned.checkpoints) == set(old.ids)
    assert run_of(clone).index.read_bytes() == before
    assert clean(run_of(clone), older_than_days=None, max_records=1, dry_run=False) == planned
    assert set(open_ledger(run_of(clone)).view().index.checkpoints) == set(new.ids)
    commit(folder(clone))
    assert set(committed(origin).checkpoints) == set(new.ids)


def test_what_others_keep_the_files_of_stays_in_a_clone_with_files_of_its_own(origin, clone, tmp_path):
    theirs = train(clone)
    commit(folder(clone))
    laptop = repos.clone(origin, tmp_path / "laptop")
    train(laptop, [4.0], resume="never")
    planned = clean(run_of(laptop), older_than_days=None, max_records=0, dry_run=True)
    assert planned.checkpoints == {}
    assert "its file is kept elsewhere" in {planned.kept[id] for id in theirs.ids}
    assert clean(run_of(laptop), older_than_days=None, max_records=0, dry_run=False) == planned
