"""A checkpoint cache for PyTorch: every run continues from the best checkpoint that fits.

The public names load on first use, so that ``import ckptcache`` and the command line stay
quick and never import torch for work that needs no tensors.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ckptcache.cache import TrainingCache as TrainingCache
    from ckptcache.config import CacheConfig as CacheConfig
    from ckptcache.errors import CkptCacheError as CkptCacheError
    from ckptcache.metadata import CheckpointMetadata as CheckpointMetadata
    from ckptcache.session import TrainingSession as TrainingSession
    from ckptcache.trainer import CachedTrainer as CachedTrainer

_HOMES = {
    "CacheConfig": "ckptcache.config",
    "CachedTrainer": "ckptcache.trainer",
    "CheckpointMetadata": "ckptcache.metadata",
    "CkptCacheError": "ckptcache.errors",
    "TrainingCache": "ckptcache.cache",
    "TrainingSession": "ckptcache.session",
}

__all__ = [
    "CacheConfig",
    "CachedTrainer",
    "CheckpointMetadata",
    "CkptCacheError",
    "TrainingCache",
    "TrainingSession",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ckptcache' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
