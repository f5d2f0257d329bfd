"""What is evicted for pages: in turn, inner entries last, and nothing that would free none."""

from __future__ import annotations

import pytest
from small_caches import filled, grow, step, tiny_cache

from paged_kv import CacheIndex, KVCacheManager


def test_an_inner_entry_goes_where_nothing_else_is_left() -> None:
    cache = tiny_cache(8)
    index = CacheIndex(cache)
    (root,) = filled(cache, 4)
    index.put("root", root)
    (child,) = step(cache, [root], 2)
    cache.slide([child], 4)  # it holds none of the pages above it
    assert index.reclaim(2)
    assert len(index) == 0
    assert cache.live() == [child]


@pytest.mark.parametrize("need", range(1, 7))
def test_indexes_of_one_rank_go_in_turn(need: int) -> None:
    cache = tiny_cache(8)
    manager = KVCacheManager(cache, 3, init_entries=2)
    for number, seq in enumerate(filled(cache, *[2] * 6)):
        manager.set_init_cache(number % 3, number, seq)
    assert manager.reclaim(need)
    assert sorted(key for pool in manager.init_pools for key in pool) == list(range(need, 6))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_page_that_is_written_on_in_place_is_not_freed_for_it(count: int) -> None:
    cache = tiny_cache(2, page_size=4)
    index = CacheIndex(cache)
    (seq,) = filled(cache, count)
    index.put("fork", cache.fork([seq])[0])
    assert not index.reclaim(1, busy=[seq])
    assert list(index) == ["fork"]
    grow(cache, [seq], 1)
    assert cache.stats.copied_pages == 0


def test_an_index_that_gives_nothing_keeps_its_order() -> None:
    """Its only entry was passed over, for something hangs on it."""
    cache = tiny_cache(8)
    manager = KVCacheManager(cache, 2, init_entries=2)
    root, leaf = filled(cache, 2, 2)
    cache.fork([root])
    manager.set_init_cache(0, "root", root)
    manager.set_init_cache(1, "leaf", leaf)
    first, second = manager.init_pools
    policy = first.policy
    assert manager.reclaim(1)
    assert (list(first), list(second)) == (["root"], [])
    first.victims()
    assert first.policy is policy
