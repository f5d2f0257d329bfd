"""Metrics of a worker for Ray, under the names that are exported to Prometheus; Ray puts `ray_`
before them, and says whose they are.
"""

from __future__ import annotations

from collections.abc import Callable

from ray.util.metrics import Counter, Gauge

from paged_kv.cache import PagedKVCache
from paged_kv.recording.metrics import COUNTERS, LOOKUPS, gauges
from paged_kv.recording.target import find


def telling(cache: PagedKVCache) -> Callable[[], None]:
    """What tells Ray of a cache, whenever it is called."""
    counters = {
        field: Counter(name, description=about)
        for field, (name, about) in {**LOOKUPS, **COUNTERS}.items()
    }
    shown = {name: Gauge(name, description=about) for name, about in gauges(cache)}
    told = dict.fromkeys(counters, 0)
    target = find(cache)

    def tell() -> None:
        for (name, _), value in gauges(cache).items():
            shown[name].set(value)
        lookups = target.lookups()
        stats = cache.stats
        for field, counter in counters.items():
            source = stats if field in COUNTERS else lookups
            count = int(getattr(source, field, 0))
            if count > told[field]:
                counter.inc(count - told[field])
                told[field] = count

    return tell
