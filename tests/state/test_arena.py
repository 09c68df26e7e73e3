"""The memory that saves are staged in."""

import gc
import mmap
import resource
import threading
import time
import weakref
from pathlib import Path

import pytest

from ckptcache.state import arena
from ckptcache.state.arena import Arena, available_bytes
from tests.faults import run_child, wait_until

MB = 1 << 20


def test_memory_is_page_aligned_and_taken_again_for_the_next_save():
    own = Arena()
    first = own.take(3 * MB)
    first[:5] = b"12345"
    own.give_back()
    again = own.take(2 * MB)
    assert (len(first), len(again), bytes(again[:5])) == (3 * MB, 2 * MB, b"12345")
    import numpy as np

    assert np.frombuffer(again, dtype=np.uint8).ctypes.data % mmap.PAGESIZE == 0
    assert own.size == 4 * MB


def test_a_larger_save_gets_larger_memory():
    own = Arena()
    own.take(MB)
    assert len(own.take(5 * MB)) == 5 * MB
    assert own.size == 6 * MB


def test_it_is_given_back_after_a_while_without_saves_and_not_while_one_is_going_on():
    own = Arena(idle_seconds=0.05)
    own.take(MB)
    time.sleep(0.1)
    assert own.size
    own.give_back()
    wait_until(lambda: own.size == 0)
    own.take(MB)
    own.give_back()
    own.take(MB)
    time.sleep(0.1)
    assert own.size


@pytest.mark.parametrize(("longest", "is_kept"), [(60.0, True), (0.1, False)])
def test_where_saves_are_far_apart_it_is_kept_for_the_next_one_within_limits(longest, is_kept):
    own = Arena(idle_seconds=0.05, longest=longest)
    own.take(MB)
    time.sleep(0.6)
    own.take(MB)
    own.give_back()
    time.sleep(0.4)
    assert bool(own.size) == is_kept


def test_memory_goes_with_its_cache_and_so_does_what_watches_it():
    own = Arena(idle_seconds=0.05)
    own.take(MB)
    own.give_back()
    timer, memory = own._timer, weakref.ref(own)
    del own
    gc.collect()
    assert memory() is None
    wait_until(lambda: not timer.is_alive())


def test_a_view_outlives_the_release():
    own = Arena()
    view = own.take(MB)
    own.release()
    view[-1] = 7
    assert own.size == 0


def test_where_memory_is_short_there_is_none(monkeypatch):
    monkeypatch.setattr(arena, "available_bytes", lambda: 65 * MB)
    assert Arena().take(MB) is None
    monkeypatch.setattr(arena, "available_bytes", lambda: 67 * MB)
    assert Arena().take(MB) is not None


def test_where_the_address_space_is_short_there_is_none():
    def body() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (used + 50 * MB, resource.RLIM_INFINITY))
        own = Arena()
        assert own.take(100 * MB) is None
        assert own.take(20 * MB) is not None

    assert run_child(body) == 0


def test_where_no_thread_can_be_started_the_memory_goes_at_once(monkeypatch):
    """As while the interpreter ends, from Python 3.12 on."""

    def refuse(self):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    own = Arena()
    own.take(MB)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    own.give_back()
    assert own.size == 0


class Cudart:
    """Stands in for CUDA's own library, and keeps what is locked."""

    def __init__(self):
        self.locked = set()

    def cudaHostRegister(self, address, size, flags):
        self.locked.add(address)
        return 0

    def cudaHostUnregister(self, address):
        self.locked.remove(address)
        return 0


@pytest.mark.parametrize("how", ["released", "forgotten", "replaced", "no thread"])
def test_pages_that_were_locked_for_a_device_are_unlocked_before_they_go(monkeypatch, how):
    library, own = Cudart(), Arena()
    monkeypatch.setattr(arena.torch.cuda, "cudart", lambda: library)
    own.take(MB, pinned=True)
    (first,) = library.locked
    if how == "no thread":
        monkeypatch.setattr(arena.threading.Timer, "start", lambda timer: (_ for _ in ()).throw(RuntimeError))
        own.give_back()
    elif how == "replaced":
        own.take(5 * MB)
    elif how == "released":
        own.release()
    else:
        del own
        gc.collect()
    assert first not in library.locked


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_what_is_prepared_is_there_before_it_is_taken():
    own, before = Arena(), resident()
    own.prepare(64 * MB)
    wait_until(lambda: resident() - before > 60 * MB)
    own.take(64 * MB)
    assert own.size == 64 * MB


def test_a_save_may_take_what_is_still_being_prepared_or_drop_it():
    own = Arena()
    for size in (32, 48, 40):
        own.prepare(32 * MB)
        view = own.take(size * MB)
        view[:] = bytes([7]) * len(view)
        own.prepare(MB)
        assert view[0] == view[-1] == 7
        own.release()
    assert own.size == 0


def test_nothing_is_prepared_where_memory_is_short(monkeypatch):
    own = Arena()
    monkeypatch.setattr(arena, "available_bytes", lambda: 65 * MB)
    own.prepare(MB)
    assert own.size == 0


def test_a_forked_child_shares_nothing_of_it():
    own = Arena()
    view = own.take(MB)
    view[:4] = b"past"

    def body() -> None:
        assert bytes(view[:4]) == bytes(4)
        own.release()

    assert run_child(body) == 0
    assert bytes(view[:4]) == b"past"


@pytest.mark.parametrize(
    ("limit", "used", "idle", "left"), [("1000", 700, 100, 400), ("max", 700, 100, None), ("500", 700, 0, 0)]
)
def test_the_limit_of_a_container_counts(tmp_path, limit, used, idle, left):
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {idle}\nactive_file 3\n")
    assert arena._of_container(tmp_path) == left
    assert arena._of_container(tmp_path / "none") is None


def test_this_machine_tells_what_is_free():
    found = available_bytes()
    assert found is None or found > 0
