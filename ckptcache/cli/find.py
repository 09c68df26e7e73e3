"""Where the cache is, when nobody says so: the nearest one at or below the current folder. Only looks."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ckptcache.config import CacheConfig, settings_with_sources
from ckptcache.errors import AmbiguousCache, CacheDirIsFile, CacheNotFound
from ckptcache.storage import fs
from ckptcache.storage.index import INDEX_NAME

MAX_DEPTH = 6
MAX_FOLDERS = 5_000
"""How far is looked; a home folder may hold millions."""
NOT_HIDDEN = frozenset({".training-progress"})
PASSED_OVER = frozenset({"node_modules", "venv", "site-packages", "__pycache__"})


def find_cache(given: str | None, *, create: bool = False) -> Path:
    """The folder that `given`, the environment or the settings file names; else the nearest one.

    Args:
        create: whether a folder that is named need not be a cache yet.

    Raises:
        CacheNotFound: it isn't there, or isn't a cache.
        AmbiguousCache: there are several at the same depth.
        CacheDirIsFile: a file is named.
        ConfigError: the settings, this one or others, don't work.
    """
    if given is None and not settings_with_sources(["cache_dir"]):
        return _nearest(Path())
    path = Path(CacheConfig().cache_dir if given is None else CacheConfig(cache_dir=given).cache_dir)
    if path.exists() and not path.is_dir():
        raise CacheDirIsFile(path=path)
    if not create and not _was_used(path):
        raise CacheNotFound(path=path)
    return path


def _was_used(path: Path) -> bool:
    # Whoever names a folder means it: one whose index was lost is a cache to be rebuilt.
    return any((path / name).exists() for name in (INDEX_NAME, f"{INDEX_NAME}.prev", "checkpoints"))


# --- searching -----------------------------------------------------------------------------------


def _nearest(start: Path) -> Path:
    for level in _levels(start):
        found = [folder for folder in level if is_cache(folder)]
        if len(found) > 1:
            # A repository holds the records of trainings whose files are elsewhere; the one that ran here is meant.
            found = [folder for folder in found if _holds_checkpoints(folder / "checkpoints")] or found
        if len(found) > 1:
            raise AmbiguousCache(count=len(found), examples=", ".join(str(f) for f in found[:5]))
        if found:
            return found[0]
    raise CacheNotFound(path=f"{start.absolute()} or below it")


def _levels(start: Path) -> Iterator[list[Path]]:
    level, seen = [start], 0
    for _ in range(MAX_DEPTH + 1):
        level = level[: MAX_FOLDERS - seen]
        if not level:
            return
        seen += len(level)
        yield level
        level = [inner for folder in level for inner in _inside(folder)]


def _inside(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if _is_worth_a_look(e))
    except OSError:
        return []
    return [folder / name for name in names]


def _is_worth_a_look(entry: "os.DirEntry[str]") -> bool:
    # A link may lead in a circle, or far away.
    if entry.name in PASSED_OVER or (entry.name.startswith(".") and entry.name not in NOT_HIDDEN):
        return False
    return entry.is_dir(follow_symlinks=False)


def is_cache(folder: Path) -> bool:
    """Whether `folder` holds an index: other programs write a metadata.json too."""
    if not (folder / INDEX_NAME).is_file():
        return False
    if (folder / f"{INDEX_NAME}.lock").exists():
        return True
    return _looks_like_index(folder / INDEX_NAME) or _holds_checkpoints(folder / "checkpoints")


def _holds_checkpoints(folder: Path) -> bool:
    return any(name.endswith(".pt") for name in fs.scan(folder))


def _looks_like_index(path: Path) -> bool:
    import orjson

    try:
        data = path.read_bytes()
        document: Any = orjson.loads(data)
    except OSError:
        return False
    except ValueError:
        # Broken, by a merge's conflict markers perhaps: still the one that is meant.
        return b'"schema_version"' in data and b'"checkpoints"' in data
    if not isinstance(document, dict):
        return False
    if "schema_version" in document:
        return isinstance(document.get("checkpoints"), dict)
    # The oldest layout: a flat mapping of id to record.
    return bool(document) and all(isinstance(r, dict) and "iteration" in r for r in document.values())
