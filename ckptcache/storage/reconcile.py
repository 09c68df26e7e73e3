"""The index against the disk against the sidecars: what is available, missing, damaged, adoptable.

Opening, doctor, and everything that brings files from elsewhere use this one place, so that they
can't have different ideas of what is there. Looking changes nothing; `tidy` is what acts.
"""

import os
import re
import secrets
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import orjson

from ckptcache.errors import CkptCacheError, IndexDamaged, IndexUnreadable, InvalidValue, NotACheckpoint
from ckptcache.metadata import CheckpointMetadata, is_valid_id
from ckptcache.storage import fs, locks
from ckptcache.storage.index import INDEX_NAME, Index, IndexFile, parse, read_index_bytes, serialise
from ckptcache.storage.layout import WAITING, Layout

_SUMMARY_TEMP = re.compile(r"training_summary\.json\.writer_[0-9a-f]{12}\.tmp")
"""Beside the index lie a user's files too: only a name that this package gives is taken for its own."""
MAX_SIDECAR_BYTES = 64 * 1024 * 1024


@dataclass(slots=True)
class Opened:
    """An index as it stands after looking at the disk."""

    index: Index
    adopted: list[str] = field(default_factory=list)
    """Checkpoints that the committed index doesn't name, taken up from their sidecars."""
    broken: IndexDamaged | None = None
    """Why the committed index could not be read, when it had to be rebuilt."""
    is_lost: bool = False
    """Whether there was one, and it is gone."""
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
    waiting: list[str] = field(default_factory=list)
    """Available checkpoints whose files a backup brought and a crash kept from their final names."""
    condemned: dict[Path, str] = field(default_factory=dict)
    """Files that a crash kept from quarantine after it was decided, with the reason."""


# --- opening -------------------------------------------------------------------------------------


def open_index(file: IndexFile, layout: Layout) -> Opened:
    """The committed index, or the one rebuilt from `.prev` and the sidecars, with stray checkpoints adopted.

    Raises:
        IndexDamaged: it can't be read, and there is nothing from which to rebuild it, or it is no index at all.
        IndexTooNew: a later version wrote it.
        IndexUnreadable: the system refuses to read it, which says nothing of what is in it.
    """
    opened, found = Opened(Index()), None
    try:
        found = file.read()
    except IndexDamaged as error:
        opened.broken = error
    strays = layout.file_ids()
    if found is None:
        found = _previous(file)
        opened.is_lost = found is not None and opened.broken is None
        strays |= _ids_of_sidecars(layout)
    opened.index = found or Index()
    _adopt_strays(opened, layout, strays)
    can_be_rebuilt = found is not None or bool(opened.adopted)
    if opened.broken is not None and not (can_be_rebuilt and _may_be_ours(file)):
        raise opened.broken
    return opened


def _ids_of_sidecars(layout: Layout) -> set[str]:
    """Records whose files are gone are not dropped, and without an index their sidecars may be all that is left.

    A sidecar whose file is still under its temporary name is of a save that came to no end.
    """
    found = fs.names(layout.checkpoints)
    unfinished = {name.split(".pt.")[0] for name in found if name.endswith(fs.TEMP_SUFFIX)}
    return {name.removesuffix(".json") for name in found if name.endswith(".json")} - unfinished


def _may_be_ours(file: IndexFile) -> bool:
    """Whether a broken index was one: something else in JSON may have the same name, and must stay where it is."""
    try:
        data = read_index_bytes(file.path)
        if b"schema_version" not in data and b"checkpoint" not in data:
            orjson.loads(data)
            return False
    except (FileNotFoundError, IndexDamaged, orjson.JSONDecodeError):
        pass
    return True


def _previous(file: IndexFile) -> Index | None:
    try:
        return parse(read_index_bytes(file.previous), file.previous)
    except (FileNotFoundError, IndexDamaged):
        return None


def _adopt_strays(opened: Opened, layout: Layout, ids: set[str]) -> None:
    """Take up those of `ids` that the index doesn't name; what it holds is never changed by a sidecar."""
    strays = Index()
    # Not a difference of sets, which goes through all that the index names.
    for id in sorted(id for id in ids if id not in opened.index.checkpoints):
        try:
            found = read_sidecar(layout, id) if is_valid_id(id) else None
        except CkptCacheError as error:
            opened.unreadable_sidecars[id] = str(error)
            continue
        if found is not None:
            strays.checkpoints.update(found.checkpoints)
            strays.configs.update(found.configs)
            strays.fingerprints.update(found.fingerprints)
            opened.adopted.append(id)
    if opened.adopted:
        opened.index = _with_strays(opened.index, strays)


def _with_strays(index: Index, strays: Index) -> Index:
    """A sidecar is written at the save, when nothing was decided against the checkpoint yet."""
    adopted = index.copy()
    for id, record in strays.checkpoints.items():
        adopted.checkpoints[id] = replace(record, decision=None, decision_reason=None)
    adopted.configs = {**strays.configs, **index.configs}
    adopted.fingerprints = {**strays.fingerprints, **index.fingerprints}
    return adopted


def read_sidecar(layout: Layout, id: str) -> Index | None:
    """The sidecar of a checkpoint: an index of one record; None where there is none. Raises IndexDamaged."""
    path = layout.sidecar(id)
    try:
        found = parse(fs.read_bytes(path, limit=MAX_SIDECAR_BYTES), path)
    except FileNotFoundError:
        return None
    except NotACheckpoint as error:
        raise IndexDamaged(path=path, reason=error.fields["reason"]) from error
    except OSError as error:
        raise IndexUnreadable(path=path, reason=fs.reason_of(error)) from error
    except ValueError as error:
        raise IndexDamaged(path=path, reason=error) from error
    if set(found.checkpoints) != {id}:
        raise IndexDamaged(path=path, reason="it is the record of another checkpoint")
    return Index(checkpoints=found.checkpoints, configs=found.configs, fingerprints=found.fingerprints)


def sidecar_bytes(record: CheckpointMetadata, index: Index) -> bytes:
    """The sidecar of `record`: the index cut down to it and the configurations it names.

    Raises InvalidValue for one that would be too long to be read again.
    """
    alone = Index(checkpoints={record.id: record}, configs=index.configs, fingerprints=index.fingerprints)
    data = serialise(alone)
    if len(data) > MAX_SIDECAR_BYTES:
        reason = f"no more than {MAX_SIDECAR_BYTES} are read again; keep less in `extra` and notes"
        raise InvalidValue(name=f"the record of {record.id}", value=f"{len(data)} bytes", reason=reason)
    return data


# --- observing -----------------------------------------------------------------------------------


def observe(index: Index, layout: Layout) -> Observed:
    """Compare `index` with the files. Sizes are compared, contents are not (see `integrity.verify`)."""
    seen, files = Observed(), layout.files()
    for id, record in index.checkpoints.items():
        entry = files.get(id)
        if record.decision is not None:
            if entry is not None and record.decision == "evicted":
                seen.leftovers[layout.locate(id)] = "the file of a checkpoint that was evicted"
            elif entry is not None:
                seen.condemned[layout.locate(id)] = record.decision_reason or record.decision
        elif entry is None:
            seen.missing[id] = "its file is gone"
        elif record.size is not None and entry.size != record.size:
            seen.damaged[id] = f"its file has {entry.size} bytes, and its record says {record.size}"
        else:
            seen.available[id] = entry.size
    for id in files:
        # Beside the index only files that it names are checkpoints: an export may lie there, and must not be evicted.
        if id not in index.checkpoints and is_valid_id(id) and layout.checkpoint(id).exists():
            seen.unrecorded[id] = layout.checkpoint(id)
    _find_leftovers(seen, index, layout)
    return seen


def _find_leftovers(seen: Observed, index: Index, layout: Layout) -> None:
    found = fs.names(layout.checkpoints)
    for name in found:
        if name.endswith(".json") and (what := _leftover_sidecar(name.removesuffix(".json"), index, found)):
            seen.leftovers[layout.checkpoints / name] = what
        if name.endswith(WAITING):
            _find_waiting(seen, layout.checkpoints / name, index)
    beside = [name for name in fs.names(layout.root) if name.startswith(INDEX_NAME) or _SUMMARY_TEMP.fullmatch(name)]
    folders = ((layout.checkpoints, found), (layout.root, beside), (layout.quarantine, fs.names(layout.quarantine)))
    for folder, names in folders:
        for name in names:
            if name.endswith(fs.TEMP_SUFFIX) and writer_state(layout, name) == "dead":
                seen.leftovers[folder / name] = "a file that a process died while writing"


def _find_waiting(seen: Observed, path: Path, index: Index) -> None:
    """What a backup brought is no one's until the index names it: whoever holds the lock may remove it."""
    id = path.name.removesuffix(WAITING).removesuffix(".pt")
    if id not in index.checkpoints or path.with_name(f"{id}.pt").exists():
        seen.leftovers[path] = "a file of a backup whose restoring came to no end"
    elif id in seen.available:
        seen.waiting.append(id)


def _leftover_sidecar(id: str, index: Index, found: Collection[str]) -> str | None:
    record = index.checkpoints.get(id)
    if record is not None:
        return None if record.decision is None else f"the sidecar of a checkpoint that was {record.decision}"
    return None if f"{id}.pt" in found or not is_valid_id(id) else "a sidecar without checkpoint or record"


def writer_state(layout: Layout, temp_name: str) -> locks.LeaseState:
    """Whether the writer named in a temporary file's name still lives."""
    states = {locks.lease_state(layout.lease(writer)) for writer in _possible_writers(temp_name)}
    return next((state for state in ("live", "unknown", "dead") if state in states), "unknown")


def _possible_writers(temp_name: str) -> Iterator[str]:
    """A writer's id may hold dots itself, so each ending of the name can be it."""
    parts = temp_name.removesuffix(fs.TEMP_SUFFIX).split(".")
    endings = (".".join(parts[start:]) for start in range(1, len(parts)))
    return (ending for ending in endings if is_valid_id(ending))


def leases(layout: Layout) -> dict[str, locks.LeaseState]:
    """The state of every session's and writer's lease that has a file."""
    owners = (name.removesuffix(".lock") for name in fs.names(layout.sessions) if name.endswith(".lock"))
    return {owner: locks.lease_state(layout.lease(owner)) for owner in owners if is_valid_id(owner)}


# --- acting --------------------------------------------------------------------------------------


def tidy(seen: Observed, file: IndexFile, layout: Layout) -> list[Path]:
    """Remove what crashes and evictions left behind, end quarantines that were cut short; returns what was removed.

    The index's lock must be held, since before `seen` was observed. What cannot be removed stays for the next time.
    """
    dead = [layout.lease(owner) for owner, state in leases(layout).items() if state == "dead"]
    # Temporary files beside the index are only written under its lock, which is held: their writers are dead.
    stale = [
        layout.root / name
        for name in fs.names(layout.root)
        if name.startswith(file.path.name) and name.endswith(fs.TEMP_SUFFIX)
    ]
    removed = [path for path in (*seen.leftovers, *stale) if _removed(path, layout)]
    for id in seen.waiting:
        with suppress(OSError):
            fs.move(layout.waiting(id), layout.checkpoint(id))
    for path, reason in seen.condemned.items():
        with suppress(OSError, CkptCacheError):
            quarantine(path, layout, reason=reason)
    for path in dead:
        with suppress(OSError):
            locks.remove_dead_lease(path)
    return removed


def _removed(path: Path, layout: Layout) -> bool:
    # A folder linked to since (ValueError) or one that is read-only must not keep a cache from opening.
    with suppress(OSError, ValueError):
        return layout.remove(path)
    return False


def set_aside(file: IndexFile, layout: Layout) -> Path | None:
    """Move a broken index into quarantine, where nothing reads it; returns where it went."""
    if not os.path.lexists(file.path):
        return None
    return quarantine(file.path, layout, reason="the index could not be read")


def quarantine(path: Path, layout: Layout, *, reason: str) -> Path:
    """Move a file that failed verification into quarantine, with the reason beside it; nothing is overwritten."""
    target = fs.move_aside(path, fs.ensure_folder(layout.quarantine))
    note = target.with_name(f"{target.name}.reason.txt")
    fs.write_atomically(note, f"{reason}\n".encode(errors="backslashreplace"), writer=secrets.token_hex(4))
    return target
