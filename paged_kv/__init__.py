"""Paged KV cache for tree search: fixed-size pages, block tables, copy-on-write.

>>> import torch
>>> from paged_kv import PagedKVCache
>>> cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2)
>>> root, = cache.new()
>>> cache.append([root], torch.ones(1, 1, 1, 3, 2), torch.ones(1, 1, 1, 3, 2))
>>> children = cache.fork([root] * 4)
>>> cache.pages_in_use
2
"""

from importlib import import_module

# Type checkers know the name; importing `typing` would be most of the time that this file takes.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from paged_kv import errors
    from paged_kv.cache import PagedKVCache
    from paged_kv.errors import PagedKVError
    from paged_kv.eviction import FIFO, LRU, Policy, Priority
    from paged_kv.gather import Gathered
    from paged_kv.index import CacheIndex
    from paged_kv.manager import KVCacheManager
    from paged_kv.paged_step import PagedStep
    from paged_kv.pages.pool import Reclaimer
    from paged_kv.scope import Scope
    from paged_kv.stats import CacheStats
    from paged_kv.step import Step

__version__ = "0.1.0"

__all__ = [
    "CacheIndex",
    "CacheStats",
    "FIFO",
    "Gathered",
    "KVCacheManager",
    "LRU",
    "PagedKVCache",
    "PagedKVError",
    "PagedStep",
    "Policy",
    "Priority",
    "Reclaimer",
    "Scope",
    "Step",
    "errors",
]

# Imported when they are first asked for, so that `paged-kv --help` and `paged-kv estimate` do not
# wait for torch.
_HOMES = {
    "CacheIndex": "index",
    "CacheStats": "stats",
    "FIFO": "eviction",
    "Gathered": "gather",
    "KVCacheManager": "manager",
    "LRU": "eviction",
    "PagedKVCache": "cache",
    "PagedKVError": "errors",
    "PagedStep": "paged_step",
    "Policy": "eviction",
    "Priority": "eviction",
    "Reclaimer": "pages.pool",
    "Scope": "scope",
    "Step": "step",
}

if not TYPE_CHECKING:  # a type checker would take it for a promise that every name exists

    def __getattr__(name: str) -> object:
        if name == "errors":
            return import_module(f"{__name__}.errors")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
