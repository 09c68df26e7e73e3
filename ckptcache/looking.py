"""A cache that is open: its ledger and its saves in flight, and everything that looks without changing."""

import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ckptcache import resume
from ckptcache.catalog import Catalog, Explanation
from ckptcache.config import CacheConfig
from ckptcache.errors import ConfigError
from ckptcache.ledger import Change, Ledger
from ckptcache.metadata import CheckpointMetadata, SessionRecord
from ckptcache.policy.compatibility import Description
from ckptcache.storage.datacache import DataCache
from ckptcache.values import jsonable

if TYPE_CHECKING:
    from ckptcache.saving import Saver

log = logging.getLogger("ckptcache")


class Looking:
    """What is there, seen from the index and the disk together; see `TrainingCache`."""

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish what is being written and give the folder back; the cache can be used again afterwards."""
        try:
            self.wait_until_finished()
        finally:
            self.ledger.close()

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

        A save in the background may still be copying them; its file is written afterwards all the same. The same goes
        for moving their memory: by `share_memory_`, by sending them to another process, by resizing a storage.
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
                "recorded and not scored, because not every checkpoint has one in [0, 1]: %s; declare quality_metrics "
                "to score them",
                ", ".join(sorted(new)),
            )
        return catalog

    def _learn_unknown(self) -> None:
        """Read what files of the oldest layout, and files without a record, hold; the index then knows it."""
        catalog = self._view()
        strangers = [id for id in catalog.observed.available if catalog.index.checkpoints[id].fingerprint is None]
        if strangers or catalog.observed.unrecorded:
            from ckptcache.adoption import learn

            learn(self.ledger, strangers, sorted(catalog.observed.unrecorded))
