import errno
import os
import signal
import stat
import threading
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

from ckptcache.errors import LockTimeout
from ckptcache.storage import locks
from tests.faults import FailingSystem, end_of, run_child, start_child, swapped, wait_for

ERRORS = [errno.ENOSPC, errno.EIO, errno.EACCES]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_lock_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with locks.locked(tmp_path / "lock"):
            pass
        lease = locks.Lease(tmp_path / "lease.lock")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"lock": 0o640, "lease.lock": 0o640}
    lease.release()


# --- locks ---------------------------------------------------------------------------------------


def hold(lock: Path, signs: Path) -> None:
    """Hold `lock` until the file `release` appears among the signs."""
    with locks.locked(lock):
        (signs / "held").touch()
        wait_for(signs / "release")


def test_a_lock_that_another_process_keeps_times_out_by_name_and_is_free_after_its_death(tmp_path: Path) -> None:
    lock = tmp_path / "the.lock"
    child = start_child(lambda: hold(lock, tmp_path))
    wait_for(tmp_path / "held")
    with pytest.raises(LockTimeout, match=r"the\.lock for more than 0\.05 seconds"), locks.locked(lock, timeout=0.05):
        pytest.fail("it was held")
    os.kill(child, signal.SIGKILL)
    assert end_of(child) == -signal.SIGKILL
    with locks.locked(lock, timeout=5):
        pass
    assert lock.exists()


def count_up(lock: Path, counter: Path, times: int) -> None:
    for _ in range(times):
        with locks.locked(lock):
            number = int(counter.read_text())
            time.sleep(0)
            counter.write_text(str(number + 1))


def test_two_processes_exclude_each_other(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    children = [start_child(lambda: count_up(tmp_path / "lock", counter, 200)) for _ in range(2)]
    assert [end_of(child) for child in children] == [0, 0]
    assert counter.read_text() == "400"


def test_threads_exclude_each_other(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    threads = [threading.Thread(target=count_up, args=(tmp_path / "lock", counter, 100)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.read_text() == "300"


def test_a_lock_held_by_one_thread_delays_no_other_lock_and_no_forked_child(tmp_path: Path) -> None:
    thread = threading.Thread(target=hold, args=(tmp_path / "long", tmp_path))
    thread.start()
    wait_for(tmp_path / "held")
    try:
        with locks.locked(tmp_path / "short", timeout=5):
            pass
        with pytest.raises(LockTimeout), locks.locked(tmp_path / "long", timeout=0.05):
            pytest.fail("it was held")

        def other_lock() -> None:
            signal.alarm(10)
            with locks.locked(tmp_path / "short", timeout=5):
                pass

        assert run_child(other_lock) == 0
    finally:
        (tmp_path / "release").touch()
        thread.join()


# --- leases --------------------------------------------------------------------------------------


def keep_lease(path: Path, signs: Path, *, with_child: bool) -> None:
    lease = locks.Lease(path)
    if with_child:
        pid = start_child(lambda: wait_for(signs / "release"))
        (signs / "grandchild").write_text(str(pid))
    (signs / "ready").touch()
    wait_for(signs / "release")
    lease.release()


@pytest.mark.parametrize("with_child", [False, True])
def test_a_lease_lives_as_long_as_its_owner(tmp_path: Path, with_child: bool) -> None:
    path = tmp_path / "s.lock"
    owner = start_child(lambda: keep_lease(path, tmp_path, with_child=with_child))
    try:
        wait_for(tmp_path / "ready")
        assert locks.lease_state(path) == "live"
        os.kill(owner, signal.SIGKILL)
        assert end_of(owner) == -signal.SIGKILL
        if with_child:
            os.kill(int((tmp_path / "grandchild").read_text()), 0)  # it lives on
        assert locks.lease_state(path) == "dead"
        assert path.exists()
    finally:
        (tmp_path / "release").touch()


def test_a_lease_given_back_is_dead_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "s.lock"
    lease = locks.Lease(path)
    assert locks.lease_state(path) == "live"
    assert run_child(lease.release) == 0
    assert locks.lease_state(path) == "live"  # a child can't give it back
    lease.release()
    lease.release()
    assert locks.lease_state(path) == "dead"
    assert names(tmp_path) == []


@pytest.mark.parametrize("is_signed", [True, False])
def test_a_lease_given_back_while_it_is_looked_at_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_signed: bool
) -> None:
    path = tmp_path / "s.lock"
    lease = locks.Lease(path)
    if not is_signed:
        path.write_bytes(b"")

    class LockOfALateLooker(locks.FileLock):
        def acquire(self, *args: Any, **options: Any) -> Any:
            lease.release()
            return super().acquire(*args, **options)

    monkeypatch.setattr(locks, "FileLock", LockOfALateLooker)
    assert locks.lease_state(path) == "dead"
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("changed", "state"),
    [({"host": "elsewhere"}, "unknown"), ({"boot_id": "earlier"}, "dead"), ({"boot_id": ""}, "unknown")],
    ids=str,
)
def test_a_lease_of_another_machine_is_unknown_and_one_of_an_earlier_boot_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], state: str
) -> None:
    monkeypatch.setattr(locks, "_this_machine", lambda: {"host": "here", "boot_id": "now"})
    path = tmp_path / "s.lock"
    lease = locks.Lease(path)
    content = orjson.loads(path.read_bytes())
    lease.release()
    path.write_bytes(orjson.dumps({**content, **changed}))
    assert locks.lease_state(path) == state


@pytest.mark.parametrize("length", [0, 1, 20])
def test_a_lease_whose_owner_died_while_signing_is_unknown_and_live_until_then(tmp_path: Path, length: int) -> None:
    path = tmp_path / "s.lock"
    lease = locks.Lease(path)
    path.write_bytes(path.read_bytes()[:length])
    assert locks.lease_state(path) == "live"
    assert not locks.remove_dead_lease(path)
    content = path.read_bytes()
    lease.release()
    path.write_bytes(content)
    assert locks.lease_state(path) == "unknown"
    assert path.read_bytes() == content, "looking changes nothing"


@pytest.mark.parametrize("content", [b"[]", b"{}", b"\xff" * 5000], ids=lambda c: repr(c[:4]))
def test_a_lease_that_cannot_be_read_is_unknown(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.lock").write_bytes(content)
    assert locks.lease_state(tmp_path / "s.lock") == "unknown"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_lease_that_may_not_be_tried_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "s.lock"
    locks.Lease(path)
    path.chmod(0o444)
    tmp_path.chmod(0o755)

    def body() -> None:
        os.chdir(tmp_path)
        os.setuid(65534)
        assert Path("s.lock").read_bytes()
        assert locks.lease_state(Path("s.lock")) == "unknown"

    assert run_child(body) == 0


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
def test_a_lease_that_cannot_be_signed_is_not_kept(tmp_path: Path, error: int) -> None:
    for operation in ("overwrite", "write"):
        with swapped(FailingSystem(0, error, operation)) as failing, pytest.raises(OSError):
            locks.Lease(tmp_path / "s.lock")
        assert failing.hit
        assert names(tmp_path) == []
