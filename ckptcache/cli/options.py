"""What the commands take: the cache, checkpoints by id or name, configuration files."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from ckptcache.errors import CkptCacheError, InvalidConfigFile

if TYPE_CHECKING:
    from ckptcache.cache import TrainingCache
    from ckptcache.catalog import Catalog

    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # generic since click 8.4 only

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Options:
    """What every command takes, before it or after it."""

    cache_dir: str | None = None
    as_json: bool = False


def options() -> Options:
    """The options of the command that runs."""
    return click.get_current_context().ensure_object(Options)


def _keep(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value not in (None, False):
        setattr(ctx.ensure_object(Options), param.name or "", value)


def common(command: F) -> F:
    """Add --cache-dir and --json, which are kept in `options`."""
    return click.option(
        "--cache-dir",
        metavar="DIR",
        type=click.Path(readable=False),
        expose_value=False,
        is_eager=True,
        callback=_keep,
        help="The cache's folder.",
    )(json_option(command))


def json_option(command: F) -> F:
    """Add --json, which is kept in `options`, to a command that is about no single cache."""
    return click.option(
        "--json",
        "as_json",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_keep,
        help="Print one JSON document on stdout, and nothing else there.",
    )(command)


def open_cache(*, create: bool = False, **settings: Any) -> "TrainingCache":
    """The cache that the options, the environment, or the folders below name.

    Args:
        create: whether a folder that --cache-dir names may become a cache.
        settings: of `CacheConfig`.

    Raises CacheNotFound, AmbiguousCache or CacheDirIsFile.
    """
    from ckptcache.cache import TrainingCache
    from ckptcache.cli.find import find_cache

    return TrainingCache(find_cache(options().cache_dir, create=create), **settings)


# --- a checkpoint --------------------------------------------------------------------------------


class CheckpointType(ParamType):
    """An id, the beginning of one, a name, "best" or "latest"; the shell completes ids and names."""

    name = "checkpoint"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        found = {id: _hint(record) for id, record in _index_for_completion(ctx).items()}
        return [CompletionItem(word, help=hint) for word, hint in found.items() if word.startswith(incomplete)]


class NameType(ParamType):
    """A name that was given to a checkpoint."""

    name = "name"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        found = _catalog_for_completion(ctx)
        names = {} if found is None else found.index.names
        return [CompletionItem(n, help=p.checkpoint) for n, p in sorted(names.items()) if n.startswith(incomplete)]


def _catalog_for_completion(ctx: click.Context) -> "Catalog | None":
    # Whatever is wrong with the cache, the shell's line is not the place to say so.
    with suppress(CkptCacheError, OSError), ctx.scope(cleanup=False):
        return open_cache().ledger.view()
    return None


def _index_for_completion(ctx: click.Context) -> Mapping[str, Any]:
    catalog = _catalog_for_completion(ctx)
    if catalog is None:
        return {}
    named = {n: catalog.index.checkpoints.get(p.checkpoint) for n, p in sorted(catalog.index.names.items())}
    listed = catalog.ranked() or catalog.ranked(everything=True)
    words: dict[str, Any] = {"best": None, "latest": None} if listed else {}
    return {**named, **{r.id: r for r in listed}, **words}


def _hint(record: Any) -> str:
    if record is None:
        return ""
    loss = "" if record.val_loss is None else f", val_loss {record.val_loss:.4f}"
    return f"iteration {record.iteration}{loss}"


checkpoint_argument = click.argument("checkpoint", metavar="ID", type=CheckpointType())


# --- a configuration -----------------------------------------------------------------------------


class ConfigFileType(ParamType):
    """A JSON or TOML file that holds a mapping."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if isinstance(value, dict) else read_config(Path(value))

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


def read_config(path: Path) -> dict[str, Any]:
    """The mapping that a JSON or TOML file holds; that under "model_config", where it has such a part.

    Raises InvalidConfigFile.
    """
    import tomllib

    import orjson

    try:
        data = path.read_bytes()
        found = tomllib.loads(data.decode()) if path.suffix == ".toml" else orjson.loads(data)
    except OSError as error:
        raise InvalidConfigFile(path=path, reason=(error.strerror or str(error)).lower()) from error
    except ValueError as error:
        raise InvalidConfigFile(path=path, reason=error) from error
    if not isinstance(found, dict):
        raise InvalidConfigFile(path=path, reason="it holds no mapping")
    inner = found.get("model_config")
    return inner if isinstance(inner, dict) else found


class DirectionType(ParamType):
    """``NAME=max`` or ``NAME=min``: a metric, and whether more or less is better."""

    name = "direction"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        metric, _, direction = str(value).rpartition("=")
        if not metric or direction not in ("max", "min"):
            self.fail(f"{value!r} is not of the form NAME=max or NAME=min.", param, ctx)
        return metric, direction


model_config_option = click.option(
    "--model-config",
    metavar="FILE",
    type=ConfigFileType(),
    help="A JSON or TOML file with the whole configuration of the model.",
)
