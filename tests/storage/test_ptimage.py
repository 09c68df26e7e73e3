import io
import os
import random
import signal
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from ckptcache import TrainingCache
from ckptcache.errors import CheckpointDamaged, CkptCacheError
from ckptcache.storage import audit, integrity, ptfile, ptimage
from tests.faults import end_of, start_child, wait_until
from tests.storage.test_ptfile import DTYPES, RECORD, bits, identical, save

KB = 1 << 10
BIG = 70 * KB
"""More bytes than torch is left to copy by itself."""


def large_state():
    whole = bits(torch.float32, 40 * KB, seed=1)
    halves = bits(torch.bfloat16, 100 * KB, seed=2)
    return {
        "model": {
            "whole": whole,
            "half": whole[20 * KB :],
            "turned": whole.reshape(-1, 8).t(),
            "small": whole[:3].clone(),
        },
        "optimizer": {"moment": halves, "parameter": torch.nn.Parameter(halves.clone(), requires_grad=False)},
        "empty": torch.empty(0, 7),
    }


def test_a_forked_child_reads_though_its_parent_has_read_before(tmp_path):
    path = tmp_path / "a.pt"
    save(path, {"w": torch.zeros(1 << 20)})
    ptfile.read(path)
    child = start_child(lambda: ptfile.read(path))
    try:
        wait_until(lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None, 20)
    except TimeoutError:
        os.kill(child, signal.SIGKILL)
    assert end_of(child) == 0


# --- what is decoded -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_tensors_of_every_dtype_come_back_bit_by_bit(tmp_path, dtype):
    values = bits(dtype, BIG)
    state = {"model": {"flat": values, "turned": values.reshape(-1, 2).t(), "copy": values.clone()}}
    written = save(tmp_path / "a.pt", state)
    assert identical(ptfile.read(tmp_path / "a.pt", size=written.size, digest=written.digest).state, state)


def test_a_file_of_torch_s_own_comes_back_as_torch_reads_it(tmp_path):
    torch.save(large_state(), tmp_path / "a.pt")
    read = ptfile.read(tmp_path / "a.pt").state
    assert identical(read, torch.load(tmp_path / "a.pt", weights_only=True))
    read["model"]["whole"][20 * KB] = 5
    assert read["model"]["half"][0] == 5


def test_the_tensors_own_their_memory_and_may_grow(tmp_path):
    save(tmp_path / "a.pt", large_state())
    read = ptfile.read(tmp_path / "a.pt").state
    os.truncate(tmp_path / "a.pt", 0)
    assert read["optimizer"]["moment"].add_(1).resize_(BIG * 9).untyped_storage().resizable()


def test_stored_tensors_are_read_into_the_memory_that_they_keep(tmp_path):
    save(tmp_path / "a.pt", large_state())
    with (tmp_path / "a.pt").open("rb") as file:
        size = file.seek(0, 2)
        places = ptimage.places(file, audit.check_archive(file, tmp_path, size), size)
        image, measured = ptimage.read(file, places, size)
    assert measured == integrity.digest_of(tmp_path / "a.pt")
    assert [place.length for place in places] == [160 * KB, 200 * KB, 200 * KB]
    data = torch.arange(3)
    with image.handing_over():
        assert image.seek(places[1].offset) == places[1].offset
        assert image.readinto(bytearray(places[1].length)) == places[1].length
        claimed = image.claim(torch.UntypedStorage(places[1].length), "cpu")
        assert image.claim(data.untyped_storage(), "cpu").data_ptr() == data.data_ptr()
    assert bytes(claimed.tolist()) == (tmp_path / "a.pt").read_bytes()[places[1].offset :][: places[1].length]
    assert not image.left_unclaimed


MEASURED = """
import re, sys
from pathlib import Path
from ckptcache.storage import ptfile
folder = Path(sys.argv[1])
peaks = []
for name in ("small", "large"):
    state = ptfile.read(folder / (name + ".pt")).state
    peaks.append(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]))
print(peaks[1] - peaks[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory in kilobytes")
def test_reading_takes_memory_for_the_file_and_little_more(tmp_path):
    save(tmp_path / "small.pt", {"model": {"w": torch.ones(BIG)}})
    size = save(tmp_path / "large.pt", {"model": {f"w{i}": torch.ones(25 << 20) for i in range(2)}}).size
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert 0.9 * size < int(done.stdout) * KB < 1.15 * size


def rewritten(data, change):
    """An archive of torch's with each entry's content changed, by the standard library."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for entry in archive.infolist():
            new.writestr(entry.filename, change(entry.filename, archive.read(entry)))
    return target.getvalue()


def of_the_other_order(name, content):
    if name.endswith("/byteorder"):
        return b"big" if sys.byteorder == "little" else b"little"
    if "/data/" in name:
        return b"".join(content[i : i + 4][::-1] for i in range(0, len(content), 4))
    return content


def test_a_file_of_a_machine_with_the_other_order_of_bytes_is_read_alike(tmp_path):
    buffer, state = io.BytesIO(), {"model": {"large": torch.arange(BIG), "x": torch.arange(3.0)}}
    state["model"]["large"] = state["model"]["large"].to(torch.int32)
    torch.save(state, buffer)
    (tmp_path / "a.pt").write_bytes(rewritten(buffer.getvalue(), of_the_other_order))
    assert identical(ptfile.read(tmp_path / "a.pt").state, state)


def test_a_file_without_the_order_of_bytes_is_read_too(tmp_path):
    buffer, target, state = io.BytesIO(), io.BytesIO(), {"model": {"large": torch.arange(BIG)}}
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as archive, zipfile.ZipFile(target, "w") as new:
        for name in archive.namelist():
            if not name.endswith("/byteorder"):
                new.writestr(name, archive.read(name))
    (tmp_path / "a.pt").write_bytes(target.getvalue())
    assert identical(ptfile.read(tmp_path / "a.pt").state, state)


# --- damage and change ---------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "a.pt"
    return path, save(path, large_state())


def test_every_kind_of_damage_to_a_large_file_is_found(checkpoint):
    path, written = checkpoint
    whole, chance = path.read_bytes(), random.Random(5)
    for _ in range(150):
        at = chance.randrange(len(whole)) if chance.random() < 0.7 else -chance.randrange(1, 2000)
        broken = bytearray(whole)
        broken[at] ^= 1 << chance.randrange(8)
        path.write_bytes(broken)
        with pytest.raises(CheckpointDamaged, match="differs from the digest"):
            ptfile.read(path, size=written.size, digest=written.digest)
    for length in (*range(1, 200, 13), *chance.sample(range(len(whole)), 30)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointDamaged, match="its record says"):
            ptfile.read(path, size=written.size, digest=written.digest)
        with pytest.raises(CkptCacheError):
            ptfile.read(path)


@pytest.mark.parametrize("change", ["overwritten", "cut short"])
def test_what_becomes_of_a_file_once_it_is_verified_changes_nothing(checkpoint, monkeypatch, change):
    path, written = checkpoint
    check = integrity.check_digest

    def check_and_change(*arguments):
        check(*arguments)
        if change == "overwritten":
            path.write_bytes(os.urandom(written.size))
        else:
            os.truncate(path, 0)

    monkeypatch.setattr(ptfile, "check_digest", check_and_change)
    content = ptfile.read(path, size=written.size, digest=written.digest)
    assert identical(content.state, large_state())
    assert content.record == RECORD


def test_a_file_that_is_cut_short_while_it_is_read_is_damaged(checkpoint, monkeypatch):
    path, written = checkpoint
    places = ptimage.places

    def places_then_cut(*arguments):
        found = places(*arguments)
        os.truncate(path, written.size // 2)
        return found

    monkeypatch.setattr(ptimage, "places", places_then_cut)
    with pytest.raises(CheckpointDamaged, match="cut short while it was read"):
        ptfile.read(path, size=written.size, digest=written.digest)


def moved(data, name, source):
    """An archive whose directory has entry `name` begin where `source` does."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        to = archive.getinfo(f"archive/{source}").header_offset
        start = archive.start_dir
    at = data.index(f"archive/{name}".encode(), start)
    return data[: at - 4] + struct.pack("<L", to) + data[at:]


@pytest.mark.parametrize(("name", "source"), [("data/0", "data/1"), ("data.pkl", "data/1"), ("version", "data/0")])
def test_entries_that_lie_in_one_another_are_never_handed_over(tmp_path, name, source):
    buffer = io.BytesIO()
    torch.save({"model": {"a": torch.arange(BIG), "b": torch.ones(BIG)}}, buffer)
    (tmp_path / "a.pt").write_bytes(moved(buffer.getvalue(), name, source))
    try:
        theirs = torch.load(tmp_path / "a.pt", weights_only=True)
    except Exception:
        with pytest.raises(CkptCacheError):
            ptfile.read(tmp_path / "a.pt")
    else:
        assert identical(ptfile.read(tmp_path / "a.pt").state, theirs)


def test_entries_that_overlap_have_no_places(tmp_path):
    buffer = io.BytesIO()
    torch.save({"model": {"a": torch.arange(BIG), "b": torch.ones(BIG)}}, buffer)
    for data, places in ((buffer.getvalue(), 2), (moved(buffer.getvalue(), "data/0", "data/1"), None)):
        file = io.BytesIO(data)
        entries = audit.check_archive(file, tmp_path, len(data))
        if places is None:
            with pytest.raises(ValueError, match="overlap"):
                ptimage.places(file, entries, len(data))
        else:
            assert len(ptimage.places(file, entries, len(data))) == places


# --- the image as a file -------------------------------------------------------------------------


def image_of(data, cuts):
    ends = sorted({min(cut, len(data)) for cut in cuts})
    places = [ptimage.Place(start, end - start) for start, end in zip(ends[::2], ends[1::2], strict=False)]
    return ptimage.read(io.BytesIO(data), places, len(data))


@given(
    st.binary(min_size=1, max_size=200),
    st.lists(st.integers(0, 200), max_size=8),
    st.lists(st.tuples(st.integers(0, 220), st.integers(0, 230)), max_size=12),
)
def test_an_image_reads_like_the_file(data, cuts, looks):
    (image, measured), file = image_of(data, cuts), io.BytesIO(data)
    assert measured == integrity.Written(len(data), f"blake3:{blake3(data).hexdigest()}")
    for at, length in looks:
        assert image.seek(at) == file.seek(at)
        assert image.read(length) == file.read(length)
        assert image.tell() == file.tell()
    for whence, offset in ((2, -1), (2, 0), (1, 0)):
        assert image.seek(offset, whence) == file.seek(offset, whence)


def test_memory_that_nobody_claims_is_noticed():
    image, _ = image_of(bytes(range(100)), [10, 30, 50, 60])
    with image.handing_over():
        for offset, length in ((10, 20), (50, 10)):
            image.seek(offset)
            image.readinto(bytearray(length))
    assert image.left_unclaimed


def test_a_storage_shorter_than_what_is_stored_gets_its_beginning():
    data = bytes(range(100))
    image, _ = image_of(data, [10, 30])
    with image.handing_over():
        image.seek(10)
        image.readinto(bytearray(20))
        given = torch.UntypedStorage(5)
        claimed = image.claim(given, "cpu")
    assert claimed.data_ptr() == given.data_ptr()
    assert bytes(claimed.tolist()) == data[10:15]


def test_what_is_not_asked_for_as_a_whole_is_copied():
    data = bytes(range(100))
    image, _ = image_of(data, [10, 30])
    with image.handing_over():
        image.seek(10)
        assert image.read(19) == data[10:29]
        image.seek(9)
        assert image.read(21) == data[9:30]
    assert not image.left_unclaimed


def test_a_file_shorter_than_it_was_is_not_read():
    with pytest.raises(EOFError, match="cut short"):
        ptimage.read(io.BytesIO(b"abc"), [], 4)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, ArithmeticError])
def test_an_interrupt_while_torch_reads_is_no_damage(tmp_path, monkeypatch, raised):
    with TrainingCache(tmp_path) as cache:
        cache.save({"weights": torch.rand(300, 300), "bias": torch.rand(3)}, iteration=1, val_loss=1.0)
        (id,) = [record.id for record in cache.checkpoints()]
        actual, copy, calls = torch.load, ptimage.Image._copy_into, []
        fatal = [0]

        def interrupted(image, *args):
            calls.append(None)
            if len(calls) == fatal[0]:
                raise raised
            return copy(image, *args)

        def load(*args, **kwargs):
            with monkeypatch.context() as patch:
                patch.setattr(ptimage.Image, "_copy_into", interrupted)
                return actual(*args, **kwargs)

        monkeypatch.setattr(torch, "load", load)
        cache.load(id)
        fatal[0], count = 1, len(calls)
        while fatal[0] <= count:
            calls.clear()
            with pytest.raises(raised):
                cache.load(id)
            fatal[0] += 1
        assert count > 5
        fatal[0] = 0
        assert cache.load(id)["bias"].shape == (3,)


def test_a_fault_that_torch_does_not_repeat_is_not_the_files(tmp_path, monkeypatch):
    with TrainingCache(tmp_path) as cache:
        bias = torch.rand(3)
        record = cache.save({"weights": torch.rand(300, 300), "bias": bias}, iteration=1, val_loss=1.0)
        actual, faults = torch.load, [RuntimeError("PytorchStreamReader failed")]

        def load(*args, **kwargs):
            if faults:
                raise faults.pop()
            return actual(*args, **kwargs)

        monkeypatch.setattr(torch, "load", load)
        assert torch.equal(cache.load(record.id)["bias"], bias)
