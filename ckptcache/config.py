"""The settings of a cache, resolved from four layers and validated once, together.

An argument wins over a ``CKPTCACHE_*`` environment variable, that over ``ckptcache.toml`` or
``[tool.ckptcache]`` in ``pyproject.toml`` (the nearest at or above the current folder), that over
the default.
"""

import difflib
import math
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ckptcache.errors import ConfigError, InvalidConfigFile, UnknownSetting

if TYPE_CHECKING:
    from ckptcache.metadata import CheckpointMetadata

Direction = Literal["max", "min"]
CRITICAL_PARAMS = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")
GB = 1_000_000_000
_ONLY_IN_CODE = frozenset({"best_fn"})
_UNSET: Any = object()
_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def _setting(default: Any) -> Any:
    """A field that, left out, is looked up in the environment and the settings file."""
    return field(default=_UNSET, metadata={"default": default})


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """How a cache stores, ranks and prunes.

    Raises:
        ConfigError: one or more values don't work; all of them are named.
        UnknownSetting: the settings file names a setting that doesn't exist.
    """

    cache_dir: str = _setting("cache/training")
    """Folder of the cache; created at the first save."""
    max_checkpoints: int = _setting(10)
    """How many checkpoint files are kept, at least 1. What is protected stays even above it."""
    max_cache_size_gb: float = _setting(20.0)
    """How much the checkpoint files may take together, in units of 10**9 bytes."""
    min_improvement_threshold: float = _setting(0.01)
    """By what fraction quality must rise for an evaluation to be saved as an improvement."""
    quality_weight_loss: float = _setting(0.7)
    """Weight of the validation loss in the quality score."""
    quality_weight_metrics: float = _setting(0.3)
    """Weight of the mean of the scored metrics in the quality score."""
    quality_weight_progress: float = _setting(0.0)
    """Weight of the progress, an iteration's share of the furthest of its group."""
    quality_metrics: Mapping[str, Direction] | None = _setting(None)
    """Which metrics are scored, each "max" or "min"; None finds them per group."""
    best_fn: Callable[["CheckpointMetadata"], float | None] | None = None
    """Replaces the scorer: a record to its quality, higher being better; None is unknown."""
    critical_params: tuple[str, ...] | Literal["all"] = _setting(CRITICAL_PARAMS)
    """Keys of model_config that must agree for a checkpoint to fit, or "all"."""
    auto_cleanup: bool = _setting(True)
    """Whether each save prunes to the limits."""
    keep_latest: int = _setting(1)
    """How many latest checkpoints of every live session, and of the newest, are protected."""
    data_cache_enabled: bool = _setting(True)
    """Whether prepared data is cached; when off it is built each time."""
    data_cache_ttl_hours: float = _setting(168.0)
    """Hours for which prepared data counts as fresh."""
    max_records: int = _setting(1000)
    """How many records the index holds; beyond it, the oldest of the lowest without a file go."""

    def __post_init__(self) -> None:
        missing = [f for f in fields(self) if getattr(self, f.name) is _UNSET]
        found = layered_settings([f.name for f in missing]) if missing else {}
        for f in missing:
            object.__setattr__(self, f.name, found.get(f.name, f.metadata["default"]))
        object.__setattr__(self, "cache_dir", os.fspath(self.cache_dir))
        if self.critical_params != "all":
            object.__setattr__(self, "critical_params", tuple(self.critical_params))
        if problems := list(_problems(self)):
            raise ConfigError(problems="; ".join(problems))

    @property
    def max_cache_bytes(self) -> int:
        """`max_cache_size_gb` in bytes."""
        return int(self.max_cache_size_gb * GB)


# --- layers --------------------------------------------------------------------------------------


def layered_settings(names: Iterable[str]) -> dict[str, Any]:
    """The values of `names` that the environment or the nearest settings file gives.

    Raises:
        UnknownSetting: the file names a setting that doesn't exist.
        InvalidConfigFile: the file isn't TOML, or a variable can't be read as its setting's type.
    """
    from_file, path = _settings_file()
    for name in from_file:
        check_setting(name, source=str(path))
    values = {name: from_file[name] for name in names if name in from_file}
    if path is not None and "cache_dir" in values:
        values["cache_dir"] = str(path.parent / values["cache_dir"])
    for name in names:
        variable = environment_variable(name)
        if variable is not None:
            values[name] = _parse(name, os.environ[variable], variable)
    return values


def environment_variable(name: str) -> str | None:
    """The variable that sets `name` at present, if one does (`CKPTCACHE_DIR` is short for the folder's)."""
    candidates = [f"CKPTCACHE_{name.upper()}"] + (["CKPTCACHE_DIR"] if name == "cache_dir" else [])
    return next((v for v in candidates if v in os.environ and name not in _ONLY_IN_CODE), None)


def check_setting(name: str, *, source: str, known: Iterable[str] | None = None) -> None:
    """Raise UnknownSetting, with the nearest name that exists, unless `name` is one."""
    names = list(known) if known is not None else [f.name for f in fields(CacheConfig)]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        suggestion = f": did you mean {near[0]!r}?" if near else f": there are {', '.join(sorted(names))}"
        raise UnknownSetting(name=name, source=source, suggestion=suggestion)


def _settings_file() -> tuple[dict[str, Any], Path | None]:
    here = Path.cwd()
    for folder in (here, *here.parents):
        own, project = folder / "ckptcache.toml", folder / "pyproject.toml"
        if own.is_file():
            return _read_toml(own), own
        if project.is_file():
            section = _read_toml(project).get("tool", {}).get("ckptcache")
            return (section, project) if isinstance(section, dict) else ({}, None)
    return {}, None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidConfigFile(path=path, reason=error) from error


def _parse(name: str, text: str, variable: str) -> Any:
    if name == "cache_dir" or (name == "critical_params" and text == "all"):
        return text
    if name == "critical_params":
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if name == "quality_metrics":
        return dict(part.strip().split("=", 1) for part in text.split(",") if "=" in part) or text
    words = {
        "1": True,
        "true": True,
        "yes": True,
        "on": True,
        "0": False,
        "false": False,
        "no": False,
        "off": False,
    }
    if name in ("auto_cleanup", "data_cache_enabled"):
        return words.get(text.strip().lower(), text)
    try:
        return float(text) if name.startswith(("quality_", "min_")) or "_gb" in name or "_hours" in name else int(text)
    except ValueError:
        raise InvalidConfigFile(path=variable, reason=f"{text!r} is not a number") from None


# --- validation ----------------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _problems(c: CacheConfig) -> Iterable[str]:
    yield from _limit_problems(c)
    yield from _quality_problems(c)
    if not c.cache_dir:
        yield "cache_dir is empty"
    for name in ("auto_cleanup", "data_cache_enabled"):
        if not isinstance(getattr(c, name), bool):
            yield f"{name} must be true or false, not {getattr(c, name)!r}"
    if c.critical_params != "all" and not all(isinstance(p, str) for p in c.critical_params):
        yield f"critical_params must be names or 'all', not {c.critical_params!r}"


def _limit_problems(c: CacheConfig) -> Iterable[str]:
    for name, least in (("max_checkpoints", 1), ("keep_latest", 0), ("max_records", 1)):
        if not _is_count(value := getattr(c, name)) or value < least:
            yield f"{name} must be a whole number of at least {least}, not {value!r}"
    for name in ("max_cache_size_gb", "data_cache_ttl_hours"):
        if not _is_number(value := getattr(c, name)) or value <= 0:
            yield f"{name} must be above 0, not {value!r}"


def _quality_problems(c: CacheConfig) -> Iterable[str]:
    weights = ("quality_weight_loss", "quality_weight_metrics", "quality_weight_progress")
    values = [getattr(c, name) for name in weights]
    for name, value in zip(
        (*weights, "min_improvement_threshold"), (*values, c.min_improvement_threshold), strict=True
    ):
        if not _is_number(value) or value < 0:
            yield f"{name} must be a number of at least 0, not {value!r}"
    if all(_is_number(v) for v in values) and sum(values) == 0:
        yield "the quality weights add up to nothing: set one of them above 0"
    if c.quality_metrics is not None and not (
        isinstance(c.quality_metrics, Mapping) and all(d in ("max", "min") for d in c.quality_metrics.values())
    ):
        yield f"quality_metrics must map each metric to 'max' or 'min', not {c.quality_metrics!r}"
