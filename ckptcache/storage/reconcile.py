"""The index against the disk against the sidecars: what is available, missing, damaged, adoptable.

Opening, doctor, and everything that brings files from elsewhere use this one place, so that they
can't have different ideas of what is there. Looking changes nothing; `tidy` is what acts.
"""

from dataclasses import dataclass, field
from pathlib import Path

from ckptcache.errors import CkptCacheError, IndexDamaged
from ckptcache.metadata import CheckpointMetadata, is_valid_id
from ckptcache.storage import fs
from ckptcache.storage.index import Index, IndexFile, merge, parse, read_index_bytes, serialise
from ckptcache.storage.layout import Layout

MAX_SIDECAR_BYTES = 64 * 1024 * 1024


@dataclass(slots=True)
class Opened:
    """An index as it stands after looking at the disk."""

    index: Index
    adopted: list[str] = field(default_factory=list)
    """Checkpoints that the committed index doesn't name, taken up from their sidecars."""
    broken: IndexDamaged | None = None
    """Why the committed index could not be read, when it had to be rebuilt."""
    unreadable_sidecars: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Observed:
    """What is on the disk, seen from an index."""

    available: dict[str, int] = field(default_factory=dict)
    """Size in bytes of each checkpoint whose file is there and not decided against."""
    missing: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    unrecorded: dict[str, Path] = field(default_factory=dict)
    """Files without record or sidecar; the record inside them can still be read."""
    leftovers: dict[Path, str] = field(default_factory=dict)
    """What a crash or an eviction left behind, with what it is."""


# --- opening -------------------------------------------------------------------------------------


def open_index(file: IndexFile, layout: Layout) -> Opened:
    """The committed index, or the one rebuilt from `.prev` and the sidecars, with stray checkpoints adopted.

    Raises:
        IndexDamaged: it can't be read, and there is nothing from which to rebuild it.
        IndexTooNew: a later version wrote it.
    """
    opened = Opened(Index())
    try:
        committed = file.read()
    except IndexDamaged as error:
        committed, opened.broken = None, error
    opened.index = committed if committed is not None else _previous(file)
    _adopt_strays(opened, layout)
    if opened.broken is not None and not opened.index.checkpoints and not layout.files():
        raise opened.broken
    return opened


def _previous(file: IndexFile) -> Index:
    try:
        return parse(read_index_bytes(file.previous), file.previous)
    except (FileNotFoundError, IndexDamaged):
        return Index()


def _adopt_strays(opened: Opened, layout: Layout) -> None:
    known = opened.index.checkpoints
    for id in sorted(layout.files()):
        if id in known or not is_valid_id(id):
            continue
        try:
            found = read_sidecar(layout, id)
        except (IndexDamaged, CkptCacheError) as error:
            opened.unreadable_sidecars[id] = str(error)
            continue
        if found is not None:
            opened.index = merge(Index(), opened.index, found)
            opened.adopted.append(id)


def read_sidecar(layout: Layout, id: str) -> Index | None:
    """The sidecar of a checkpoint: an index of one record; None where there is none. Raises IndexDamaged."""
    path = layout.sidecar(id)
    try:
        found = parse(fs.read_bytes(path, limit=MAX_SIDECAR_BYTES), path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise IndexDamaged(path=path, reason=error) from error
    if set(found.checkpoints) != {id}:
        raise IndexDamaged(path=path, reason="it is the record of another checkpoint")
    return found


def sidecar_bytes(record: CheckpointMetadata, index: Index) -> bytes:
    """The sidecar of `record`: the index cut down to it and the configurations it names."""
    return serialise(Index(checkpoints={record.id: record}, configs=index.configs, fingerprints=index.fingerprints))


# --- observing -----------------------------------------------------------------------------------


def observe(index: Index, layout: Layout) -> Observed:
    """Compare `index` with the files. Sizes are compared, contents are not (see `ptfile.verify`)."""
    seen, files = Observed(), layout.files()
    for id, record in index.checkpoints.items():
        entry = files.get(id)
        if record.decision is not None:
            if entry is not None:
                seen.leftovers[layout.locate(id)] = f"the file of a checkpoint that was {record.decision}"
        elif entry is None:
            seen.missing[id] = "its file is gone"
        elif record.size is not None and entry.size != record.size:
            seen.damaged[id] = f"its file has {entry.size} bytes, and its record says {record.size}"
        else:
            seen.available[id] = entry.size
    for id in files:
        if id not in index.checkpoints and is_valid_id(id):
            seen.unrecorded[id] = layout.locate(id)
    _find_leftovers(seen, index, layout)
    return seen


def _find_leftovers(seen: Observed, index: Index, layout: Layout) -> None:
    for name in fs.scan(layout.checkpoints):
        path, record = layout.checkpoints / name, index.checkpoints.get(name.removesuffix(".json"))
        if name.endswith(fs.TEMP_SUFFIX) and writer_state(layout, name) == "dead":
            seen.leftovers[path] = "a file that a process died while writing"
        elif record is not None and record.decision is not None:
            seen.leftovers[path] = f"the sidecar of a checkpoint that was {record.decision}"


def writer_state(layout: Layout, temp_name: str) -> fs.LeaseState:
    """Whether the writer named in a temporary file's name still lives."""
    writer = temp_name.removesuffix(fs.TEMP_SUFFIX).rsplit(".", 1)[-1]
    return fs.lease_state(layout.lease(writer)) if is_valid_id(writer) else "unknown"


def leases(layout: Layout) -> dict[str, fs.LeaseState]:
    """The state of every session's and writer's lease that has a file."""
    owners = (name.removesuffix(".lock") for name in fs.scan(layout.sessions) if name.endswith(".lock"))
    return {owner: fs.lease_state(layout.lease(owner)) for owner in owners if is_valid_id(owner)}


# --- acting --------------------------------------------------------------------------------------


def tidy(seen: Observed, file: IndexFile, layout: Layout) -> list[Path]:
    """Remove what crashes and evictions left behind; the index's lock must be held. Returns what went."""
    removed = [path for path in seen.leftovers if fs.remove(path, root=layout.root)]
    for name in fs.scan(layout.root):
        # Temporary files here are only written under the lock, which is held: their writers are dead.
        if name.startswith(file.path.name) and name.endswith(fs.TEMP_SUFFIX):
            fs.remove(layout.root / name, root=layout.root)
            removed.append(layout.root / name)
    for owner, state in leases(layout).items():
        if state == "dead":
            fs.remove(layout.lease(owner), root=layout.root)
    return removed


def set_aside(file: IndexFile, layout: Layout) -> Path | None:
    """Move a broken index into quarantine, where nothing reads it; returns where it went."""
    if not file.path.exists():
        return None
    return quarantine(file.path, layout, reason="the index could not be read")


def quarantine(path: Path, layout: Layout, *, reason: str) -> Path:
    """Move a file that failed verification into quarantine, with the reason beside it; nothing is overwritten."""
    fs.ensure_folder(layout.quarantine)
    taken, number = fs.scan(layout.quarantine), 0
    target = layout.quarantine / path.name
    while target.name in taken:
        number += 1
        target = layout.quarantine / f"{path.stem}.{number}{path.suffix}"
    fs.move(path, target)
    fs.write_atomically(target.with_name(f"{target.name}.reason.txt"), f"{reason}\n".encode(), writer="quarantine")
    return target
