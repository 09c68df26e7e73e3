"""Making `.training-progress/` in a repository, and telling its clone how to merge records."""

import shlex
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ckptcache.errors import CkptCacheError, GitFailed, MergeFailed, NotARepository
from ckptcache.progress.folder import ATTRIBUTES, IGNORED, ProgressFolder
from ckptcache.progress.git import Repository
from ckptcache.progress.record import read
from ckptcache.progress.summarize import lines, summarize, write_changed
from ckptcache.storage import fs
from ckptcache.storage.index import MAX_INDEX_BYTES, Index, serialise
from ckptcache.storage.merging import merge


@dataclass(slots=True)
class Prepared:
    """What `prepare` did.

    Attributes:
        written: files that were made or added to.
        driver: the command that git calls to merge records; None outside of a clone.
        notes: what else is to be known.
    """

    written: list[Path] = field(default_factory=list)
    driver: str | None = None
    notes: list[str] = field(default_factory=list)


def prepare(folder: ProgressFolder) -> Prepared:
    """Make the folder with its page and what keeps big files out of git; lines that people added there stay.

    Raises CacheDirNotWritable.
    """
    fs.ensure_folder(folder.root)
    prepared = Prepared(written=write_changed(standing_files(folder)))
    if not folder.page.exists():
        summarize(folder, [])
        prepared.written.append(folder.page)
    try:
        prepared.driver = install_driver(Repository.around(folder.root))
    except (NotARepository, GitFailed) as error:
        prepared.notes.append(f"git was not told how to merge records: {error}")
    return prepared


def standing_files(folder: ProgressFolder) -> dict[Path, bytes]:
    """`.gitignore` and `.gitattributes`, with what stands in them already and what they lack."""
    return {path: completed(own_bytes(path), needed) for path, needed in needed_lines(folder).items()}


def needed_lines(folder: ProgressFolder) -> dict[Path, tuple[str, ...]]:
    """The lines that `.gitignore` and `.gitattributes` must hold."""
    return {folder.root / ".gitignore": IGNORED, folder.root / ".gitattributes": ATTRIBUTES}


def own_bytes(path: Path) -> bytes:
    """What stands in a file of the folder; nothing where there is none, or a link to what is not the folder's."""
    return path.read_bytes() if path.is_file() and not path.is_symlink() else b""


def completed(there: bytes, needed: Iterable[str]) -> bytes:
    """`there` with those of the lines `needed` that it lacks."""
    known = set(there.decode(errors="replace").splitlines())
    if there and not there.endswith(b"\n"):
        there += b"\n"
    return there + lines(line for line in needed if line not in known)


# --- merging by git ------------------------------------------------------------------------------


def install_driver(repository: Repository) -> str:
    """Tell this clone, and no other, how to merge records; returns the command. Raises GitFailed."""
    command = f"{tool()} progress merge-driver %O %A %B"
    repository.configure("merge.ckptcache.name", "merge training records by record")
    repository.configure("merge.ckptcache.driver", command)
    # What is made of the records is made anew by the next summary, so that either side will do.
    repository.configure("merge.ckptcache-derived.name", "keep ours until it is made anew")
    repository.configure("merge.ckptcache-derived.driver", "true")
    return command


def tool() -> str:
    """This installation's `ckptcache` as a shell calls it: git runs drivers with whatever PATH it was started with."""
    own = Path(sys.executable).with_name("ckptcache")
    found = str(own) if own.exists() else shutil.which("ckptcache")
    return shlex.quote(found) if found else f"{shlex.quote(sys.executable)} -m ckptcache.cli"


def merge_files(base: Path, ours: Path, theirs: Path) -> Index:
    """Merge three versions of a record as git hands them over, and put the result in the place of `ours`.

    Raises MergeFailed, and leaves `ours` as it is, when one of them can't be read.
    """
    merged = merge(*(_version(path) for path in (base, ours, theirs)))
    fs.write_atomically(ours, serialise(merged), writer="merge")
    return merged


def _version(path: Path) -> Index:
    try:
        data = fs.read_bytes(path, limit=MAX_INDEX_BYTES)
        # Where both sides have added the file, there is no base, and git hands over an empty file for it.
        return read(data, path, lambda: ()).index if data.strip() else Index()
    except (CkptCacheError, OSError, ValueError) as error:
        raise MergeFailed(path=path, reason=error) from error
