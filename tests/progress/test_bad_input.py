"""Records, caches and repositories in a state that nobody wished for: what is left behind, and what is said of it."""

import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
import torch
from click.testing import CliRunner, Result

from ckptcache.cache import TrainingCache
from ckptcache.cli import main
from ckptcache.errors import CacheDirNotWritable, IndexTooNew
from ckptcache.progress import commit as committing
from ckptcache.progress.commit import commit
from ckptcache.progress.restore import restore
from ckptcache.storage.index import MAX_INDEX_BYTES, Index, parse
from ckptcache.storage.layout import Layout
from tests.caches import flip, listing, temporary_files
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
    assert "both sides of it were taken up" in said(result)
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
    assert "the one side of it that is whole" in said(result)
    assert here(trained) == parse(good, Path())


def test_of_a_conflict_without_a_whole_side_the_history_helps(trained):
    good = repos.run_of(trained).index.read_bytes()
    half = good[: len(good) // 2] + b"\n"
    repos.run_of(trained).index.write_bytes(conflict(half, half))
    result = tool(trained, "restore", repos.RUN)
    assert result.exit_code == 0
    assert re.search(r"that of commit [0-9a-f]{8} was taken instead", said(result))
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


@pytest.mark.parametrize("kind", BROKEN)
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
