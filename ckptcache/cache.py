"""TrainingCache: checkpoints kept, ranked, restored and pruned. It sequences the wings and owns no policy."""

import dataclasses
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptcache import checkup, resume, transfer
from ckptcache import rollback as rolling_back
from ckptcache.catalog import Catalog, Explanation
from ckptcache.config import CacheConfig
from ckptcache.errors import (
    CheckpointNotFound,
    ConfigError,
    InvalidName,
)
from ckptcache.ledger import Change, Ledger
from ckptcache.metadata import ROLLBACK, CheckpointMetadata, NamePointer, SessionRecord, check_id, check_name
from ckptcache.policy.compatibility import Description
from ckptcache.policy.retention import Plan
from ckptcache.storage.datacache import DataCache
from ckptcache.values import jsonable, texts
from ckptcache.values import text as as_text

if TYPE_CHECKING:
    from ckptcache.backup import Backup
    from ckptcache.drafting import Draft
    from ckptcache.restoring import Restored
    from ckptcache.saving import Saver
    from ckptcache.unpacking import Unpacked

log = logging.getLogger("ckptcache")


class TrainingCache:
    """A folder of checkpoints that every run continues from.

    ``TrainingCache("runs/cache", max_checkpoints=5)`` or ``TrainingCache(CacheConfig(...))``. Many
    processes may use one folder at once. Nothing is written before the first save.

    Raises:
        ConfigError: the settings don't work.
        CacheDirIsFile: a file stands where the folder should be.
    """

    def __init__(self, config: CacheConfig | str | os.PathLike[str] | None = None, **settings: Any) -> None:
        if isinstance(config, CacheConfig):
            if settings:
                raise ConfigError(problems=f"give {', '.join(settings)} to CacheConfig, not beside it")
            self.config = config
        else:
            where: dict[str, Any] = {} if config is None else {"cache_dir": os.fspath(config)}
            self.config = CacheConfig(**where, **settings)
        # Absolute from here on: a program that changes its folder must not change its cache.
        self.ledger = Ledger(Path(self.config.cache_dir).absolute(), self.config)
        self.last_evicted: Mapping[str, str] = {}
        """What the latest save or prune evicted, as id to reason."""
        self.last_notes: tuple[str, ...] = ()
        """What the latest restore passed over, and why, whether it came to anything or not; one sentence each."""
        self.last_warned: tuple[str, ...] = ()
        """Those of `last_notes` that were logged as warnings."""
        self._saver: Saver | None = None
        self._warned_of: set[str] = set()

    @property
    def cache_dir(self) -> Path:
        """The folder, as it was given."""
        return Path(self.config.cache_dir)

    @cached_property
    def data(self) -> DataCache:
        """Prepared data, kept beside the checkpoints."""
        config = self.config
        return DataCache(
            self.ledger.layout.data, ttl_hours=config.data_cache_ttl_hours, enabled=config.data_cache_enabled
        )

    def __enter__(self) -> "TrainingCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish what is being written and give the folder back; the cache can be used again afterwards."""
        try:
            self.wait_until_finished()
        finally:
            self.ledger.close()

    # --- saving ----------------------------------------------------------------------------------

    def save(
        self,
        state: Mapping[str, Any],
        *,
        iteration: int,
        epoch: float | None = None,
        train_loss: float | None = None,
        val_loss: float | None = None,
        last_val_loss: float | None = None,
        last_val_loss_iteration: int | None = None,
        metrics: Mapping[str, float] | None = None,
        learning_rate: float | Iterable[float] | None = None,
        model_config: Any = None,
        training_config: Any = None,
        data_config: Any = None,
        tags: Iterable[str] = (),
        notes: str = "",
        extra: Mapping[str, Any] | None = None,
        save_reason: str = "manual",
        session: SessionRecord | None = None,
        parents: Iterable[str] = (),
        if_improved: bool = False,
        blocking: bool = True,
    ) -> CheckpointMetadata | None:
        """Save a checkpoint. When this returns (with `blocking`), it is synced, and survives kill -9.

        Args:
            state: named parts: objects with `state_dict`, generators, tensors, arrays, plain values, and trees.
            iteration: optimizer steps taken so far.
            val_loss: loss on the validation data now; None when not evaluated, NaN when diverged.
            metrics: further measurements by name; `CacheConfig.quality_metrics` says which are scored.
            learning_rate: per parameter group; found in the first optimizer of `state` if left out.
            model_config: mapping, dataclass or namespace; its `critical_params` must agree for a resume.
            data_config: what the data is; `val_digest` in it says which validation bytes.
            extra: the user's own metadata, anything that JSON can hold.
            if_improved: save only if the quality is better than the best of its group by
                `min_improvement_threshold`, or the first.
            blocking: False returns at once and writes in the background, one save at a time: an error is raised by
                the next call. What a forward pass may change is copied before it returns, what an optimizer in
                `state` steps before the next step of any optimizer begins. Call it from the thread that trains,
                between steps, and `staged` before parameters are changed in another way.

        Returns:
            The record; None if `if_improved` and it was not.

        Raises:
            NotSavable: something in `state` could not be read back; nothing was written.
            InvalidValue, InvalidId: an argument is not what it should be; nothing was written.
            SaveFailed, NoSpace: the disk refused; what was there before is untouched.
        """
        measured = {
            "iteration": iteration,
            "epoch": epoch,
            "train_loss": train_loss,
            "val_loss": val_loss,
            "last_val_loss": last_val_loss,
            "last_val_loss_iteration": last_val_loss_iteration,
            "metrics": dict(metrics or {}),
            "learning_rate": learning_rate,
        }
        configs = {"model_config": model_config, "training_config": training_config, "data_config": data_config}
        described = {"tags": tags, "notes": notes, "extra": jsonable(dict(extra or {}), "extra")}
        described |= {"save_reason": save_reason, "parents": parents}
        saver, self.last_evicted = self._background(), {}
        draft = self._draft(state, measured, configs, described, session)
        if if_improved:
            saver.wait(None if session is None else session.id)
            if not self._improves(draft):
                return None
        return saver.write(draft) if blocking else saver.write_later(draft, state)

    def wait_until_finished(self, *, session: str | None = None) -> None:
        """Wait for a save in the background; raises the error that one ended with.

        Args:
            session: only what the saves of the session with this id ended with; those of a `TrainingSession` are for
                it to tell of, and raised to nobody else.
        """
        if self._saver is not None:
            self._saver.wait(session)

    @property
    def is_saving(self) -> bool:
        """Whether a save is being written in the background."""
        return self._saver is not None and self._saver.in_flight.is_under_way

    def evicted_for(self, id: str) -> Mapping[str, str]:
        """What a session's save of a checkpoint evicted, as id to reason; told once."""
        return {} if self._saver is None else self._saver.evicted.pop(id, {})

    def staged(self) -> None:
        """Wait until parameters and optimizer state may be changed outside of an optimizer's step.

        A save in the background may still be copying them; its file is written afterwards all the same.
        """
        if self._saver is not None:
            self._saver.in_flight.settle()

    def _view(self) -> Catalog:
        """Everything as it stands, once what this process has saved counts."""
        self._finish_own()
        return self.ledger.view()

    def _change(self) -> AbstractContextManager[Change]:
        self._finish_own()
        return self.ledger.change()

    def _finish_own(self) -> None:
        """Whoever has saved sees what was saved, in the background too; what a save failed with is told elsewhere."""
        if self._saver is not None:
            self._saver.in_flight.wait()

    def _draft(
        self,
        state: Mapping[str, Any],
        measured: Mapping[str, Any],
        configs: Mapping[str, Any],
        described: Mapping[str, Any],
        session: SessionRecord | None,
    ) -> "Draft":
        from ckptcache.drafting import describe

        return describe(state, measured, configs, described, session, self.config.critical_params)

    def _background(self) -> "Saver":
        if self._saver is None:
            from ckptcache.saving import Saver

            # Weakly, for a cache that nobody holds gives its lease back at once, and not when a cycle is collected.
            note = weakref.WeakMethod(self._note_evicted)
            self._saver = Saver(self.ledger, on_evicted=lambda evicted: _call(note(), evicted))
        return self._saver

    def _note_evicted(self, evicted: Mapping[str, str]) -> None:
        self.last_evicted = evicted

    def _improves(self, draft: "Draft") -> bool:
        from ckptcache.drafting import improves

        return improves(self.ledger.view(), draft)

    # --- looking ---------------------------------------------------------------------------------

    def view(self) -> Catalog:
        """Everything at one instant: records, scores, groups and verdicts that belong together."""
        return self._catalog()

    def checkpoints(self, *, everything: bool = False) -> list[CheckpointMetadata]:
        """The available checkpoints, best first; with `everything`, all records, whether their files are there or not.

        Checkpoints of another architecture or other validation data can't be ranked against each
        other; such groups stand one after another, the one used last first.
        """
        catalog = self._catalog()
        return catalog.ranked(everything=everything)

    def get(self, wanted: str) -> CheckpointMetadata:
        """The record that an id, a unique prefix of one, a name, "best" or "latest" stands for.

        Raises CheckpointNotFound or AmbiguousId.
        """
        catalog = self._catalog()
        return catalog.scored(resume.find(catalog, wanted))

    def configs(self, record: CheckpointMetadata) -> dict[str, Any]:
        """The model's, training's and data's configuration that a record names by their hashes."""
        configs = self._catalog().index.configs
        names = ("model_config", "training_config", "data_config")
        return {name: configs.get(getattr(record, name) or "") for name in names}

    def sessions(self) -> list[SessionRecord]:
        """Every session, oldest first."""
        return sorted(self._catalog().index.sessions.values(), key=lambda s: s.order)

    def names(self) -> dict[str, str]:
        """Every name, with the id of the checkpoint that it points to."""
        return {name: pointer.checkpoint for name, pointer in sorted(self._catalog().index.names.items())}

    def best(
        self, model: Any = None, *, model_config: Any = None, data_config: Any = None
    ) -> CheckpointMetadata | None:
        """The best available checkpoint that fits, or None.

        Args:
            model: a module, or a mapping of the objects that are to be restored; None compares configurations only.
        """
        needed = self.needed(model, model_config=model_config, data_config=data_config)
        return self._catalog(needed).best(needed)

    def explain(self, model: Any = None, *, model_config: Any = None, data_config: Any = None) -> list[Explanation]:
        """For every checkpoint that wasn't evicted, in the order "best" tries them: its score taken apart,
        how it fits, and why it would or would not be resumed from."""
        needed = self.needed(model, model_config=model_config, data_config=data_config)
        return self._catalog(needed).explain(needed)

    def needed(self, model: Any = None, *, model_config: Any = None, data_config: Any = None) -> Description:
        """What a checkpoint has to fit, of live objects and declared configurations."""
        fingerprint = None
        if model is not None:
            from ckptcache.state.capture import fingerprint as fingerprint_of

            fingerprint = fingerprint_of(model if isinstance(model, Mapping) else {"model": model})
        return Description(
            fingerprint,
            None if model_config is None else jsonable(model_config, "model_config"),
            None if data_config is None else jsonable(data_config, "data_config"),
        )

    def _catalog(self, needed: Description | None = None) -> Catalog:
        if needed is not None and needed.fingerprint is not None:
            self._learn_unknown()
        catalog = self._view()
        if new := set(catalog.unscored_metrics()) - self._warned_of:
            self._warned_of |= new
            log.warning(
                "recorded and not scored, because not every value is in [0, 1]: %s; declare quality_metrics to "
                "score them",
                ", ".join(sorted(new)),
            )
        return catalog

    # --- restoring -------------------------------------------------------------------------------

    def restore(
        self,
        objects: Mapping[str, Any],
        *,
        resume: str = "best",
        model_config: Any = None,
        data_config: Any = None,
        rng: bool = True,
        only: Callable[[CheckpointMetadata], bool] | None = None,
    ) -> "Restored | None":
        """Restore `objects` from the checkpoint that the policy chooses; None means a fresh start.

        Candidates are tried in order: read, verified, checked, applied. One that fails is
        quarantined or passed over, loudly, and the next is tried. All is restored, or nothing.

        Args:
            objects: live objects by the names they were saved under; filled in place.
            resume: "best", "latest", "auto" (an interrupted session goes on from its latest, else
                best), "never", or an id or name.
            rng: whether to restore the global random number generators, if they were saved.
            only: says of a record whether its checkpoint may be taken at all.

        Raises:
            CheckpointNotFound, CheckpointMissing, CheckpointDamaged, Incompatible, NotRestorable: the checkpoint
                that `resume` names can't be restored.
            InvalidValue: one of `objects` can't be changed in place, such as a number.
        """
        from ckptcache.restoring import restore_first
        from ckptcache.state.restore import check_fillable

        check_fillable(objects)
        self.staged()
        self.last_notes = self.last_warned = ()
        needed = self.needed(objects, model_config=model_config, data_config=data_config)
        restored, told = restore_first(
            self.ledger, lambda: self.choose(needed, resume).restricted(only), objects, rng=rng
        )
        self.last_notes, self.last_warned = told.notes, told.warned
        return restored

    def choose(self, needed: Description, policy: str) -> resume.Choice:
        """The checkpoints that `restore` would try under `policy`, in order, without reading any."""
        catalog = self._catalog(needed)
        held = self.ledger.sessions_by_lease(catalog.index)
        return resume.choose(catalog, needed, policy, live=held["live"], elsewhere=held["unknown"])

    def load(self, wanted: str) -> dict[str, Any]:
        """The verified state tree of a checkpoint, on the CPU, its tensors owning their memory.

        Raises:
            CheckpointNotFound, AmbiguousId, CheckpointMissing, NotACheckpoint, UnsafeCheckpoint.
            CheckpointDamaged: it differs from its digest; it went to quarantine.
        """
        from ckptcache.restoring import read
        from ckptcache.state.restore import from_plain

        loaded: dict[str, Any] = from_plain(read(self.ledger, self.get(wanted)).state)
        return loaded

    def _learn_unknown(self) -> None:
        """Read what files of the oldest layout, and files without a record, hold; the index then knows it."""
        catalog = self._view()
        strangers = [id for id in catalog.observed.available if catalog.index.checkpoints[id].fingerprint is None]
        if strangers or catalog.observed.unrecorded:
            from ckptcache.adoption import learn

            learn(self.ledger, strangers, sorted(catalog.observed.unrecorded))

    # --- keeping ---------------------------------------------------------------------------------

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

    def pin(self, wanted: str) -> CheckpointMetadata:
        """Protect a checkpoint from being evicted."""
        return self._mark(wanted, lambda record: {"pinned": True})

    def unpin(self, wanted: str) -> CheckpointMetadata:
        """Take a pin off."""
        return self._mark(wanted, lambda record: {"pinned": False})

    def tag(self, wanted: str, *tags: str, remove: bool = False) -> CheckpointMetadata:
        """Add tags to a checkpoint, or remove them."""
        tags = texts(tags, "tags")
        if remove:
            return self._mark(wanted, lambda r: {"tags": tuple(t for t in r.tags if t not in tags)})
        return self._mark(wanted, lambda r: {"tags": tuple(dict.fromkeys((*r.tags, *tags)))})

    def note(self, wanted: str, text: str) -> CheckpointMetadata:
        """Set a checkpoint's notes."""
        notes = as_text(text, "notes")
        return self._mark(wanted, lambda record: {"notes": notes})

    def name(self, wanted: str, name: str) -> CheckpointMetadata:
        """Let `name` point to a checkpoint, which protects it; the name moves if it pointed elsewhere.

        Raises InvalidName, CheckpointNotFound or AmbiguousId.
        """
        check_name(name)
        self.get(wanted)
        with self._change() as change:
            catalog = change.catalog()
            record = resume.find(catalog, wanted)
            if name in change.index.checkpoints:
                raise InvalidName(name=name, reason="a checkpoint has that id")
            held = change.index.names.get(name)
            change.index.names[name] = NamePointer(
                checkpoint=record.id, revision=0 if held is None else held.revision + 1
            )
            change.is_dirty = True
        return catalog.scored(record)

    def unname(self, name: str) -> str:
        """Remove a name; returns the id that it pointed to, which is no longer protected by it.

        Raises CheckpointNotFound where there is no such name, and InvalidName for that of a rollback.
        """
        if name == ROLLBACK:
            raise InvalidName(name=name, reason="`ckptcache rollback --undo` takes a rollback back")
        if name not in self.names():
            raise CheckpointNotFound(id=name, path=self.cache_dir)
        with self._change() as change:
            if name not in change.index.names:
                raise CheckpointNotFound(id=name, path=self.cache_dir)
            change.is_dirty = True
            return change.index.names.pop(name).checkpoint

    def _mark(self, wanted: str, fields: Callable[[CheckpointMetadata], dict[str, Any]]) -> CheckpointMetadata:
        self.get(wanted)  # refused before a folder or a lock is made for it
        with self._change() as change:
            record = resume.find(change.catalog(), wanted)
            change.put(record.changed(**fields(record)))
            return change.catalog().scored(change.index.checkpoints[record.id])

    def rollback(self, wanted: str, *, dry_run: bool = False) -> rolling_back.Rollback:
        """Let the next session go on from a checkpoint, weights and history, on a new branch.

        All that descends from the checkpoint stays and is marked: it can be named, exported, and resumed from by its
        id, and is never chosen by "best", "latest" or "auto". These choose the checkpoint itself until something that
        descends from it is saved. A rollback that nothing has followed yet is replaced by another.

        Args:
            wanted: an id, a unique prefix of one, or a name; one that is itself marked is unmarked, with all that it
                descends from.
            dry_run: change nothing.

        Raises:
            CheckpointNotFound, AmbiguousId: `wanted` names none, or several.
            CheckpointMissing: its file isn't there.
        """
        self._finish_own()
        return rolling_back.roll_back(self.ledger, wanted, dry_run=dry_run)

    def undo_rollback(self, *, dry_run: bool = False) -> rolling_back.Rollback:
        """Take back the rollback that is in force: all marks are again as they were before it.

        Raises NoRollback where none is in force, or something was saved after it.
        """
        self._finish_own()
        return rolling_back.undo(self.ledger, dry_run=dry_run)

    def record_session(self, session: SessionRecord, configs: Mapping[str, Any] | None = None) -> SessionRecord:
        """Keep what is known of a session; a new one gets its place in the order. Returns it as it was kept.

        Args:
            configs: its model's, training's and data's configuration by name, as plain values.

        Raises InvalidId or InvalidValue for what could not be read again.
        """
        for id in (session.id, session.parent, session.best_checkpoint):
            if id is not None:
                check_id(id)
        if configs is not None:
            configs = jsonable(dict(configs), "configs")
        with self._change() as change:
            if configs is not None:
                session = dataclasses.replace(session, config=change.index.store_config(dict(configs)))
            if session.sequence == 0:
                session = dataclasses.replace(session, sequence=change.index.sequence + 1)
            change.put_session(session)
        return session

    def forget_session(self, session: str) -> None:
        """Remove a session's checkpoints and its record, but for what is pinned, named or another session's parent."""
        with self._change() as change:
            index = change.index
            kept = {p.checkpoint for p in index.names.values()}
            kept |= {s.parent for s in index.sessions.values() if s.parent is not None and s.id != session}
            own = [r.id for r in index.checkpoints.values() if r.session == session]
            gone = [id for id in own if id not in kept and not index.checkpoints[id].pinned]
            # Decided first, removed second, forgotten last: a crash in between leaves nothing to be adopted again.
            self.ledger.evict(change, dict.fromkeys(gone, "its session was discarded"))
            for id in gone:
                del index.checkpoints[id]
            if len(gone) == len(own):
                index.sessions.pop(session, None)
            change.is_dirty = True

    # --- care ------------------------------------------------------------------------------------

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

    # --- to and from elsewhere -------------------------------------------------------------------

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

    def import_(self, path: str | os.PathLike[str], **described: Any) -> CheckpointMetadata:
        """Take up a ``.pt`` file that something else wrote; the file itself is left alone.

        Args:
            described: what `save` takes (iteration, val_loss, model_config, tags, ...); what is left out is
                taken from the file where it holds it.

        Raises NotACheckpoint, UnsafeCheckpoint or CheckpointDamaged.
        """
        state, found = transfer.read_foreign(Path(path))
        record = self.save(state, **{**found, **described})
        assert record is not None  # noqa: S101 - only `if_improved` gives None
        return record

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


def _call(function: Callable[[Mapping[str, str]], None] | None, evicted: Mapping[str, str]) -> None:
    if function is not None:
        function(evicted)
