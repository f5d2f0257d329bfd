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
    BadCount,
    BadDevice,
    BadDtype,
    BadShape,
    ClosedBatch,
    ConcurrentCall,
    CorruptCache,
    DuplicateSequence,
    ForeignHandle,
    OutOfPages,
    PagedKVError,
    ParentChanged,
    StaleHandle,
)
from paged_kv.pool import Reclaimer
from paged_kv.staging import StagingBatch
from paged_kv.stats import CacheStats

__version__ = "0.1.0"

__all__ = [
    "BadCount",
    "BadDevice",
    "BadDtype",
    "BadShape",
    "CacheStats",
    "ClosedBatch",
    "ConcurrentCall",
    "CorruptCache",
    "DuplicateSequence",
    "ForeignHandle",
    "Gathered",
    "OutOfPages",
    "PagedKVCache",
    "PagedKVError",
    "ParentChanged",
    "Reclaimer",
    "StaleHandle",
    "StagingBatch",
]
