"""A cache as a collector of prometheus_client.

from prometheus_client import REGISTRY, start_http_server
from paged_kv.recording.prometheus import PagedKVCollector

REGISTRY.register(PagedKVCollector(cache))
start_http_server(8000)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from paged_kv.cache import PagedKVCache
from paged_kv.errors import MissingPackage
from paged_kv.recording.metrics import COUNTERS, LOOKUPS, Gauges, gauges
from paged_kv.recording.patience import patiently
from paged_kv.recording.target import find

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import Collector
except ImportError:
    raise MissingPackage(
        "exporting to Prometheus", "prometheus_client", "prometheus_client"
    ) from None

Metric = GaugeMetricFamily | CounterMetricFamily


class PagedKVCollector(Collector):
    """Reads a cache whenever it is scraped; adds nothing to the cache's own work.

    `target` is what `record` takes; what has yet to make its cache exports nothing until it has.
    `labels` are added to every metric. Only numbers that the cache keeps anyway are read, so a
    scrape from another thread is safe, and costs the same however large the cache is. A registry
    takes one collector. Raises NothingToRecord.

    >>> from prometheus_client import CollectorRegistry
    >>> cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2)
    >>> registry = CollectorRegistry()
    >>> registry.register(PagedKVCollector(cache, {"model": "mine"}))
    >>> sequences = cache.new(3)
    >>> registry.get_sample_value("paged_kv_sequences", {"model": "mine"})
    3
    """

    def __init__(self, target: Any, labels: Mapping[str, str] | None = None) -> None:
        self._target = find(target)
        self._names = list(labels or {})
        self._values = list((labels or {}).values())

    def describe(self) -> Iterator[Metric]:
        """The names, which the registry keeps unique."""
        yield from self._metrics(dict.fromkeys((*COUNTERS, *LOOKUPS), 0), {})

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now. Waits for a verb that another thread is in."""
        cache = self._target.cache
        if cache is not None:
            yield from self._metrics(*patiently(partial(self._read, cache)))

    def _read(self, cache: PagedKVCache) -> tuple[dict[str, int], Gauges]:
        lookups = self._target.lookups()
        stats = cache.stats
        counts = {field: getattr(stats, field) for field in COUNTERS}
        return {**counts, **({} if lookups is None else lookups._asdict())}, gauges(cache)

    def _metrics(self, counts: Mapping[str, int], gauges: Gauges) -> Iterator[Metric]:
        for field, (name, about) in {**LOOKUPS, **COUNTERS}.items():
            if field in counts:
                counter = CounterMetricFamily(name, about, labels=self._names)
                counter.add_metric(self._values, counts[field])
                yield counter
        for (name, about), value in gauges.items():
            gauge = GaugeMetricFamily(name, about, labels=self._names)
            gauge.add_metric(self._values, value)
            yield gauge
