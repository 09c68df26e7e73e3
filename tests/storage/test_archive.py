import dataclasses
import io
import os
import random
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from blake3 import blake3

from ckptcache import TrainingCache
from ckptcache.errors import BackupDamaged, BackupTooNew, CkptCacheError, NotABackup
from ckptcache.storage import archive, fs
from ckptcache.storage.archive import MANIFEST, SEAL, header
from ckptcache.storage.index import parse, serialise
from ckptcache.storage.manifest import FORMAT, Manifest, Member, described
from tests.caches import listing, save

BLOCK = 512
MADE_AT = 1_700_000_000
INDEX = "metadata.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """A small backup of a real cache."""
    folder = tmp_path_factory.mktemp("whole")
    with TrainingCache(folder / "cache") as cache:
        for loss in (2.0, 1.0):
            save(cache, loss, iteration=int(loss))
        cache.name("best", "slot-1")
        cache.backup(folder / "all.tar")
    return (folder / "all.tar").read_bytes()


def refusal(data: bytes | Path, folder: Path) -> CkptCacheError | None:
    """What restoring raises; nothing may be in the folder then."""
    path = folder / "bad.tar"
    if isinstance(data, bytes):
        path.write_bytes(data)
    before = listing(folder)
    try:
        TrainingCache(folder / "new").restore_backup(path)
    except CkptCacheError as error:
        assert listing(folder) == before, "something was left behind"
        return error
    return None


# --- what tar makes of it ------------------------------------------------------------------------


def test_tar_lists_and_unpacks_it_to_a_cache_that_works(whole, tmp_path):
    (tmp_path / "all.tar").write_bytes(whole)
    listed = subprocess.run(["tar", "tvf", tmp_path / "all.tar"], capture_output=True, text=True, check=True)
    assert listed.stderr == ""
    names = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert names[:3] == [MANIFEST, SEAL, INDEX]
    (tmp_path / "cache").mkdir()
    subprocess.run(["tar", "xf", tmp_path / "all.tar", "-C", tmp_path / "cache"], check=True, capture_output=True)
    with TrainingCache(tmp_path / "cache") as cache:
        assert len(cache.checkpoints()) == 2
        assert cache.doctor() == []
        assert cache.load("best")["w"].tolist() == [1.0] * 4


@pytest.mark.parametrize("size", [0, 1, 511, 512, 8**11 - 1, 8**11, 5 * 10**12])
@pytest.mark.parametrize("name", ["manifest.json", f"checkpoints/{'a' * 83}.json", f"checkpoints/{'a' * 128}.json"])
def test_headers_are_what_other_programs_read(name, size):
    data = header(name, size, MADE_AT)
    assert len(data) % BLOCK == 0
    with tarfile.open(fileobj=io.BytesIO(data + bytes(1024))) as tar:
        found = next(iter(tar))
    assert (found.name, found.size, found.mtime, found.type, found.mode) == (name, size, MADE_AT, b"0", 0o644)


def test_the_manifest_can_be_checked_with_b3sum(whole):
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        manifest, seal = (tar.extractfile(name).read() for name in (MANIFEST, SEAL))
    assert seal == f"{blake3(manifest).hexdigest()}  {MANIFEST}\n".encode()
    assert orjson.loads(manifest)["format"] == FORMAT == 1


def test_ids_of_any_length_come_back(tmp_path):
    long = "x" * 128
    with TrainingCache(tmp_path / "cache") as cache:
        record = save(cache, 1.0)
        with cache.ledger.change() as change:
            change.index.checkpoints[long] = dataclasses.replace(change.index.checkpoints.pop(record.id), id=long)
            change.is_dirty = True
        layout = cache.ledger.layout
        layout.checkpoint(record.id).rename(layout.checkpoint(long))
        layout.sidecar(record.id).unlink()
        cache.backup(tmp_path / "all.tar")
    other = TrainingCache(tmp_path / "new")
    assert other.restore_backup(tmp_path / "all.tar").added == (long,)
    assert other.load(long)["w"].tolist() == [1.0] * 4


# --- chance --------------------------------------------------------------------------------------


def test_every_length_but_the_whole_is_refused(whole, tmp_path, counted):
    path = tmp_path / "cut.tar"
    path.write_bytes(whole)
    for size in range(len(whole) - 1, -1, -1):
        os.truncate(path, size)
        with pytest.raises((BackupDamaged, NotABackup)) as caught, archive.opened(path):
            pass
        if size >= BLOCK:
            assert "cut short" in str(caught.value)
            assert str(path) in str(caught.value)
    counted("backups", "truncations refused", len(whole))


def test_what_is_cut_short_leaves_no_folder_behind(whole, tmp_path):
    for size in (0, 1, 100, 512, len(whole) // 2, len(whole) - 1):
        assert refusal(whole[:size], tmp_path) is not None


def test_something_behind_the_end_is_refused(whole, tmp_path):
    for more in (b"x", bytes(1), bytes(512), bytes(10240), whole):
        assert isinstance(refusal(whole + more, tmp_path), BackupDamaged)


def flipped(whole: bytes, tries: int, seed: int) -> Iterator[bytes]:
    chance = random.Random(seed)
    ends = [i for i in range(len(whole)) if i < 3000 or i > len(whole) - 1200]
    for number in range(tries):
        place = chance.choice(ends) if number % 2 else chance.randrange(len(whole))
        data = bytearray(whole)
        data[place] ^= 1 << chance.randrange(8)
        yield bytes(data)


@pytest.mark.parametrize("tries", [600, pytest.param(5_000, marks=pytest.mark.campaign)])
def test_any_flipped_bit_is_found(whole, tmp_path, counted, tries):
    path = tmp_path / "flipped.tar"
    for data in flipped(whole, tries, seed=5):
        path.write_bytes(data)
        with pytest.raises((BackupDamaged, NotABackup)), archive.opened(path) as backup:
            backup.verify()
    counted("backups", "bit flips found", tries)


# --- intent --------------------------------------------------------------------------------------

ID = "ckpt_20260101_000000_00000001_00000000_0000"


def sealed(manifest: bytes, rest: bytes = b"") -> bytes:
    """A backup with that manifest, whatever it says."""
    seal = f"{blake3(manifest).hexdigest()}  {MANIFEST}\n".encode()
    parts = ((MANIFEST, manifest), (SEAL, seal))
    return b"".join(header(n, len(d), MADE_AT) + d + bytes(-len(d) % BLOCK) for n, d in parts) + rest


def built(members: list[tuple[Member, bytes]], headers: dict[str, bytes] | None = None, **more: Any) -> bytes:
    """A backup whose manifest, order and end are right, of any members."""
    manifest = Manifest(tuple(m for m, _ in members), MADE_AT, **more).data
    rest = b""
    for member, data in members:
        before = (headers or {}).get(member.name, header(member.name, member.size, MADE_AT))
        rest += before + data + bytes(-len(data) % BLOCK)
    return sealed(manifest, rest + bytes(1024))


def parts(whole: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar.getmembers()}


def members(whole: bytes) -> list[tuple[Member, bytes]]:
    found = parts(whole)
    document = orjson.loads(found[MANIFEST])
    return [(Member(**m), found[m["name"]]) for m in document["members"]]


def changed(whole: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """With a manifest that says something else, and is sealed."""
    document = orjson.loads(parts(whole)[MANIFEST])
    change(document)
    rest = whole[len(sealed(parts(whole)[MANIFEST])) :]
    return sealed(orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE), rest)


def renamed(whole: bytes, name: Any) -> bytes:
    """The last checkpoint under another name, in the manifest and in its header."""
    *others, (last, data) = members(whole)
    if not isinstance(name, str):
        return changed(whole, lambda d: d["members"][-1].update(name=name))
    return built([*others, (dataclasses.replace(last, name=name), data)])


def raw_header(name: str, kind: bytes, link: str = "", size: int = 0, **more: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.mtime, info.pax_headers = kind, link, size, MADE_AT, more
    return info.tobuf(tarfile.PAX_FORMAT if more else tarfile.GNU_FORMAT)


def with_index(whole: bytes, change: Callable[[Any], object]) -> bytes:
    """With an index that says something else, and whose digest is right."""
    (_, data), *others = members(whole)
    index = parse(data, Path("x"))
    change(index)
    data = serialise(index)
    return built([(described("index", data), data), *others])


def raw_index(whole: bytes, data: bytes) -> bytes:
    return built([(described("index", data), data), *members(whole)[1:]])


def hostile_manifests(whole: bytes) -> Iterator[tuple[str, bytes]]:
    lies: dict[str, Callable[[dict[str, Any]], object]] = {
        "no format": lambda d: d.pop("format"),
        "format true": lambda d: d.update(format=True),
        "format of text": lambda d: d.update(format="1"),
        "format 0": lambda d: d.update(format=0),
        "a later format": lambda d: d.update(format=2),
        "no members": lambda d: d.update(members=[]),
        "members of text": lambda d: d.update(members=["metadata.json"]),
        "members a mapping": lambda d: d.update(members={}),
        "no index": lambda d: d["members"].pop(0),
        "index last": lambda d: d["members"].append(d["members"].pop(0)),
        "two indexes": lambda d: d["members"].insert(0, d["members"][0]),
        "a member twice": lambda d: d["members"].append(d["members"][-1]),
        "a sidecar too few": lambda d: d["members"].pop(1),
        "a checkpoint too few": lambda d: d["members"].pop(),
        "unknown kind": lambda d: d["members"][-1].update(kind="program"),
        "kind a list": lambda d: d["members"][-1].update(kind=["checkpoint"]),
        "no kind": lambda d: d["members"][-1].pop("kind"),
        "kind of another": lambda d: d["members"][-1].update(kind="sidecar"),
        "a gigabyte of zeros": lambda d: d["members"][-1].update(size=2**30),
        "two to the 60": lambda d: d["members"][-1].update(size=2**60),
        "two to the 63": lambda d: d["members"][-1].update(size=2**63),
        "size 0": lambda d: d["members"][-1].update(size=0),
        "size negative": lambda d: d["members"][-1].update(size=-512),
        "size true": lambda d: d["members"][-1].update(size=True),
        "size of text": lambda d: d["members"][-1].update(size="512"),
        "size a fraction": lambda d: d["members"][-1].update(size=512.5),
        "a byte less": lambda d: d["members"][-1].update(size=d["members"][-1]["size"] - 1),
        "no digest": lambda d: d["members"][-1].update(digest=None),
        "digest of another kind": lambda d: d["members"][-1].update(digest="md5:" + "0" * 32),
        "digest too short": lambda d: d["members"][-1].update(digest="blake3:00"),
        "another digest": lambda d: d["members"][-1].update(digest="blake3:" + "0" * 64),
        "another digest of the index": lambda d: d["members"][0].update(digest="blake3:" + "0" * 64),
        "something more": lambda d: d.update(run="rm -rf /"),
        "left out of text": lambda d: d.update(left_out="x"),
        "left out a path": lambda d: d.update(left_out={"../x": "y"}),
        "left out without reason": lambda d: d.update(left_out={ID: 1}),
    }
    for label, lie in lies.items():
        yield label, changed(whole, lie)
    for label, data in {
        "no JSON": b"hello",
        "a list": b"[]",
        "a number": b"1",
        "nothing": b"{}",
        "not a number": b'{"format": NaN}',
        "deep": b"[" * 100_000,
        "keys twice": parts(whole)[MANIFEST].replace(b'"format": 1', b'"format": 1, "format": 1'),
        "empty": b"",
    }.items():
        yield f"manifest: {label}", sealed(data, whole)


def hostile_names(whole: bytes) -> Iterator[tuple[str, bytes]]:
    above = ("../x.pt", "checkpoints/../../x.pt", "/tmp/x.pt", "checkpoints//x.pt", "./checkpoints/x.pt", "..")
    odd = ("checkpoints/.pt", "checkpoints/A.pt", "checkpoints/a b.pt", "checkpoints/a\n.pt", "checkpoints/é.pt")
    own = ("metadata.json.lock", "sessions/x.lock", "data/x", "quarantine/x.pt", "x.pt", ".bashrc", "checkpoints/x")
    last = members(whole)[-1][0].id
    above += (f"../{last}.pt", f"/tmp/{last}.pt", f"checkpoints/../{last}.pt", f"sessions/{last}.pt", f"{last}.pt")
    ids = (f"checkpoints/{'a' * 129}.pt", "checkpoints/a..b.pt", "checkpoints/x.pt.restored", "", 7, None, ["x"])
    for name in (*above, *odd, *own, *ids):
        yield f"named {name!r}"[:60], renamed(whole, name)


def hostile_headers(whole: bytes) -> Iterator[tuple[str, bytes]]:
    found = members(whole)
    last = found[-1][0]
    kinds = {
        "a hard link": raw_header(last.name, tarfile.LNKTYPE, "/etc/passwd"),
        "a link": raw_header(last.name, tarfile.SYMTYPE, "/etc/passwd"),
        "a device": raw_header(last.name, tarfile.CHRTYPE),
        "a disk": raw_header(last.name, tarfile.BLKTYPE),
        "a folder": raw_header(last.name, tarfile.DIRTYPE),
        "a pipe": raw_header(last.name, tarfile.FIFOTYPE),
        "contiguous": raw_header(last.name, tarfile.CONTTYPE, size=last.size),
        "sparse": raw_header(last.name, tarfile.GNUTYPE_SPARSE, size=last.size),
        "another name": raw_header("../../x", tarfile.REGTYPE, size=last.size),
        "another size": raw_header(last.name, tarfile.REGTYPE, size=last.size + 1),
        "a huge size": raw_header(last.name, tarfile.REGTYPE, size=2**60),
        "a path of its own": raw_header(last.name, tarfile.REGTYPE, size=last.size, path="../../x"),
        "a sparse map": raw_header(
            last.name, tarfile.REGTYPE, size=last.size, **{"GNU.sparse.realsize": "1" + "0" * 12}
        ),
        "no header": bytes(BLOCK),
        "a wrong sum": header(last.name, last.size, MADE_AT)[:148]
        + b"0000000\0"
        + header(last.name, last.size, 0)[156:],
    }
    for label, before in kinds.items():
        yield f"header: {label}", built(found, {last.name: before})
    padded = bytearray(whole)
    padded[-1024 - (-last.size % BLOCK)] = 1
    yield "something in the padding", bytes(padded)
    yield "a member between", built([*found, (described("sidecar", b"{}", ID), b"{}")])
    yield "a checkpoint twice", built([*found, found[-1]])
    yield "the index twice", built([*found, found[0]])
    yield "by another tar", _by_tarfile(whole)
    yield "compressed", b"\x1f\x8b" + whole
    yield "a first header with a giant size", header(MANIFEST, 8**11 - 1, MADE_AT) + whole[BLOCK:]
    yield "a first header of a link", raw_header(MANIFEST, tarfile.SYMTYPE, "/etc/passwd") + whole[BLOCK:]
    yield "only zeros", bytes(20 * BLOCK)
    yield "a seal of something else", whole.replace(b"  manifest.json\n", b"  manifest.jsom\n")


def _by_tarfile(whole: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in parts(whole).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def hostile_indexes(whole: bytes) -> Iterator[tuple[str, bytes]]:
    id = members(whole)[-1][0].id

    def put(**fields: Any) -> Callable[[Any], object]:
        return lambda index: index.checkpoints.update({id: dataclasses.replace(index.checkpoints[id], **fields)})

    yield "an index without the checkpoint", with_index(whole, lambda index: index.checkpoints.pop(id))
    yield "an index that names others", with_index(whole, lambda i: i.checkpoints.update({ID: i.checkpoints.pop(id)}))
    yield "an index that evicted it", with_index(whole, put(decision="evicted"))
    yield "an index that quarantined it", with_index(whole, put(decision="quarantined"))
    yield "an index with another size", with_index(whole, put(size=1))
    yield "an index with another digest", with_index(whole, put(digest="blake3:" + "0" * 64))
    plain = members(whole)[0][1]
    yield "an index that is none", raw_index(whole, b"hello")
    yield "an index of a later schema", raw_index(whole, plain.replace(b'"schema_version": 2', b'"schema_version": 9'))
    yield "an index with a path", raw_index(whole, plain.replace(id.encode(), b"../../../x"))
    yield "an index with half of it", raw_index(whole, plain[: len(plain) // 2])


def corpus(whole: bytes) -> dict[str, bytes]:
    makers = (hostile_manifests, hostile_names, hostile_headers, hostile_indexes)
    return {label: data for make in makers for label, data in make(whole)}


def test_what_is_made_to_do_harm_is_refused_with_nothing_left_behind(whole, tmp_path, counted):
    cases = corpus(whole)
    assert len(cases) >= 90
    for label, data in cases.items():
        error = refusal(data, tmp_path)
        assert isinstance(error, BackupDamaged | NotABackup | BackupTooNew), label
        assert "bad.tar" in str(error), label
    assert refusal(built(members(whole)), tmp_path) is None, "what the cases are built by is fine by itself"
    counted("backups", "hostile files refused", len(cases))


def test_a_later_version_is_told_apart_from_damage(whole, tmp_path):
    for label in ("a later format", "an index of a later schema"):
        assert isinstance(refusal(corpus(whole)[label], tmp_path), BackupTooNew)


def test_sidecars_that_lie_are_written_anew(whole, tmp_path):
    found = [(m, d) if m.kind != "sidecar" else (described("sidecar", b"[]", m.id), b"[]") for m, d in members(whole)]
    assert refusal(built(found), tmp_path) is None
    assert TrainingCache(tmp_path / "new").doctor() == []


def test_what_is_no_file_is_refused(whole, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    for path in (tmp_path / "pipe", tmp_path / "circle", tmp_path, tmp_path / "none", Path("/dev/zero")):
        assert isinstance(refusal_of(path, tmp_path), NotABackup)


def refusal_of(path: Path, folder: Path) -> CkptCacheError | None:
    try:
        TrainingCache(folder / "new").restore_backup(path)
    except CkptCacheError as error:
        return error
    return None


def test_a_link_to_a_backup_is_followed(whole, tmp_path):
    (tmp_path / "real.tar").write_bytes(whole)
    (tmp_path / "link.tar").symlink_to("real.tar")
    assert len(TrainingCache(tmp_path / "new").restore_backup(tmp_path / "link.tar").added) == 2


def test_what_changes_between_the_first_look_and_the_copy_is_found(whole, tmp_path):
    path = tmp_path / "all.tar"
    path.write_bytes(whole)
    with archive.opened(path) as backup:
        backup.verify()
        last = backup.manifest.members[-1]
        with path.open("r+b") as file:
            file.seek(len(whole) - 1024 - 600)
            file.write(b"?")
        with pytest.raises(BackupDamaged, match="differs from its digest"):
            backup.copy(last, lambda _: None)


# --- writing -------------------------------------------------------------------------------------


def test_a_source_that_is_not_what_the_manifest_says_is_named(tmp_path):
    good, bad = described("index", b"fine"), described("sidecar", b"fine", ID)
    manifest = Manifest((good, bad), MADE_AT)
    for data, why in ((b"fin", "3 bytes"), (b"fime", "differs")):
        with pytest.raises(archive.Differs, match=why) as caught, fs.replacing(tmp_path / "x.tar", writer="w") as temp:
            archive.write(temp, manifest, {good.name: io.BytesIO(b"fine"), bad.name: io.BytesIO(data)})
        assert caught.value.member == bad
        assert list(tmp_path.iterdir()) == []


def test_an_archive_of_a_long_name_and_many_blocks_is_read_back(tmp_path):
    data = os.urandom(5 * 2**20 + 3)
    id = "y" * 120
    found = (described("index", b"{}"), described("sidecar", b"{}", id), described("checkpoint", data, id))
    sources = {m.name: io.BytesIO(d) for m, d in zip(found, (b"{}", b"{}", data), strict=True)}
    seen: list[int] = []
    with fs.replacing(tmp_path / "x.tar", writer="w") as temp:
        archive.write(temp, Manifest(found, MADE_AT), sources, seen.append)
    assert sum(seen) == len(data) + 4
    with archive.opened(tmp_path / "x.tar") as backup:
        backup.verify()
        assert backup.read(found[2], limit=len(data)) == data
        with pytest.raises(BackupDamaged, match="are the most"):
            backup.read(found[2], limit=len(data) - 1)
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert tar.getnames()[-1] == found[2].name
