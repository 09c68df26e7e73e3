"""Publishing a checkpoint: its file and its sidecar appear together, or not at all."""

from ckptcache.storage import fs
from ckptcache.storage.layout import Layout


class Publication:
    """A checkpoint on its way to the disk: written under a temporary name, then published, or withdrawn.

    `file` takes the checkpoint's bytes without any lock; `publish` is called under the index's
    lock, so that whoever holds it never sees a checkpoint that is about to be committed.
    """

    def __init__(self, layout: Layout, id: str, writer: str) -> None:
        fs.ensure_folder(layout.checkpoints)
        self._layout = layout
        self._id = id
        self._writer = writer
        self.file = fs.TempFile(layout.checkpoint(id), writer)
        self._temps = [self.file]
        self._published = False

    def publish(self, sidecar: bytes) -> None:
        """Give the synced file and its sidecar their names, durably."""
        beside = fs.TempFile(self._layout.sidecar(self._id), self._writer)
        self._temps.append(beside)
        beside.write(sidecar)
        beside.sync()
        self._published = True
        # The sidecar first: a crash in between leaves a sidecar to clean up, and no file without a record.
        beside.publish()
        self.file.publish()
        fs.sync_folder(self._layout.checkpoints)

    def begin_again(self) -> None:
        """Throw away what was written of the file, and write it anew."""
        self.file.discard()
        self.file = self._temps[0] = fs.TempFile(self._layout.checkpoint(self._id), self._writer)

    def keep(self) -> None:
        """Leave what was published as it is, whatever comes."""
        self._published = False

    def withdraw(self) -> None:
        """Remove every trace of it, whatever had been done."""
        for temp in self._temps:
            temp.discard()
        if self._published:
            remove_checkpoint(self._layout, self._id)


def remove_checkpoint(layout: Layout, id: str) -> None:
    """Remove a checkpoint's file, then its sidecar; the index must have decided so before."""
    layout.remove(layout.locate(id))
    layout.remove(layout.sidecar(id))
