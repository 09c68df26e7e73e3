"""Where everything lies in a cache folder. A path is derived from an id, never read from a record."""

from pathlib import Path

from ckptcache.metadata import check_id
from ckptcache.storage import fs

WAITING = ".restored"
"""Behind the name of a checkpoint file that a backup brought: it counts once the index names it, and is never adopted.
So the commit of the index is what makes all of a backup count at one instant."""


class Layout:
    """The paths of one cache folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.checkpoints = root / "checkpoints"
        self.sessions = root / "sessions"
        self.quarantine = root / "quarantine"
        self.data = root / "data"

    def linked_folders(self) -> list[Path]:
        """Subfolders that are links. Nothing outside the cache is ever removed, so that such a one can't be kept."""
        folders = (self.checkpoints, self.sessions, self.quarantine, self.data)
        return [folder for folder in folders if folder.is_symlink()]

    def checkpoint(self, id: str) -> Path:
        """The file of a checkpoint."""
        return self.checkpoints / f"{check_id(id)}.pt"

    def waiting(self, id: str) -> Path:
        """Where the file of a checkpoint is that a backup brought, until it gets its final name."""
        return self.checkpoints / f"{check_id(id)}.pt{WAITING}"

    def sidecar(self, id: str) -> Path:
        """The record of a checkpoint, beside its file."""
        return self.checkpoints / f"{check_id(id)}.json"

    def lease(self, owner: str) -> Path:
        """The lock file that a session or writer holds while it lives."""
        return self.sessions / f"{check_id(owner)}.lock"

    def remove(self, path: Path) -> bool:
        """Remove a file of the cache; returns whether it was there. Raises ValueError when it lies elsewhere."""
        return fs.remove(path, root=self.root)

    def locate(self, id: str) -> Path:
        """Where the file of a checkpoint is: the oldest layout also kept files beside the index."""
        path = self.checkpoint(id)
        if path.exists():
            return path
        return next((other for other in (self.root / f"{id}.pt", self.waiting(id)) if other.is_file()), path)

    def files(self) -> dict[str, fs.Entry]:
        """The checkpoint files that are there, by id."""
        there = fs.scan(self.checkpoints, ending=(".pt", WAITING))
        waiting = {n.removesuffix(WAITING): there.pop(n) for n in list(there) if n.endswith(WAITING)}
        found = {**waiting, **fs.scan(self.root, ending=".pt"), **there}
        return {name.removesuffix(".pt"): entry for name, entry in found.items()}

    def file_ids(self) -> set[str]:
        """The ids of `files`, at a fraction of the cost."""
        found = (*fs.names(self.root), *fs.names(self.checkpoints))
        return {name.removesuffix(".pt") for name in found if name.endswith(".pt")}
