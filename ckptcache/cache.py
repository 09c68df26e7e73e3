"""TrainingCache: checkpoints kept, ranked, restored and pruned. It sequences the wings and owns no policy."""

import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptcache import resume, transfer
from ckptcache.caring import Caring
from ckptcache.marking import Marking
from ckptcache.metadata import CheckpointMetadata, SessionRecord
from ckptcache.policy.compatibility import Description
from ckptcache.values import jsonable

if TYPE_CHECKING:
    from ckptcache.drafting import Draft
    from ckptcache.restoring import Restored
    from ckptcache.saving import Saver


class TrainingCache(Marking, Caring):
    """A folder of checkpoints that every run continues from.

    ``TrainingCache("runs/cache", max_checkpoints=5)`` or ``TrainingCache(CacheConfig(...))``. Many
    processes may use one folder at once. Nothing is written before the first save.

    Raises:
        ConfigError: the settings don't work.
        CacheDirIsFile: a file stands where the folder should be.
    """

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
            state: named parts: objects with `state_dict`, generators, tensors, arrays, plain values, and trees. What is
                a part of another tensor is saved with all of that one's memory, as by `torch.save`: clone it first.
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
                between steps, and `staged` before parameters are changed in another way, or their memory is moved
                (`share_memory_`, sending them to another process, resizing a storage): that ends the process.

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

    def prepare(self, objects: Mapping[str, Any]) -> None:
        """Make ready for saves of `objects` in the background, so that the first is as quick as all others.

        Takes the memory that they are staged in, in a thread, while training goes on. A `TrainingSession` does so
        after its first step.
        """
        self._background().prepare(objects)

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

    # --- from elsewhere --------------------------------------------------------------------------

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


def _call(function: Callable[[Mapping[str, str]], None] | None, evicted: Mapping[str, str]) -> None:
    if function is not None:
        function(evicted)
