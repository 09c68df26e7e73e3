import errno
import io
import json
import math
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from ckptcache.errors import CheckpointDamaged, CkptCacheError, NotACheckpoint, UnsafeCheckpoint
from ckptcache.storage import fs, integrity, ptfile
from tests.faults import FailingSystem, swapped
from tests.storage import hostile

RECORD = {"id": "ckpt_a", "iteration": 7, "val_loss": "nan"}
ROOT = Path(__file__).parents[2]
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EIGHT_BITS = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]
WHOLE = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
COMPLEX = [torch.complex64, torch.complex128]
DTYPES = [*FLOATS, *EIGHT_BITS, *WHOLE, *COMPLEX, torch.bool]


def save(path, state, record=RECORD):
    temp = fs.TempFile(path, "w1")
    written = ptfile.write(temp, state, record)
    temp.sync()
    temp.publish()
    return written


def round_trip(path, state):
    written = save(path, state)
    return ptfile.read(path, size=written.size, digest=written.digest).state


def raw(tensor):
    """The elements' bytes, so that NaN equals NaN and -0.0 differs from 0.0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def identical(left, right):
    if isinstance(left, torch.Tensor):
        layout = [(t.dtype, t.shape, t.stride(), t.storage_offset(), type(t), t.requires_grad) for t in (left, right)]
        return layout[0] == layout[1] and raw(left) == raw(right)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(identical(v, right[k]) for k, v in left.items())
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(identical, left, right))
    if isinstance(left, float):
        return struct.pack("d", left) == struct.pack("d", right)
    return left == right


# --- round trip ----------------------------------------------------------------------------------


def bits(dtype, count=24, seed=0):
    """A tensor of arbitrary bits: NaN with payload, denormals, infinities."""
    if dtype is torch.bool:
        return torch.arange(count) % 3 == 0
    if count == 0:
        return torch.empty(0, dtype=dtype)
    width = torch.empty(0, dtype=dtype).element_size()
    data = random.Random(seed).randbytes(count * width)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_by_bit(tmp_path, dtype):
    values = bits(dtype)
    state = {
        "model": {
            "flat": values,
            "matrix": values.reshape(4, 6),
            "turned": values.reshape(4, 6).t(),
            "every_other": values[1::2],
            "scalar": values[3].clone(),
            "view": values[5],
            "empty": values[:0],
            "zero_wide": values[:0].reshape(3, 0, 2),
        }
    }
    assert identical(round_trip(tmp_path / "a.pt", state), state)


trees = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats()
    | st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
    | st.binary(min_size=1, max_size=8)  # empty bytes are what torch writes and cannot read
    | st.builds(bits, st.sampled_from(DTYPES), st.integers(0, 5), st.integers(0, 9)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=("Cs",)), max_size=5) | st.integers(0, 9), inner, max_size=3
        )
        | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3).map(OrderedDict)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text("abcdef_", min_size=1, max_size=5), trees, max_size=3))
def test_every_tree_comes_back_as_it_was(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("tree") / "a.pt"
    assert identical(round_trip(path, state), state)


def test_a_real_training_state_comes_back_and_trains_on_alike(tmp_path):
    def training():
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
        return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=50)

    def step(model, optimizer, scheduler):
        optimizer.zero_grad()
        model(torch.arange(32.0).reshape(8, 4) / 32).square().sum().backward()
        optimizer.step()
        scheduler.step()

    parts = training()
    for _ in range(3):
        step(*parts)
    keys = ("model", "optimizer", "scheduler")
    state = {key: part.state_dict() for key, part in zip(keys, parts, strict=True)} | {"rng": torch.get_rng_state()}
    read = round_trip(tmp_path / "a.pt", state)
    assert identical(read, state)
    assert read["model"]._metadata == state["model"]._metadata
    others = training()
    for key, part in zip(keys, others, strict=True):
        part.load_state_dict(read[key])
    for both in (parts, others):
        step(*both)
    assert identical(others[0].state_dict(), parts[0].state_dict())


def test_tied_tensors_stay_tied(tmp_path):
    weight = torch.ones(4, 4)
    read = round_trip(tmp_path / "a.pt", {"model": {"in": weight, "out": weight, "row": weight[1]}})["model"]
    read["in"][1, 2] = 5
    assert read["out"][1, 2] == read["row"][2] == 5


def test_what_is_read_owns_its_memory(tmp_path):
    path = tmp_path / "a.pt"
    read = round_trip(path, {"model": {"w": torch.ones(2048)}})
    os.truncate(path, 0)
    read["model"]["w"] += 1
    assert read["model"]["w"].sum() == 4096


@pytest.mark.parametrize(
    "value",
    [
        torch.nn.Parameter(torch.ones(2)),
        torch.ones(3, 3).to_sparse(),
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.zeros(1).expand(10**9)[:3],
        torch.Size((1, 2)),
        torch.device("cpu"),
        torch.bfloat16,
        Counter("aab"),
        {1, 2},
        1j,
        bytearray(b"xyz"),
        random.Random(1).getstate(),
        2**100,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_torch_can_read_back_is_not_refused_for_want_of_a_digest(tmp_path, value):
    path = tmp_path / "foreign.pt"
    torch.save({"part": value, "other": 1}, path)
    read = ptfile.read(path).state["part"]
    assert type(read) is type(value)
    if isinstance(value, torch.Tensor):
        assert torch.equal(read.to_dense() if read.is_sparse else read, value.to_dense() if value.is_sparse else value)
    else:
        assert read == value


def test_tensors_with_attributes_of_their_own_come_back(tmp_path):
    tensor, parameter = torch.ones(2), torch.nn.Parameter(torch.ones(2))
    tensor.note = parameter.note = "x"
    torch.save({"part": [tensor, parameter]}, tmp_path / "a.pt")
    assert [t.note for t in ptfile.read(tmp_path / "a.pt").state["part"]] == ["x", "x"]


def test_plain_torch_reads_the_file(tmp_path):
    state = {"model": {"w": bits(torch.bfloat16)}, "extra": [1, "é", None]}
    save(tmp_path / "a.pt", state)
    for mmap in (True, False):
        read = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)
        header = read.pop(ptfile.HEADER)
        assert identical(read, state)
        assert header == {"format": ptfile.FORMAT, "record": RECORD}


def test_the_digest_is_what_b3sum_prints(tmp_path):
    path = tmp_path / "a.pt"
    written = save(path, {"model": {"w": torch.ones(5000)}})
    data = path.read_bytes()
    assert written == integrity.Written(len(data), f"blake3:{blake3(data).hexdigest()}")
    assert integrity.digest_of(path) == integrity.verify(path, size=written.size, digest=written.digest) == written


def test_the_record_inside_comes_back_with_the_measures(tmp_path):
    path = tmp_path / "a.pt"
    written = save(path, {"model": {}})
    content = ptfile.read(path)
    assert (content.record, content.size, content.digest) == (RECORD, written.size, written.digest)
    assert content.state == {"model": {}}


def test_the_same_state_is_written_alike_wherever_it_goes(tmp_path):
    state = {"model": {"w": torch.ones(5)}}
    assert save(tmp_path / "a.pt", state) == save(tmp_path / "b.pt", state)


@pytest.mark.parametrize("operation", ["reserve", "write"])
def test_a_write_that_fails_says_so_as_the_system_did(tmp_path, operation):
    with swapped(FailingSystem(at=0, error=errno.ENOSPC, operation=operation)):
        temp = fs.TempFile(tmp_path / "a.pt", "w1")
        with pytest.raises(OSError, match="No space left"):
            ptfile.write(temp, {"model": {"w": torch.ones(5000)}}, RECORD)
        temp.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*quantized:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage:UserWarning")
def test_what_only_torch_can_write_in_one_go_is_written_and_fails_as_before(tmp_path):
    quantised = torch.quantize_per_tensor(torch.arange(4.0), 0.5, 0, torch.qint8)
    read = round_trip(tmp_path / "a.pt", {"model": {"q": quantised}})
    assert torch.equal(read["model"]["q"].int_repr(), quantised.int_repr())
    data = torch.ones(4)
    temp = fs.TempFile(tmp_path / "b.pt", "w1")
    with pytest.raises(RuntimeError, match="view the same data as different types"):
        ptfile.write(temp, {"model": {"f": data, "i": data.view(torch.int32)}}, RECORD)
    temp.discard()


# --- foreign files -------------------------------------------------------------------------------


def foreign(path, payload):
    torch.save(payload, path)
    return ptfile.read(path)


def test_a_bare_state_dict_is_the_model(tmp_path):
    model = torch.nn.BatchNorm1d(2)
    content = foreign(tmp_path / "a.pt", model.state_dict())
    assert content.record is None
    assert list(content.state) == ["model"]
    assert content.state["model"]._metadata == model.state_dict()._metadata


def test_the_parts_of_the_oldest_layout_get_today_s_names(tmp_path):
    payload = {"model_state_dict": {"w": 1}, "optimizer_state_dict": {"s": 2}, "epoch": 3, "scheduler_state_dict": None}
    assert foreign(tmp_path / "a.pt", payload).state == {"model": {"w": 1}, "optimizer": {"s": 2}, "epoch": 3}


@pytest.mark.parametrize("keys", [("model", "model_state_dict"), ("state_dict", "model_state_dict")])
def test_no_part_is_lost_to_another_of_the_same_name(tmp_path, keys):
    payload = {key: {"value": number} for number, key in enumerate(keys)}
    values = [part["value"] for part in foreign(tmp_path / "a.pt", payload).state.values()]
    assert sorted(values) == [0, 1]


@pytest.mark.parametrize("version", [2, 99, None, "1"])
def test_a_newer_format_is_refused_by_number(tmp_path, version):
    torch.save({"model": {}, ptfile.HEADER: {"format": version, "record": RECORD}}, tmp_path / "a.pt")
    with pytest.raises(NotACheckpoint, match=f"format {version!r}"):
        ptfile.read(tmp_path / "a.pt")


# --- damage --------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    """A file of about 25 KB, and what it measured."""
    path = tmp_path / "ckpt_a.pt"
    torch.manual_seed(0)
    state = {
        "model": {f"layer{i}": torch.randn(20 + i, 20) for i in range(8)},
        "optimizer": {"step": 3, "m": torch.randn(2000)},
    }
    return path, save(path, state)


def found_damaged(path, written):
    with pytest.raises(CheckpointDamaged) as caught:
        ptfile.read(path, size=written.size, digest=written.digest)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return True


def test_every_truncation_is_found(checkpoint, counted):
    path, written = checkpoint
    assert 20_000 < written.size < 60_000
    found = 0
    for length in range(written.size - 1, -1, -1):
        os.truncate(path, length)
        try:
            ptfile.read(path, size=written.size, digest=written.digest)
        except CheckpointDamaged:
            found += 1
    assert found == written.size
    counted("bit rot", "truncations found in a file", found)


def test_a_truncation_is_found_by_the_digest_alone(checkpoint):
    path, written = checkpoint
    for length in range(written.size - 1, 0, -97):
        os.truncate(path, length)
        with pytest.raises(CheckpointDamaged):
            ptfile.read(path, digest=written.digest)


def flips(size, count, seed=0):
    """Places of single bits: spread over the whole file, all of the first and the last 64 bytes among them."""
    chance = random.Random(seed)
    edges = [(at, bit) for at in (*range(64), *range(size - 64, size)) for bit in range(8)]
    return edges + [(chance.randrange(size), chance.randrange(8)) for _ in range(count - len(edges))]


def flip(path, at, bit):
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def test_every_flipped_bit_is_found(checkpoint, counted):
    path, written = checkpoint
    for at, bit in flips(written.size, 3000):
        flip(path, at, bit)
        assert found_damaged(path, written), (at, bit)
        flip(path, at, bit)
    assert ptfile.read(path, size=written.size, digest=written.digest).record == RECORD
    counted("bit rot", "flipped bits found in a file", 3000)


def test_every_zeroed_page_is_found(checkpoint):
    path, written = checkpoint
    whole = path.read_bytes()
    for start in range(0, written.size, 512):
        for length in (512, 4096):
            page = slice(start, start + length)
            if any(whole[page]):
                path.write_bytes(whole[: page.start] + bytes(len(whole[page])) + whole[page.stop :])
                assert found_damaged(path, written)


def test_two_pages_that_changed_places_are_found(checkpoint):
    path, written = checkpoint
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + whole[8192:12288] + whole[4096:8192] + whole[12288:])
    assert found_damaged(path, written)


def test_a_file_that_grew_is_found(checkpoint):
    path, written = checkpoint
    with path.open("ab") as file:
        file.write(b"\0")
    assert found_damaged(path, written)


def test_damage_is_found_before_anything_is_decoded(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"model": hostile.Calling(os.mkdir, str(tmp_path / "sentinel"))}, path)
    size, digest = path.stat().st_size, integrity.digest_of(path).digest
    with pytest.raises(UnsafeCheckpoint):
        ptfile.read(path, size=size, digest=digest)
    for wrong in ({"size": size + 1}, {"digest": "blake3:" + "0" * 64}, {"size": size, "digest": "md5:0"}):
        with pytest.raises(CheckpointDamaged):
            ptfile.read(path, **wrong)
    assert not (tmp_path / "sentinel").exists()


def test_without_a_record_damage_never_brings_anything_but_a_clear_refusal(checkpoint):
    path, written = checkpoint
    refused = Counter()
    for at, bit in flips(written.size, 2000, seed=1):
        flip(path, at, bit)
        try:
            ptfile.read(path)
        except CkptCacheError as error:
            refused[type(error)] += 1
        flip(path, at, bit)
    assert refused[CheckpointDamaged] > 100


def test_without_a_record_every_truncation_is_refused_all_the_same(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"model": {"w": torch.ones(64)}, "step": 3}, path)
    for length in range(path.stat().st_size - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises((CheckpointDamaged, NotACheckpoint)):
            ptfile.read(path)


def test_a_pickle_damaged_at_random_never_brings_anything_else(tmp_path):
    chance, path = random.Random(5), tmp_path / "a.pt"
    with zipfile.ZipFile(
        io.BytesIO(_saved({"model": OrderedDict(w=torch.ones(4), b={"x": (1, 2.5, "s", b"y", None)})}))
    ) as file:
        pickled = file.read("archive/data.pkl")
    for _ in range(1500):
        changed = bytearray(pickled)
        for _ in range(chance.choice((1, 1, 2, 6))):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        # The checksum is right, so that the instructions themselves are what is judged.
        path.write_bytes(hostile.archive(bytes(changed)))
        for digest in (None, integrity.digest_of(path).digest):
            try:
                ptfile.read(path, digest=digest)
            except CkptCacheError as error:
                reason = str(error)
                assert str(path) in reason
                assert "\n" not in reason


READERS = (ptfile.read, integrity.digest_of, lambda path: integrity.verify(path, size=1, digest=None))


def _saved(payload):
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "call", [ptfile.read, integrity.digest_of, lambda path: integrity.verify(path, size=1, digest=None)]
)
def test_a_file_that_is_gone_is_not_called_damaged(tmp_path, call):
    with pytest.raises(FileNotFoundError):
        call(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "call", [ptfile.read, integrity.digest_of, lambda path: integrity.verify(path, size=1, digest=None)]
)
@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "fifo", "device", "link to a device"])
def test_only_regular_files_are_read(tmp_path, kind, call):
    path, target = tmp_path / "a.pt", tmp_path / "outside.pt"
    save(target, {"model": {}})
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        path.symlink_to({"link": target, "dangling link": "nowhere", "link to a device": "/dev/zero"}[kind])
    with pytest.raises(NotACheckpoint, match="regular file"):
        call(path)


def test_what_the_system_refuses_is_not_called_damaged(tmp_path):
    # A name that is too long stands for any refusal: as root, permissions refuse nothing.
    with pytest.raises(NotACheckpoint, match="name too long"):
        ptfile.read(tmp_path / ("x" * 300))


def test_a_mapping_of_nothing_is_read(tmp_path):
    assert foreign(tmp_path / "a.pt", {}).state == {}


@pytest.mark.parametrize("data", [b"", b"x", b"\0" * 5000, b"{}", b"PK", b"PK\x03\x04" * 50, b"\x80\x02}q\x00."])
def test_what_is_no_archive_is_refused(tmp_path, data):
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises((NotACheckpoint, CheckpointDamaged)):
        ptfile.read(tmp_path / "a.pt")


# --- hostile files -------------------------------------------------------------------------------


def test_the_corpus_is_in_earnest(tmp_path):
    sentinel = tmp_path / "sentinel"
    worked = 0
    for label in (
        "os.system",
        "exec",
        "eval",
        "subprocess.run",
        "os.mkdir",
        "subprocess.check_output",
        "partial",
        "map",
    ):
        pickle.loads(pickle.dumps(hostile.payloads(sentinel)[label], protocol=2))
        assert sentinel.exists(), label
        sentinel.rmdir() if sentinel.is_dir() else sentinel.unlink()
        worked += 1
    assert worked == 8
    assert len(list(hostile.corpus(sentinel))) >= 120
    path = tmp_path / "honest.pt"
    path.write_bytes(hostile.archive(hostile.HONEST))
    assert torch.equal(ptfile.read(path).state["model"]["model"], torch.zeros(4))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "files").mkdir()
    (folder / "inner.pt").write_bytes(b"")
    labels = {}
    for number, (label, data) in enumerate(hostile.corpus(folder / "sentinel")):
        (folder / "files" / f"{number:03}.pt").write_bytes(data)
        labels[f"{number:03}.pt"] = label
    return folder, labels


def test_every_hostile_file_is_refused_and_nothing_happens(corpus, counted):
    folder, labels = corpus
    for name, label in labels.items():
        path = folder / "files" / name
        measured = integrity.digest_of(path)
        for vouched in ({}, {"size": measured.size, "digest": measured.digest}):
            with pytest.raises((CheckpointDamaged, NotACheckpoint, UnsafeCheckpoint)) as caught:
                ptfile.read(path, **vouched)
            assert str(path) in str(caught.value), label
            assert "\n" not in str(caught.value), label
    assert sorted(p.name for p in folder.iterdir()) == ["files", "inner.pt"]
    counted("hostile input", "files by themselves", len(labels))


def test_a_file_that_would_run_code_is_called_unsafe_and_says_what_it_calls(corpus):
    folder, labels = corpus
    for name, label in labels.items():
        if label.startswith(("saved", "stored")):
            with pytest.raises(UnsafeCheckpoint, match="it calls"):
                ptfile.read(folder / "files" / name)


def test_what_a_file_claims_of_its_tensors_is_compared_before_torch_is_asked(tmp_path):
    path = tmp_path / "a.pt"
    for label, data in hostile.greedy().items():
        if label.startswith("storage ") and "beyond" in label:
            path.write_bytes(data)
            with pytest.raises(CheckpointDamaged, match=r"claims \d+ bytes"):
                ptfile.read(path)


_UNDER_PRESSURE = """
import json, os, resource, sys
from pathlib import Path
import torch
from ckptcache.errors import CkptCacheError
from ckptcache.storage import integrity, ptfile

torch.set_num_threads(1)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000,) * 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
outcome = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    measured = integrity.digest_of(path)
    for digest in (None, measured.digest):
        try:
            ptfile.read(path, digest=digest)
            outcome[path.name] = "read"
        except CkptCacheError as error:
            outcome[path.name] = str(error)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"outcome": outcome, "grown_kb": grown}))
"""


def test_nothing_happens_either_where_torch_is_told_to_trust_and_memory_is_short(corpus):
    folder, labels = corpus
    done = subprocess.run(
        [sys.executable, "-c", _UNDER_PRESSURE, str(folder / "files")],
        env={**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    result = json.loads(done.stdout)
    assert result["outcome"].keys() == labels.keys()
    for name, said in result["outcome"].items():
        assert said != "read", labels[name]
        # Refused for what it is, and not because the memory it asked for was not there.
        assert "memory" not in said, labels[name]
    assert result["grown_kb"] < 100_000
    assert sorted(p.name for p in folder.iterdir()) == ["files", "inner.pt"]


def test_too_little_memory_for_an_honest_file_is_not_called_damage(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"model": {"w": torch.zeros(200_000_000, dtype=torch.uint8)}}, path)
    done = subprocess.run(
        [sys.executable, "-c", _UNDER_PRESSURE.replace("300_000_000", "100_000_000"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "not enough memory" in json.loads(done.stdout)["outcome"]["a.pt"]


def test_the_inside_of_a_storage_is_not_for_the_file_to_change(tmp_path):
    (tmp_path / "a.pt").write_bytes(hostile.INSIDE_A_STORAGE)
    with pytest.raises(UnsafeCheckpoint, match="inside of a storage"):
        ptfile.read(tmp_path / "a.pt")


def test_a_hostile_link_in_place_of_a_checkpoint_is_not_followed(tmp_path):
    outside = tmp_path / "outside.pt"
    save(outside, {"model": {}})
    before = outside.stat()
    (tmp_path / "a.pt").symlink_to(outside)
    with pytest.raises(NotACheckpoint):
        ptfile.read(tmp_path / "a.pt")
    assert outside.stat() == before


def test_losses_in_the_record_are_what_json_holds(tmp_path):
    save(tmp_path / "a.pt", {"metrics": {"loss": math.nan}}, {"id": "a", "val_loss": "nan"})
    content = ptfile.read(tmp_path / "a.pt")
    assert math.isnan(content.state["metrics"]["loss"])
    assert content.record == {"id": "a", "val_loss": "nan"}
