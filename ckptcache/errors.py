"""One error class per cause.

The first line of a class's docstring is its message, filled in with the keyword arguments it was
raised with; it names the thing, the cause and the way out. ``exit_code`` is what the command line
ends with. `docs/errors.md` is generated from this module.
"""

import inspect
from typing import Any


class CkptCacheError(Exception):
    """The cache could not do what was asked: {reason}."""

    exit_code = 1

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.fields = fields

    def __str__(self) -> str:
        template = inspect.getdoc(type(self)) or "{reason}"
        return template.split("\n\n")[0].replace("\n", " ").format(**self.fields)

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword-only arguments are lost by Exception's own pickling, and workers send these back.
        return (_rebuild, (type(self), self.fields))


def _rebuild(kind: type[CkptCacheError], fields: dict[str, Any]) -> CkptCacheError:
    return kind(**fields)


# --- settings and arguments: exit code 2 ---------------------------------------------------------


class ConfigError(CkptCacheError):
    """The settings don't work: {problems}."""

    exit_code = 2


class UnknownSetting(CkptCacheError):
    """There is no setting {name!r} (in {source}){suggestion}."""

    exit_code = 2


class InvalidConfigFile(CkptCacheError):
    """{path} cannot be read as settings: {reason}. Correct the file, or point to another."""

    exit_code = 2


class InvalidId(CkptCacheError):
    """{id!r} is not a checkpoint id: ids hold only a-z, 0-9, '.', '_' and '-', at most 128 of them,
    and begin with a letter or digit."""

    exit_code = 2


class InvalidName(CkptCacheError):
    """{name!r} cannot be the name of a checkpoint: {reason}. Choose another name."""

    exit_code = 2


class AmbiguousId(CkptCacheError):
    """{prefix!r} fits {count} checkpoints ({examples}): give more of the id."""

    exit_code = 2


class InvalidValue(CkptCacheError):
    """{name} cannot be {value!r}: {reason}."""

    exit_code = 2


# --- the folder ----------------------------------------------------------------------------------


class CacheNotFound(CkptCacheError):
    """There is no cache at {path}: name one with --cache-dir or CKPTCACHE_DIR, or train first."""

    exit_code = 3


class AmbiguousCache(CkptCacheError):
    """{count} caches lie equally near ({examples}): choose one with --cache-dir or CKPTCACHE_DIR."""

    exit_code = 2


class CacheDirIsFile(CkptCacheError):
    """{path} is a file, and a cache needs a folder: choose another cache_dir, or move the file."""


class CacheDirNotWritable(CkptCacheError):
    """Nothing can be written in {path} ({reason}): change its permissions, or choose another cache_dir."""


class CacheDirNotReadable(CkptCacheError):
    """{path} cannot be read ({reason}): change its permissions, or choose another cache_dir."""


class LockTimeout(CkptCacheError):
    """Another process has held {path} for more than {seconds:g} seconds: wait for it, or find the
    process that holds it and end it."""


# --- the index -----------------------------------------------------------------------------------


class IndexDamaged(CkptCacheError):
    """The index {path} cannot be read: {reason}. `ckptcache doctor --repair` sets it aside and
    rebuilds it from what is on disk."""

    exit_code = 4


class IndexUnreadable(CkptCacheError):
    """The system refuses to read the index {path} ({reason}): correct that, and try again; nothing was changed."""


class IndexTooNew(CkptCacheError):
    """The index {path} has schema version {found}, and this ckptcache knows {known}: install a newer
    ckptcache."""


# --- checkpoints ---------------------------------------------------------------------------------


class CheckpointNotFound(CkptCacheError):
    """There is no checkpoint {id!r} in {path}: `ckptcache ls` lists those that are there."""

    exit_code = 3


class CheckpointMissing(CkptCacheError):
    """The record of {id} is there and its file isn't ({reason}): bring the file back to {path}, or
    choose another checkpoint."""

    exit_code = 3


class CheckpointDamaged(CkptCacheError):
    """The checkpoint file {path} is damaged: {reason}. It must not be trusted; choose another checkpoint."""

    exit_code = 4


class NotACheckpoint(CkptCacheError):
    """{path} is not a checkpoint that can be read: {reason}. Name a file that ckptcache or torch.save wrote."""


class UnsafeCheckpoint(CkptCacheError):
    """{path} was refused, because reading it could run code: {reason}. Save it again as tensors and
    plain values where it comes from."""


class Incompatible(CkptCacheError):
    """{id} can't be resumed from by this run: it {reason}. Choose another checkpoint, or start fresh."""

    exit_code = 3


class CannotWarmStart(CkptCacheError):
    """{id} can't give this run its weights: {reason}. Choose another checkpoint, or leave warm_start out."""

    exit_code = 3


class NoRollback(CkptCacheError):
    """No rollback is in force in {path}: there was none, or training has gone on from it already. To change to another
    branch, give `ckptcache rollback` the checkpoint to go on from; one that was left behind will do."""

    exit_code = 3


class NotSavable(CkptCacheError):
    """The state at {key!r} is {kind}, which could be saved but never be read back: {remedy}."""

    exit_code = 2


class NotRestorable(CkptCacheError):
    """{key!r} could not be restored from {id}: {reason}. Everything is as it was before; choose another
    checkpoint, or leave {key!r} out."""


class SaveFailed(CkptCacheError):
    """{id} could not be saved in {path}: {reason}. Correct that and save again; what was there before is
    untouched."""


class NoSpace(SaveFailed):
    """{id} needs {needed} bytes in {path}, where {free} are free: make room, for instance with
    `ckptcache prune --max-checkpoints N`, or lower the limits. What is within them is untouched."""


class ExportFailed(CkptCacheError):
    """{id} could not be exported to {path}: {reason}. Correct that, or export to another path."""


# --- backups -------------------------------------------------------------------------------------


class BackupFailed(CkptCacheError):
    """The cache {cache} could not be backed up to {path}: {reason}. Correct that, or choose another file."""


class NotABackup(CkptCacheError):
    """{path} is not a backup that can be read: {reason}. Name a file that `ckptcache backup` wrote."""


class BackupDamaged(CkptCacheError):
    """The backup {path} is damaged: {reason}. Nothing was restored from it; choose another one, or copy it again
    from where it is whole."""

    exit_code = 4


class BackupTooNew(CkptCacheError):
    """The backup {path} is of a later version ({what} {found}, and this ckptcache knows {known}): install a newer
    ckptcache."""


class CacheNotEmpty(CkptCacheError):
    """{path} holds {what} of its own, and a backup is restored into a folder without any: choose another folder with
    --cache-dir, or add what is missing there with --merge."""


class RestoreFailed(CkptCacheError):
    """{path} could not be restored into {folder}: {reason}. What was there before is untouched; correct that, or
    choose another folder."""


# --- sessions ------------------------------------------------------------------------------------


class SessionClosed(CkptCacheError):
    """Session {session} has ended: open a new one."""

    exit_code = 2


class SessionNotFound(CkptCacheError):
    """There is no session {id!r} in {path}: `ckptcache sessions` lists those that are there."""

    exit_code = 3


class AmbiguousSession(CkptCacheError):
    """{prefix!r} fits {count} sessions ({examples}): give more of the id."""

    exit_code = 2


class DuplicateName(CkptCacheError):
    """Two objects cannot both be registered as {name!r}: give one of them another name."""

    exit_code = 2


# --- proving that a training resumes exactly -----------------------------------------------------


class NothingToProve(CkptCacheError):
    """There is nothing to prove: {reason}."""

    exit_code = 3


class ProofFailed(CkptCacheError):
    """The {run} could not be made: {reason}. Correct that, and run it again."""


# --- training data -------------------------------------------------------------------------------


class DataNotFound(CkptCacheError):
    """{path} holds no training data: {reason}."""

    exit_code = 2


class DataTooSmall(CkptCacheError):
    """{path} holds {tokens} tokens, and one block needs {needed}: add text, or lower block_size."""

    exit_code = 2


class TokenOutOfRange(CkptCacheError):
    """{path} holds token {token}, and the vocabulary ends at {last}: raise vocab_size to at least {needed}."""

    exit_code = 2


class InvalidTokenFile(CkptCacheError):
    """{path} cannot be read as tokens: {reason}. Prepare the data again, or correct the file."""

    exit_code = 2


class NotCacheable(CkptCacheError):
    """The prepared data {key} is {kind}, which cannot be kept and come back the same: {remedy}."""

    exit_code = 2


# --- training that lives in a repository ---------------------------------------------------------


class InvalidRunName(CkptCacheError):
    """{name!r} cannot be the name of a run: names hold only letters, digits, '.', '_' and '-', at most 64,
    and begin with a letter or digit."""

    exit_code = 2


class ProgressNotFound(CkptCacheError):
    """There is no {path}: make one with `ckptcache progress init`, or name another with --progress-dir."""

    exit_code = 3


class RunNotFound(CkptCacheError):
    """There is no run {name!r} in {path} (there are: {names}): train with the cache {path}/{name}/cache first."""

    exit_code = 3


class NotARepository(CkptCacheError):
    """{path} is not in a git work tree ({reason}): run this in a clone."""

    exit_code = 2


class NoBranch(CkptCacheError):
    """There is no branch to commit to ({reason}): name one with --branch."""

    exit_code = 2


class GitFailed(CkptCacheError):
    """`git {command}` failed: {reason}. Correct that and run it again; the records are still in {path}."""


class PushFailed(CkptCacheError):
    """The record could not be pushed to {branch} of {remote} after {attempts} ({reason}). Nothing is lost: the commit
    {commit} is in {bundle}; run `ckptcache progress commit` again, or bring it in elsewhere with
    `git fetch {bundle} {ref}`."""


class MergeFailed(CkptCacheError):
    """{path} could not be merged: {reason}. Git has left it as a conflict; `ckptcache progress restore` takes up
    both sides of it."""
