import copy
import pickle
from pathlib import Path

import pytest

from ckptcache import errors
from ckptcache.errors import CkptCacheError

ID = "ckpt_20260102_030405_00000500_0123abcd_9f1e"
PATH = Path("runs/cache")
SAMPLES = {
    "CkptCacheError": {"reason": "the reason"},
    "ConfigError": {"problems": "max_checkpoints must be a whole number of at least 1, not 0"},
    "UnknownSetting": {"name": "max_chekpoints", "source": "ckptcache.toml", "suggestion": ": did you mean 'x'?"},
    "InvalidConfigFile": {"path": PATH, "reason": "line 3"},
    "InvalidId": {"id": "../x"},
    "InvalidName": {"name": "best", "reason": "taken"},
    "AmbiguousId": {"prefix": "ckpt_2", "count": 3, "examples": "a, b, c"},
    "InvalidValue": {"name": "iteration", "value": -1, "reason": "it must be at least 0"},
    "CacheNotFound": {"path": PATH},
    "AmbiguousCache": {"count": 2, "examples": "a/cache, b/cache"},
    "CacheDirIsFile": {"path": PATH},
    "CacheDirNotWritable": {"path": PATH, "reason": "permission denied"},
    "CacheDirNotReadable": {"path": PATH, "reason": "permission denied"},
    "LockTimeout": {"path": PATH, "seconds": 10.0},
    "IndexDamaged": {"path": PATH, "reason": "it ends early"},
    "IndexUnreadable": {"path": PATH, "reason": "permission denied"},
    "IndexTooNew": {"path": PATH, "found": 3, "known": 2},
    "CheckpointNotFound": {"id": ID, "path": PATH},
    "CheckpointMissing": {"id": ID, "path": PATH, "reason": "removed"},
    "CheckpointDamaged": {"path": PATH, "reason": "its digest differs"},
    "NotACheckpoint": {"path": PATH, "reason": "it is a folder"},
    "UnsafeCheckpoint": {"path": PATH, "reason": "it calls os.system"},
    "Incompatible": {"id": ID, "reason": "does not fit: n_head: saved 4, needed 8"},
    "SessionNotFound": {"id": "sess_20260102_030405_0123abcd", "path": PATH},
    "AmbiguousSession": {"prefix": "sess_2", "count": 3, "examples": "a, b, c"},
    "CannotWarmStart": {"id": ID, "reason": "it has no parameter that this model has"},
    "InvalidTokenFile": {"path": PATH, "reason": "it has an odd length"},
    "NotCacheable": {"key": "tokens", "kind": "an object array", "remedy": "save it as numbers"},
    "InvalidRunName": {"name": "../x"},
    "ProgressNotFound": {"path": PATH},
    "RunNotFound": {"name": "mine", "path": PATH, "names": "nanecho-cached-ci"},
    "NotARepository": {"path": PATH, "reason": "no .git"},
    "NoBranch": {"reason": "HEAD is detached"},
    "GitFailed": {"command": "fetch", "reason": "no space left on device", "path": PATH},
    "PushFailed": {
        "remote": "origin",
        "branch": "main",
        "attempts": "5 attempts",
        "reason": "permission denied",
        "commit": "0123abcd",
        "bundle": PATH,
        "ref": "refs/ckptcache/unpushed",
    },
    "MergeFailed": {"path": PATH, "reason": "it isn't JSON"},
    "NoRollback": {"path": PATH},
    "NotSavable": {"key": "extra.when", "kind": "a datetime", "remedy": "save its text"},
    "NotRestorable": {"key": "optimizer", "id": ID, "reason": "3 groups, not 2"},
    "SaveFailed": {"id": ID, "path": PATH, "reason": "I/O error"},
    "NoSpace": {"id": ID, "path": PATH, "needed": 1000, "free": 10},
    "ExportFailed": {"id": ID, "path": PATH, "reason": "it exists"},
    "BackupFailed": {"cache": PATH, "path": "all.tar", "reason": "no space left on device"},
    "NotABackup": {"path": PATH, "reason": "it is empty"},
    "BackupDamaged": {"path": PATH, "reason": "it is cut short"},
    "BackupTooNew": {"path": PATH, "what": "format", "found": 2, "known": 1},
    "CacheNotEmpty": {"path": PATH, "what": "2 checkpoints"},
    "RestoreFailed": {"path": "all.tar", "folder": PATH, "reason": "no space left on device"},
    "SessionClosed": {"session": "sess_1"},
    "DuplicateName": {"name": "model"},
    "NothingToProve": {"reason": "no session was opened; name a command that opens one"},
    "ProofFailed": {"run": "undisturbed run", "reason": "it ended with 1"},
    "DataNotFound": {"path": PATH, "reason": "it is empty"},
    "DataTooSmall": {"path": PATH, "tokens": 10, "needed": 65},
    "TokenOutOfRange": {"path": PATH, "token": 300, "last": 255, "needed": 301},
}
"""What each class is raised with; a new class needs a line here."""

SAYS_WHAT_TO_DO = (
    "must",
    "did you mean",
    "hold only",
    "train first",
    "train with",
    "repair",
    *("choose", "correct", "change", "give", "install", "wait", "bring", "save it", "save again", "make room"),
    *(
        "lower",
        "raise",
        "add",
        "open a new",
        "lists",
        "name a file",
        "export to",
        "leave",
        "run this in",
        "run `ckptcache",
        "takes up",
        "name one",
        "make one",
    ),
)
THE_CALLER_SAYS = {"CkptCacheError", "NothingToProve", "InvalidValue", "NotSavable", "DataNotFound"}
"""Their reason or remedy, given where they are raised, is the way out."""


def classes() -> dict[str, type[CkptCacheError]]:
    return {n: c for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, CkptCacheError)}


def sample(name: str) -> CkptCacheError:
    return classes()[name](**SAMPLES[name])


def test_every_class_has_a_sample_here():
    assert set(SAMPLES) == set(classes())


@pytest.mark.parametrize("name", SAMPLES)
def test_message_is_filled_in_with_every_field(name):
    message = str(sample(name))
    assert "{" not in message
    assert "\n" not in message
    for key, value in SAMPLES[name].items():
        assert str(round(value) if isinstance(value, float) else value) in message, key


@pytest.mark.parametrize("name", sorted(set(SAMPLES) - THE_CALLER_SAYS))
def test_message_says_the_way_out(name):
    assert any(words in str(sample(name)).lower() for words in SAYS_WHAT_TO_DO)


@pytest.mark.parametrize("name", SAMPLES)
def test_error_survives_pickling_and_copying(name):
    error = sample(name)
    for twin in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert twin.fields == error.fields


@pytest.mark.parametrize("name", SAMPLES)
def test_exit_code_is_one_that_is_documented(name):
    assert classes()[name].exit_code in (1, 2, 3, 4)


def test_a_value_with_braces_is_not_filled_in_again():
    assert "{reason} {0}" in str(errors.InvalidConfigFile(path="a", reason="{reason} {0}"))


def test_a_full_disk_is_a_failed_save():
    with pytest.raises(errors.SaveFailed, match="make room"):
        raise sample("NoSpace")
