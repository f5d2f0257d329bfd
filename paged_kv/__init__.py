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

# type checkers know the name; importing `typing` would be most of the time that this file takes
TYPE_CHECKING = False

if TYPE_CHECKING:
    from paged_kv.cache import Gathered, PagedKVCache
    from paged_kv.errors import (
        AlreadyRecording,
        BadArgument,
        BadConfig,
        BadCount,
        BadDevice,
        BadDtype,
        BadKey,
        BadPriority,
        BadRecording,
        BadShape,
        CapacityExceeded,
        ClosedBatch,
        ConcurrentCall,
        CorruptCache,
        DuplicateSequence,
        ForeignHandle,
        HandleInUse,
        MissingPackage,
        NestedCall,
        NotCopyable,
        NothingToRecord,
        NotPinned,
        OutOfPages,
        OwnedSequence,
        PagedKVError,
        ParentChanged,
        PinnedEntry,
        StaleHandle,
        UnannouncedNode,
        UnknownEnv,
        UnknownKey,
        UnknownPolicy,
        UnsupportedVersion,
    )
    from paged_kv.eviction import FIFO, LRU, Policy, Priority
    from paged_kv.index import CacheIndex
    from paged_kv.manager import KVCacheManager, ManagerStats
    from paged_kv.pages.pool import Reclaimer
    from paged_kv.scope import Scope
    from paged_kv.staging import StagingBatch
    from paged_kv.stats import CacheStats, IndexStats

__version__ = "0.1.0"

__all__ = [
    "AlreadyRecording",
    "BadArgument",
    "BadConfig",
    "BadCount",
    "BadDevice",
    "BadDtype",
    "BadKey",
    "BadPriority",
    "BadRecording",
    "BadShape",
    "CacheIndex",
    "CacheStats",
    "CapacityExceeded",
    "ClosedBatch",
    "ConcurrentCall",
    "CorruptCache",
    "DuplicateSequence",
    "FIFO",
    "ForeignHandle",
    "Gathered",
    "HandleInUse",
    "IndexStats",
    "KVCacheManager",
    "LRU",
    "ManagerStats",
    "MissingPackage",
    "NestedCall",
    "NotCopyable",
    "NothingToRecord",
    "NotPinned",
    "OutOfPages",
    "OwnedSequence",
    "PagedKVCache",
    "PagedKVError",
    "ParentChanged",
    "PinnedEntry",
    "Policy",
    "Priority",
    "Reclaimer",
    "Scope",
    "StagingBatch",
    "StaleHandle",
    "UnannouncedNode",
    "UnknownEnv",
    "UnknownKey",
    "UnknownPolicy",
    "UnsupportedVersion",
]

# Where the public names live, what needs no torch first. They are imported when they are first
# asked for, so that `paged-kv --help` and `paged-kv estimate` do not wait for torch.
_HOMES = (
    "errors",
    "stats",
    "eviction",
    "index",
    "manager",
    "scope",
    "staging",
    "pages.pool",
    "cache",
)

if not TYPE_CHECKING:  # a type checker would take it for a promise that every name exists

    def __getattr__(name: str) -> object:
        if name in _HOMES:
            return import_module(f"{__name__}.{name}")
        if name in __all__:
            for home in _HOMES:
                found = getattr(import_module(f"{__name__}.{home}"), name, None)
                if found is not None:
                    globals()[name] = found
                    return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
