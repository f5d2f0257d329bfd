"""Searches with a language model on several workers, which Ray runs. See docs/ray.md.

Importing this imports transformers, but not ray: a `SearchPool` does.
"""

from paged_kv.integrations.ray.calls import Figures
from paged_kv.integrations.ray.engine import Engine
from paged_kv.integrations.ray.figures import PoolStats, WorkerStats
from paged_kv.integrations.ray.placement import Placement
from paged_kv.integrations.ray.pool import SearchPool
from paged_kv.integrations.ray.pool_nodes import PoolNode

__all__ = ["Engine", "Figures", "Placement", "PoolNode", "PoolStats", "SearchPool", "WorkerStats"]
