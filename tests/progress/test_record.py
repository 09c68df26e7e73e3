from pathlib import Path

import pytest
from hypothesis import given

from ckptcache.errors import IndexDamaged, IndexTooNew
from ckptcache.metadata import CheckpointMetadata
from ckptcache.progress.record import Record, conflict_sides, merged, read, told_apart, vouched
from ckptcache.storage.index import Index, serialise
from ckptcache.storage.merging import merge
from tests.strategies import indexes

PATH = Path("metadata.json")


def index_with(*ids):
    return Index(checkpoints={id: CheckpointMetadata(id=id, digest=f"blake3:{id}", size=3) for id in ids})


def conflicted(ours, theirs, base=None):
    middle = b"||||||| base\n" + base if base is not None else b""
    return b"<<<<<<< HEAD\n" + ours + middle + b"=======\n" + theirs + b">>>>>>> other\n"


def test_a_whole_record_is_read_as_it_is():
    record = read(serialise(index_with("a")), PATH, tuple)
    assert set(record.index.checkpoints) == {"a"}
    assert record.is_whole
    assert record.mended == ""


@pytest.mark.parametrize("base", [None, b"", serialise(index_with("base"))])
def test_both_sides_of_a_conflict_are_taken_up(base):
    data = conflicted(serialise(index_with("a", "b")), serialise(index_with("b", "c")), base)
    record = read(data, PATH, tuple)
    assert set(record.index.checkpoints) == {"a", "b", "c"}
    assert not record.is_whole


@given(indexes(), indexes())
def test_the_sides_of_a_conflict_come_back_to_the_byte(ours, theirs):
    ours, theirs = serialise(ours), serialise(theirs)
    assert conflict_sides(conflicted(ours, theirs)) == [ours, theirs]
    assert conflict_sides(ours) == []


def test_a_conflict_within_lines_that_both_have_is_put_together():
    one, other = serialise(index_with("a")), serialise(index_with("a")).replace(b'"size": 3', b'"size": 4')
    lines, others = one.splitlines(keepends=True), other.splitlines(keepends=True)
    at = next(i for i, (x, y) in enumerate(zip(lines, others, strict=True)) if x != y)
    data = b"".join(lines[:at]) + conflicted(lines[at], others[at]) + b"".join(lines[at + 1 :])
    assert conflict_sides(data) == [one, other]
    assert set(read(data, PATH, tuple).index.checkpoints) == {"a"}


def test_of_one_whole_side_and_the_history_the_union_is_taken():
    data = conflicted(serialise(index_with("a")), b"broken\n")
    record = read(data, PATH, lambda: [("commit 1", b"{"), ("commit 2", serialise(index_with("old")))])
    assert set(record.index.checkpoints) == {"a", "old"}
    assert "commit 2" in record.mended


def test_the_newest_whole_version_stands_in_for_a_broken_one():
    older = [("commit 1", b"NaN"), ("commit 2", serialise(index_with("x"))), ("commit 3", serialise(index_with("y")))]
    record = read(b'{"schema_version": 2', PATH, lambda: older)
    assert set(record.index.checkpoints) == {"x"}


def test_without_any_whole_version_it_is_damaged():
    with pytest.raises(IndexDamaged):
        read(b"[]", PATH, lambda: [("commit 1", b"")])


def test_a_newer_version_is_never_replaced_by_an_older_one():
    newer = serialise(Index()).replace(b'"schema_version": 2', b'"schema_version": 99')
    with pytest.raises(IndexTooNew):
        read(newer, PATH, lambda: [("commit 1", serialise(index_with("x")))])


def test_the_digest_of_git_counts():
    ours = index_with("a", "b")
    ours.checkpoints["a"] = ours.checkpoints["a"].changed(digest="blake3:false")
    kept, strange = vouched(ours, index_with("a"))
    assert strange == ["a"]
    assert kept.checkpoints["a"].digest == "blake3:a"
    assert kept.checkpoints["b"].digest == "blake3:b"


def test_a_union_keeps_what_any_has():
    assert set(merged(index_with("a"), Index(), index_with("b")).checkpoints) == {"a", "b"}


@pytest.mark.parametrize(
    ("ours", "theirs", "is_whole", "removed", "kept", "left"),
    [
        ("ab", "ab", True, "", "", "ab"),
        ("a", "ab", True, "", "", "ab"),  # merely lacking here
        ("a", "ab", True, "b", "", "a"),  # taken out here
        ("a", "abc", True, "c", "", "ab"),  # taken out here, where the clone is behind
        ("ab", "a", True, "", "", "a"),  # taken out by somebody's commit
        ("ab", "a", True, "", "b", "ab"),  # the same, but its file is here
        ("ab", "", False, "", "", "ab"),  # what can't be read removes nothing
        ("", "ab", True, "ab", "", ""),
    ],
)
def test_only_what_was_taken_out_on_purpose_is_removed(ours, theirs, is_whole, removed, kept, left):
    base, here, there = index_with(*"ab"), index_with(*ours), index_with(*theirs)
    told = told_apart(base, Record(here), Record(there, is_whole=is_whole), removed={*removed}, kept=kept)
    assert set(merge(told, here, there).checkpoints) == set(left)
