"""Searches with a language model, and LightZero's collectors, on several workers, which Ray runs.
See docs/ray.md.

Importing this imports transformers, but neither ray nor LightZero: pools do.
"""

from paged_kv.integrations.ray.calls import Figures
from paged_kv.integrations.ray.collecting import CollectorFigures, SeededCollector
from paged_kv.integrations.ray.collection import (
    CollectionStats,
    CollectorPool,
    CollectorStats,
    Shard,
)
from paged_kv.integrations.ray.engine import Engine
from paged_kv.integrations.ray.figures import PoolStats, WorkerStats
from paged_kv.integrations.ray.placement import Placement
from paged_kv.integrations.ray.pool import SearchPool
from paged_kv.integrations.ray.pool_nodes import PoolNode

__all__ = [
    "CollectionStats",
    "CollectorFigures",
    "CollectorPool",
    "CollectorStats",
    "Engine",
    "Figures",
    "Placement",
    "PoolNode",
    "PoolStats",
    "SearchPool",
    "SeededCollector",
    "Shard",
    "WorkerStats",
]
