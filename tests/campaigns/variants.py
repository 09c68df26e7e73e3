"""Broken variants of our code: what a campaign's check must fail for, or the campaign proves nothing.

Each is a context manager, entered in the process that is to be broken.
"""

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ckptcache import backup, ledger, restoring, unpacking
from ckptcache.catalog import Catalog
from ckptcache.ledger import Change, Ledger
from ckptcache.metadata import CheckpointMetadata
from ckptcache.policy import quality
from ckptcache.signals import SignalWatch
from ckptcache.state import staging
from ckptcache.state.arena import Arena
from ckptcache.storage import fs, locks, ptfile, reconcile
from ckptcache.storage.archive import Archive
from ckptcache.storage.manifest import Member
from tests.faults import swapped

Variant = Callable[[], AbstractContextManager[None]]


def name_of(variant: Variant) -> str:
    """How the table at the end of a run calls it."""
    return variant.__name__.replace("_", " ")


class _NoFileSync(fs.System):
    """Bytes reach the disk when the system feels like it; names are synced as they should be."""

    def fsync(self, fd: int) -> None:
        pass

    def fsync_folder(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


class _NoFolderSync(fs.System):
    """Files are synced, the names they are renamed to are not."""

    def fsync_folder(self, path: Path) -> None:
        pass


@contextmanager
def without_file_sync() -> Iterator[None]:
    with swapped(_NoFileSync()):
        yield


@contextmanager
def without_folder_sync() -> Iterator[None]:
    with swapped(_NoFolderSync()):
        yield


@contextmanager
def evicting_before_the_commit() -> Iterator[None]:
    """Files go when their eviction is decided, and not when it is durable."""
    decide = Ledger.decide

    def early(self: Ledger, change: Change, decided: Mapping[str, str]) -> None:
        decide(self, change, decided)
        self.remove_files(decided)

    with patch.object(Ledger, "decide", early):
        yield


@contextmanager
def keeping_leftovers() -> Iterator[None]:
    """Nobody cleans up what the dead left behind."""
    with patch.object(ledger, "tidy", lambda *_: []):
        yield


@contextmanager
def keeping_half_backups() -> Iterator[None]:
    """The next backup leaves alone what the last one was killed at."""
    with patch.object(backup, "_remove_leftovers", lambda *_: None):
        yield


@contextmanager
def restoring_file_by_file() -> Iterator[None]:
    """Each of a backup's files is a checkpoint as soon as it is there."""
    copy = unpacking._copy

    def eager(owner: Ledger, archive: Archive, member: Member, temps: unpacking.Temps, progress: Any) -> None:
        copy(owner, archive, member, temps, progress)
        index, sidecar = unpacking._index_of(archive), owner.layout.sidecar(member.id)
        fs.write_atomically(sidecar, reconcile.sidecar_bytes(index.checkpoints[member.id], index), writer=owner.writer)
        temps.pop(member.id).publish()
        fs.move(owner.layout.waiting(member.id), owner.layout.checkpoint(member.id))

    with patch.object(unpacking, "_copy", eager):
        yield


@contextmanager
def keeping_temporary_files() -> Iterator[None]:
    """A write that failed leaves its half file."""
    with patch.object(fs.TempFile, "discard", fs.TempFile.close):
        yield


@contextmanager
def without_the_lock() -> Iterator[None]:
    """Every process changes the index when it likes."""
    with patch.object(locks, "locked", lambda *_, **__: nullcontext()):
        yield


@contextmanager
def without_a_second_look() -> Iterator[None]:
    """Who loses a race with an eviction gives up."""
    first_of_all = restoring.restore_first

    def once(owner: Ledger, choose: Callable[[], Any], *arguments: Any, **named: Any) -> Any:
        choice = choose()
        return first_of_all(owner, lambda: choice, *arguments, **named)

    with patch.object(restoring, "restore_first", once), patch.object(ledger, "_LOOKS", 1):
        yield


@contextmanager
def without_comparing_digests() -> Iterator[None]:
    """What a file holds is believed."""
    with patch.object(ptfile, "check_digest", lambda *_: None):
        yield


@contextmanager
def with_a_lock_that_children_keep() -> Iterator[None]:
    """flock as it is: whoever was forked while it was held holds it too."""

    @contextmanager
    def locked(path: Path, **_: Any) -> Iterator[None]:
        with path.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    with patch.object(locks, "locked", locked):
        yield


@contextmanager
def with_a_writer_that_children_keep() -> Iterator[None]:
    """A child writes in the name of its parent."""
    with patch.object(Ledger, "writer", property(lambda self: self._writer)):
        yield


@contextmanager
def writing_past_the_system() -> Iterator[None]:
    """Small files are written by Python itself."""

    def write(path: Path, data: bytes, *, writer: str) -> None:
        beside = path.with_name(f"{path.name}.{writer}.tmp")
        beside.write_bytes(data)
        beside.replace(path)

    with patch.object(fs, "write_atomically", write):
        yield


@contextmanager
def locking_to_look() -> Iterator[None]:
    """Who looks takes the lock of those who write."""
    view = Ledger.view

    def locked(self: Ledger) -> Catalog:
        with self.file.held():
            return view(self)

    with patch.object(Ledger, "view", locked):
        yield


@contextmanager
def deaf_to_signals() -> Iterator[None]:
    """A session leaves signals to Python."""
    with patch.object(SignalWatch, "install", lambda _: False):
        yield


@contextmanager
def ordering_by_time() -> Iterator[None]:
    """The latest is what the clock says."""
    with patch.object(CheckpointMetadata, "order", property(lambda self: (self.created_at, self.id))):
        yield


@contextmanager
def taking_infinity_for_a_number() -> Iterator[None]:
    """A loss that is not finite is a loss like any other."""
    with patch.object(quality, "_divergence", lambda _: None):
        yield


@contextmanager
def without_reading_sidecars() -> Iterator[None]:
    """A lost index is what the generation before it was."""
    with patch.object(reconcile, "read_sidecar", lambda *_: None):
        yield


@contextmanager
def decoding_freely() -> Iterator[None]:
    """Files are unpickled, whatever they hold."""
    load = torch.load
    with (
        patch.object(ptfile.audit, "check_pickle", lambda *_, **__: None),
        patch.object(ptfile.audit, "check_archive", lambda *_, **__: {}),
        patch.object(torch, "load", lambda *a, **k: load(*a, **{**k, "weights_only": False})),
    ):
        yield


@contextmanager
def following_links() -> Iterator[None]:
    """A cache goes where its folders lead."""
    with patch.object(Ledger, "refuse_links", lambda _: None), patch.object(fs, "remove", lambda p, **_: p.unlink()):
        yield


@contextmanager
def without_copying_at_the_call() -> Iterator[None]:
    """What a forward pass changes is written as it is when the thread comes to it."""
    with patch.object(staging, "_clone", lambda storage: storage):
        yield


@contextmanager
def without_waiting_for_the_copy() -> Iterator[None]:
    """An optimizer steps while its parameters are copied, and nobody looks whether they changed."""
    with (
        patch.object(staging.Staging, "settle", lambda _: None),
        patch.object(staging.Staging, "_has_changed", lambda _: False),
    ):
        yield


@contextmanager
def insisting_on_a_copy() -> Iterator[None]:
    """Memory is taken, whether it is there or not."""
    with patch.object(Arena, "take", lambda _, size: memoryview(bytearray(size))):
        yield


@contextmanager
def rebuilding_by_what_is_new() -> Iterator[None]:
    """A file calls for a function of torch's that earlier releases don't have."""
    known = torch._utils._rebuild_tensor_v2

    def _rebuild_tensor_anew(*arguments: Any) -> Any:
        return known(*arguments)

    _rebuild_tensor_anew.__module__, _rebuild_tensor_anew.__qualname__ = "torch._utils", "_rebuild_tensor_anew"
    with (
        patch.object(torch._utils, "_rebuild_tensor_anew", _rebuild_tensor_anew, create=True),
        patch.object(torch._utils, "_rebuild_tensor_v2", _rebuild_tensor_anew),
    ):
        yield
