"""The settings of a cache, resolved from four layers and validated once, together.

An argument wins over a ``CKPTCACHE_*`` environment variable, that over ``ckptcache.toml`` or
``[tool.ckptcache]`` in ``pyproject.toml`` (the nearest at or above the current folder), that over
the default.
"""

import ast
import difflib
import functools
import inspect
import itertools
import math
import os
import textwrap
import tomllib
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ckptcache.errors import ConfigError, InvalidConfigFile, UnknownSetting
from ckptcache.values import content_hash

if TYPE_CHECKING:
    from ckptcache.metadata import CheckpointMetadata

Direction = Literal["max", "min"]
CRITICAL_PARAMS = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")
GB = 1_000_000_000
SCRATCH = "CKPTCACHE_SCRATCH"
"""Names a folder below which all caches then lie, whatever the program says; `ckptcache prove` sets it."""
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
        found = settings_with_sources([f.name for f in missing]) if missing else {}
        for f in missing:
            object.__setattr__(self, f.name, found[f.name][0] if f.name in found else f.metadata["default"])
        object.__setattr__(self, "cache_dir", in_scratch(_as_given(self.cache_dir)))
        object.__setattr__(self, "critical_params", _as_given(self.critical_params))
        if problems := [_told(name, problem, found) for name, problem in _problems(self)]:
            raise ConfigError(problems="; ".join(problems))

    @property
    def max_cache_bytes(self) -> int:
        """`max_cache_size_gb` in bytes."""
        return int(self.max_cache_size_gb * GB)


def where_it_is(folder: str | os.PathLike[str]) -> CacheConfig:
    """Settings of a cache that is only read: its own folder, which no scratch folder stands in for."""
    config = CacheConfig(cache_dir=os.fspath(folder))
    object.__setattr__(config, "cache_dir", os.fspath(folder))
    return config


def _as_given(value: Any) -> Any:
    """Paths as text, lists as tuples; anything else as it is, for validation to judge."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return tuple(value) if isinstance(value, list | set | frozenset) else value


def in_scratch(path: Any) -> Any:
    """`path`, or, where CKPTCACHE_SCRATCH names a folder, what stands for it below that.

    So a training can be tried without its own cache being touched, wherever the program names that. Each path has a
    stand-in of its own, always the same; what lies in the scratch folder already, and what is no path, stays.
    """
    scratch = os.environ.get(SCRATCH)
    if not scratch or not isinstance(path, str) or not path or "\0" in path:
        return path
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - resolves "..", and no links
    if absolute.is_relative_to(scratch):
        return path
    return str(Path(scratch) / f"{content_hash(str(absolute.parent))}-{absolute.name}")


# --- layers --------------------------------------------------------------------------------------


def settings_with_sources(names: Iterable[str]) -> dict[str, tuple[Any, str]]:
    """The values of `names` that the environment or the nearest settings file gives, each with where it stands.

    A variable that can't be read as its setting's type is given as its text, for validation to refuse.

    Raises:
        UnknownSetting: the file names a setting that doesn't exist.
        InvalidConfigFile: the file isn't TOML.
    """
    found: dict[str, tuple[Any, str]] = {}
    from_file, path = _settings_file()
    for name, value in from_file.items():
        check_setting(name, source=str(path))
        found[name] = (value, str(path))
    if path is not None and isinstance(from_file.get("cache_dir"), str):
        # Empty stays empty, and is refused; it must not become the folder of the settings file.
        found["cache_dir"] = (str(path.parent / from_file["cache_dir"]) if from_file["cache_dir"] else "", str(path))
    for name in names:
        if variable := environment_variable(name):
            found[name] = (_parse(name, os.environ[variable]), variable)
    return {name: found[name] for name in names if name in found}


def _told(name: str, problem: str, sources: Mapping[str, tuple[Any, str]]) -> str:
    return f"{name} (from {sources[name][1]}) {problem}" if name in sources else f"{name} {problem}"


def environment_variable(name: str) -> str | None:
    """The variable that sets `name` at present, if one does (`CKPTCACHE_DIR` is short for the folder's)."""
    candidates = [f"CKPTCACHE_{name.upper()}"] + (["CKPTCACHE_DIR"] if name == "cache_dir" else [])
    return next((v for v in candidates if v in os.environ and name not in _ONLY_IN_CODE), None)


def check_setting(name: str, *, source: str, known: Iterable[str] | None = None) -> None:
    """Raise UnknownSetting, with the nearest name that exists, unless `name` is one."""
    names = list(known) if known is not None else [f.name for f in fields(CacheConfig) if f.name not in _ONLY_IN_CODE]
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
            section = _section(project)
            if section is not None:
                return section, project
    return {}, None


def _section(project: Path) -> dict[str, Any] | None:
    tools = _read_toml(project).get("tool")
    section = tools.get("ckptcache") if isinstance(tools, dict) else None
    if section is not None and not isinstance(section, dict):
        raise InvalidConfigFile(path=project, reason="tool.ckptcache is not a table")
    return section


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidConfigFile(path=path, reason=error) from error


def _parse(name: str, text: str) -> Any:
    if name == "cache_dir" or (name == "critical_params" and text == "all"):
        return text
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if name == "critical_params":
        return tuple(parts)
    if name == "quality_metrics":
        pairs = [part.partition("=") for part in parts]
        return {key.strip(): way.strip() for key, equals, way in pairs if equals} if all(p[1] for p in pairs) else text
    if name in ("auto_cleanup", "data_cache_enabled"):
        return _WORDS.get(text.strip().lower(), text)
    try:
        return float(text) if name.startswith(("quality_", "min_")) or "_gb" in name or "_hours" in name else int(text)
    except ValueError:
        return text


def setting_help(kind: type[Any], name: str) -> str:
    """What the docstring after a setting says, and its default: for command lines."""
    found = next(f for f in fields(kind) if f.name == name)
    default = found.metadata.get("default", found.default)
    text = _attribute_docs(cast(Hashable, kind)).get(name, "").split("\n")[0].rstrip(".")
    return f"{text} (default: {default})" if default is not None else text


@functools.cache
def _attribute_docs(kind: Any) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    found = {}
    for field_, text in itertools.pairwise(getattr(body, "body", [])):
        if isinstance(field_, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[ast.unparse(field_.target)] = str(text.value.value)
    return found


# --- validation ----------------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _problems(c: CacheConfig) -> Iterable[tuple[str, str]]:
    """Each setting that doesn't work, and what it must be."""
    yield from _limit_problems(c)
    yield from _quality_problems(c)
    if not isinstance(c.cache_dir, str) or not c.cache_dir or "\0" in c.cache_dir:
        yield "cache_dir", f"must be the path of a folder, not {c.cache_dir!r}"
    for name in ("auto_cleanup", "data_cache_enabled"):
        if not isinstance(getattr(c, name), bool):
            yield name, f"must be true or false, not {getattr(c, name)!r}"
    scorer: Any = c.best_fn
    if scorer is not None and not callable(scorer):
        yield "best_fn", f"must be a function of a record, not {scorer!r}"
    if c.critical_params != "all" and not _are_names(c.critical_params):
        yield "critical_params", f"must be a list of names, or 'all', not {c.critical_params!r}"


def _are_names(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) for name in value)


def _limit_problems(c: CacheConfig) -> Iterable[tuple[str, str]]:
    for name, least in (("max_checkpoints", 1), ("keep_latest", 0), ("max_records", 1)):
        if not _is_count(value := getattr(c, name)) or value < least:
            yield name, f"must be a whole number of at least {least}, not {value!r}"
    for name in ("max_cache_size_gb", "data_cache_ttl_hours"):
        if not _is_number(value := getattr(c, name)) or value <= 0:
            yield name, f"must be a number above 0, not {value!r}"


def _quality_problems(c: CacheConfig) -> Iterable[tuple[str, str]]:
    weights = ("quality_weight_loss", "quality_weight_metrics", "quality_weight_progress")
    values = [getattr(c, name) for name in weights]
    for name, value in zip(
        (*weights, "min_improvement_threshold"), (*values, c.min_improvement_threshold), strict=True
    ):
        if not _is_number(value) or value < 0:
            yield name, f"must be a number of at least 0, not {value!r}"
    if all(_is_number(v) for v in values) and sum(values) == 0:
        yield ", ".join(weights), "add up to nothing: set one of them above 0"
    if c.quality_metrics is not None and not (
        isinstance(c.quality_metrics, Mapping) and all(d in ("max", "min") for d in c.quality_metrics.values())
    ):
        yield "quality_metrics", f"must map each metric to 'max' or 'min', not {c.quality_metrics!r}"
