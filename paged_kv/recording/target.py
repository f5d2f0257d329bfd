"""Where the cache is: itself, or in a manager, or in what runs on pages: a model or a policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from paged_kv.cache import PagedKVCache
from paged_kv.errors import NothingToRecord
from paged_kv.stats import IndexStats

# What DI-engine calls the models of a policy; models have their `world_model`. Nothing of any
# framework is imported here.
_MODELS = ("model", "learn_model", "collect_model", "eval_model")


class Lookups(NamedTuple):
    """Counts that only grow."""

    queries: int
    hits: int
    evictions: int


class Target:
    """What is recorded. `state` makes the cache at its first use and may make another later.

    A cache has no such state.
    """

    def __init__(
        self, cache: PagedKVCache | None, state: Any = None, world_model: Any = None
    ) -> None:
        self._cache = cache
        self.state = state
        self._world_model = world_model

    @property
    def cache(self) -> PagedKVCache | None:
        """The cache as it is now, or None where it was not made yet. Makes none."""
        if self.state is None:
            return self._cache
        return self.state.cache if self.state.started else None

    def lookups(self) -> Lookups | None:
        """Lookups since the index or the model was made; None where nobody counts them."""
        cache = self.cache
        stats = None if cache is None else getattr(cache.reclaimer, "stats", None)
        combined = getattr(stats, "combined", stats)
        if not isinstance(combined, IndexStats):
            return None
        queries = combined.queries
        hits = combined.hits
        model = self._world_model
        if hasattr(model, "total_query_count") and hasattr(model, "hit_count"):
            # A model finds most of its nodes without asking an index, and counts for itself.
            queries = model.total_query_count + getattr(model, "root_total_query_cnt", 0)
            hits = model.hit_count + getattr(model, "root_hit_cnt", 0)
        return Lookups(int(queries), int(hits), combined.evictions)


def find(target: Any) -> Target:
    """The cache of a target. Raises NothingToRecord."""
    if isinstance(target, PagedKVCache):
        return Target(target)
    for holder in _holders(target):
        state = getattr(holder, "paged", holder)
        if hasattr(type(state), "started"):
            return Target(None, state, None if holder is state else holder)
    if isinstance(getattr(target, "cache", None), PagedKVCache):
        return Target(target.cache)
    raise NothingToRecord(target)


def _holders(target: Any) -> Iterator[Any]:
    """Everything that may be, or may hold, the contexts of a world model."""
    for holder in (target, *_models(target)):
        yield from (holder, getattr(holder, "world_model", None))


def _models(policy: Any) -> Iterator[Any]:
    """The models of a policy, as its interface hands them out; of all else none."""
    attribute = getattr(getattr(policy, "collect_mode", None), "get_attribute", None)
    if not callable(attribute):
        return
    for name in _MODELS:
        with suppress(NotImplementedError):  # it has no such model
            yield attribute(name)
