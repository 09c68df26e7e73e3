"""Care for a whole cache: pruning, counting, examining, and taking it elsewhere."""

import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptcache import checkup, transfer
from ckptcache.looking import Looking
from ckptcache.policy.retention import Plan

if TYPE_CHECKING:
    from ckptcache.backup import Backup
    from ckptcache.unpacking import Unpacked

log = logging.getLogger("ckptcache")


class Caring(Looking):
    """What is done to all that is there; see `TrainingCache`."""

    def prune(self, *, dry_run: bool = False) -> Plan:
        """Evict what is beyond the limits; the answer says of each checkpoint whether it stays, and why.

        With `dry_run` nothing is changed.
        """
        if dry_run:
            catalog = self._view()
            return catalog.retention_plan(catalog.latest(), self.ledger.live_sessions(catalog.index))
        with self._change() as change:
            plan = change.catalog().retention_plan(change.catalog().latest(), self.ledger.live_sessions(change.index))
            self.ledger.evict(change, plan.evicted)
        self.last_evicted = plan.evicted
        if plan.over_limit:
            log.warning("%s", plan.over_limit)
        return plan

    def stats(self) -> checkup.Stats:
        """Counts and bytes, limits, groups and prepared data."""
        return checkup.stats(self._view(), self.data)

    def doctor(
        self, *, repair: bool = False, verify: bool = True, progress: Callable[[int, int], None] | None = None
    ) -> list[checkup.Finding]:
        """Examine everything: index, sidecars, files, leftovers; with `repair`, mend what can be mended.

        Args:
            repair: set aside a broken index and rebuild it, adopt files without a record, quarantine
                damaged files, and remove what crashes left behind.
            verify: read every file and compare its digest, which takes as long as reading them.
            progress: called with the bytes verified so far and the bytes in all.
        """
        return checkup.examine(self.ledger, repair=repair, verify=verify, progress=progress)

    def rerank(self, **settings: Any) -> list[checkup.Move]:
        """What would move if quality were scored with other settings, such as ``quality_weight_loss=0.5``.

        Nothing is changed: scores are always computed from the records under the settings in force.
        """
        return checkup.rerank(self._view(), dataclasses.replace(self.config, **settings))

    def export(
        self, wanted: str, path: str | os.PathLike[str], *, optimizer: bool = False, overwrite: bool = False
    ) -> Path:
        """Write a checkpoint's model to `path`, ``.pt`` or ``.safetensors``; returns the path.

        Args:
            optimizer: write all other parts too. In safetensors only their tensors can be kept.

        Raises:
            ExportFailed: the ending is neither, or the file is there already and `overwrite` is off.
        """
        from ckptcache.restoring import read

        record = self.get(wanted)
        state = read(self.ledger, record).state
        return transfer.export(state, record, Path(path), everything=optimizer, overwrite=overwrite)

    def backup(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> "Backup":
        """Write the whole cache to one file: the index and every checkpoint that is there, as they are at one instant.

        Others may train in it meanwhile. A damaged checkpoint is left out and named in the answer.

        Args:
            path: the file, a plain tar; it is there once all of it is durable.
            overwrite: whether a file that is there already may be replaced.
            progress: called with the bytes read so far and the bytes in all.

        Raises:
            CacheNotFound: there is nothing to back up.
            BackupFailed: the file is there already, has no place there, or the disk refuses.
        """
        from ckptcache.backup import back_up

        self._finish_own()
        return back_up(self.ledger, Path(path), overwrite=overwrite, progress=progress)

    def restore_backup(
        self,
        path: str | os.PathLike[str],
        *,
        merge: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> "Unpacked":
        """Restore a backup into this cache's folder, which need not be there: all of it, or nothing.

        Args:
            path: what `backup` wrote; verified to the last byte before anything of it is put anywhere.
            merge: whether the folder may hold checkpoints of its own, to which those that it lacks are added.
            progress: called with the bytes read so far and the bytes in all.

        Raises:
            NotABackup, BackupDamaged, BackupTooNew: it can't be trusted or read; nothing was written.
            CacheNotEmpty: the folder holds checkpoints or sessions of its own, and `merge` is off.
            RestoreFailed, CacheDirNotWritable: the disk refuses, or both have another checkpoint of the same id.
        """
        from ckptcache.unpacking import unpack

        self._finish_own()
        return unpack(self.ledger, Path(path), combine=merge, progress=progress)
