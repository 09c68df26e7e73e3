"""The options of the main job: what the model is and how it is trained, each validated together; no torch."""

import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import orjson

from ckptcache.config import check_setting
from ckptcache.errors import ConfigError, InvalidConfigFile

RUN_OPTIONS = (
    "data_dir",
    "out_dir",
    "cache_dir",
    "max_checkpoints",
    "max_cache_size_gb",
    "min_improvement_threshold",
    "force_fresh_start",
    "resume",
    "warm_start",
    "json",
)
"""Options of a run that are neither the model's nor the training's; a settings file may hold them too."""
DEFAULT_SESSION_ITERS = 300
"""How many iterations a session adds when neither `max_iters` nor `session_iters` says."""

_DEVICE = re.compile(r"[a-z]+(:\d+)?")
_MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class NanEchoConfig:
    """What a NanEcho model is: its `model_config` in the cache.

    The defaults make a model of 0.8 M parameters that two CPU cores train by several iterations a second.

    Raises:
        ConfigError: one or more values don't work; all of them are named.
    """

    n_layer: int = 4
    """How many blocks."""
    n_head: int = 4
    """How many attention heads per block; divides `n_embd`."""
    n_embd: int = 128
    """Width of the residual stream."""
    vocab_size: int = 256
    """How many different tokens; 256 for text as bytes."""
    block_size: int = 128
    """Longest context, in tokens."""
    dropout: float = 0.0
    """Probability with which activations are dropped in training."""
    bias: bool = False
    """Whether linear and normalisation layers have a bias."""
    connection_ratio: float = 0.5
    """Fraction of the blocks' connections that is active at first; above 0."""
    max_connections: float = 1.0
    """The fraction up to which connections grow."""
    connection_seed: int = 0
    """Decides, with each layer's name, in which order connections become active."""

    def __post_init__(self) -> None:
        _raise_for(_model_problems(self))

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """The configuration that `options` gives; keys that are not the model's are passed over."""
        return cls(**_own(cls, options))


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How the main job trains: its `training_config` in the cache.

    Raises:
        ConfigError: one or more values don't work; all of them are named.
    """

    batch_size: int = 16
    """Blocks per forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward and backward passes per optimizer step."""
    learning_rate: float = 4e-3
    """Highest learning rate, reached after `warmup_iters`."""
    min_learning_rate: float | None = None
    """Learning rate from `decay_iters` on; None: a tenth of `learning_rate`."""
    warmup_iters: int = 20
    """Iterations over which the learning rate rises in a line."""
    decay_iters: int = 2000
    """Iteration at which the cosine has come down to its lowest."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's decay rates of the first and second moment."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    eval_interval: int = 50
    """Iterations between evaluations."""
    eval_batches: int = 20
    """Validation batches per evaluation, the same each time."""
    checkpoint_interval: int = 100
    """Iterations between the checkpoints that are saved whatever the loss."""
    connection_growth_interval: int = 100
    """Iterations between growths of the connections; 0 never grows."""
    connection_growth_step: float = 0.1
    """How much the fraction of active connections rises at a growth."""
    max_iters: int | None = None
    """Iterations in all, over all sessions; None leaves it to `session_iters`."""
    session_iters: int | None = None
    """Iterations in this session; None leaves it to `max_iters`."""
    max_seconds: float | None = None
    """Seconds after which the session ends; None: no limit."""
    seed: int = 1337
    """Seed of the initial weights and of the order of the batches."""
    device: str = "auto"
    """Where to train: "cpu", "cuda", "cuda:1", "mps", ...; "auto" takes the fastest there is."""

    def __post_init__(self) -> None:
        betas: Any = self.betas
        if isinstance(betas, list):  # as JSON and TOML give it
            object.__setattr__(self, "betas", tuple(betas))
        _raise_for(_training_problems(self))

    @property
    def lowest_learning_rate(self) -> float:
        """`min_learning_rate`, or what stands for it."""
        return self.learning_rate / 10 if self.min_learning_rate is None else self.min_learning_rate

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """The settings that `options` gives; keys that are not the training's are passed over."""
        return cls(**_own(cls, options))


def known_options() -> tuple[str, ...]:
    """Every name that a settings file may hold, sorted."""
    return tuple(sorted({f.name for kind in (NanEchoConfig, TrainingSettings) for f in fields(kind)} | {*RUN_OPTIONS}))


def load_settings(path: Path) -> dict[str, Any]:
    """The options that the file at `path` gives, by name; dashes in names are read as underscores.

    Values are judged where they are used: by NanEchoConfig, TrainingSettings and CacheConfig.

    Raises:
        InvalidConfigFile: the file can't be read, isn't JSON or TOML, or names an option twice.
        UnknownSetting: a name is no option; the nearest one is suggested.
    """
    settings: dict[str, Any] = {}
    for key, value in _read_options(path).items():
        name = key.replace("-", "_")
        check_setting(name, source=str(path), known=known_options())
        if name in settings:
            raise InvalidConfigFile(path=path, reason=f"{name} is given twice")
        settings[name] = value
    return settings


def _read_options(path: Path) -> dict[str, Any]:
    if path.suffix not in (".json", ".toml"):
        raise InvalidConfigFile(path=path, reason="its name must end in .json or .toml")
    try:
        data = path.read_bytes()
        options = orjson.loads(data) if path.suffix == ".json" else tomllib.loads(data.decode("utf-8"))
    except OSError as error:
        raise InvalidConfigFile(path=path, reason=error.strerror or str(error)) from error
    except ValueError as error:
        raise InvalidConfigFile(path=path, reason=error) from error
    if not isinstance(options, dict):
        raise InvalidConfigFile(path=path, reason="it must map names of options to their values")
    return options


# --- validation ----------------------------------------------------------------------------------


def _own(kind: type[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    return {f.name: options[f.name] for f in fields(kind) if f.name in options}


def _raise_for(found: Iterator[str]) -> None:
    if problems := list(found):
        raise ConfigError(problems="; ".join(problems))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count_problems(owner: object, least: Mapping[str, int]) -> Iterator[str]:
    for name, limit in least.items():
        if not _is_count(value := getattr(owner, name)) or value < limit:
            yield f"{name} must be a whole number of at least {limit}, not {value!r}"


def _seed_problems(owner: object, name: str) -> Iterator[str]:
    if not _is_count(value := getattr(owner, name)) or not 0 <= value <= _MAX_SEED:
        yield f"{name} must be a whole number from 0 to 2**63 - 1, not {value!r}"


def _model_problems(c: NanEchoConfig) -> Iterator[str]:
    sizes = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")
    bad_sizes = list(_count_problems(c, dict.fromkeys(sizes, 1)))
    yield from bad_sizes
    if not bad_sizes and c.n_embd % c.n_head:
        yield f"n_embd must be a multiple of n_head, and {c.n_embd} is no multiple of {c.n_head}"
    if not _is_number(c.dropout) or not 0 <= c.dropout < 1:
        yield f"dropout must be at least 0 and below 1, not {c.dropout!r}"
    bias: Any = c.bias
    if not isinstance(bias, bool):
        yield f"bias must be true or false, not {bias!r}"
    yield from _connection_problems(c)
    yield from _seed_problems(c, "connection_seed")


def _connection_problems(c: NanEchoConfig) -> Iterator[str]:
    names = ("connection_ratio", "max_connections")
    wrong = [name for name in names if not _is_number(v := getattr(c, name)) or not 0 < v <= 1]
    for name in wrong:
        yield f"{name} must be above 0 and at most 1, not {getattr(c, name)!r}"
    if not wrong and c.connection_ratio > c.max_connections:
        yield f"connection_ratio ({c.connection_ratio}) must not be above max_connections ({c.max_connections})"


def _training_problems(s: TrainingSettings) -> Iterator[str]:
    at_least_one = ("batch_size", "gradient_accumulation_steps", "eval_interval", "eval_batches", "checkpoint_interval")
    from_zero = ("warmup_iters", "connection_growth_interval")
    optional = [name for name in ("max_iters", "session_iters") if getattr(s, name) is not None]
    yield from _count_problems(s, {**dict.fromkeys(at_least_one, 1), **dict.fromkeys(from_zero, 0)})
    yield from _count_problems(s, dict.fromkeys(optional, 1))
    if s.max_seconds is not None and (not _is_number(s.max_seconds) or s.max_seconds <= 0):
        yield f"max_seconds must be above 0, not {s.max_seconds!r}"
    if not _is_number(s.connection_growth_step) or not 0 < s.connection_growth_step <= 1:
        yield f"connection_growth_step must be above 0 and at most 1, not {s.connection_growth_step!r}"
    if not isinstance(s.device, str) or not _DEVICE.fullmatch(s.device):
        yield f"device must be like auto, cpu, cuda, cuda:0 or mps, not {s.device!r}"
    yield from _seed_problems(s, "seed")
    yield from _optimizer_problems(s)
    yield from _schedule_problems(s)


def _optimizer_problems(s: TrainingSettings) -> Iterator[str]:
    for name in ("weight_decay", "grad_clip"):
        if not _is_number(value := getattr(s, name)) or value < 0:
            yield f"{name} must be a number of at least 0, not {value!r}"
    betas: Any = s.betas
    pair = isinstance(betas, tuple) and len(betas) == 2
    if not pair or not all(_is_number(beta) and 0 <= beta < 1 for beta in betas):
        yield f"betas must be two numbers of at least 0 and below 1, not {betas!r}"


def _schedule_problems(s: TrainingSettings) -> Iterator[str]:
    if not _is_number(s.learning_rate) or s.learning_rate <= 0:
        yield f"learning_rate must be above 0, not {s.learning_rate!r}"
    elif not _is_number(s.lowest_learning_rate) or not 0 <= s.lowest_learning_rate <= s.learning_rate:
        yield (
            f"min_learning_rate must be from 0 to the learning_rate ({s.learning_rate:g}), not "
            f"{s.min_learning_rate!r}: lower it too"
        )
    if not _is_count(s.decay_iters) or (_is_count(s.warmup_iters) and s.decay_iters <= s.warmup_iters):
        yield f"decay_iters must be a whole number above warmup_iters ({s.warmup_iters!r}), not {s.decay_iters!r}"
