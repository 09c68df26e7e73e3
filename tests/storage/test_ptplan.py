import errno
import fcntl
import io
import mmap
import os
import struct
import sys
import tempfile
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from ckptcache.storage import fs, integrity, ptfile, ptplan
from tests.faults import CountingSystem, FailingSystem, swapped
from tests.storage.test_ptfile import DTYPES, RECORD, bits, identical, save

MIB = 1 << 20


def written(path, payload):
    temp = fs.TempFile(path, "w1")
    measured = ptplan.write(temp, ptplan.plan(payload))
    temp.sync()
    temp.publish()
    return measured


def by_torch(payload):
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return buffer.getvalue()


def entries(data):
    """Name to place and content, of all but the hash that torch makes of the checksums."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        found = {}
        for entry in archive.infolist():
            start = entry.header_offset + 30 + sum(struct.unpack_from("<2H", data, entry.header_offset + 26))
            found[entry.filename] = (start, data[start : start + entry.file_size])
    return {name: place for name, place in found.items() if not name.endswith("serialization_id")}


VIEWS = {
    "itself": lambda t: t,
    "a parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "its half": lambda t: t[len(t) // 2 :],
    "every other": lambda t: t[1::2] if len(t) > 1 else t,
    "an element": lambda t: t[0] if len(t) else t,
    "turned": lambda t: t[: len(t) // 2 * 2].reshape(-1, 2).t() if len(t) > 1 else t,
    "expanded": lambda t: t[:1].expand(3) if len(t) else t,
    "a copy": lambda t: t.clone(),
}


@st.composite
def shared_trees(draw):
    """Mappings of lists of tensors, many of which look into the memory of others."""
    bases = draw(st.lists(st.builds(bits, st.sampled_from(DTYPES), st.sampled_from([0, 1, 7, 24])), min_size=1))
    look = st.builds(lambda base, view: VIEWS[view](base), st.sampled_from(bases), st.sampled_from(sorted(VIEWS)))
    leaves = look | st.integers() | st.text("abc", max_size=3)
    return draw(st.dictionaries(st.text("abc", min_size=1, max_size=3), st.lists(leaves, max_size=5), max_size=4))


def sharing(tree):
    """Which tensors of a tree share their memory, as numbers in order."""
    numbers = {}
    tensors = [t for leaves in tree.values() for t in leaves if isinstance(t, torch.Tensor) and t.untyped_storage()]
    return [numbers.setdefault(t.untyped_storage().data_ptr(), len(numbers)) for t in tensors]


@given(shared_trees())
def test_a_file_is_what_torch_writes_in_place_and_content_and_reads_back_alike(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("tree") / "a.pt"
    measured = written(path, tree)
    data, theirs = path.read_bytes(), by_torch(tree)
    assert entries(data) == entries(theirs)
    assert measured == integrity.Written(len(data), f"blake3:{blake3(data).hexdigest()}")
    for mapped in (False, True):
        read = torch.load(path, weights_only=True, mmap=mapped)
        assert identical(read, torch.load(io.BytesIO(theirs), weights_only=True))
        assert sharing(read) == sharing(tree)
    content = ptfile.read(path, size=measured.size, digest=measured.digest)
    assert content.size == len(data)


def test_a_plan_says_where_each_storage_stands_and_reads_none(tmp_path):
    model = {"w": torch.randn(5000), "b": torch.randn(3)}
    state = {"model": model, "again": model["w"][7:9]}
    plan = ptfile.plan(state, RECORD)
    assert [placed.length for placed in plan.storages] == [20_000, 12]
    assert all(placed.offset % 64 == 0 for placed in plan.storages)
    model["w"].fill_(3)  # after planning: the bytes are taken when they are written
    save(tmp_path / "a.pt", state)
    data = (tmp_path / "a.pt").read_bytes()
    assert len(data) == plan.size
    for placed, tensor in zip(plan.storages, model.values(), strict=True):
        assert data[placed.offset : placed.offset + placed.length] == tensor.numpy().tobytes()
    assert all(data[at : at + len(piece)] == piece for at, piece in plan.between)


def test_a_tensor_that_was_saved_can_still_grow(tmp_path):
    payload = {"small": torch.ones(3), "large": torch.ones(5 * MIB)}
    written(tmp_path / "a.pt", payload)
    assert all(tensor.untyped_storage().resizable() for tensor in payload.values())
    assert payload["large"].resize_(6 * MIB)[5 * MIB - 1] == 1


def test_the_same_state_is_planned_alike():
    state = {"model": {"w": torch.ones(5), "sparse": torch.eye(3).to_sparse()}}
    plans = [ptfile.plan(state, RECORD) for _ in range(2)]
    assert plans[0].between == plans[1].between
    assert plans[0].size == plans[1].size


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors_come_back(tmp_path, layout):
    dense = torch.arange(12.0).reshape(3, 4)
    written(tmp_path / "a.pt", {"t": dense.to_sparse(layout=layout)})
    read = torch.load(tmp_path / "a.pt", weights_only=True)["t"]
    assert read.layout is layout
    assert torch.equal(read.to_dense(), dense)


AROUND_A_BLOCK = [1, (1 << 16) - 1, 1 << 16, 16 * MIB - 1, 16 * MIB, 16 * MIB + 4097, 50 * MIB]


@pytest.mark.parametrize("size", AROUND_A_BLOCK)
def test_long_tensors_between_many_short_ones_are_written_whole(tmp_path, size):
    torch.manual_seed(size)
    payload = {f"short{i}": torch.randn(i * 9) for i in range(40)}
    payload["long"] = torch.randint(0, 256, (size,), dtype=torch.uint8)
    payload |= {f"more{i}": torch.randint(0, 256, (60_000,), dtype=torch.uint8) for i in range(200)}
    measured = written(tmp_path / "a.pt", payload)
    assert integrity.digest_of(tmp_path / "a.pt") == measured
    assert identical(torch.load(tmp_path / "a.pt", weights_only=True), payload)


def test_where_no_thread_can_be_started_the_digest_is_taken_all_the_same(tmp_path, monkeypatch):
    def refused(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    measured = written(tmp_path / "a.pt", {"w": torch.ones(5 * MIB)})
    assert integrity.digest_of(tmp_path / "a.pt") == measured


class Watched(fs.System):
    """Notes the length of each write and whether it passes the system's cache by."""

    def __init__(self):
        self.writes = []

    def write(self, fd, data):
        self.writes.append((len(data), bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)))
        return super().write(fd, data)


class Cached(fs.System):
    """A file system that only writes through the cache."""

    def direct(self, fd, on):
        return False


class Picky(Watched):
    """A file system that takes the flag, and then wants other multiples than any there are."""

    def write(self, fd, data):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return super().write(fd, data)


LARGE = {"long": torch.arange(20 * MIB, dtype=torch.int16), "short": torch.ones(3)}
WAYS = {
    "from tensors": lambda path: written(path, LARGE),
    "from an image": lambda path: image_written(path, image_of(ptplan.plan(LARGE))),
}


def passes_the_cache_by(folder):
    temp = fs.TempFile(folder / "probe", "w1")
    able = temp.pass_cache_by()
    temp.discard()
    return able


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can")
@pytest.mark.parametrize("way", WAYS)
def test_a_large_file_passes_the_cache_by_except_for_its_end(tmp_path, way):
    if not passes_the_cache_by(tmp_path):
        pytest.skip("this file system only writes through the cache")
    with swapped(Watched()) as watched:
        measured = WAYS[way](tmp_path / "a.pt")
    *blocks, end, rest = watched.writes
    assert blocks == [(16 * MIB, True)] * 2
    assert (end[1], rest[1], rest[0]) == (True, False, measured.size % 4096)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("system", [fs.System, Cached, Picky])
def test_the_bytes_are_the_same_whatever_the_file_system_can(tmp_path, way, system):
    with swapped(system()):
        measured = WAYS[way](tmp_path / "a.pt")
    assert integrity.digest_of(tmp_path / "a.pt") == measured
    assert entries((tmp_path / "a.pt").read_bytes()) == entries(by_torch(LARGE))


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="needs a file system in memory")
@pytest.mark.parametrize("way", WAYS)
def test_a_file_system_in_memory_takes_it_too(way):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        measured = WAYS[way](Path(folder) / "a.pt")
        assert integrity.digest_of(Path(folder) / "a.pt") == measured


def test_an_image_may_begin_anywhere(tmp_path):
    whole = image_of(ptplan.plan(LARGE))
    elsewhere = memoryview(bytearray(len(whole) + 1))[1:]
    elsewhere[:] = whole
    assert image_written(tmp_path / "a.pt", elsewhere) == written(tmp_path / "b.pt", LARGE)


@pytest.mark.parametrize("refused", [1, 2, 3, 6, 99])
def test_with_little_memory_the_buffers_are_smaller_or_none(tmp_path, monkeypatch, refused):
    real, calls = mmap.mmap, []

    def stingy(*arguments):
        calls.append(arguments)
        if len(calls) <= refused:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return real(*arguments)

    monkeypatch.setattr(ptplan.mmap, "mmap", stingy)
    measured = written(tmp_path / "a.pt", LARGE)
    assert calls
    assert integrity.digest_of(tmp_path / "a.pt") == measured


def test_a_full_disk_is_found_before_anything_is_written(tmp_path):
    with swapped(FailingSystem(at=0, error=errno.ENOSPC, operation="reserve")) as failing:
        temp = fs.TempFile(tmp_path / "a.pt", "w1")
        with pytest.raises(OSError, match="No space left"):
            ptplan.write_image(temp, image_of(ptplan.plan(LARGE)))
        temp.discard()
    assert failing.operations == ["create", "reserve", "unlink"]


@pytest.mark.parametrize("way", WAYS)
def test_a_failure_of_any_write_is_told_and_leaves_no_thread(tmp_path, way):
    with swapped(CountingSystem()) as counting:
        WAYS[way](tmp_path / "whole.pt")
    before = threading.active_count()
    for at, operation in enumerate(counting.operations[:-2]):
        with swapped(FailingSystem(at, errno.EIO)), pytest.raises(OSError, match="Input/output"):
            WAYS[way](tmp_path / f"{at}.pt")
        assert operation in ("create", "reserve", "direct", "write")
        assert threading.active_count() == before


def test_no_thread_is_left_when_a_write_fails_halfway(tmp_path):
    before = threading.active_count()
    temp = fs.TempFile(tmp_path / "a.pt", "w1")
    with swapped(FailingSystem(at=2, error=errno.EIO, operation="write")), pytest.raises(OSError, match="Input/output"):
        ptplan.write(temp, ptplan.plan({"w": torch.ones(20 * MIB)}))
    temp.discard()
    assert threading.active_count() == before


def test_room_is_taken_before_anything_is_written(tmp_path):
    with swapped(CountingSystem()) as counting:
        written(tmp_path / "a.pt", {"w": torch.ones(3)})
    assert counting.operations == ["create", "reserve", "write", "fsync", "replace"]


def test_what_other_threads_save_meanwhile_is_whole():
    stop, found = threading.Event(), []
    theirs = {"w": torch.arange(1000.0)}
    whole = by_torch(theirs)

    def saving():
        while not stop.is_set():
            found.append(by_torch(theirs) == whole)

    other = threading.Thread(target=saving)
    other.start()
    ours = {f"w{i}": torch.ones(100) for i in range(50)}
    plans = []
    try:
        while len(plans) < 100 or len(found) < 11:
            plans.append(ptplan.plan(ours))
    finally:
        stop.set()
        other.join()
    assert all(found)
    assert all(len(plan.storages) == 50 for plan in plans)
    assert by_torch(theirs) == whole


def test_a_tensor_that_is_resized_after_it_was_planned_is_refused(tmp_path):
    tensor = torch.ones(100)
    plan = ptplan.plan({"w": tensor})
    tensor.untyped_storage().resize_(0)
    temp = fs.TempFile(tmp_path / "a.pt", "w1")
    with pytest.raises(RuntimeError, match="resized while it was saved"):
        ptplan.write(temp, plan)
    temp.discard()


@pytest.mark.filterwarnings("ignore:.*quantized:UserWarning")
def test_what_torch_cannot_outline_is_not_planned():
    with pytest.raises(ptplan.Unplannable, match="qtensor"):
        ptplan.plan({"q": torch.quantize_per_tensor(torch.arange(4.0), 0.5, 0, torch.qint8)})


def test_of_many_storages_of_one_length_each_stands_in_its_own_place(tmp_path):
    state = {f"t{number}": torch.full((50,), float(number)) for number in range(25)}
    planned = ptplan.plan(state)
    path = tmp_path / "a.pt"
    path.write_bytes(b"".join(bytes(block) for block in ptplan.blocks(planned)))
    read = torch.load(path, weights_only=True)
    assert all(torch.equal(read[name], value) for name, value in state.items())


def test_storages_are_told_apart_by_their_entries_names_and_not_by_their_order(monkeypatch):
    state = {f"t{number}": torch.full((50,), float(number)) for number in range(3)}
    others, real = {"0": "2", "1": "1", "2": "0"}, ptplan._entry_name
    monkeypatch.setattr(ptplan, "_entry_name", lambda written: others[real(written)])
    placed = sorted(ptplan.plan(state).storages, key=lambda p: p.offset)
    assert [struct.unpack_from("<f", bytes(p.storage.tolist()))[0] for p in placed] == [2, 1, 0]


# --- images --------------------------------------------------------------------------------------


def image_of(plan):
    """The whole file in memory of its own, beginning at a page."""
    image = mmap.mmap(-1, plan.size)
    for at, piece in plan.between:
        image[at : at + len(piece)] = piece
    for placed in plan.storages:
        data = torch.empty(0, dtype=torch.uint8).set_(placed.storage)
        image[placed.offset : placed.offset + placed.length] = data.numpy().tobytes()
    return memoryview(image)


def image_written(path, image):
    temp = fs.TempFile(path, "w1")
    measured = ptplan.write_image(temp, image)
    temp.sync()
    temp.publish()
    return measured


@pytest.mark.parametrize("size", AROUND_A_BLOCK)
def test_an_image_is_written_as_its_plan_would_be(tmp_path, size):
    torch.manual_seed(size)
    payload = {"long": torch.randint(0, 256, (size,), dtype=torch.uint8), "short": torch.ones(3)}
    planned = written(tmp_path / "a.pt", payload)
    assert image_written(tmp_path / "b.pt", image_of(ptplan.plan(payload))) == planned
    data = (tmp_path / "b.pt").read_bytes()
    assert data == (tmp_path / "a.pt").read_bytes()
    assert f"blake3:{blake3(data).hexdigest()}" == planned.digest
    for mapped in (False, True):
        assert identical(torch.load(tmp_path / "b.pt", weights_only=True, mmap=mapped), payload)


def test_the_writing_of_an_image_can_be_given_up_between_blocks(tmp_path):
    image, calls, threads = memoryview(mmap.mmap(-1, 50 * MIB)), [], threading.active_count()

    def enough():
        calls.append(1)
        if len(calls) == 3:
            raise InterruptedError

    temp = fs.TempFile(tmp_path / "a.pt", "w1")
    with pytest.raises(InterruptedError):
        ptplan.write_image(temp, image, between_blocks=enough)
    assert temp.path.stat().st_size == 32 * MIB
    temp.discard()
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads
