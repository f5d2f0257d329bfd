"""What nobody holds is gone at once: caches, steps, indexes, managers. No collector runs here."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from paged_kv import CacheIndex, KVCacheManager, PagedKVCache


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """The collector is off."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def made() -> PagedKVCache:
    return PagedKVCache(layers=1, heads=1, head_size=2, page_size=2, num_pages=8)


def tokens(rows: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    kv = torch.ones(1, rows, 1, count, 2)
    return kv, kv


def filled() -> PagedKVCache:
    cache = made()
    cache.append(cache.new(2), *tokens(2, 3))
    return cache


def with_a_step() -> PagedKVCache:
    cache = filled()
    step = cache.open(cache.live(), 1)
    step.update(0, torch.ones(2, 1, 1, 2), torch.ones(2, 1, 1, 2))
    step.commit()
    cache.open(cache.live(), 1)
    return cache


def with_a_step_that_is_held() -> PagedKVCache:
    cache = filled()
    with cache.open(cache.live(), 1):
        return cache


def with_an_index() -> PagedKVCache:
    cache = filled()
    index = CacheIndex(cache)
    index.put("a", cache.live()[0])
    cache.set_reclaimer(index)
    return cache


def with_a_manager() -> PagedKVCache:
    cache = filled()
    manager = KVCacheManager(cache, env_count=2)
    manager.set_init_cache(1, "a", cache.live()[0])
    return cache


@pytest.mark.parametrize(
    "make",
    [made, filled, with_a_step, with_a_step_that_is_held, with_an_index, with_a_manager],
)
def test_a_cache_is_freed_when_it_is_dropped(make: Callable[[], PagedKVCache]) -> None:
    cache = make()
    tables = weakref.ref(cache.books)
    seen = weakref.ref(cache)
    del cache
    assert seen() is None
    assert tables() is None


def test_a_step_gives_all_back_when_it_is_dropped() -> None:
    cache = filled()
    before = cache.pages_in_use
    step = cache.open(cache.live(), 4)
    layer = step.layers[0]
    del step
    assert cache.pages_in_use == before + 4  # its layer still works on it
    assert cache.open_steps == 1
    del layer
    assert cache.open_steps == 0
    assert cache.pages_in_use == before
    cache.check()


def test_the_entries_of_an_index_end_with_it() -> None:
    cache = filled()
    kept, entry = cache.live()
    index = CacheIndex(cache)
    other = CacheIndex(cache)
    index.put("a", entry)
    index.pin("a")
    other.put("b", cache.fork([kept])[0])
    del index
    assert cache.live_sequences == 2
    assert entry not in cache.live()
    assert len(other) == 1
    cache.check()
    del other
    assert cache.live() == [kept]
    cache.release([kept])
    assert cache.pages_in_use == 0
    cache.check()


def test_a_manager_that_is_dropped_is_asked_for_nothing() -> None:
    cache = filled()
    manager = KVCacheManager(cache, env_count=1)
    assert cache.reclaimer is manager
    del manager
    assert cache.reclaimer is None


def test_a_reclaimer_of_the_callers_own_is_held() -> None:
    class Reclaimer:
        def reclaim(self, need: int, busy: object) -> bool:
            return False

        def pinned_pages(self) -> int:
            return 0

    cache = filled()
    cache.set_reclaimer(Reclaimer())
    assert isinstance(cache.reclaimer, Reclaimer)


def test_a_step_that_took_its_pages_late_gives_them_back() -> None:
    """A light one takes them as soon as somebody asks for anything."""
    cache = made()
    (root,) = cache.new()
    cache.append([root], *tokens(1, 2))
    step = cache.open([root], 2)
    assert cache.turns.books.light
    assert (cache.pages_in_use, cache.open_steps) == (2, 1)
    assert not cache.turns.books.light
    assert step.room == 2
    del step
    assert (cache.pages_in_use, cache.open_steps) == (1, 0)
