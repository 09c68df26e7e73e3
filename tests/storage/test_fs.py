import errno
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from ckptcache.errors import CacheDirIsFile, CacheDirNotWritable, NotACheckpoint
from ckptcache.storage import fs
from tests.faults import (
    CountingSystem,
    FailingSystem,
    KillingSystem,
    run_child,
    swapped,
)

ERRORS = [errno.ENOSPC, errno.EIO, errno.EACCES]


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# --- writing -------------------------------------------------------------------------------------


def operations_of_a_write(path: Path) -> list[str]:
    with swapped(CountingSystem()) as counting:
        fs.write_atomically(path, b"old", writer="w0")
    return counting.operations


def test_a_write_syncs_the_data_before_the_rename_and_the_folder_after_it(tmp_path: Path) -> None:
    assert operations_of_a_write(tmp_path / "f") == ["create", "write", "fsync", "replace", "fsync_folder"]
    assert (tmp_path / "f").read_bytes() == b"old"
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
def test_a_failure_at_any_operation_leaves_the_old_content_or_the_new_and_no_temporary_file(
    tmp_path: Path, error: int
) -> None:
    path = tmp_path / "f"
    operations = operations_of_a_write(path)
    for at, operation in enumerate(operations):
        fs.write_atomically(path, b"old", writer="w0")
        with swapped(FailingSystem(at, error)) as failing, pytest.raises(OSError) as caught:
            fs.write_atomically(path, b"new", writer="w1")
        assert failing.hit
        assert caught.value.errno == error
        assert path.read_bytes() == (b"new" if operation == "fsync_folder" else b"old"), operation
        assert names(tmp_path) == ["f"], operation


def test_a_sync_that_failed_is_not_tried_again(tmp_path: Path) -> None:
    with swapped(FailingSystem(0, errno.EIO, "fsync")) as failing, pytest.raises(OSError):
        fs.write_atomically(tmp_path / "f", b"new", writer="w")
    assert failing.operations.count("fsync") == 1


@pytest.mark.parametrize("torn", [False, True])
def test_a_kill_at_any_operation_leaves_the_old_content_or_the_new(tmp_path: Path, torn: bool) -> None:
    path = tmp_path / "f"
    for at in range(len(operations_of_a_write(path))):
        fs.write_atomically(path, b"old", writer="w0")

        def killed_write(at: int = at) -> None:
            with swapped(KillingSystem(at, torn=torn)):
                fs.write_atomically(path, b"new and longer", writer=f"w{at}")

        assert run_child(killed_write) == -signal.SIGKILL
        assert path.read_bytes() in (b"old", b"new and longer")


def test_files_follow_the_umask(tmp_path: Path, umask: None) -> None:
    fs.write_atomically(tmp_path / "f", b"", writer="w")
    fs.ensure_folder(tmp_path / "a" / "b")
    assert mode_of(tmp_path / "f") == 0o640
    assert [mode_of(tmp_path / name) for name in ("a", "a/b")] == [0o750] * 2


def test_a_temporary_file_is_never_written_through_a_link_or_over_another(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"mine")
    (tmp_path / "f.w.tmp").symlink_to(tmp_path / "target")
    with pytest.raises(FileExistsError):
        fs.write_atomically(tmp_path / "f", b"new", writer="w")
    assert (tmp_path / "target").read_bytes() == b"mine"


@pytest.mark.parametrize("data", [b"", bytearray(b"abc"), np.arange(6.0).reshape(2, 3), np.empty((0, 3))], ids=repr)
def test_a_temporary_file_takes_anything_with_a_buffer(tmp_path: Path, data: object) -> None:
    temp = fs.TempFile(tmp_path / "f", "w")
    written = temp.write(data)
    temp.sync()
    temp.publish()
    assert (tmp_path / "f").read_bytes() == bytes(memoryview(data).tobytes())  # type: ignore[arg-type]
    assert written == (tmp_path / "f").stat().st_size


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reserves without writing")
def test_room_on_the_disk_is_taken_without_a_change_of_length(tmp_path: Path) -> None:
    temp = fs.TempFile(tmp_path / "f", "w")
    with pytest.raises(OSError) as caught:
        temp.reserve(1 << 55)
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    temp.reserve(1 << 20)
    temp.reserve(0)
    temp.close()
    assert temp.path.stat().st_size == 0
    assert temp.path.stat().st_blocks * 512 >= 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="a file system of Linux")
def test_where_room_cannot_be_reserved_nothing_is_said() -> None:
    fd = os.open("/proc/self/comm", os.O_WRONLY)
    try:
        fs.system.reserve(fd, 4096)
    finally:
        os.close(fd)


def test_short_writes_are_continued(tmp_path: Path) -> None:
    class Hesitant(fs.System):
        def write(self, fd: int, data: memoryview) -> int:
            return super().write(fd, data[:3])

    with swapped(Hesitant()):
        fs.write_atomically(tmp_path / "f", b"0123456789", writer="w")
    assert (tmp_path / "f").read_bytes() == b"0123456789"


# --- generations ---------------------------------------------------------------------------------


def test_a_generation_is_kept_as_often_as_asked_and_leaves_nothing_else(tmp_path: Path) -> None:
    path, kept = tmp_path / "f", tmp_path / "f.prev"
    fs.keep_generation(path, kept, writer="w")
    assert names(tmp_path) == []
    path.write_bytes(b"1")
    for _ in range(3):  # a write that fails after it, tried again
        fs.keep_generation(path, kept, writer="w")
    fs.write_atomically(path, b"2", writer="w")
    assert (path.read_bytes(), kept.read_bytes()) == (b"2", b"1")
    assert names(tmp_path) == ["f", "f.prev"]


def test_without_hard_links_a_generation_is_a_copy(tmp_path: Path) -> None:
    path, kept = tmp_path / "f", tmp_path / "f.prev"
    path.write_bytes(b"1")
    with swapped(FailingSystem(0, errno.EPERM, "link")) as failing:
        fs.keep_generation(path, kept, writer="w")
    assert failing.hit
    assert kept.read_bytes() == b"1"
    assert not kept.samefile(path)


def next_generation(path: Path, kept: Path) -> None:
    fs.keep_generation(path, kept, writer="w")
    fs.write_atomically(path, b"3", writer="w")


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
def test_a_failure_at_any_operation_of_a_generation_loses_neither(tmp_path: Path, error: int) -> None:
    path, kept = tmp_path / "f", tmp_path / "f.prev"
    path.touch()
    with swapped(CountingSystem()) as counting:
        next_generation(path, kept)
    for at, operation in enumerate(counting.operations):
        path.unlink()
        fs.write_atomically(path, b"2", writer="w0")
        fs.write_atomically(kept, b"1", writer="w0")
        with swapped(FailingSystem(at, error)) as failing, suppress(OSError):
            next_generation(path, kept)
        assert failing.hit
        assert (path.read_bytes(), kept.read_bytes()) in [(b"2", b"1"), (b"2", b"2"), (b"3", b"2")], operation
        if operation != "unlink":
            assert names(tmp_path) == ["f", "f.prev"], operation
        for name in set(names(tmp_path)) - {"f", "f.prev"}:
            (tmp_path / name).unlink()


# --- folders -------------------------------------------------------------------------------------


def test_a_folder_is_made_with_its_parents_once(tmp_path: Path) -> None:
    with swapped(CountingSystem()) as counting:
        assert fs.ensure_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
        fs.ensure_folder(tmp_path / "a" / "b")
    assert counting.operations == ["mkdir", "fsync_folder"] * 2


def test_many_may_make_one_folder_at_once(tmp_path: Path) -> None:
    failures = []

    def make(path: Path, together: threading.Barrier) -> None:
        together.wait()
        try:
            fs.ensure_folder(path)
        except CacheDirIsFile as error:
            failures.append(error)

    for i in range(300):
        together = threading.Barrier(3)
        threads = [threading.Thread(target=make, args=(tmp_path / str(i), together)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_a_folder_that_another_process_has_made_meanwhile_is_taken(tmp_path: Path) -> None:
    class Overtaken(fs.System):
        def mkdir(self, path: Path) -> None:
            path.mkdir()
            super().mkdir(path)

    with swapped(Overtaken()):
        assert fs.ensure_folder(tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("path", ["file", "file/below", "dangling"])
def test_a_file_where_a_folder_must_be_is_named(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CacheDirIsFile, match=path.split("/")[0]):
        fs.ensure_folder(tmp_path / path)


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
def test_a_folder_that_cannot_be_made_is_a_typed_error(tmp_path: Path, error: int) -> None:
    for operation in ("mkdir", "fsync_folder"):
        with swapped(FailingSystem(0, error, operation)), pytest.raises(CacheDirNotWritable, match=str(tmp_path)):
            fs.ensure_folder(tmp_path / operation)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_folder_that_may_not_be_looked_into_is_a_typed_error(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    tmp_path.chmod(0o755)

    def body() -> None:
        os.chdir(closed.parent)
        os.setuid(65534)
        with pytest.raises(CacheDirNotWritable, match="permission denied"):
            fs.ensure_folder(Path("closed") / "a" / "b")

    assert run_child(body) == 0


def test_a_scan_lists_regular_files_only(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "f")
    os.mkfifo(tmp_path / "pipe")
    assert {name: entry.size for name, entry in fs.scan(tmp_path).items()} == {"f": 3}
    assert fs.scan(tmp_path / "nowhere") == fs.scan(tmp_path / "f") == {}


def test_a_file_that_goes_while_a_folder_is_scanned_hides_no_other(tmp_path: Path) -> None:
    kept = {f"kept{i}" for i in range(20)}
    for name in kept:
        (tmp_path / name).touch()
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            for i in range(20):
                (tmp_path / f"passing{i}").touch()
            for i in range(20):
                (tmp_path / f"passing{i}").unlink()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(2000):
            assert kept <= fs.scan(tmp_path).keys()
    finally:
        stop.set()
        thread.join()


# --- reading -------------------------------------------------------------------------------------


def test_only_regular_files_are_opened_and_nothing_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "f")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(tmp_path)  # a socket's path may have 107 bytes
        listener.bind("socket")
        for name in ("link", "folder", "pipe", "socket"):
            with pytest.raises(NotACheckpoint, match=f"{name} .*not a regular file"):
                fs.open_regular(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        fs.open_regular(tmp_path / "gone")
    with fs.open_regular(tmp_path / "f") as file:
        assert file.read() == b"abc"


def test_no_more_than_the_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert fs.read_bytes(tmp_path / "f", limit=3) == b"abc"
    assert fs.read_bytes(tmp_path / "f", limit=2**40) == b"abc", "and no more memory is taken than it needs"
    with pytest.raises(ValueError, match="longer than 2 bytes"):
        fs.read_bytes(tmp_path / "f", limit=2)


# --- moving and removing -------------------------------------------------------------------------


def test_nothing_outside_the_root_is_removed(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "sub").mkdir(parents=True)
    outside.mkdir()
    (outside / "f").touch()
    (root / "door").symlink_to(outside)
    for path in (outside / "f", root / ".." / "outside" / "f", root / "door" / "f", root / "sub/../../outside/f", root):
        with pytest.raises(ValueError, match="is outside"):
            fs.remove(path, root=root)
    assert (outside / "f").exists()


def test_a_removal_says_whether_the_file_was_there_and_takes_a_link_for_itself(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    (tmp_path / "link").symlink_to(tmp_path / "f")
    assert fs.remove(tmp_path / "link", root=tmp_path)
    assert (tmp_path / "f").exists()
    assert fs.remove(tmp_path / "f", root=tmp_path)
    assert not fs.remove(tmp_path / "f", root=tmp_path)


def test_a_move_is_durable_on_both_sides(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "f").write_bytes(b"abc")
    with swapped(CountingSystem()) as counting:
        fs.move(tmp_path / "f", tmp_path / "a" / "g")
    assert counting.operations == ["replace", "fsync_folder", "fsync_folder"]
    assert (tmp_path / "a" / "g").read_bytes() == b"abc"


def test_what_goes_aside_to_another_file_system_is_copied_whole(tmp_path: Path) -> None:
    source, folder = tmp_path / "x.pt", tmp_path / "aside"
    folder.mkdir()
    source.write_bytes(b"content")
    with swapped(FailingSystem(0, errno.EXDEV, "link")) as failing:
        assert fs.move_aside(source, folder) == folder / "x.pt"
    assert failing.hit
    assert (folder / "x.pt").read_bytes() == b"content"
    assert names(folder) == ["x.pt"]
    assert not source.exists()


def test_a_scratch_folder_goes_with_all_that_is_in_it_and_spares_what_links_lead_to(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("stays")
    with pytest.raises(KeyError), fs.scratch("test-", inside=tmp_path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("goes")
        (folder / "link").symlink_to(tmp_path / "mine")
        raise KeyError
    assert not folder.exists()
    assert (tmp_path / "mine" / "file").read_text() == "stays"
    with fs.scratch("test-", inside=tmp_path, keep=True) as kept:
        pass
    assert kept.is_dir()


def test_a_new_file_is_never_an_existing_one(tmp_path: Path) -> None:
    with fs.new_file(tmp_path / "log") as file:
        file.write(b"at once")
        assert (tmp_path / "log").read_bytes() == b"at once"
    with pytest.raises(FileExistsError):
        fs.new_file(tmp_path / "log")
