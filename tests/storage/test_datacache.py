import errno
import json
import logging
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ckptcache.errors import CacheDirNotWritable, InvalidValue, NotCacheable
from ckptcache.storage import datafile, fs
from ckptcache.storage.datacache import CLOCK_SKEW, DataCache, is_fresh
from tests.faults import (
    CountingSystem,
    FailingSystem,
    KillingSystem,
    end_of,
    run_child,
    start_child,
    swapped,
    wait_for,
    wait_until,
)

HOUR = 3600.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Builder:
    """Builds `value`, and counts."""

    def __init__(self, value: Any = 1) -> None:
        self.value, self.built = value, 0

    def __call__(self) -> Any:
        self.built += 1
        return self.value


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(tmp_path: Path, clock: Clock) -> DataCache:
    return DataCache(tmp_path / "data", ttl_hours=10, clock=clock)


def never() -> Any:
    raise AssertionError("it was built although it is cached")


def file_of(cache: DataCache) -> Path:
    (file,) = cache.folder.glob("*.safetensors")
    return file


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_same(left: Any, right: Any) -> None:
    """Equal in kind, dtype, shape and every bit."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif isinstance(left, np.ndarray):
        assert (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())
    elif isinstance(left, torch.Tensor):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert torch.equal(left.flatten().view(torch.uint8), right.flatten().view(torch.uint8))
    else:
        assert left == right or (math.isnan(left) and math.isnan(right))


# --- what goes in comes out ----------------------------------------------------------------------

INTEGERS = [f"{sign}int{bits}" for sign in ("u", "") for bits in (8, 16, 32, 64)]
DTYPES = ["bool", *INTEGERS, "float16", "float32", "float64", "complex64", "complex128"]
TENSOR_DTYPES = [getattr(torch, name) for name in [*DTYPES, "bfloat16", "float8_e4m3fn", "float8_e5m2"]]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape, dtype = draw(SHAPES), draw(st.sampled_from(TENSOR_DTYPES))
    values = torch.tensor(draw(st.lists(st.integers(0, 100), min_size=math.prod(shape), max_size=math.prod(shape))))
    tensor = values.reshape(shape).to(dtype)
    return tensor.transpose(0, -1) if tensor.dim() > 1 and draw(st.booleans()) else tensor


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    array = draw(hnp.arrays(draw(st.sampled_from(DTYPES)), SHAPES))
    return draw(st.sampled_from([array, array.T, array[..., ::2] if array.ndim else array, np.asfortranarray(array)]))


TEXT = st.text(max_size=5)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
LEAVES = arrays() | tensors() | PLAIN
VALUES = LEAVES | st.dictionaries(TEXT, LEAVES, max_size=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(value=VALUES)
def test_what_goes_in_comes_out_at_the_first_call_and_at_each_later_one(tmp_path: Path, value: Any) -> None:
    cache = DataCache(tmp_path, ttl_hours=1)
    cache.clear()
    first = cache.get("k", lambda: value)
    assert_same(first, value)
    assert_same(cache.get("k", never), value)
    uncached = DataCache(tmp_path, ttl_hours=1, enabled=False).get("k", lambda: value)
    assert_same(uncached, value)


def test_forms_of_one_value_come_back_in_one_form(cache: DataCache) -> None:
    mapped = np.memmap(cache.folder.parent / "m", "int16", "w+", shape=(3,))
    given = {
        "big": np.arange(3, dtype=">i4"),
        "memmap": mapped,
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "read only": np.broadcast_to(np.float32(1), (2, 2)),
    }
    expected = {
        "big": np.arange(3, dtype="i4"),
        "memmap": np.zeros(3, "int16"),
        "parameter": torch.ones(2),
        "conjugate": torch.tensor([1 - 2j]),
        "read only": np.ones((2, 2), np.float32),
    }
    for value in (cache.get("k", lambda: given), cache.get("k", never)):
        assert_same(value, expected)
        assert not value["parameter"].requires_grad


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [
        (np.array([object()]), "array of object"),
        (np.array(["text"]), "array of <U4"),
        (np.array([b"bytes"]), "array of "),
        (np.zeros(2, [("a", "i4")]), "array of "),
        (np.array(["2020-01-01"], "datetime64[D]"), "array of datetime64"),
        (np.longdouble(1) * np.ones(2), "array of (float|longdouble)"),
        (np.ma.masked_array([1, 2], [True, False]), "MaskedArray"),
        (np.float64(1), "float64"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.empty(2, device="meta"), "meta"),
        (torch.zeros(2).to(torch.float8_e4m3fnuz), "tensor of torch.float8_e4m3fnuz"),
        ((1, 2), "tuple"),
        ([{"deep": [np.ones(2)]}], "ndarray"),
        ({1: 2}, "dict"),
        (2**64, "more than 64 bits"),
        (Path("x"), "Path"),
        ({1, 2}, "set"),
    ],
)
def test_what_cannot_come_back_is_named_and_leaves_nothing(cache: DataCache, leaf: Any, kind: str) -> None:
    with pytest.raises(NotCacheable, match=kind) as caught:
        cache.get("tokens", lambda: {"fine": np.ones(3), "culprit": leaf})
    assert "tokens['culprit']" in str(caught.value)
    assert not list(cache.folder.glob("*.safetensors*"))


def test_a_name_must_be_text_and_deep_nesting_ends(cache: DataCache) -> None:
    deep: list[Any] = []
    for _ in range(100):
        deep = [deep]
    for value in ({1: np.ones(2)}, {"__metadata__": np.ones(2)}, deep):
        with pytest.raises(NotCacheable):
            cache.get("k", lambda value=value: value)
    with pytest.raises(InvalidValue, match="key"):
        cache.get(3, never)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [10, datafile.MAP_FROM])
def test_the_value_is_the_callers_own(cache: DataCache, length: int) -> None:
    for kind in (np.zeros, torch.zeros):
        value = cache.get(kind.__module__, lambda kind=kind: kind(length))
        value += 1
        assert cache.get(kind.__module__, never).sum() == 0
        assert value.sum() == length


def test_large_arrays_are_mapped_and_outlive_the_file(cache: DataCache) -> None:
    big = np.arange(datafile.MAP_FROM, dtype=np.uint16)
    cache.get("k", lambda: {"pad": np.ones(1, np.int8), "big": big})
    value = cache.get("k", never)
    assert str(file_of(cache)) in Path("/proc/self/maps").read_text()
    assert value["big"].flags.aligned
    cache.clear()
    np.testing.assert_array_equal(value["big"], big)


def test_other_programs_can_read_it(cache: DataCache) -> None:
    value = {"x": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), "z": np.array([1 + 2j]), "n": 3, "": np.ones(2)}
    cache.get("k", lambda: {**value, "data": np.zeros(1)})
    found = safetensors.torch.load_file(file_of(cache))
    assert_same(found["x"], value["x"])
    assert torch.view_as_complex(found["z"]).tolist() == [1 + 2j]
    assert found[""].tolist() == [1, 1]


def test_torch_is_imported_for_tensors_only(tmp_path: Path) -> None:
    code = """if True:
        import sys
        from pathlib import Path
        from ckptcache.storage.datacache import DataCache
        cache = DataCache(Path(sys.argv[1]), ttl_hours=1)
        assert cache.get("plain", lambda: {"n": [1]}) == {"n": [1]}
        assert not cache.entries()[0].key.startswith("x")
        assert "numpy" not in sys.modules
        import numpy
        cache.get("array", lambda: numpy.ones(3))
        cache.get("array", lambda: None)
        assert "torch" not in sys.modules
        assert type(cache.get("tensor", lambda: None)).__module__ == "torch"
    """
    DataCache(tmp_path, ttl_hours=1).get("tensor", lambda: torch.ones(2))
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(datafile.__file__).parents[2])


# --- keys and configurations ---------------------------------------------------------------------


def test_another_configuration_is_another_entry(cache: DataCache) -> None:
    config = {"block": 8, "parts": ("a", "b"), "path": Path("x")}
    assert cache.get("k", lambda: 1, config) == 1
    assert cache.get("k", lambda: 2, {**config, "block": 9}) == 2
    assert cache.get("k", lambda: 3) == 3
    assert cache.get("k", never, dict(reversed(config.items()))) == 1
    assert len({entry.config for entry in cache.entries()}) == 3
    with pytest.raises(InvalidValue, match=r"config\.f"):
        cache.get("k", never, {"f": object()})


HOSTILE = [
    "../../x",
    "",
    ".",
    "..",
    "/etc/passwd",
    "a" * 5000,
    "naïve 数据 \U0001f600",
    "a\0b",
    "CON",
    "-rf",
    "\ud800",
    "a/b",
]


def test_hostile_keys_stay_in_the_folder_and_apart(tmp_path: Path) -> None:
    cache = DataCache(tmp_path / "in" / "data", ttl_hours=1)
    for i, key in enumerate([*HOSTILE, "a_b"]):
        assert cache.get(key, lambda i=i: i) == i
    for i, key in enumerate([*HOSTILE, "a_b"]):
        assert cache.get(key, never) == i
    assert {entry.key for entry in cache.entries()} == {*HOSTILE, "a_b"}
    assert names(tmp_path) == {"in"}
    assert names(tmp_path / "in") == {"data"}
    assert all(len(name) < 120 and name.isascii() and name[0].isalnum() for name in names(cache.folder))


def test_a_file_under_the_name_of_another_entry_is_not_taken_for_it(cache: DataCache) -> None:
    cache.get("a", lambda: 1)
    file = file_of(cache)
    cache.get("b", lambda: 2)
    (other,) = set(cache.folder.glob("*.safetensors")) - {file}
    shutil.copy(file, other)
    assert cache.get("b", lambda: 3) == 3


# --- time to live --------------------------------------------------------------------------------


def test_data_is_built_anew_when_it_has_outlived_its_time(cache: DataCache, clock: Clock) -> None:
    builder = Builder()
    cache.get("k", builder)
    clock.now += 10 * HOUR - 1
    cache.get("k", builder)
    assert builder.built == 1
    clock.now += 1
    cache.get("k", builder)
    cache.get("k", builder)
    assert builder.built == 2


def test_the_old_data_stays_when_building_it_anew_fails(cache: DataCache, clock: Clock) -> None:
    cache.get("k", lambda: "old")
    clock.now += 11 * HOUR
    before = names(cache.folder)

    def fail() -> None:
        raise KeyError("no source")

    with pytest.raises(KeyError, match="no source"):
        cache.get("k", fail)
    assert names(cache.folder) == before
    clock.now -= 11 * HOUR
    assert cache.get("k", never) == "old"


def test_data_from_the_future_is_stale_but_for_the_skew_between_clocks(cache: DataCache, clock: Clock) -> None:
    cache.get("k", lambda: 1)
    clock.now -= CLOCK_SKEW
    assert cache.get("k", never) == 1
    clock.now -= 1
    assert cache.get("k", lambda: 2) == 2
    assert cache.get("k", never) == 2


@pytest.mark.parametrize(
    ("age", "ttl", "fresh"),
    [
        *[(0, 0, False), (-1, 0, False), (0, 1, True), (3599, 1, True), (3600, 1, False), (1e12, math.inf, True)],
        *[(math.nan, 1, False), (-math.inf, 1, False), (-301, math.inf, False)],
    ],
)
def test_what_is_fresh(age: float, ttl: float, fresh: bool) -> None:
    assert is_fresh(age, ttl) is fresh


@pytest.mark.parametrize("ttl", [-1, math.nan])
def test_a_time_to_live_must_make_sense(tmp_path: Path, ttl: float) -> None:
    with pytest.raises(InvalidValue, match="ttl_hours"):
        DataCache(tmp_path, ttl_hours=ttl)


# --- damage --------------------------------------------------------------------------------------

SMALL = {"x": np.arange(5, dtype=np.uint16), "t": torch.ones(2), "n": [1.5]}


def check_rebuilt(cache: DataCache, caplog: pytest.LogCaptureFixture) -> None:
    builder = Builder(SMALL)
    caplog.clear()
    assert_same(cache.get("k", builder), SMALL)
    assert builder.built == 1
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "'k' can't be used" in caplog.text


def test_every_truncation_leads_to_a_rebuild(cache: DataCache, caplog: pytest.LogCaptureFixture) -> None:
    cache.get("k", lambda: SMALL)
    whole = file_of(cache).read_bytes()
    for length in range(len(whole)):
        file_of(cache).write_bytes(whole[:length])
        with quick():
            check_rebuilt(cache, caplog)
    file_of(cache).write_bytes(whole + b"\0")
    check_rebuilt(cache, caplog)


def test_every_flipped_bit_leads_to_a_rebuild(cache: DataCache, caplog: pytest.LogCaptureFixture) -> None:
    cache.get("k", lambda: SMALL)
    whole = file_of(cache).read_bytes()
    for bit in random.Random(0).sample(range(len(whole) * 8), 200):
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        file_of(cache).write_bytes(broken)
        with quick():
            check_rebuilt(cache, caplog)


def test_a_flipped_bit_in_a_mapped_file_leads_to_a_rebuild(cache: DataCache, caplog: pytest.LogCaptureFixture) -> None:
    value = np.zeros(datafile.MAP_FROM, np.uint8)
    cache.get("k", lambda: value)
    for place in (-1, -40, datafile.MAP_FROM // 2, 5, 300):
        broken = bytearray(file_of(cache).read_bytes())
        broken[place] ^= 1
        file_of(cache).write_bytes(broken)
        caplog.clear()
        assert not cache.get("k", lambda: value).any()
        assert "can't be used" in caplog.text


@contextmanager
def quick() -> Iterator[None]:
    """Without waiting for the disk: what is on it is not what is tested."""

    class Unsynced(fs.System):
        def fsync(self, fd: int) -> None: ...

    with swapped(Unsynced()):
        yield


class Exploding:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.sentinel,))


def sealed(header: object, body: bytes = b"") -> bytes:
    """A file with a digest that is right, as somebody who may write in the folder could make it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + body
    return content + blake3(content).digest()


def told(**changes: Any) -> dict[str, Any]:
    single = {"kind": "array", "dtype": "uint8", "shape": [4], "start": 0}
    record = {"format": 1, "key": "k", "config": "c", "created_at": 1_000_000.0, "single": {**single, **changes}}
    return {"__metadata__": {"ckptcache": json.dumps(record)}}


def test_nothing_planted_is_run_or_believed(cache: DataCache, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sentinel = tmp_path / "sentinel"
    np.save(tmp_path / "evil.npy", np.array([Exploding(sentinel)]), allow_pickle=True)
    planted = [
        (tmp_path / "evil.npy").read_bytes(),
        pickle.dumps(Exploding(sentinel)),
        sealed(pickle.dumps(Exploding(sentinel))),
        sealed(b"[" * 100_000),
        sealed(b"\xff\xfe"),
        sealed({}),
        sealed({"__metadata__": {"ckptcache": "[]"}}),
        sealed({"__metadata__": {"ckptcache": "{}"}}),
        sealed({"__metadata__": {"ckptcache": json.dumps({"format": 1, "key": "k", "config": 3})}}),
        *(
            sealed(told(**c), b"abcd")
            for c in ({"dtype": "object"}, {"dtype": "O"}, {"shape": [-4]}, {"shape": [2**70]})
        ),
        *(
            sealed(told(**c), b"abcd")
            for c in ({"start": -50}, {"start": 2**70}, {"shape": 4}, {"kind": "tensor", "shape": [99]})
        ),
        *(sealed(told(**c), b"abcd") for c in ({"kind": None, "shape": ["4"]}, {"shape": [64]}, {"start": None})),
        (2**63).to_bytes(8, "little") + bytes(100),
    ]
    cache.get("k", lambda: SMALL)
    for content in planted:
        file_of(cache).write_bytes(content)
        cache.entries()
        with quick():
            check_rebuilt(cache, caplog)
    assert not sentinel.exists()


def test_a_link_or_folder_in_place_of_an_entry_is_not_followed(cache: DataCache, tmp_path: Path) -> None:
    cache.get("k", lambda: 1)
    file = file_of(cache)
    (tmp_path / "outside").write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(tmp_path / "outside")
    before = (tmp_path / "outside").read_bytes()
    assert cache.get("k", lambda: 2) == 2
    assert not file.is_symlink()
    assert (tmp_path / "outside").read_bytes() == before
    file.unlink()
    file.mkdir()
    assert cache.get("k", lambda: 3) == 3


# --- many processes ------------------------------------------------------------------------------


def ask(folder: Path, count: Path, ready: Callable[[], None] = lambda: None) -> None:
    def build() -> dict[str, Any]:
        with count.open("a") as file:
            file.write("x")
        ready()
        threading.Event().wait(0.2)
        return {"x": np.arange(100)}

    value = DataCache(folder, ttl_hours=1).get("k", build)
    assert value["x"].sum() == 4950


def test_four_processes_that_ask_at_once_build_once(tmp_path: Path) -> None:
    children = [start_child(lambda: ask(tmp_path / "data", tmp_path / "count")) for _ in range(4)]
    assert [end_of(child) for child in children] == [0] * 4
    assert (tmp_path / "count").read_text() == "x"


def test_four_threads_that_ask_at_once_build_once(cache: DataCache) -> None:
    builder = Builder()
    threads = [threading.Thread(target=cache.get, args=("k", builder)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert builder.built == 1


def test_after_a_builder_was_killed_another_builds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ckptcache")
    data = tmp_path / "data"

    def stuck() -> None:
        (tmp_path / "ready").touch()
        wait_for(tmp_path / "never", 30)

    victim = start_child(lambda: ask(data, tmp_path / "count", stuck))
    wait_for(tmp_path / "ready")
    waiting = threading.Thread(target=ask, args=(data, tmp_path / "count"))
    waiting.start()
    wait_until(lambda: "waiting for another process" in caplog.text)
    os.kill(victim, signal.SIGKILL)
    assert end_of(victim) == -signal.SIGKILL
    waiting.join()
    assert (tmp_path / "count").read_text() == "xx"
    DataCache(data, ttl_hours=1).get("k", never)


@pytest.mark.parametrize("torn", [False, True])
def test_a_kill_at_any_operation_leaves_whole_data_or_none_and_no_leftovers(tmp_path: Path, torn: bool) -> None:
    with swapped(CountingSystem()) as counting:
        DataCache(tmp_path / "counted", ttl_hours=1).get("k", lambda: SMALL)
    for at in range(len(counting.operations)):
        cache = DataCache(tmp_path / str(at), ttl_hours=1)

        def killed(at: int = at, cache: DataCache = cache) -> None:
            with swapped(KillingSystem(at, torn=torn)):
                cache.get("k", lambda: SMALL)

        assert run_child(killed) == -signal.SIGKILL
        builder = Builder(SMALL)
        assert_same(cache.get("k", builder), SMALL)
        assert builder.built == (counting.operations[at] != "fsync_folder" or at < 4)
        assert {Path(name).suffix for name in names(cache.folder)} == {".lock", ".safetensors"}


# --- when nothing can be written -----------------------------------------------------------------


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS], ids=errno.errorcode.get)
def test_a_failure_at_any_operation_still_gives_the_data(
    tmp_path: Path, error: int, caplog: pytest.LogCaptureFixture
) -> None:
    with swapped(CountingSystem()) as counting:
        DataCache(tmp_path / "counted", ttl_hours=1).get("k", lambda: SMALL)
    for at in range(len(counting.operations)):
        cache, builder = DataCache(tmp_path / str(at), ttl_hours=1), Builder(SMALL)
        caplog.clear()
        with swapped(FailingSystem(at, error)) as failing:
            assert_same(cache.get("k", builder), SMALL)
        assert failing.hit
        assert builder.built == 1
        assert [r.levelname for r in caplog.records] == ["WARNING"]
        assert not list(cache.folder.glob("*.tmp"))
        assert_same(cache.get("k", builder), SMALL)


def test_the_old_data_stays_when_the_new_cannot_be_written(cache: DataCache, clock: Clock) -> None:
    cache.get("k", lambda: "old")
    clock.now += 11 * HOUR
    with swapped(FailingSystem(0, errno.ENOSPC, "write", lasting=True)) as failing:
        assert cache.get("k", lambda: "new") == "new"
    assert failing.hit
    clock.now -= 11 * HOUR
    assert cache.get("k", never) == "old"


def test_a_file_in_place_of_the_folder_hinders_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "data").write_text("mine")
    cache = DataCache(tmp_path / "data", ttl_hours=1)
    assert_same(cache.get("k", lambda: SMALL), SMALL)
    assert "built without being cached" in caplog.text
    assert (tmp_path / "data").read_text() == "mine"
    assert cache.entries() == []
    assert cache.clear() == 0


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_folder_that_may_not_be_written_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = DataCache(Path("data"), ttl_hours=1)
    monkeypatch.chdir(tmp_path)
    cache.get("there", lambda: SMALL)
    for path in [tmp_path, cache.folder, *cache.folder.iterdir()]:
        path.chmod(0o755 if path.is_dir() else 0o644)

    def body() -> None:
        os.setuid(65534)
        assert_same(cache.get("there", never), SMALL)
        assert_same(cache.get("not there", lambda: SMALL), SMALL)
        assert "built without being cached" in caplog.text
        assert len(cache.entries()) == 1
        with pytest.raises(CacheDirNotWritable):
            cache.clear()

    assert run_child(body) == 0


def test_an_error_of_the_builder_is_its_own(cache: DataCache, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "the builder's own disk is full")

    with pytest.raises(OSError, match="the builder's own"):
        cache.get("k", fail)
    assert not caplog.records
    assert {Path(name).suffix for name in names(cache.folder)} == {".lock"}


def test_disabled_it_builds_each_time_and_touches_nothing(tmp_path: Path) -> None:
    builder = Builder(SMALL)
    cache = DataCache(tmp_path / "data", ttl_hours=1, enabled=False)
    with swapped(CountingSystem()) as counting:
        for _ in range(2):
            assert_same(cache.get("k", builder), SMALL)
    assert builder.built == 2
    assert counting.operations == []
    assert not (tmp_path / "data").exists()


# --- looking and clearing ------------------------------------------------------------------------


def test_entries_tell_what_is_there(cache: DataCache, clock: Clock) -> None:
    assert cache.entries() == []
    cache.get("old", lambda: SMALL)
    clock.now += 9 * HOUR
    cache.get("young", lambda: 1, {"a": 1})
    clock.now += 2 * HOUR
    (cache.folder / "foreign.safetensors").touch()
    old, young = cache.entries()
    assert (old.key, old.fresh, old.age_seconds) == ("old", False, 11 * HOUR)
    assert (young.key, young.fresh, young.age_seconds) == ("young", True, 2 * HOUR)
    assert old.bytes == old.path.stat().st_size
    assert old.config != young.config
    old.path.write_bytes(b"broken")
    broken = cache.entries()[0]
    assert (broken.key, broken.config, broken.age_seconds, broken.fresh, broken.bytes) == (None, None, None, False, 6)


def fill(cache: DataCache, clock: Clock) -> dict[str, int]:
    cache.get("old", lambda: SMALL)
    clock.now += 5 * HOUR
    cache.get("young", lambda: 1)
    cache.get("young", lambda: 2, {"a": 1})
    (cache.folder / "mine.txt").write_text("mine")
    (cache.folder / "mine.safetensors").write_text("mine")
    return {str(entry.key): entry.bytes for entry in cache.entries()}


def test_clearing_frees_what_it_says_and_nothing_of_others(cache: DataCache, clock: Clock) -> None:
    fill(cache, clock)
    total = sum(entry.bytes for entry in cache.entries())
    locks = {name for name in names(cache.folder) if name.endswith(".lock")}
    assert cache.clear() == total
    assert cache.entries() == []
    assert names(cache.folder) == locks | {"mine.txt", "mine.safetensors"}
    assert cache.clear() == 0


def test_clearing_by_key_and_age(cache: DataCache, clock: Clock) -> None:
    sizes = fill(cache, clock)
    assert cache.clear("nothing") == 0
    assert cache.clear("young", older_than_hours=1) == 0
    assert cache.clear(older_than_hours=1) == sizes["old"]
    assert [entry.key for entry in cache.entries()] == ["young", "young"]
    assert cache.clear("young") > 0
    assert cache.entries() == []


def test_clearing_leaves_what_is_being_built_and_takes_what_the_dead_left(cache: DataCache, clock: Clock) -> None:
    freed = []
    cache.get("k", lambda: 0)
    clock.now += 11 * HOUR

    def build() -> int:
        other = threading.Thread(target=lambda: freed.append(cache.clear()))
        other.start()
        other.join()
        assert file_of(cache).exists()
        return 1

    cache.get("k", build)
    assert freed == [0]
    leftover = file_of(cache).with_name(f"{file_of(cache).name}.1f-00.tmp")
    leftover.write_bytes(b"12345")
    assert cache.clear(older_than_hours=1) == 5
    assert not leftover.exists()
    assert cache.get("k", never) == 1
