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

from paged_kv.cache import Gathered, PagedKVCache
from paged_kv.errors import (
    AlreadyRecording,
    BadCount,
    BadDevice,
    BadDtype,
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
    NothingToRecord,
    NotPinned,
    OutOfPages,
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
from paged_kv.index import CacheIndex, IndexStats
from paged_kv.manager import KVCacheManager, ManagerStats
from paged_kv.pool import Reclaimer
from paged_kv.staging import StagingBatch
from paged_kv.stats import CacheStats

__version__ = "0.1.0"

__all__ = [
    "AlreadyRecording",
    "BadCount",
    "BadDevice",
    "BadDtype",
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
    "NothingToRecord",
    "NotPinned",
    "OutOfPages",
    "PagedKVCache",
    "PagedKVError",
    "ParentChanged",
    "PinnedEntry",
    "Policy",
    "Priority",
    "Reclaimer",
    "StagingBatch",
    "StaleHandle",
    "UnannouncedNode",
    "UnknownEnv",
    "UnknownKey",
    "UnknownPolicy",
    "UnsupportedVersion",
]
