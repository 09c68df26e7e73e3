"""A whole cache into one file, while others train in it: what the index names at one instant, read from open files.

An eviction can take a name away and not what is open. What is derived (prepared data), what failed verification
(quarantine) and what processes at work hold (leases, temporary files) stays out.
"""

import io
import logging
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from blake3 import blake3

from ckptcache import __version__
from ckptcache.catalog import Catalog
from ckptcache.errors import BackupFailed, CacheDirNotWritable, CacheNotFound, NotACheckpoint
from ckptcache.ledger import Ledger
from ckptcache.metadata import CheckpointMetadata
from ckptcache.storage import archive, fs, integrity, locks
from ckptcache.storage.index import serialise
from ckptcache.storage.manifest import Manifest, Member, described, name_of
from ckptcache.storage.reconcile import sidecar_bytes

log = logging.getLogger("ckptcache")
"""Called with the bytes read so far and in all."""
_LOOKS = 20
"""At a cache that others evict from, where its lock can't be taken."""


@dataclass(frozen=True, slots=True)
class Backup:
    """What a backup came to.

    Attributes:
        path, bytes: the file, and its size.
        checkpoints: ids of those whose files are in it.
        records, sessions: how many the index in it holds; of some the file was evicted, or is missing.
        damaged: ids of those left out because their files are not what their records say, with the reason.
        unrecorded: names of files left out because the index names no such checkpoint.
    """

    path: Path
    bytes: int
    checkpoints: tuple[str, ...]
    records: int
    sessions: int
    damaged: Mapping[str, str]
    unrecorded: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As `ckptcache backup --json` prints it."""
        return {
            "path": str(self.path),
            "bytes": self.bytes,
            "checkpoints": list(self.checkpoints),
            "records": self.records,
            "sessions": self.sessions,
            "damaged": dict(self.damaged),
            "unrecorded": list(self.unrecorded),
        }


def back_up(ledger: Ledger, path: Path, *, overwrite: bool = False, progress: archive.Overall | None = None) -> Backup:
    """Write everything that counts in a cache to one file at `path`; a damaged checkpoint is left out, loudly.

    Nothing of the cache is changed, and nothing is at `path` before all of it is durable.

    Raises:
        CacheNotFound: there is nothing to back up.
        BackupFailed: the file is there already, or has no place there, or the disk refuses.
        IndexDamaged, IndexTooNew, CacheDirNotReadable: the cache can't be read.
    """
    try:
        _check_target(ledger, path, overwrite)
        with _opened(ledger) as taken, _writer(ledger, path) as writer:
            manifest = _written(taken, path, writer, progress)
    except OSError as error:
        raise BackupFailed(cache=ledger.layout.root, path=path, reason=fs.reason_of(error)) from error
    for id, reason in taken.damaged.items():
        log.warning(
            "%s is left out of the backup: %s. Its record is in it, as of one whose file is missing.", id, reason
        )
    for name in taken.unrecorded:
        log.warning(
            "%s is left out of the backup: the index doesn't name it. `ckptcache doctor --repair` mends that.", name
        )
    return Backup(
        path=path,
        bytes=archive.length(manifest),
        checkpoints=tuple(m.id for m in manifest.members if m.kind == "checkpoint"),
        records=len(taken.catalog.index.checkpoints),
        sessions=len(taken.catalog.index.sessions),
        damaged=taken.damaged,
        unrecorded=taken.unrecorded,
    )


# --- where it goes -------------------------------------------------------------------------------


def _check_target(ledger: Ledger, path: Path, overwrite: bool) -> None:
    root = ledger.layout.root

    def refused(reason: str) -> BackupFailed:
        return BackupFailed(cache=root, path=path, reason=reason)

    inside = path.parent.resolve()
    if inside.is_relative_to(root.resolve()) and (inside != root.resolve() or path.suffix != ".tar"):
        raise refused("what lies within the cache is the cache's own, but for files that end in .tar beside the index")
    if path.is_dir():
        raise refused("it is a folder")
    if path.exists() and not overwrite:
        raise refused("the file is there already; overwrite it, or name another")
    if not path.parent.is_dir():
        raise refused("there is no such folder")


@contextmanager
def _writer(ledger: Ledger, path: Path) -> Iterator[str]:
    """The name of this backup in its temporary file, and a lease of that name in the cache.

    By it the next backup to the same file knows what one left that was killed. The name says which cache the lease is
    in: what another cache's backup is at, nobody here may remove.
    """
    origin = blake3(str(ledger.layout.root.resolve()).encode()).hexdigest()[:8]
    writer = f"backup_{origin}_{secrets.token_hex(4)}"
    try:
        ledger.hold(writer)
    except CacheDirNotWritable:
        writer = f"backup_{secrets.token_hex(4)}"  # and what is left of this one stays
    try:
        _remove_leftovers(ledger, path, origin)
        yield writer
    finally:
        ledger.release(writer)


def _remove_leftovers(ledger: Ledger, path: Path, origin: str) -> None:
    ours = re.compile(rf"{re.escape(path.name)}\.backup_{origin}_[0-9a-f]{{8}}{re.escape(fs.TEMP_SUFFIX)}")
    for name in filter(ours.fullmatch, fs.names(path.parent)):
        writer = name.removeprefix(f"{path.name}.").removesuffix(fs.TEMP_SUFFIX)
        if locks.lease_state(ledger.layout.lease(writer)) == "dead":
            with suppress(OSError):
                fs.remove(path.with_name(name), root=path.parent)
                log.info("removed %s, which a backup that was killed had left behind", path.with_name(name))
                locks.remove_dead_lease(ledger.layout.lease(writer))


# --- what goes there -----------------------------------------------------------------------------


@dataclass(slots=True)
class _Taken:
    """A cache at one instant: the index, and the files that it names, open."""

    catalog: Catalog
    files: dict[str, BinaryIO]
    damaged: dict[str, str] = field(default_factory=dict)

    @property
    def unrecorded(self) -> tuple[str, ...]:
        return tuple(sorted(path.name for path in self.catalog.observed.unrecorded.values()))


@contextmanager
def _opened(ledger: Ledger) -> Iterator[_Taken]:
    """The index, and every file it names, opened before anybody could evict it."""
    with ExitStack() as held:
        for _ in range(_LOOKS):
            with ledger.steady():
                taken, gone = _look(ledger, held)
            if not gone:
                break
        taken.damaged |= taken.catalog.observed.damaged
        yield taken


def _look(ledger: Ledger, held: ExitStack) -> tuple[_Taken, bool]:
    """What is there, and whether something of it was evicted between two looks at it."""
    held.close()
    catalog = ledger.view()
    if not catalog.index.checkpoints and not catalog.index.sessions:
        raise CacheNotFound(path=catalog.root)
    taken, gone = _Taken(catalog, {}), False
    for id in sorted(catalog.observed.available):
        try:
            taken.files[id] = held.enter_context(fs.open_regular(ledger.layout.locate(id)))
        except FileNotFoundError:
            gone = True
        except NotACheckpoint as error:
            taken.damaged[id] = error.fields["reason"]
    return taken, gone


def _written(taken: _Taken, path: Path, writer: str, progress: archive.Overall | None) -> Manifest:
    """Write it. A checkpoint that turns out damaged is taken out, with all that are, and the file begun again."""
    while True:
        manifest, sources = _manifest(taken)
        _check_room(taken, path, manifest)
        counted = archive.counted(progress, sum(m.size for m in manifest.members))
        try:
            with fs.replacing(path, writer=writer) as temp:
                archive.write(temp, manifest, sources, counted)
            return manifest
        except archive.Differs as found:
            taken.damaged[found.member.id] = found.reason
            _find_damaged(taken, manifest.members[manifest.members.index(found.member) + 1 :])


def _manifest(taken: _Taken) -> tuple[Manifest, dict[str, BinaryIO]]:
    """What to write. The sidecars are made of the index: one that is lost or broken is whole in the backup."""
    index = taken.catalog.index
    small = [("index", "", serialise(index))]
    members, sources = [], dict[str, BinaryIO]()
    files = {id: file for id, file in taken.files.items() if id not in taken.damaged}
    small += [("sidecar", id, sidecar_bytes(index.checkpoints[id], index)) for id in files]
    for kind, id, data in small:
        members.append(described("index" if kind == "index" else "sidecar", data, id))
        sources[members[-1].name] = io.BytesIO(data)
    for id, file in files.items():
        members.append(_member(index.checkpoints[id], file))
        sources[members[-1].name] = file
    made = int(datetime.now(UTC).timestamp())
    return Manifest(tuple(members), made, f"ckptcache {__version__}", dict(sorted(taken.damaged.items()))), sources


def _member(record: CheckpointMetadata, file: BinaryIO) -> Member:
    size, digest = record.size, record.digest
    if size is None or digest is None:
        # Of the oldest layout, and never read since: nothing vouches for it, and it is taken as it is.
        file.seek(0)
        measured = integrity.measure(file)
        size, digest = measured.size, measured.digest
    return Member("checkpoint", name_of("checkpoint", record.id), size, digest)


def _find_damaged(taken: _Taken, members: tuple[Member, ...]) -> None:
    for member in members:
        if member.kind == "checkpoint":
            try:
                archive.check(member, taken.files[member.id])
            except archive.Differs as found:
                taken.damaged[member.id] = found.reason


def _check_room(taken: _Taken, path: Path, manifest: Manifest) -> None:
    needed, free = archive.length(manifest), fs.free_bytes(path.parent)
    if needed > free:
        reason = f"it needs {needed} bytes, and {free} are free there"
        raise BackupFailed(cache=taken.catalog.root, path=path, reason=reason)
