"""What the manager promises about order, counts and errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from naive_index import Entry, FullError, NaiveIndex
from small_caches import books, filled, grow, listened, step, tiny_cache

from paged_kv import PagedKVCache
from paged_kv.errors import (
    BadArgument,
    BadCount,
    BadKey,
    CapacityExceeded,
    CorruptCache,
    HandleInUse,
    OutOfPages,
    OwnedSequence,
    UnknownEnv,
    UnknownPolicy,
)
from paged_kv.eviction import FIFO, POLICIES
from paged_kv.index import CacheIndex
from paged_kv.manager import KVCacheManager
from paged_kv.stats import IndexStats


def loaded(pages: int = 8) -> tuple[PagedKVCache, KVCacheManager, list[int]]:
    """A manager with one entry of one page in each pool: "r", "w", "i0", "i1"."""
    cache = tiny_cache(pages)
    manager = KVCacheManager(cache, 2)
    seqs = filled(cache, 1, 1, 1, 1)
    manager.set_recur_cache("r", seqs[0])
    manager.set_wm_cache("w", seqs[1])
    manager.set_init_cache(0, "i0", seqs[2])
    manager.set_init_cache(1, "i1", seqs[3])
    return cache, manager, seqs


def keys(manager: KVCacheManager) -> list[list[object]]:
    return [list(pool) for pool in manager.pools]


def test_the_lookup_asks_init_before_recurrent() -> None:
    cache, manager, (recur, _, init, _) = loaded()
    (other,) = cache.new()
    manager.set_recur_cache("i0", other)
    assert manager.retrieve_cache_hierarchical(0, "i0") == init
    # an environment sees its own roots only
    assert manager.retrieve_cache_hierarchical(1, "i0") == other
    assert manager.retrieve_cache_hierarchical(1, "r") == recur
    assert manager.retrieve_cache_hierarchical(1, "r", check_recur=False) is None
    # world-model contexts are no search nodes
    assert manager.retrieve_cache_hierarchical(0, "w") is None
    stats = manager.stats
    assert stats.combined == IndexStats(queries=5, hits=3, misses=2, insertions=5)
    assert stats.init == IndexStats(queries=5, hits=1, misses=4, insertions=2)
    assert stats.recur == IndexStats(queries=3, hits=2, misses=1, insertions=2)
    assert stats.wm == IndexStats(insertions=1)


def test_stats_are_snapshots() -> None:
    _, manager, _ = loaded()
    before = manager.stats
    manager.get_wm_cache("w")
    assert before.wm.hits == 0
    assert manager.stats.wm.hits == 1


def test_pages_come_from_search_nodes_first_and_from_roots_last() -> None:
    cache, manager, _ = loaded(4)
    (seq,) = cache.new()
    seen = []
    for _ in range(4):
        grow(cache, [seq], 2)
        seen.append(keys(manager))
    assert seen == [
        [[], ["w"], ["i0"], ["i1"]],
        [[], [], ["i0"], ["i1"]],
        [[], [], [], ["i1"]],
        [[], [], [], []],
    ]
    assert manager.stats.combined.evictions == 4
    with pytest.raises(OutOfPages):
        grow(cache, [seq], 1)


def test_environments_give_up_roots_in_turn() -> None:
    cache = tiny_cache(6)
    manager = KVCacheManager(cache, 3)
    for key, (env, seq) in enumerate(zip([0, 0, 1, 2, 2], filled(cache, 1, 1, 1, 1, 1))):
        manager.set_init_cache(env, key, seq)
    assert manager.reclaim(4)
    assert keys(manager) == [[], [], [], [], [4]]


def test_pools_of_one_entry_a_page_shared_between_pools_and_pins() -> None:
    cache, manager, (recur, _, _init, _) = loaded(6)
    (child,) = cache.fork([recur])
    manager.set_init_cache(0, "child", child)
    manager.recur_pool.pin("r")
    manager.init_pools[0].pin("child")
    assert manager.pinned_pages() == 1
    assert not manager.reclaim(6)
    assert manager.reclaim(3)
    assert keys(manager) == [["r"], [], ["child"], []]
    assert cache.lengths([recur, child]) == [1, 1]


def test_each_clear_is_one_change_of_the_books() -> None:
    cache, manager, seqs = loaded()
    heard = listened(cache)
    manager.clear_init_caches()
    manager.clear_recur_cache()
    manager.clear_all()
    manager.clear_all()
    assert [drops for _, drops in heard[-4:]] == [[seqs[2:]], [seqs[:1]], [seqs[1:2]], []]
    assert cache.live_sequences == 0


def test_roots_of_a_batch_replace_all_others_in_one_change_and_are_pinned_once() -> None:
    cache = tiny_cache()
    manager = KVCacheManager(cache, 3, init_entries=1)
    first = cache.new(3)
    manager.set_init_caches(range(3), range(3), first)
    manager.init_pools[1].pin(1)
    manager.init_pools[1].pin(1)
    heard = listened(cache)
    roots = cache.fork(first)
    manager.set_init_caches([2, 0, 1], [2, 0, 1], [roots[2], roots[0], roots[1]], pin=True)
    assert heard[-1] == ("set_init_caches", [[first[2], first[0], first[1]]])
    assert [pool.handles() for pool in manager.init_pools] == [[root] for root in roots]
    for env, pins in enumerate([1, 2, 1]):
        for _ in range(pins):
            manager.init_pools[env].unpin(env)
        assert not manager.init_pools[env].pinned(env)
    assert manager.stats.init == IndexStats(insertions=6)


def test_a_batch_of_roots_that_is_refused_changes_nothing() -> None:
    cache, manager, seqs = loaded()
    a, b = cache.new(2)
    manager.init_pools[1].pin("i1")
    manager.init_pools[1].entries.max_entries = 1
    before = (books(cache.books), keys(manager), manager.stats)
    refused: list[tuple[type[Exception], str, tuple[Any, Any, Any]]] = [
        (UnknownEnv, "environment id is 2", ([0, 2], ["x", "y"], [a, b])),
        (BadCount, "env_ids (one a sequence) is 1, allowed is 2 env_ids", ([0], ["x"], [a, b])),
        (BadCount, "keys (one a sequence) is 1, allowed is 2 keys", ([0, 1], ["x"], [a, b])),
        (BadArgument, "allowed is a list of environment ids", (0, ["x"], [a])),
        (HandleInUse, "under key 'x'", ([0, 1], ["x", "x"], [a, a])),
        (HandleInUse, "under key 'r'", ([0, 1], ["x", "r"], [a, seqs[0]])),
        (HandleInUse, "under key 'i0'", ([0, 1], ["x", "i0"], [a, seqs[2]])),
        (CapacityExceeded, "need 2 entries, allowed is 1", ([0, 1], ["i0", "y"], [a, b])),
        (BadKey, "cannot be hashed", ([0, 1], ["x", []], [a, b])),
    ]
    for error, words, args in refused:
        with pytest.raises(error) as caught:
            manager.set_init_caches(*args, pin=True)
        assert words in str(caught.value)
        assert (books(cache.books), keys(manager), manager.stats) == before
        manager.check()


def test_init_pools_keep_two_roots_each_by_default() -> None:
    cache = tiny_cache()
    manager = KVCacheManager(cache, 2)
    for key, seq in enumerate(cache.new(3)):
        manager.set_init_cache(0, key, seq)
    assert keys(manager) == [[], [], [1, 2], []]
    assert manager.env_count == 2


def test_any_maker_of_policies() -> None:
    made: list[FIFO] = []

    def make() -> FIFO:
        made.append(FIFO())
        return made[-1]

    manager = KVCacheManager(
        tiny_cache(), 3, init_policy=make, recur_policy="priority", wm_policy=FIFO
    )
    assert [pool.policy for pool in manager.init_pools] == made[::2]
    assert isinstance(manager.recur_pool.policy, POLICIES["priority"])  # type: ignore[arg-type]


def test_block_tables_are_those_of_the_cache() -> None:
    cache, manager, seqs = loaded()
    (longer,) = step(cache, seqs[:1], 2)
    tables, lengths, starts = manager.block_tables([longer, seqs[2]])
    assert (tables.dtype, tables.shape) == (torch.int32, (2, 2))
    assert (lengths.tolist(), starts.tolist()) == ([3, 1], [0, 0])


def test_entries_belong_to_the_manager() -> None:
    cache, manager, seqs = loaded()
    for seq, key in zip(seqs, ("r", "w", "i0", "i1")):
        with pytest.raises(OwnedSequence, match=f"under key '{key}'"):
            cache.release([seq])
    assert keys(manager) == [["r"], ["w"], ["i0"], ["i1"]]


def test_environment_ids_of_any_library() -> None:
    _, manager, seqs = loaded()
    for env in (np.int64(1), np.uint8(1), torch.tensor(1)):
        assert manager.get_init_cache(env, "i1") == seqs[3]  # type: ignore[arg-type]
    manager.clear_init_caches(np.array([1]))
    manager.clear_init_caches(torch.tensor([1, 1]))  # type: ignore[arg-type]
    assert keys(manager) == [["r"], ["w"], ["i0"], []]


@pytest.mark.parametrize("envs", ["01", b"01", 1])
def test_environments_to_clear_are_a_list(envs: object) -> None:
    _, manager, _ = loaded()
    words = r"env_ids is .*, allowed is None or a list of environment ids"
    with pytest.raises(BadArgument, match=words):
        manager.clear_init_caches(envs)  # type: ignore[arg-type]
    assert keys(manager) == [["r"], ["w"], ["i0"], ["i1"]]


@pytest.mark.parametrize("check_recur", [1, None, "yes"])
def test_whether_to_ask_the_recurrent_pool_is_a_bool(check_recur: object) -> None:
    _, manager, _ = loaded()
    before = manager.stats
    with pytest.raises(BadArgument, match=r"check_recur is .*, allowed is True or False"):
        manager.retrieve_cache_hierarchical(0, "r", check_recur)  # type: ignore[arg-type]
    assert manager.stats == before


@pytest.mark.parametrize("env", [-1, 2, 10**9, 1.0, "0", None, True])
def test_unknown_environment(env: object) -> None:
    cache, manager, _ = loaded()
    (seq,) = cache.new()
    before = manager.stats
    calls = [
        lambda: manager.get_init_cache(env, "i0"),  # type: ignore[arg-type]
        lambda: manager.set_init_cache(env, "x", seq),  # type: ignore[arg-type]
        lambda: manager.retrieve_cache_hierarchical(env, "i0"),  # type: ignore[arg-type]
        lambda: manager.clear_init_caches([0, env]),  # type: ignore[list-item]
    ]
    for call in calls:
        with pytest.raises(
            UnknownEnv, match=r"environment id is .*, allowed is an integer from 0 to 1"
        ) as caught:
            call()
        assert (caught.value.env_id, caught.value.count) == (env, 2)
    assert keys(manager) == [["r"], ["w"], ["i0"], ["i1"]]
    assert manager.stats == before


@pytest.mark.parametrize("count", [0, -3, 1.5, True])
def test_bad_environment_count(count: object) -> None:
    with pytest.raises(BadCount, match=r"env_count is .*, allowed is an int >= 1"):
        KVCacheManager(tiny_cache(), count)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["init_entries", "recur_entries", "wm_entries"])
def test_bad_capacity_or_policy_leaves_the_cache_without_a_manager(name: str) -> None:
    cache = tiny_cache(1)
    with pytest.raises(BadCount, match=f"{name} is 0, allowed is None or an integer >= 1"):
        KVCacheManager(cache, 1, **{name: 0})  # type: ignore[arg-type]
    with pytest.raises(UnknownPolicy, match="eviction policy 'newest' is not usable"):
        KVCacheManager(cache, 1, wm_policy="newest")
    assert cache.reclaimer is None


def test_one_sequence_lies_in_one_pool() -> None:
    _, manager, (recur, *_) = loaded()
    with pytest.raises(HandleInUse, match="already stored under key 'r'"):
        manager.set_init_cache(0, "x", recur)
    assert keys(manager) == [["r"], ["w"], ["i0"], ["i1"]]
    manager.check()


def test_check_sees_an_entry_of_two_pools() -> None:
    cache, manager, _ = loaded()
    manager.wm_pool.entries.by_key["r"] = manager.recur_pool.entries.by_key["r"]
    manager.wm_pool.policy.on_add(manager.recur_pool.entries.by_key["r"])
    manager.recur_pool.check()
    with pytest.raises(CorruptCache, match="key 'r' holds an entry of 'r'"):
        manager.check()
    cache.check()


def test_check_sees_an_entry_without_a_sequence() -> None:
    cache, manager, (recur, *_) = loaded()
    assert manager.get_recur_cache("r") == recur
    owned = cache.books.owned
    owned[1] = owned[recur]
    with pytest.raises(
        CorruptCache, match="sequence 0x1 is owned under key 'r', and does not live"
    ):
        cache.check()


def test_the_model_itself_refuses_a_full_pool_of_pins() -> None:
    model = NaiveIndex("lru", 1, entries=[Entry("a", 1, 0.0, 0, 0, pins=1)])
    with pytest.raises(FullError):
        model.put("b", 2, None)
    cache = tiny_cache()
    index = CacheIndex(cache, max_entries=1)
    a, b = cache.new(2)
    index.put("a", a)
    index.pin("a")
    with pytest.raises(CapacityExceeded):
        index.put("b", b)
