"""Prepared data (tokens, features), built once across processes and kept for a time.

An entry is one file (`datafile`), named after its key and configuration, and one lock file beside
it, which is never removed: unlinking a lock that others wait for would let two of them in.
"""

import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from blake3 import blake3

from ckptcache.errors import CacheDirNotWritable, CkptCacheError, InvalidValue, LockTimeout, NotCacheable
from ckptcache.storage import datafile, fs, locks
from ckptcache.values import content_hash, jsonable

T = TypeVar("T")

CLOCK_SKEW = 300.0
"""Seconds by which the clocks of two machines that share a folder may differ."""
SUFFIX = ".safetensors"
_POLL = 0.05
_READABLE = 48
_OURS = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*-[0-9a-f]{16}-[0-9a-f]{16})\.safetensors(?:\.[0-9a-f-]+\.tmp)?")
_UNREADABLE = (OSError, ValueError, CkptCacheError)

log = logging.getLogger("ckptcache")


@dataclass(frozen=True, slots=True)
class DataEntry:
    """One cached piece of prepared data, as its file says; its content is not verified.

    Attributes:
        key: the name it was asked for under; None when the file can't be read.
        config: hash of its configuration; None when the file can't be read.
        bytes: the size of its file.
        age_seconds: by the cache's clock; None when the file can't be read.
        fresh: whether it would be used as it is.
        path: its file.
    """

    key: str | None
    config: str | None
    bytes: int
    age_seconds: float | None
    fresh: bool
    path: Path


@dataclass(frozen=True, slots=True)
class _Place:
    key: str
    config: str
    path: Path
    lock: Path


class DataCache:
    """Prepared data in `folder`, which is created at need.

    Args:
        folder: where the files lie; nothing in it that this class hasn't made is touched.
        ttl_hours: for how long data counts as fresh, in hours; infinity for ever.
        enabled: when false, `get` builds each time and touches nothing on disk.
        clock: seconds since 1970.

    Raises:
        InvalidValue: `ttl_hours` is negative or not a number.
    """

    def __init__(
        self, folder: Path, *, ttl_hours: float, enabled: bool = True, clock: Callable[[], float] = time.time
    ) -> None:
        if not ttl_hours >= 0:
            raise InvalidValue(name="ttl_hours", value=ttl_hours, reason="it must be at least 0")
        self.folder = folder
        self.ttl_hours = ttl_hours
        self.enabled = enabled
        self._clock = clock

    def get(self, key: str, build: Callable[[], T], config: Mapping[str, Any] | None = None) -> T:
        """What `build` returns, or returned earlier, here or in another process, for this key and configuration.

        One process builds; others that ask meanwhile wait for it, however long it takes, unless it dies.
        Data that is older than `ttl_hours`, or whose file is damaged, is built anew; when that fails,
        what was there stays. When nothing can be written, the data is built all the same, with a warning.

        The value comes back in the same form whether it was built or read: a mapping as a dict, arrays
        C-contiguous and in the machine's byte order, tensors contiguous, detached and on the CPU. It
        belongs to the caller: changing it changes nothing on disk.

        Args:
            key: any name; it needn't be fit for a file.
            build: makes a mapping of text to NumPy arrays, tensors and plain JSON values, or a single one
                of them. It must not ask for the same key and configuration again.
            config: what the data depends on, plain values; another configuration is another entry.

        Raises:
            NotCacheable: a value can't come back as it is (objects, text in arrays, tuples); names it.
            InvalidValue: the configuration isn't plain, or the key isn't text.
            Exception: whatever `build` raises.
        """
        place = self._place(key, config)
        if not self.enabled:
            return cast(T, datafile.normal(build(), key))
        found = self._read(place, quietly=True)
        return cast(T, found[0] if found else self._get_locked(place, build))

    def _get_locked(self, place: _Place, build: Callable[[], Any]) -> Any:
        with ExitStack() as held:
            try:
                self._lock(place, held)
            except (OSError, CkptCacheError) as error:
                log.warning("data %r is built without being cached: %s", place.key, error)
                return datafile.normal(build(), place.key)
            # Whoever held the lock may have built it.
            if found := self._read(place):
                return found[0]
            self._remove_leftovers(place.path.name)
            return self._keep(place, datafile.normal(build(), place.key))

    def _lock(self, place: _Place, held: ExitStack) -> None:
        fs.ensure_folder(self.folder)
        try:
            held.enter_context(locks.locked(place.lock, timeout=0))
        except LockTimeout:
            log.info("waiting for another process to prepare %r", place.key)
            held.enter_context(locks.locked(place.lock, timeout=float("inf"), poll=_POLL))

    def _read(self, place: _Place, *, quietly: bool = False) -> tuple[Any] | None:
        """The fresh value of an entry, in a tuple, since it may be None; None when it has to be built."""
        try:
            value, record = datafile.read(place.path)
            if (record.key, record.config) != (place.key, place.config):
                raise ValueError("it holds other data")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except _UNREADABLE as error:
            if not quietly:
                log.warning("cached data %r can't be used (%s: %s) and is built anew", place.key, place.path, error)
            return None
        return (value,) if is_fresh(self._clock() - record.created_at, self.ttl_hours) else None

    def _keep(self, place: _Place, value: Any) -> Any:
        """Write `value` and return it as it is read back, or as it is when that fails."""
        record = datafile.Record(place.key, place.config, self._clock())
        try:
            with fs.replacing(place.path, writer=f"{os.getpid():x}-{secrets.token_hex(4)}") as file:
                datafile.write(file, value, record)
            return datafile.read(place.path)[0]
        except NotCacheable:
            raise
        except _UNREADABLE as error:
            log.warning("data %r was built and could not be cached: %s", place.key, error)
            return value

    def _place(self, key: str, config: Mapping[str, Any] | None) -> _Place:
        if not isinstance(key, str):
            raise InvalidValue(name="key", value=key, reason="it must be text")
        hashed = content_hash(jsonable(config, "config"))
        stem = f"{_prefix(key)}{hashed}"
        return _Place(key, hashed, self.folder / f"{stem}{SUFFIX}", self.folder / f"{stem}.lock")

    # --- looking and clearing ---

    def entries(self) -> list[DataEntry]:
        """What is cached, by file name, those that can't be read among them."""
        files = fs.scan(self.folder).values()
        return [self._entry(f) for f in sorted(files, key=lambda f: f.name) if _is_entry(f.name)]

    def _entry(self, file: fs.Entry) -> DataEntry:
        path = self.folder / file.name
        try:
            record = datafile.peek(path)
        except _UNREADABLE:
            return DataEntry(None, None, file.size, None, False, path)
        age = self._clock() - record.created_at
        return DataEntry(record.key, record.config, file.size, age, is_fresh(age, self.ttl_hours), path)

    def clear(self, key: str | None = None, *, older_than_hours: float | None = None) -> int:
        """Remove entries, and what dead writers left of them; returns the bytes freed.

        One that another process is building right now is left alone. Data in use stays in use.

        Args:
            key: only the entries of this name, whatever their configuration.
            older_than_hours: only those that would be stale if data were fresh for so long, and broken ones.

        Raises:
            CacheDirNotWritable: the system refuses.
        """
        prefix = "" if key is None else _prefix(key)
        stems = {found[1] for name in fs.scan(self.folder) if (found := _OURS.fullmatch(name))}
        try:
            return sum(self._clear(stem, older_than_hours) for stem in sorted(stems) if stem.startswith(prefix))
        except OSError as error:
            raise CacheDirNotWritable(path=self.folder, reason=fs.reason_of(error)) from error

    def _clear(self, stem: str, older_than_hours: float | None) -> int:
        name = f"{stem}{SUFFIX}"
        try:
            with locks.locked(self.folder / f"{stem}.lock", timeout=0):
                freed = self._remove_leftovers(name)
                file = fs.scan(self.folder).get(name)
                if file is None or (older_than_hours is not None and self._is_younger(file, older_than_hours)):
                    return freed
                return freed + file.size * fs.remove(self.folder / name, root=self.folder)
        except LockTimeout:
            log.info("%s is being prepared by another process and stays", name)
            return 0

    def _is_younger(self, file: fs.Entry, hours: float) -> bool:
        age = self._entry(file).age_seconds
        return age is not None and is_fresh(age, hours)

    def _remove_leftovers(self, name: str) -> int:
        """Remove the temporary files of an entry whose lock is held, and whose writers are therefore dead."""
        freed = 0
        for file in fs.scan(self.folder).values():
            if file.name != name and file.name.startswith(name) and _OURS.fullmatch(file.name):
                # What can't be removed only takes room.
                with suppress(OSError):
                    freed += file.size * fs.remove(self.folder / file.name, root=self.folder)
        return freed


def is_fresh(age_seconds: float, ttl_hours: float) -> bool:
    """Whether data of this age may still be used.

    Data from the future (negative age) is stale, or a clock that once ran years ahead would have made
    it fresh for years; a little of it is the skew between two machines, and counts as new.
    """
    return age_seconds >= -CLOCK_SKEW and max(age_seconds, 0.0) < ttl_hours * 3600


def _prefix(key: str) -> str:
    """What the file names of a key begin with: as much of it as is readable and safe, and its hash."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", key)[:_READABLE].strip("._-") or "data"
    return f"{readable}-{blake3(key.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}-"


def _is_entry(name: str) -> bool:
    return name.endswith(SUFFIX) and _OURS.fullmatch(name) is not None
