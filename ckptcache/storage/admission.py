"""Files that came from elsewhere: let in only if the record vouches for them, by size and digest, before anything
of them is decoded.

The record comes from a place that is trusted (git), the files need not (a cache that others can write). What is
refused goes to quarantine, and its record stays as it is: a good copy may come another time.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ckptcache.errors import CheckpointDamaged, CkptCacheError
from ckptcache.metadata import CheckpointMetadata
from ckptcache.storage import fs, integrity
from ckptcache.storage.index import Index, IndexFile
from ckptcache.storage.layout import Layout
from ckptcache.storage.reconcile import quarantine, sidecar_bytes

Progress = Callable[[int, int], None]
"""Called with the bytes verified so far and in all."""


@dataclass(slots=True)
class Admission:
    """What came of it.

    Attributes:
        verified: ids of the checkpoints whose files are what their records say.
        refused: names of the files that went to quarantine, each with the reason.
    """

    verified: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def refuse_strangers(index: Index, layout: Layout) -> dict[str, str]:
    """Quarantine, unread, what lies among the checkpoints and isn't in `index`; its lock must be held.

    Returns the names with the reasons. A sidecar vouches for nothing here: it came with its file.
    """
    reason = "the record doesn't name it"
    return {path.name: _refuse(path, layout, reason) for path in _strangers(index, layout)}


def _strangers(index: Index, layout: Layout) -> Iterator[Path]:
    for name in sorted(fs.names(layout.checkpoints)):
        path = layout.checkpoints / name
        if path.suffix in (".pt", ".json") and path.stem not in index.checkpoints:
            yield path


def refuse_previous(file: IndexFile, layout: Layout, *, is_whole: bool, writer: str) -> dict[str, str]:
    """Let the generation before the index vouch for nothing, which can have come with the files; its lock must be held.

    Beside an index that is whole it becomes the same as that; one that would take a lost index's place is quarantined.
    """
    if is_whole:
        fs.keep_generation(file.path, file.previous, writer=writer)
    elif os.path.lexists(file.previous):
        return {file.previous.name: _refuse(file.previous, layout, "it may come from elsewhere, as the files do")}
    return {}


def verify_files(index: Index, layout: Layout, *, writer: str, progress: Progress | None = None) -> Admission:
    """Compare every file with its record, and quarantine those that differ; the index's lock must be held.

    A checkpoint whose record has no digest can't be vouched for, and is refused as well.
    """
    admission, files = Admission(), layout.files()
    wanted = [r for id, r in sorted(index.checkpoints.items()) if id in files and r.decision is None]
    done, total = 0, sum(files[r.id].size for r in wanted)
    for record in wanted:
        reason = _objection(layout.locate(record.id), record)
        if reason is None:
            admission.verified.append(record.id)
        else:
            admission.refused[f"{record.id}.pt"] = _refuse(layout.locate(record.id), layout, reason)
        done += files[record.id].size
        if progress is not None:
            progress(done, total)
    for id in sorted(index.checkpoints.keys() & {*admission.verified, *_sidecars(layout)}):
        _mend_sidecar(index.checkpoints[id], index, layout, writer)
    return admission


def _objection(path: Path, record: CheckpointMetadata) -> str | None:
    if record.digest is None or record.size is None:
        return "its record has no digest, so that nothing vouches for it"
    try:
        integrity.verify(path, size=record.size, digest=record.digest)
    except CheckpointDamaged as error:
        return str(error.fields["reason"])
    return None


def _sidecars(layout: Layout) -> Iterator[str]:
    return (name.removesuffix(".json") for name in fs.names(layout.checkpoints) if name.endswith(".json"))


def _mend_sidecar(record: CheckpointMetadata, index: Index, layout: Layout, writer: str) -> None:
    """A lost index is rebuilt from the sidecars, so that one from elsewhere must say what the record says."""
    path, wanted = layout.sidecar(record.id), sidecar_bytes(record, index)
    try:
        if fs.read_bytes(path, limit=len(wanted)) == wanted:
            return
    except (OSError, ValueError, CkptCacheError):
        pass  # whatever is wrong with it, it is written anew
    if path.is_dir() and not path.is_symlink():
        _refuse(path, layout, "it is a folder where a sidecar belongs")
    fs.write_atomically(path, wanted, writer=writer)


def _refuse(path: Path, layout: Layout, reason: str) -> str:
    quarantine(path, layout, reason=reason)
    return reason
