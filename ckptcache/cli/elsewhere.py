"""A cache that an argument names, in which nothing is changed."""

from typing import TYPE_CHECKING

from ckptcache.elsewhere import Place

if TYPE_CHECKING:
    from ckptcache.cache import TrainingCache


def open_place(where: Place) -> "TrainingCache":
    """The cache that an argument is about. Raises what `find_cache` raises."""
    from ckptcache.cache import TrainingCache
    from ckptcache.cli.find import find_cache
    from ckptcache.cli.options import open_cache

    return open_cache() if where.folder is None else TrainingCache(find_cache(where.folder))
