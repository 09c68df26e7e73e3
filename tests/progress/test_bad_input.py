"""Records, caches and repositories in a state that nobody wished for: what is left behind, and what is said of it."""

import os
import pickle
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
import pytest
import torch
from click.testing import CliRunner, Result

from ckptcache.cache import TrainingCache
from ckptcache.cli import main
from ckptcache.errors import CacheDirNotWritable, IndexTooNew, PushFailed
from ckptcache.progress import commit as committing
from ckptcache.progress import git as running_git
from ckptcache.progress.commit import UNPUSHED, commit
from ckptcache.progress.restore import restore
from ckptcache.storage.index import MAX_INDEX_BYTES, Index, parse
from ckptcache.storage.layout import Layout
from tests.caches import NOBODY, as_nobody, flip, let_in, listing, temporary_files
from tests.conftest import requires
from tests.progress import repos

RECORD = f".training-progress/{repos.RUN}/cache/metadata.json"


@pytest.fixture
def trained(clone: Path) -> Path:
    """A clone that has trained and pushed its record."""
    repos.train(clone)
    commit(repos.folder(clone))
    return clone


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the tool is, but for how often it asks somebody who doesn't answer."""
    monkeypatch.setattr(committing, "UNREACHABLE_ATTEMPTS", 1)


def tool(clone: Path, *arguments: str) -> Result:
    """Run `ckptcache progress` over a clone; never a traceback."""
    result = CliRunner().invoke(main, ["progress", "--progress-dir", str(clone / ".training-progress"), *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def said(result: Result) -> str:
    """What a command has said, without the line ends that only wrap it."""
    return " ".join(result.output.split())


def here(clone: Path) -> Index:
    path = repos.run_of(clone).index
    return parse(path.read_bytes(), path)


def layout(clone: Path) -> Layout:
    return Layout(repos.run_of(clone).cache_dir)


def file_of(clone: Path, id: str) -> Path:
    return layout(clone).checkpoint(id)


def quarantined(clone: Path) -> list[str]:
    return sorted(p.name for p in layout(clone).quarantine.glob("*") if not p.name.endswith(".reason.txt"))


def push_file(origin: Path, folder: Path, path: str, content: bytes) -> None:
    """Somebody pushes a file with plain git."""
    other = repos.clone(origin, folder)
    (other / path).parent.mkdir(parents=True, exist_ok=True)
    (other / path).write_bytes(content)
    repos.git(other, "add", "-f", path)
    repos.git(other, "commit", "-qm", f"Change {path}")
    repos.git(other, "push", "-q", "origin", "HEAD:main")


def no_trace(clone: Path) -> None:
    """Nothing half-written is left."""
    assert temporary_files(clone / ".training-progress") == []
    assert repos.git(clone, "for-each-ref", "refs/ckptcache/pending") == ""


# --- a conflict of git's in the record ------------------------------------------------------------


def two_sides(origin: Path, tmp_path: Path) -> tuple[Path, set[str]]:
    """A clone that has committed its own record with plain git, while others pushed theirs; and all ids."""
    mine, theirs = repos.clone(origin, tmp_path / "mine"), repos.clone(origin, tmp_path / "theirs")
    ids = {*repos.train(mine, [3.0, 2.9]).ids, *repos.train(theirs, [2.5, 2.4]).ids}
    commit(repos.folder(theirs))
    repos.git(mine, "add", "-f", RECORD, f".training-progress/{repos.RUN}/training_summary.json")
    repos.git(mine, "commit", "-qm", "By hand")
    return mine, ids


@pytest.mark.parametrize("style", ["merge", "diff3", "zdiff3"])
def test_both_sides_of_a_conflict_are_taken_up(origin, tmp_path, style):
    mine, ids = two_sides(origin, tmp_path)
    repos.git(mine, "fetch", "-q")
    repos.git(mine, "-c", f"merge.conflictStyle={style}", "merge", "-q", "origin/main", check=False)
    broken = repos.run_of(mine).index.read_bytes()
    assert b"<<<<<<< HEAD" in broken
    assert (b"|||||||" in broken) == (style != "merge")

    result = tool(mine, "restore", repos.RUN)
    assert result.exit_code == 0
    assert "both sides were taken up" in said(result)
    assert here(mine).checkpoints.keys() == ids
    assert len(here(mine).sessions) == 2
    assert (layout(mine).quarantine / "metadata.json").read_bytes() == broken


def test_a_commit_takes_up_both_sides_of_a_conflict_too_and_pushes_them(origin, tmp_path):
    mine, ids = two_sides(origin, tmp_path)
    repos.git(mine, "fetch", "-q")
    repos.git(mine, "merge", "-q", "origin/main", check=False)
    result = tool(mine, "commit")
    assert result.exit_code == 0, result.output
    assert repos.committed(origin).checkpoints.keys() == ids == here(mine).checkpoints.keys()
    no_trace(mine)


def conflict(ours: bytes, theirs: bytes) -> bytes:
    return b"<<<<<<< HEAD\n" + ours + b"=======\n" + theirs + b">>>>>>> origin/main\n"


@pytest.mark.parametrize("whole", [0, 1])
def test_of_a_conflict_with_a_broken_side_the_other_is_taken_up(trained, origin, whole):
    good = repos.run_of(trained).index.read_bytes()
    sides = [good[: len(good) // 2] + b"\n"] * 2
    sides[whole] = good
    repos.run_of(trained).index.write_bytes(conflict(*sides))
    result = tool(trained, "restore", repos.RUN)
    assert result.exit_code == 0
    assert "the side of git's conflict that is whole" in said(result)
    assert here(trained) == parse(good, Path())


def test_of_a_conflict_without_a_whole_side_the_history_helps(trained):
    good = repos.run_of(trained).index.read_bytes()
    half = good[: len(good) // 2] + b"\n"
    repos.run_of(trained).index.write_bytes(conflict(half, half))
    result = tool(trained, "restore", repos.RUN)
    assert result.exit_code == 0
    assert re.search(r"taken instead: that of commit [0-9a-f]{8}", said(result))
    assert here(trained) == parse(good, Path())


def test_markers_that_somebody_has_pushed_are_mended_by_the_next_commit(trained, origin, tmp_path):
    good = repos.run_of(trained).index.read_bytes()
    push_file(origin, tmp_path / "other", RECORD, conflict(good, good[:400]))
    other = repos.clone(origin, tmp_path / "fresh")
    assert "<<<<<<<" in (other / RECORD).read_text()
    ids = {*parse(good, Path()).checkpoints, *repos.train(trained).ids}

    result = tool(trained, "commit")
    assert result.exit_code == 0
    assert "was mended" in said(result)
    assert repos.committed(origin).checkpoints.keys() == ids

    assert tool(other, "restore", repos.RUN).exit_code == 0
    assert here(other).checkpoints.keys() == ids


def test_a_pushed_record_beyond_mending_costs_only_what_nobody_has_anymore(trained, origin, tmp_path):
    push_file(origin, tmp_path / "other", RECORD, b"gone")
    before = here(trained).checkpoints.keys()
    result = tool(trained, "commit")
    assert result.exit_code == 0
    assert "was mended" in said(result)
    assert repos.committed(origin).checkpoints.keys() == before


# --- a record that was edited by hand --------------------------------------------------------------


def edited(change: Callable[[dict], None]) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        document = orjson.loads(data)
        change(document)
        return orjson.dumps(document, option=orjson.OPT_INDENT_2)

    return edit


def first(document: dict) -> dict:
    return document["checkpoints"][min(document["checkpoints"])]


def with_id_outside(document: dict) -> None:
    document["checkpoints"]["../../../outside/x"] = dict(first(document))


def with_absolute_id(document: dict) -> None:
    document["checkpoints"]["/tmp/x"] = dict(first(document))


def with_session_outside(document: dict) -> None:
    document["sessions"]["../../../outside/x"] = next(iter(document["sessions"].values()))


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "an id that leads outside": edited(with_id_outside),
    "an absolute id": edited(with_absolute_id),
    "a session that leads outside": edited(with_session_outside),
    "a name that leads outside": edited(lambda d: d["names"].update(x={"checkpoint": "../../x", "revision": 1})),
    "NaN": lambda data: re.sub(rb'"val_loss": [0-9.]+', b'"val_loss": NaN', data),
    "Infinity": lambda data: re.sub(rb'"val_loss": [0-9.]+', b'"val_loss": -Infinity', data),
    "a negative size": edited(lambda d: first(d).update(size=-1)),
    "a size that is a path": edited(lambda d: first(d).update(size="/etc/passwd")),
    "a huge iteration": lambda data: re.sub(rb'"iteration": [0-9]+', b'"iteration": ' + b"9" * 400, data),
    "deep lists": lambda data: b"[" * 200_000 + b"]" * 200_000,
    "deep mappings": lambda data: data[:-3] + b', "x": ' + b'{"x":' * 100_000 + b"1" + b"}" * 100_001,
    "invalid UTF-8": lambda data: data.replace(b"finished", b"f\xff\xfeished"),
    "half of it": lambda data: data[: len(data) // 2],
    "nothing": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "a list": lambda data: b"[]",
    "no checkpoints": edited(lambda d: d.pop("checkpoints")),
    "version zero": edited(lambda d: d.update(schema_version=0)),
    "a version that is none": edited(lambda d: d.update(schema_version="../x")),
}


@pytest.fixture
def sentinel(trained: Path) -> Path:
    """Files where ids like ../../x would lead."""
    outside = trained.parent / "outside"
    outside.mkdir()
    for name in ("x", "x.pt", "x.json"):
        (outside / name).write_text("mine")
    return outside


SELDOM = {"an absolute id", "a session that leads outside", "a size that is a path", "Infinity", "a list", "zeros"}
SELDOM |= {"version zero", "a version that is none", "no checkpoints", "half of it"}


def seldom(*values: str) -> list[object]:
    """Cases like others, left to the campaigns."""
    return [pytest.param(value, marks=pytest.mark.campaign) for value in values]


@pytest.mark.parametrize("kind", [*(kind for kind in BROKEN if kind not in SELDOM), *seldom(*sorted(SELDOM))])
def test_a_broken_record_is_set_aside_and_the_history_takes_its_place(trained, origin, sentinel, kind):
    good, outside, tip = here(trained), listing(sentinel), repos.git(origin, "rev-parse", "main")
    broken = BROKEN[kind](repos.run_of(trained).index.read_bytes())
    repos.run_of(trained).index.write_bytes(broken)

    result = tool(trained, "restore", repos.RUN)
    assert result.exit_code == 0, result.output
    assert "metadata.json was mended" in said(result)
    assert here(trained) == good
    assert (layout(trained).quarantine / "metadata.json").read_bytes() == broken
    assert set(restore(repos.folder(trained), repos.RUN).view.catalog.observed.available) == good.checkpoints.keys()

    repos.run_of(trained).index.write_bytes(broken)
    result = tool(trained, "commit")
    assert result.exit_code == 0, result.output
    assert "was mended" in said(result)
    assert repos.committed(origin) == here(trained) == good
    assert repos.git(origin, "rev-parse", "main") == tip, "what is as it was is no new commit"
    assert listing(sentinel) == outside
    assert [p.name for p in trained.parent.iterdir() if p.name in ("x", "x.pt", "x.json")] == []
    no_trace(trained)


def test_a_record_over_the_cap_is_set_aside_unread(trained, origin):
    good = here(trained)
    with repos.run_of(trained).index.open("ab") as file:
        file.truncate(300 * 1024 * 1024)
    assert MAX_INDEX_BYTES < 300 * 1024 * 1024
    for command in (["restore", repos.RUN], ["commit"]):
        result = tool(trained, *command)
        assert result.exit_code == 0, result.output
        assert "longer than" in said(result) or command == ["commit"]
        assert here(trained) == good
    assert (layout(trained).quarantine / "metadata.json").stat().st_size == 300 * 1024 * 1024


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_a_record_that_is_no_file_is_set_aside(trained, origin, sentinel, kind):
    good, path = here(trained), repos.run_of(trained).index
    (sentinel / "x").write_bytes(path.read_bytes())
    outside = listing(sentinel)
    path.unlink()
    if kind == "link":
        path.symlink_to(sentinel / "x")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    for command in (["restore", repos.RUN], ["commit"]):
        result = tool(trained, *command)
        assert result.exit_code == 0, result.output
        assert here(trained) == good
        assert not path.is_symlink()
    assert listing(sentinel) == outside
    assert repos.committed(origin) == good


def test_without_a_history_a_broken_record_is_an_error_that_names_it(clone, origin):
    repos.train(clone)
    path = repos.run_of(clone).index
    path.write_bytes(b"{")
    for command in (["restore", repos.RUN], ["commit"]):
        result = tool(clone, *command)
        assert result.exit_code == 4
        assert str(path) in said(result).replace(" ", "") or path.name in result.output
        assert path.read_bytes() == b"{", "it stays for a person to look at"
    assert "metadata.json" not in repos.git(origin, "ls-tree", "-r", "--name-only", "main")


def test_paths_in_unknown_fields_lead_nowhere_and_stay_as_they_are(trained, origin, sentinel):
    paths = {"path": str(sentinel / "x.pt"), "cache_dir": str(sentinel), "checkpoint_path": "../../../outside/x.pt"}

    def change(document: dict) -> None:
        document |= paths
        for record in document["checkpoints"].values():
            record |= {**paths, "revision": record["revision"] + 1}

    outside, index = listing(sentinel), repos.run_of(trained).index
    index.write_bytes(edited(change)(index.read_bytes()))
    for command in (["restore", repos.RUN], ["commit"], ["clean", "--max-records", "0", "--yes"]):
        assert tool(trained, *command).exit_code == 0
    assert listing(sentinel) == outside
    pushed = orjson.loads(repos.git(origin, "show", f"main:{RECORD}"))
    assert pushed["cache_dir"] == str(sentinel), "a later version's fields survive"
    assert len(list(layout(trained).checkpoints.glob("*.pt"))) == len(pushed["checkpoints"])


@pytest.mark.parametrize("swap_file", [False, True])
def test_a_digest_that_was_edited_here_does_not_count(trained, origin, swap_file):
    id = min(here(trained).checkpoints)
    path, evil = file_of(trained, id), b"evil" * 100
    if swap_file:
        path.write_bytes(evil)
    from ckptcache.storage.integrity import digest_of

    measured = digest_of(path)
    wrong = measured.digest if swap_file else "blake3:" + "0" * 64

    def change(document: dict) -> None:
        document["checkpoints"][id] |= {"digest": wrong, "size": measured.size, "revision": 99}

    index = repos.run_of(trained).index
    index.write_bytes(edited(change)(index.read_bytes()))
    result = tool(trained, "restore", repos.RUN)
    assert result.exit_code == 0
    assert "its digest was edited here" in said(result)
    assert path.exists() != swap_file
    assert quarantined(trained) == ([path.name] if swap_file else [])
    index.write_bytes(edited(change)(index.read_bytes()))
    assert tool(trained, "commit").exit_code == 0
    assert repos.committed(origin).checkpoints[id].digest != wrong


def test_a_newer_schema_is_refused_and_left_as_it_is(trained, origin):
    path, tip = repos.run_of(trained).index, repos.git(origin, "rev-parse", "main")
    newer = edited(lambda d: d.update(schema_version=99))(path.read_bytes())
    path.write_bytes(newer)
    for command in (["restore", repos.RUN], ["commit"], ["summarize"]):
        result = tool(trained, *command)
        assert result.exit_code == IndexTooNew.exit_code
        assert "schema version 99" in said(result)
        assert path.read_bytes() == newer
    assert repos.git(origin, "rev-parse", "main") == tip
    no_trace(trained)


def test_a_newer_schema_on_the_remote_is_never_pushed_over(trained, origin, tmp_path):
    path = repos.run_of(trained).index
    push_file(origin, tmp_path / "other", RECORD, edited(lambda d: d.update(schema_version=99))(path.read_bytes()))
    tip = repos.git(origin, "rev-parse", "main")
    repos.train(trained)
    before = path.read_bytes()
    for command in (["restore", repos.RUN], ["commit"]):
        result = tool(trained, *command)
        assert result.exit_code == IndexTooNew.exit_code
        assert "schema version 99" in said(result)
        assert path.read_bytes() == before
    assert repos.git(origin, "rev-parse", "main") == tip
    no_trace(trained)


# --- files from a cache ----------------------------------------------------------------------------


def cached(clone: Path, folder: Path) -> Path:
    """Keep a clone's checkpoints, as a cache between jobs does."""
    shutil.copytree(layout(clone).checkpoints, folder)
    return folder


def fresh_with(origin: Path, folder: Path, files: Path) -> Path:
    """A new clone, with checkpoints from a cache."""
    clone = repos.clone(origin, folder)
    shutil.copytree(files, layout(clone).checkpoints, symlinks=True)
    return clone


@pytest.fixture
def fresh(trained: Path, origin: Path, tmp_path: Path) -> Path:
    """A fresh clone with the cached files of the first."""
    return fresh_with(origin, tmp_path / "fresh", cached(trained, tmp_path / "cached"))


def test_files_of_another_branch_are_quarantined_unless_they_are_adopted(fresh, origin, tmp_path):
    other = repos.clone(origin, tmp_path / "another")
    strangers = repos.train(other, [0.2, 0.1], resume="never").ids
    known = set(repos.committed(origin).checkpoints)
    for id in strangers:
        shutil.copy(file_of(other, id), layout(fresh).checkpoints)
        shutil.copy(layout(other).sidecar(id), layout(fresh).checkpoints)

    result = tool(fresh, "restore", repos.RUN)
    assert result.exit_code == 0
    assert here(fresh).checkpoints.keys() == known
    assert quarantined(fresh) == sorted([f"{id}{ending}" for id in strangers for ending in (".pt", ".json")])
    assert all(f"refused {id}.pt: the record doesn't name it" in said(result) for id in strangers)
    assert repos.train(fresh).parent.id in known

    for id in strangers:
        shutil.copy(file_of(other, id), layout(fresh).checkpoints)
        shutil.copy(layout(other).sidecar(id), layout(fresh).checkpoints)
    assert tool(fresh, "restore", repos.RUN, "--adopt").exit_code == 0
    assert set(strangers) <= here(fresh).checkpoints.keys()


def test_of_a_partial_cache_what_is_whole_counts(clone, origin, tmp_path):
    repos.train(clone, [5.0, 4.0, 3.0, 2.0])
    commit(repos.folder(clone))
    truncated, missing, empty, whole = sorted(here(clone).checkpoints)
    files = cached(clone, tmp_path / "cached")
    os.truncate(files / f"{truncated}.pt", 100)
    (files / f"{missing}.pt").unlink()
    os.truncate(files / f"{empty}.pt", 0)
    fresh = fresh_with(origin, tmp_path / "fresh", files)

    done = orjson.loads(tool(fresh, "restore", repos.RUN, "--json").stdout)
    assert done["available"] == [whole]
    assert done["missing"] == [truncated, missing, empty]
    assert done["refused"].keys() == {f"{truncated}.pt", f"{empty}.pt"}
    assert "has 100 bytes" in done["refused"][f"{truncated}.pt"]
    assert done["refused"][f"{empty}.pt"] == "it is empty"
    assert len(repos.committed(origin).checkpoints) == len(here(fresh).checkpoints) == 4
    assert repos.train(fresh).parent.id == whole

    shutil.copy(file_of(clone, truncated), layout(fresh).checkpoints)
    assert truncated in restore(repos.folder(fresh), repos.RUN).view.available, "a good copy comes another time"


def test_a_cache_that_has_expired_leaves_the_record(trained, origin, tmp_path):
    fresh = repos.clone(origin, tmp_path / "fresh")
    known = repos.committed(origin).checkpoints.keys()
    result = tool(fresh, "restore", repos.RUN)
    assert result.exit_code == 0
    assert "0 checkpoints available and verified, 2 only recorded, 1 session" in said(result)
    begun = repos.train(fresh)
    assert begun.parent is None
    assert tool(fresh, "commit").exit_code == 0
    assert repos.committed(origin).checkpoints.keys() == {*known, *begun.ids}


def test_a_flipped_byte_is_refused(fresh):
    id = min(here(fresh).checkpoints)
    flip(file_of(fresh, id))
    result = tool(fresh, "restore", repos.RUN)
    assert result.exit_code == 0
    assert f"refused {id}.pt: its content differs from the digest in its record" in said(result)
    assert quarantined(fresh) == [f"{id}.pt"]
    assert id in here(fresh).checkpoints
    assert repos.train(fresh, resume="best").parent.id != id


def test_swapped_files_are_refused(fresh):
    one, other = sorted(here(fresh).checkpoints)
    one_file, other_file = file_of(fresh, one), file_of(fresh, other)
    one_file.rename(one_file.with_suffix(".x"))
    other_file.rename(one_file)
    one_file.with_suffix(".x").rename(other_file)
    refused = restore(repos.folder(fresh), repos.RUN).refused
    assert refused.keys() == {one_file.name, other_file.name}


class Evil:
    """What runs code when it is decoded."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.sentinel),)


def sidecar_for(clone: Path, id: str, **changes: object) -> bytes:
    """A sidecar that says of a known id what its forger wants."""
    document = orjson.loads(layout(clone).sidecar(id).read_bytes())
    document["checkpoints"][id] |= changes
    return orjson.dumps(document)


@pytest.mark.parametrize("how", ["torch", "pickle"])
@pytest.mark.parametrize("adopt", [[], ["--adopt"]])
@pytest.mark.parametrize("id", ["known", "stranger"])
def test_a_malicious_file_is_never_decoded(fresh, tmp_path, how, adopt, id):
    from ckptcache.storage.integrity import digest_of

    known, sentinel = min(here(fresh).checkpoints), tmp_path / "pwned"
    name = known if id == "known" else "ckpt_20200101_000000_00000001_00000000_0000"
    path = file_of(fresh, name)
    if how == "torch":
        torch.save({"model": Evil(sentinel)}, path)
    else:
        path.write_bytes(pickle.dumps(Evil(sentinel)))
    measured = digest_of(path)
    forged = sidecar_for(fresh, known, digest=measured.digest, size=measured.size, val_loss=-99.0)
    layout(fresh).sidecar(name).write_bytes(forged.replace(known.encode(), name.encode()))

    assert tool(fresh, "restore", repos.RUN, *adopt).exit_code == 0
    parent = repos.train(fresh).parent.id
    assert tool(fresh, "commit").exit_code == 0
    assert not sentinel.exists()
    assert parent != name
    is_taken_on_its_word = id == "stranger" and adopt
    assert (layout(fresh).quarantine / f"{name}.pt").exists() != bool(is_taken_on_its_word)


def test_a_tampered_sidecar_of_a_known_id_is_written_anew(fresh, tmp_path):
    one, other = sorted(here(fresh).checkpoints)
    good = here(fresh)
    layout(fresh).sidecar(one).write_bytes(sidecar_for(fresh, one, val_loss=-99.0, revision=50, tags=["forged"]))
    file_of(fresh, other).unlink()
    layout(fresh).sidecar(other).write_bytes(sidecar_for(fresh, other, val_loss=-98.0, notes="forged"))
    assert tool(fresh, "restore", repos.RUN).exit_code == 0
    assert here(fresh) == good
    repos.run_of(fresh).index.unlink()
    layout(fresh).root.joinpath("metadata.json.prev").unlink(missing_ok=True)
    rebuilt = TrainingCache(layout(fresh).root).checkpoints(everything=True)
    assert {r.id: r.val_loss for r in rebuilt} == {id: r.val_loss for id, r in good.checkpoints.items()}
    assert not [r for r in rebuilt if r.tags or r.notes]


@pytest.mark.parametrize("refuse", [False, True])
def test_a_forged_sidecar_does_not_outlive_a_file_that_was_refused(fresh, refuse):
    id, good = min(here(fresh).checkpoints), here(fresh)
    if refuse:
        flip(file_of(fresh, id))
    layout(fresh).sidecar(id).write_bytes(sidecar_for(fresh, id, digest="blake3:" + "1" * 64, val_loss=-9.0))
    assert tool(fresh, "restore", repos.RUN).exit_code == 0
    sidecar = layout(fresh).sidecar(id)
    if sidecar.exists():
        assert parse(sidecar.read_bytes(), sidecar).checkpoints[id] == good.checkpoints[id]


@pytest.mark.parametrize("lost", [False, True])
def test_the_generation_before_comes_from_the_cache_too_and_vouches_for_nothing(fresh, lost):
    """With `metadata.json.prev` forged and the index broken or gone, nothing that it says gets into the record."""
    known, good = min(here(fresh).checkpoints), here(fresh)
    forged = edited(
        lambda d: d["checkpoints"].update(
            ckpt_20200101_000000_00000001_00000000_0000={**d["checkpoints"][known], "val_loss": -99.0}
        )
    )
    index = repos.run_of(fresh).index
    index.with_name("metadata.json.prev").write_bytes(forged(index.read_bytes()))
    if lost:
        index.unlink()
    else:
        index.write_bytes(b"broken")
    assert tool(fresh, "restore", repos.RUN).exit_code == 0
    assert here(fresh).checkpoints == good.checkpoints


def test_links_folders_and_pipes_among_the_checkpoints_are_no_checkpoints(fresh, sentinel):
    one, other = sorted(here(fresh).checkpoints)
    files, good, outside = layout(fresh).checkpoints, here(fresh), None
    shutil.copy(file_of(fresh, one), sentinel / "x.pt")
    outside = listing(sentinel)
    for path in (file_of(fresh, one), file_of(fresh, other), layout(fresh).sidecar(one), layout(fresh).sidecar(other)):
        path.unlink()
    file_of(fresh, one).symlink_to(sentinel / "x.pt")
    file_of(fresh, other).mkdir()
    layout(fresh).sidecar(one).symlink_to(sentinel / "x.json")
    layout(fresh).sidecar(other).mkdir()
    os.mkfifo(files / "pipe.pt")
    os.mkfifo(files / "pipe.json")
    (files / "link.pt").symlink_to(sentinel / "x")
    (files / "loop.pt").symlink_to("loop.pt")
    (files / "folder.pt").mkdir()
    (files / "folder.json").mkdir()
    (files / "folder.json" / "kept").write_text("mine")

    result = tool(fresh, "restore", repos.RUN)
    assert result.exit_code == 0, result.output
    assert "0 checkpoints available" in said(result)
    assert repos.train(fresh).parent is None
    assert tool(fresh, "commit").exit_code == 0
    assert here(fresh).checkpoints.keys() >= good.checkpoints.keys()
    assert listing(sentinel) == outside


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_a_sidecar_that_is_no_file_does_not_keep_its_checkpoint_out(fresh, sentinel, kind):
    id, outside = min(here(fresh).checkpoints), listing(sentinel)
    path = layout(fresh).sidecar(id)
    path.unlink()
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to(sentinel / "x")}[kind]()
    result = tool(fresh, "restore", repos.RUN)
    assert result.exit_code == 0, result.output
    assert "2 checkpoints available" in said(result)
    assert listing(sentinel) == outside


@pytest.mark.parametrize("name", ["checkpoints", "quarantine"])
def test_a_folder_that_is_a_link_is_refused_and_nothing_behind_it_is_touched(fresh, sentinel, name):
    folder = layout(fresh).root / name
    if folder.exists():
        shutil.rmtree(folder)
    (sentinel / "stranger.pt").write_text("mine")
    folder.symlink_to(sentinel)
    outside, good = listing(sentinel), repos.run_of(fresh).index.read_bytes()
    (layout(fresh).root / "checkpoints" / "evil.pt").write_text("mine") if name == "quarantine" else None
    for command in (["restore", repos.RUN], ["commit"]):
        result = tool(fresh, *command)
        assert result.exit_code == CacheDirNotWritable.exit_code
        assert f"{name} (it is a link" in said(result)
        assert listing(sentinel) == outside
    assert repos.run_of(fresh).index.read_bytes() == good


def test_a_cache_that_is_a_link_to_somewhere_else_is_refused(trained, sentinel):
    root = layout(trained).root
    shutil.rmtree(root)
    root.symlink_to(sentinel)
    outside = listing(sentinel)
    for command in (["restore", repos.RUN], ["commit"]):
        result = tool(trained, *command)
        assert result.exit_code != 0
        assert "outside" in said(result) or "link" in said(result)
        assert listing(sentinel) == outside


# --- a remote that will not, or can not -----------------------------------------------------------


def brought_in(origin: Path, folder: Path, error: str) -> Index:
    """The record of a bundle, in a clone that knows nothing of the one that made it."""
    bundle = re.search(r"`git fetch (\S+) (\S+)`", error)
    assert bundle is not None, error
    assert bundle[2] == UNPUSHED
    other = repos.clone(origin, folder)
    repos.git(other, "fetch", "-q", bundle[1], UNPUSHED)
    return parse(repos.git(other, "show", f"FETCH_HEAD:{RECORD}").encode(), Path(RECORD))


def expect_bundle(result: Result, clone: Path, origin: Path, reason: str) -> None:
    """It ended with 1 and says why, and the commit can be brought in elsewhere."""
    assert result.exit_code == PushFailed.exit_code
    assert re.search(reason, said(result)), said(result)
    assert "Nothing is lost" in said(result)
    no_trace(clone)
    repos.git(clone, "fsck", "--strict")
    assert brought_in(origin, clone.parent / "elsewhere", said(result)) == here(clone)


def reject_pushes(origin: Path) -> None:
    hook = origin / "hooks" / "pre-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\necho 'no pushes today' >&2\nexit 1\n")
    hook.chmod(0o755)


def test_a_declined_push_leaves_a_bundle_and_counts_later(trained, origin):
    tip = repos.git(origin, "rev-parse", "main")
    reject_pushes(origin)
    ids = {*here(trained).checkpoints, *repos.train(trained).ids}
    result = tool(trained, "commit")
    expect_bundle(result, trained, origin, "after 1 attempt .*(declined|no pushes today)")
    assert repos.git(origin, "rev-parse", "main") == tip
    assert "unpushed" not in repos.git(trained, "status", "--short"), "a bundle is no part of the record"
    (origin / "hooks" / "pre-receive").unlink()
    assert tool(trained, "commit").exit_code == 0
    assert repos.committed(origin).checkpoints.keys() == ids


def test_who_may_not_write_to_the_repository_gets_a_bundle(trained, origin, tmp_path):
    requires("root")
    repos.train(trained)
    for path in (trained, origin):
        for each in (path, *path.rglob("*")):
            os.chown(each, NOBODY, NOBODY, follow_symlinks=False)
            if path == origin:
                each.chmod(each.stat().st_mode & ~0o222)
    let_in(tmp_path)
    output = tmp_path / "said"
    output.touch()
    output.chmod(0o666)

    def body() -> None:
        result = tool(trained, "commit")
        output.write_text(f"{result.exit_code} {said(result)}")

    assert as_nobody(body) == 0
    code, _, text = output.read_text().partition(" ")
    assert code == "1", text
    assert re.search(r"after 1 attempt .*(ermission|unable to create|read-only)", text), text
    for each in (origin, *origin.rglob("*")):
        os.chown(each, 0, 0)
    shutil.copytree(origin, tmp_path / "copy.git")
    for each in (trained, *trained.rglob("*")):
        os.chown(each, 0, 0, follow_symlinks=False)
    assert brought_in(tmp_path / "copy.git", tmp_path / "elsewhere", text) == here(trained)


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def test_without_a_network_it_ends_in_bounded_time_with_a_bundle(trained, origin):
    ids = {*here(trained).checkpoints, *repos.train(trained).ids}
    repos.git(trained, "remote", "set-url", "origin", f"git://127.0.0.1:{closed_port()}/repository.git")
    began = time.monotonic()
    restored = tool(trained, "restore", repos.RUN)
    assert restored.exit_code == 0
    assert "main of origin could not be fetched" in said(restored)
    result = tool(trained, "commit")
    assert time.monotonic() - began < 30
    expect_bundle(result, trained, origin, "after 4 attempts .*(refused|unable to connect)")
    repos.git(trained, "remote", "set-url", "origin", origin.as_uri())
    assert tool(trained, "commit").exit_code == 0
    assert repos.committed(origin).checkpoints.keys() == ids


def test_a_remote_that_never_answers_is_given_up(trained, origin, impatient, monkeypatch):
    repos.train(trained)
    monkeypatch.setattr(running_git, "TIMEOUT", 1.0)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        repos.git(trained, "remote", "set-url", "origin", f"git://127.0.0.1:{listener.getsockname()[1]}/repository.git")
        began = time.monotonic()
        result = tool(trained, "commit")
        assert time.monotonic() - began < 15
    expect_bundle(result, trained, origin, "no answer within 1 seconds")


def test_a_remote_that_is_gone_is_named(trained, origin, tmp_path):
    repos.train(trained)
    origin.rename(tmp_path / "elsewhere.git")
    result = tool(trained, "commit")
    expect_bundle(result, trained, tmp_path / "elsewhere.git", "origin after 1 attempt .*does not (exist|appear)")


def test_the_bundle_holds_commits_of_ones_own_that_it_goes_on_from(trained, origin, impatient):
    (trained / "own.py").write_text("own = 1\n")
    repos.git(trained, "add", "own.py")
    repos.git(trained, "commit", "-qm", "Own")
    repos.train(trained)
    repos.git(trained, "remote", "set-url", "origin", f"git://127.0.0.1:{closed_port()}/repository.git")
    expect_bundle(tool(trained, "commit"), trained, origin, "after 1 attempt")


def test_without_a_network_and_with_nothing_new_there_is_nothing_to_leave(trained, impatient):
    repos.git(trained, "remote", "set-url", "origin", f"git://127.0.0.1:{closed_port()}/repository.git")
    result = tool(trained, "commit")
    assert result.exit_code == 1
    assert re.search("`git fetch origin` failed: .*nothing is new here", said(result))
    assert list(trained.rglob("*.bundle")) == []
    assert repos.git(trained, "status", "--short") == ""


@pytest.mark.parametrize("name", ["permission denied.git", "read-only.git", "protected branch"])
def test_words_in_a_path_are_no_refusal(tmp_path, name):
    origin = repos.bare(tmp_path / name)
    clone = repos.clone(origin, tmp_path / "clone")
    repos.train(clone)
    hook = origin / "hooks" / "pre-receive"
    hook.parent.mkdir(exist_ok=True)
    # Somebody else gets in between, once.
    hook.write_text(
        "#!/bin/sh\nmkdir seen 2>/dev/null || exit 0\nunset GIT_QUARANTINE_PATH GIT_OBJECT_DIRECTORY\n"
        "c=$(git commit-tree -p main -m Between main^{tree}) && git update-ref refs/heads/main $c\n"
    )
    hook.chmod(0o755)
    repos.git(origin, "config", "user.name", "Bob")
    repos.git(origin, "config", "user.email", "bob@example.org")
    result = tool(clone, "commit")
    assert result.exit_code == 0, result.output
    assert "at attempt 2" in said(result)
    assert "Between" in repos.git(origin, "log", "--format=%s", "main")


@pytest.mark.parametrize("value", ["--upload-pack=mkdir {}", "-umkdir {}", "ext::sh -c mkdir% {}", "helper::{}"])
def test_a_hostile_remote_runs_nothing(trained, origin, tmp_path, impatient, value):
    sentinel = tmp_path / "pwned"
    value = value.format(sentinel)
    repos.train(trained)
    restored = tool(trained, "restore", repos.RUN, f"--remote={value}")
    assert restored.exit_code == 0
    assert "could not be fetched" in said(restored)
    result = tool(trained, "commit", f"--remote={value}")
    assert not sentinel.exists()
    expect_bundle(result, trained, origin, "after 1 attempt ")


@pytest.mark.parametrize(
    "name",
    [
        *(
            "--upload-pack=mkdir pwned",
            "-x",
            "--force",
            "",
            "a b",
            "a\nb",
            "a..b",
            "a:b",
            "+a:b",
            "refs/heads/*",
            "a~1",
        ),
        *("a^{tree}", "/a", "a/", "a.lock", ".a", "a@{1}", "a\x7f", "a\\b", "a[b"),
    ],
)
def test_a_hostile_branch_is_refused(trained, origin, name):
    before = repos.git(origin, "for-each-ref")
    repos.train(trained)
    for command in (["commit"], ["restore", repos.RUN]):
        result = tool(trained, *command, f"--branch={name}")
        if command[0] == "commit":
            assert result.exit_code == 2
        assert "git can't have a branch of that name" in said(result)
    assert repos.git(origin, "for-each-ref") == before
    assert not Path("pwned").exists()
    no_trace(trained)


@pytest.mark.parametrize(
    "name", ["ä/ö-ü", "a'b\"c", "HEAD", *seldom("$(id);y", "+a", "@", "refs/heads/main", "%s", "a#b")]
)
def test_a_branch_with_odd_letters_is_made_and_goes_on(trained, origin, name):
    before = here(trained).checkpoints.keys()
    ids = set(repos.train(trained).ids)
    assert tool(trained, "commit", f"--branch={name}").exit_code == 0
    assert repos.committed(origin, branch=f"refs/heads/{name}").checkpoints.keys() == before | ids
    ids |= set(repos.train(trained).ids)
    assert tool(trained, "commit", f"--branch={name}").exit_code == 0
    assert repos.committed(origin, branch=f"refs/heads/{name}").checkpoints.keys() == before | ids
    assert repos.committed(origin).checkpoints.keys() == before
    assert not Path("x").exists()


@pytest.mark.parametrize(
    "name",
    ["../x", "..", ".", "/etc", "a/b", "a\\b", "", ".git", ".hid", "a\nb", "a b", "a..b", "x" * 65, "ä", "-x"],
)
def test_a_hostile_run_name_is_refused(trained, origin, tmp_path, name):
    before, tip = sorted(p.name for p in tmp_path.iterdir()), repos.git(origin, "rev-parse", "main")
    for command in ("restore", "commit", "summarize"):
        result = tool(trained, command, "--", name)
        assert result.exit_code == 2
        assert "cannot be the name of a run" in said(result)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert repos.git(origin, "rev-parse", "main") == tip
    assert repos.git(trained, "status", "--short") == ""


# --- where the clone stands ------------------------------------------------------------------------


def test_a_detached_head_needs_a_branch(trained, origin):
    before = here(trained).checkpoints.keys()
    repos.git(trained, "checkout", "-q", "--detach")
    head = repos.git(trained, "rev-parse", "HEAD")
    ids = {*before, *repos.train(trained).ids}
    result = tool(trained, "commit")
    assert result.exit_code == 2
    assert "HEAD is detached" in said(result)
    assert "--branch" in said(result)
    assert here(trained).checkpoints.keys() == ids
    assert repos.committed(origin).checkpoints.keys() == before

    assert tool(trained, "commit", "--branch", "main").exit_code == 0
    assert repos.committed(origin).checkpoints.keys() == ids
    assert repos.git(trained, "rev-parse", "HEAD") == head
    assert repos.git(trained, "symbolic-ref", "-q", "HEAD", check=False) == ""


@pytest.mark.parametrize("others", [False, True])
def test_a_shallow_clone_is_enough(trained, origin, tmp_path, others):
    shallow = repos.clone(origin, tmp_path / "shallow", "--depth", "1")
    known = {*here(trained).checkpoints, *repos.train(shallow).ids}
    if others:
        known |= set(repos.train(trained).ids)
        assert tool(trained, "commit").exit_code == 0
    assert tool(shallow, "commit").exit_code == 0
    assert repos.committed(origin).checkpoints.keys() == known
    assert repos.git(shallow, "rev-parse", "--is-shallow-repository") == "true"
    assert repos.git(shallow, "rev-parse", "HEAD") == repos.git(origin, "rev-parse", "main")
    repos.git(origin, "fsck", "--strict")
    assert repos.git(origin, "rev-list", "--merges", "main") == ""


def test_a_shallow_clone_leaves_a_bundle_too(trained, origin, tmp_path):
    shallow = repos.clone(origin, tmp_path / "shallow", "--depth", "1")
    repos.train(shallow)
    reject_pushes(origin)
    expect_bundle(tool(shallow, "commit"), shallow, origin, "after 1 attempt")


def test_outside_of_a_repository_records_are_kept_and_not_committed(tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    ids = set(repos.train(alone).ids)
    result = tool(alone, "commit")
    assert result.exit_code == 2
    assert "is not in a git work tree" in said(result)
    result = tool(alone, "restore", repos.RUN)
    assert result.exit_code == 0
    assert "only what is here counts" in said(result)
    assert here(alone).checkpoints.keys() == ids


def test_without_git_records_are_kept_and_not_committed(trained, tmp_path, monkeypatch):
    ids = {*here(trained).checkpoints, *repos.train(trained).ids}
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        result = tool(trained, "commit")
        assert result.exit_code == 2
        assert "git is not installed" in said(result)
        assert tool(trained, "restore", repos.RUN).exit_code == 0
        assert tool(trained, "summarize").exit_code == 0
    assert here(trained).checkpoints.keys() == ids
    assert tool(trained, "commit").exit_code == 0


def empty_bare(path: Path) -> Path:
    repos.git(path.parent, "init", "-q", "--bare", "-b", "main", str(path))
    return path


@pytest.fixture
def unborn(tmp_path: Path) -> Path:
    """A clone of a bare repository without any commit, in which somebody is about to make the first."""
    empty_bare(tmp_path / "empty.git")
    clone = tmp_path / "unborn"
    repos.git(tmp_path, "clone", "-q", str(tmp_path / "empty.git"), str(clone))
    (clone / "staged.py").write_text("staged = 1\n")
    (clone / "untracked.py").write_text("untracked = 1\n")
    repos.git(clone, "add", "staged.py")
    return clone


@pytest.mark.parametrize("push", [[], ["--no-push"]])
@pytest.mark.parametrize("branch", ["main", "progress"])
def test_the_first_commit_of_all_holds_the_record_alone_and_takes_nothing_away(unborn, tmp_path, push, branch):
    options = [*push, *(["--branch", branch] if branch != "main" else [])]
    options = [*push, *(["--branch", branch] if branch != "main" else [])]
    ids = set(repos.train(unborn).ids)
    assert tool(unborn, "commit", *options).exit_code == 0
    where = unborn if "--no-push" in options else tmp_path / "empty.git"
    assert repos.committed(where, branch=branch).checkpoints.keys() == ids
    assert {name.split("/")[0] for name in repos.git(where, "ls-tree", "-r", "--name-only", branch).split()} == {
        ".training-progress"
    }
    assert (unborn / "staged.py").read_text() == "staged = 1\n"
    assert (unborn / "untracked.py").read_text() == "untracked = 1\n"
    status = repos.git(unborn, "status", "--short", "--", "*.py")
    assert status.splitlines() == ["A  staged.py", "?? untracked.py"]
    ids |= set(repos.train(unborn).ids)
    assert tool(unborn, "commit", *options).exit_code == 0
    assert repos.committed(where, branch=branch).checkpoints.keys() == ids


def state_of(clone: Path) -> list[str]:
    """What is staged and what is not, to the byte, outside of the folder."""
    rest = ("--", ".", ":!.training-progress")
    commands = (["diff", *rest], ["diff", "--cached", *rest], ["status", "--porcelain", *rest], ["stash", "list"])
    return [repos.git(clone, *command) for command in commands]


@pytest.mark.parametrize("behind", [False, True])
def test_unrelated_changes_stay_as_they_are(trained, origin, tmp_path, behind):
    for name in ("staged.py", "both.py", "gone.py", "moved.py", "unstaged.py"):
        (trained / name).write_text("".join(f"line {n} of {name}\n" for n in range(20)))
    repos.git(trained, "add", ".")
    repos.git(trained, "commit", "-qm", "Files")
    repos.git(trained, "push", "-q", "origin", "main")
    if behind:
        push_file(origin, tmp_path / "other", "elsewhere.py", b"theirs\n")
    (trained / "staged.py").write_text("staged\n")
    (trained / "both.py").write_text("staged\n")
    (trained / "new.py").write_text("staged\n")
    repos.git(trained, "add", "staged.py", "both.py", "new.py")
    (trained / "both.py").write_text("staged, and then unstaged\n")
    (trained / "unstaged.py").write_text("unstaged\n")
    (trained / "untracked.py").write_text("untracked\n")
    repos.git(trained, "rm", "-q", "--cached", "gone.py")
    repos.git(trained, "mv", "moved.py", "to.py")
    before = state_of(trained)
    repos.train(trained)
    assert tool(trained, "commit").exit_code == 0
    assert state_of(trained) == before
    assert repos.git(trained, "status", "--porcelain", ".training-progress") == ""
    assert repos.git(trained, "rev-parse", "HEAD") == repos.git(origin, "rev-parse", "main")
    assert (trained / "elsewhere.py").exists() == behind


def test_a_file_that_both_have_changed_keeps_the_branch_back_and_nothing_else(trained, origin, tmp_path):
    push_file(origin, tmp_path / "other", "train.py", b"theirs\n")
    (trained / "train.py").write_text("mine\n")
    before, ids = state_of(trained), set(repos.train(trained).ids)
    result = tool(trained, "commit")
    assert result.exit_code == 0
    assert "the branch here was left where it is" in said(result)
    assert "train.py" in said(result)
    assert state_of(trained) == before
    assert ids <= repos.committed(origin).checkpoints.keys()
    assert repos.git(origin, "show", "main:train.py") == "theirs"


def test_commits_of_ones_own_are_neither_pushed_nor_touched(trained, origin):
    (trained / "own.py").write_text("own = 1\n")
    repos.git(trained, "add", "own.py")
    repos.git(trained, "commit", "-qm", "Own")
    head = repos.git(trained, "rev-parse", "HEAD")
    ids = set(repos.train(trained).ids)
    result = tool(trained, "commit")
    assert result.exit_code == 0
    assert "it has commits of its own" in said(result)
    assert repos.git(trained, "rev-parse", "HEAD") == head
    assert ids <= repos.committed(origin).checkpoints.keys()
    assert "own.py" not in repos.git(origin, "ls-tree", "--name-only", "main")


@contextmanager
def index_held(clone: Path) -> Iterator[None]:
    """Another git command is at work."""
    lock = Path(repos.git(clone, "rev-parse", "--absolute-git-dir")) / "index.lock"
    lock.touch()
    try:
        yield
        assert lock.exists(), "somebody else's lock is not removed"
    finally:
        lock.unlink()


def test_another_git_command_at_work_delays_only_the_branch_here(trained, origin):
    ids, head = set(repos.train(trained).ids), repos.git(trained, "rev-parse", "HEAD")
    with index_held(trained):
        result = tool(trained, "commit")
    assert result.exit_code == 0
    assert "index.lock" in said(result).replace(" ", "")
    assert ids <= repos.committed(origin).checkpoints.keys()
    assert repos.git(trained, "rev-parse", "HEAD") == head
    repos.train(trained)
    assert tool(trained, "commit").exit_code == 0
    assert repos.git(trained, "rev-parse", "HEAD") == repos.git(origin, "rev-parse", "main")
    assert repos.git(trained, "status", "--short") == ""


def test_a_commit_that_no_branch_can_take_is_not_called_one(trained, origin):
    head, ids = repos.git(trained, "rev-parse", "HEAD"), set(repos.train(trained).ids)
    with index_held(trained):
        result = tool(trained, "commit", "--no-push")
    assert result.exit_code == 1
    assert "index.lock" in said(result).replace(" ", "")
    assert repos.git(trained, "rev-parse", "HEAD") == head
    assert tool(trained, "commit", "--no-push").exit_code == 0
    assert ids <= repos.committed(trained).checkpoints.keys()
    no_trace(trained)


def test_a_submodule_is_a_repository(origin, tmp_path):
    outer = repos.clone(repos.bare(tmp_path / "outer.git"), tmp_path / "outer")
    repos.git(outer, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", origin.as_uri(), "sub")
    inner = outer / "sub"
    repos.git(inner, "checkout", "-q", "main")
    ids = set(repos.train(inner).ids)
    assert tool(inner, "commit").exit_code == 0
    assert repos.committed(origin).checkpoints.keys() == ids
    assert repos.git(inner, "status", "--short") == ""


@pytest.mark.parametrize(
    "name", ["Üb ung\u4e2d", "a'b\"c $x;", "-q", " edge ", b"\xff\xfe".decode(errors="surrogateescape")]
)
def test_a_folder_with_odd_letters_is_one_like_any(tmp_path, name):
    parent = tmp_path / name
    parent.mkdir()
    origin = repos.bare(parent / "origin of.git")
    clone = repos.clone(origin, parent / "clone of")
    ids = set(repos.train(clone).ids)
    assert tool(clone, "commit").exit_code == 0
    assert repos.committed(origin).checkpoints.keys() == ids
    assert tool(clone, "restore", repos.RUN).exit_code == 0
    assert repos.git(clone, "status", "--short") == ""


# --- what people have put into the folder ----------------------------------------------------------


def test_lines_that_people_have_put_into_gitignore_stay(trained, origin, tmp_path):
    ours, name = trained / ".training-progress" / ".gitignore", ".training-progress/.gitignore"
    pushed = ours.read_bytes()
    push_file(origin, tmp_path / "other", name, b"# theirs\n*.theirs\n" + pushed)
    ours.write_bytes(pushed + b"*.ours\n")
    repos.train(trained)
    assert tool(trained, "commit").exit_code == 0
    now = repos.git(origin, "show", f"main:{name}").splitlines()
    assert now[:2] == ["# theirs", "*.theirs"]
    assert ours.read_bytes() == pushed + b"*.ours\n", "what nobody has committed is not for the tool to commit"


def test_a_gitignore_of_the_users_gets_what_it_lacks(clone, origin):
    path = clone / ".training-progress" / ".gitignore"
    path.parent.mkdir()
    path.write_bytes(b"# mine\r\n!keep.pt\n*.mine")
    repos.train(clone)
    assert tool(clone, "commit").exit_code == 0
    lines = path.read_bytes().splitlines()
    assert lines[:3] == [b"# mine", b"!keep.pt", b"*.mine"]
    assert b"*.pt" in lines
    assert "a-run/cache/checkpoints" not in repos.git(origin, "ls-tree", "-r", "--name-only", "main")


@pytest.mark.parametrize("name", [".gitignore", ".gitattributes", "README.md", "a-run/training_summary.json"])
def test_what_a_link_leads_to_is_neither_published_nor_written(trained, origin, sentinel, name):
    (sentinel / "x").write_text("secret\n")
    path, outside = trained / ".training-progress" / name, listing(sentinel)
    path.unlink()
    path.symlink_to(sentinel / "x")
    repos.train(trained)
    result = tool(trained, "commit")
    assert result.exit_code == 0, result.output
    assert "secret" not in repos.git(origin, "log", "-p", "main")
    assert listing(sentinel) == outside


# --- disks ---------------------------------------------------------------------------------------


@contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """A file system of 20 MB."""
    requires("root")
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(path)], capture_output=True)
    requires("a file system of one's own", done.returncode == 0)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path: Path, left: int) -> None:
    """Leave `left` bytes free."""
    path.unlink(missing_ok=True)
    free = shutil.disk_usage(path.parent).free - left
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free // 4096 * 4096)


@pytest.mark.parametrize("command", ["restore", "commit"])
def test_a_full_disk_costs_nothing_that_was_there(origin, tmp_path, impatient, command):
    with small_disk(tmp_path / "disk") as disk:
        clone = repos.clone(origin, disk / "clone")
        ids = {*repos.train(clone).ids}
        commit(repos.folder(clone))
        ids |= {*repos.train(clone).ids}
        other = repos.clone(origin, tmp_path / "other")
        both = {*ids, *repos.train(other, [float(n) for n in range(40, 10, -1)]).ids}
        commit(repos.folder(other))
        failed = 0
        for left in (0, 4096, 12_288, 40_960, 81_920, 200_000):
            fill(disk / "filler", left)
            result = tool(clone, command, *([repos.RUN] if command == "restore" else []))
            if result.exit_code:
                failed += 1
                assert result.exit_code == 1
                assert re.search("no space left|disk|could not be|unable to write|failed", said(result).lower()), result
                assert str(disk) in said(result).replace(" ", "") or "clone" in said(result), result.output
            assert here(clone).checkpoints.keys() >= ids
            assert temporary_files(clone / ".training-progress") == []
        assert failed
        (disk / "filler").unlink()
        assert tool(clone, "restore", repos.RUN).exit_code == 0
        result = tool(clone, "commit")
        assert result.exit_code == 0, result.output
        assert repos.committed(origin).checkpoints.keys() == both
        repos.git(clone, "fsck", "--strict")


def test_a_read_only_work_tree_is_named_and_left(trained, origin, tmp_path):
    requires("root")
    repos.train(trained)
    tip, before = repos.git(origin, "rev-parse", "main"), here(trained)
    subprocess.run(["mount", "--bind", str(trained), str(trained)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(trained)], check=True)
        for command in (["restore", repos.RUN], ["commit"]):
            result = tool(trained, *command)
            assert result.exit_code == 1
            assert "read-only" in said(result)
            assert str(trained) in said(result).replace(" ", ""), "the message names the place"
    finally:
        subprocess.run(["umount", "-l", str(trained)], check=True)
    assert here(trained) == before
    assert repos.git(origin, "rev-parse", "main") == tip
    assert tool(trained, "commit").exit_code == 0
