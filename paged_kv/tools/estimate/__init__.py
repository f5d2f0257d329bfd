"""Says before anything runs how many bytes a tree search's KV caches will take. Arithmetic only: no
torch.
"""

from __future__ import annotations

from paged_kv.tools.estimate.call import Estimate, Held, estimate
from paged_kv.tools.estimate.workload import Workload

__all__ = ["Estimate", "Held", "Workload", "estimate"]
