"""The manager against naive pools, and what it promises about order, counts and errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict
from itertools import chain, zip_longest

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from naive_index import Entry, FullError, NaiveIndex

from paged_kv import PagedKVCache
from paged_kv.errors import (
    BadCount,
    CapacityExceeded,
    CorruptCache,
    HandleInUse,
    OutOfPages,
    UnknownEnv,
    UnknownPolicy,
)
from paged_kv.eviction import FIFO, POLICIES
from paged_kv.index import CacheIndex
from paged_kv.manager import KVCacheManager
from paged_kv.stats import IndexStats

KEYS = st.integers(0, 3)
ENVS = st.integers(0, 1)
PICK = st.integers(0, 100)
PRIORITIES = st.none() | st.integers(-1, 2)
CAPACITIES = st.none() | st.integers(1, 3)


def tiny_cache(pages: int = 6, page_size: int = 2) -> PagedKVCache:
    return PagedKVCache(layers=1, heads=1, head_size=2, page_size=page_size, num_pages=pages, grow=False)


def grow(cache: PagedKVCache, seqs: list[int], count: int) -> None:
    kv = torch.zeros(1, len(seqs), 1, count, 2)
    cache.append(seqs, kv, kv)


def filled(cache: PagedKVCache, *counts: int) -> list[int]:
    """New sequences of that many tokens each."""
    seqs = cache.new(len(counts))
    for seq, count in zip(seqs, counts):
        grow(cache, [seq], count)
    return seqs


def pages(cache: PagedKVCache, seqs: Iterable[int]) -> list[set[int]]:
    return [set(table) - {0} for table in cache.block_tables(list(seqs))[0].tolist()]


class ManagerMachine(RuleBasedStateMachine):
    """Pools in the order of the manager's: recurrent, world model, one init pool for each of two environments."""

    @initialize(
        capacities=st.tuples(CAPACITIES, CAPACITIES, CAPACITIES),
        policies=st.tuples(*[st.sampled_from(sorted(POLICIES))] * 3),
        page_size=st.integers(1, 3),
    )
    def start(self, capacities: tuple[int | None, ...], policies: tuple[str, str, str], page_size: int) -> None:
        self.cache = tiny_cache(6, page_size)
        self.manager = KVCacheManager(
            self.cache, 2, *capacities, init_policy=policies[0], recur_policy=policies[1], wm_policy=policies[2]
        )  # fmt: skip
        init, recur, wm = (NaiveIndex(policy, size) for policy, size in zip(policies, capacities))
        self.models = [recur, wm, init, NaiveIndex(policies[0], capacities[0])]
        self.combined = {"queries": 0, "hits": 0, "misses": 0}
        self.outside = filled(self.cache, 1, 2, 1)
        for pool in (0, 2, 3):
            self.put(pool, 0, 0, None)

    def indexed(self) -> list[int]:
        return [handle for model in self.models for handle in model.handles()]

    def pick(self, seqs: list[int], number: int) -> int | None:
        return seqs[number % len(seqs)] if seqs else None

    def victims(self, busy: Collection[int]) -> list[int]:
        recur, wm, *inits = ([entry.handle for entry in model.victims(busy)] for model in self.models)
        in_turn = chain.from_iterable(zip_longest(*inits))
        return [*recur, *wm, *(handle for handle in in_turn if handle is not None)]

    def fewest(self, need: int, busy: Collection[int]) -> list[int] | None:
        """Handles of the shortest run of victims that frees `need` pages, counted without the cache's dry run."""
        victims = self.victims(busy)
        holders = Counter(page for table in pages(self.cache, self.outside + self.indexed()) for page in table)
        for size in range(len(victims) + 1):
            left = holders.copy()
            left.subtract(page for table in pages(self.cache, victims[:size]) for page in table)
            if sum(count == 0 for count in left.values()) >= need:
                return victims[:size]
        return None

    def expect_gone(self, doomed: list[int]) -> None:
        for model in self.models:
            model.evict([entry for entry in model.entries if entry.handle in doomed])

    def count(self, handle: int | None) -> None:
        self.combined["queries"] += 1
        self.combined["misses" if handle is None else "hits"] += 1

    # -- sequences -----------------------------------------------------------------------------------------

    @rule(number=PICK)
    def fork(self, number: int) -> None:
        parent = self.pick(self.outside + self.indexed(), number)
        if len(self.outside) < 4:
            self.outside += self.cache.new(1) if parent is None else self.cache.fork([parent])

    @rule(number=PICK, count=st.integers(1, 5))
    def append(self, number: int, count: int) -> None:
        seq = self.pick(self.outside + self.indexed(), number)
        if seq is None:
            return
        need, free = self.cache.pages_needed([seq], count), self.cache.pages_free
        doomed = self.fewest(need - free, [seq]) if need > free else []
        if doomed is None:
            pinned = self.manager.pinned_pages()
            with pytest.raises(OutOfPages) as caught:
                grow(self.cache, [seq], count)
            assert (caught.value.requested, caught.value.free, caught.value.pinned) == (need, free, pinned)
        else:
            grow(self.cache, [seq], count)
            self.expect_gone(doomed)

    @rule(number=PICK)
    def release(self, number: int) -> None:
        seq = self.pick(self.outside, number)
        if seq is not None:
            self.outside.remove(seq)
            self.cache.release([seq])

    # -- the pools -----------------------------------------------------------------------------------------

    @rule(pool=st.integers(0, 3), key=KEYS, number=PICK, priority=PRIORITIES)
    def put(self, pool: int, key: int, number: int, priority: float | None) -> None:
        seq = self.pick(self.outside, number)
        if seq is None:
            return
        manager = self.manager
        arguments = (key, seq, priority)
        try:
            released = self.models[pool].put(key, seq, priority)
        except FullError:
            with pytest.raises(CapacityExceeded):
                manager.pools[pool].put(*arguments)
            return
        before = self.cache.live_sequences
        if pool == 0:
            manager.set_recur_cache(*arguments)
        elif pool == 1:
            manager.set_wm_cache(*arguments)
        else:
            manager.set_init_cache(pool - 2, *arguments)
        self.outside.remove(seq)
        assert self.cache.live_sequences == before - len(released)

    @rule(env=ENVS, key=KEYS, check_recur=st.booleans())
    def retrieve(self, env: int, key: int, check_recur: bool) -> None:
        expected = self.models[2 + env].get(key)
        if expected is None and check_recur:
            expected = self.models[0].get(key)
        self.count(expected)
        assert self.manager.retrieve_cache_hierarchical(env, key, check_recur) == expected

    @rule(pool=st.integers(0, 3), key=KEYS)
    def get(self, pool: int, key: int) -> None:
        expected = self.models[pool].get(key)
        self.count(expected)
        manager = self.manager
        if pool == 0:
            assert manager.get_recur_cache(key) == expected
        elif pool == 1:
            assert manager.get_wm_cache(key) == expected
        else:
            assert manager.get_init_cache(pool - 2, key) == expected

    @rule(pool=st.integers(0, 3), key=KEYS)
    def toggle_pin(self, pool: int, key: int) -> None:
        entry = self.models[pool].find(key)
        if entry is not None:
            (self.manager.pools[pool].unpin if entry.pins else self.manager.pools[pool].pin)(key)
            entry.pins = 1 - entry.pins

    @rule(what=st.sampled_from(["all", "recur", "wm", "init", "one"]), number=PICK)
    def clear(self, what: str, number: int) -> None:
        if number % 5:
            return
        clears = {
            "all": (self.manager.clear_all, self.models),
            "recur": (self.manager.clear_recur_cache, self.models[:1]),
            "wm": (self.manager.clear_wm_cache, self.models[1:2]),
            "init": (self.manager.clear_init_caches, self.models[2:]),
            "one": (lambda: self.manager.clear_init_caches([1, 1]), self.models[3:]),
        }
        call, models = clears[what]
        call()
        for model in models:
            model.drop(model.entries)

    @rule(need=st.integers(0, 6), number=PICK)
    def reclaim(self, need: int, number: int) -> None:
        seq = self.pick(self.indexed(), number)
        busy = [] if seq is None else [seq]
        doomed = self.fewest(need, busy)
        assert self.manager.reclaim(need, busy) == (doomed is not None)
        self.expect_gone(doomed or [])

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.cache.check()
        self.manager.check()
        for pool, model in zip(self.manager.pools, self.models):
            assert asdict(pool.stats) == model.stats
            assert {key: pool._entries[key] for key in pool} == {e.key: e.handle for e in model.entries}
        stats = asdict(self.manager.stats)
        recur, wm, *inits = [model.stats for model in self.models]
        assert (stats["recur"], stats["wm"], list(stats["init_per_env"])) == (recur, wm, inits)
        assert stats["init"] == {name: sum(init[name] for init in inits) for name in recur}
        moved = {name: sum(m.stats[name] for m in self.models) for name in ("evictions", "insertions")}
        assert stats["combined"] == {**self.combined, **moved}
        pinned = [entry.handle for model in self.models for entry in model.entries if entry.pins]
        assert self.manager.pinned_pages() == len(set().union(*pages(self.cache, pinned)))
        assert self.cache.live_sequences == len(self.outside) + len(self.indexed())

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            self.cache.release(self.outside)
            self.manager.clear_all()
            assert (self.cache.pages_in_use, self.cache.live_sequences) == (0, 0)
            self.cache.check()


TestManager = ManagerMachine.TestCase
TestManager.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


# -- what a user sees --------------------------------------------------------------------------------------


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
    assert manager.retrieve_cache_hierarchical(1, "i0") == other  # an environment sees its own roots only
    assert manager.retrieve_cache_hierarchical(1, "r") == recur
    assert manager.retrieve_cache_hierarchical(1, "r", check_recur=False) is None
    assert manager.retrieve_cache_hierarchical(0, "w") is None  # world-model contexts are no search nodes
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


def test_each_clear_is_one_release(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, manager, seqs = loaded()
    calls: list[list[int]] = []
    release = cache.release
    monkeypatch.setattr(cache, "release", lambda batch: (calls.append(list(batch)), release(batch)))
    manager.clear_init_caches()
    manager.clear_recur_cache()
    manager.clear_all()
    manager.clear_all()
    assert calls == [seqs[2:], seqs[:1], seqs[1:2]]
    assert cache.live_sequences == 0


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

    manager = KVCacheManager(tiny_cache(), 3, init_policy=make, recur_policy="priority", wm_policy=FIFO)
    assert [pool.policy for pool in manager.init_pools] == made
    assert isinstance(manager.recur_pool.policy, POLICIES["priority"])  # type: ignore[arg-type]


def test_block_tables_are_those_of_the_cache() -> None:
    cache, manager, seqs = loaded()
    grow(cache, seqs[:1], 2)
    tables, lengths, starts = manager.block_tables([seqs[0], seqs[2]])
    assert (tables.dtype, tables.shape) == (torch.int32, (2, 2))
    assert (lengths.tolist(), starts.tolist()) == ([3, 1], [0, 0])


def test_numpy_environment_ids() -> None:
    _, manager, seqs = loaded()
    assert manager.get_init_cache(np.int64(1), "i1") == seqs[3]


@pytest.mark.parametrize("env", [-1, 2, 10**9, 1.0, "0", None])
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
        with pytest.raises(UnknownEnv, match=r"environment id is .*, allowed is an integer from 0 to 1") as caught:
            call()
        assert (caught.value.env_id, caught.value.count) == (env, 2)
    assert keys(manager) == [["r"], ["w"], ["i0"], ["i1"]]
    assert manager.stats == before


@pytest.mark.parametrize("count", [0, -3, 1.5, True])
def test_bad_environment_count(count: object) -> None:
    with pytest.raises(BadCount, match=r"env_count is .*, allowed is an integer >= 1"):
        KVCacheManager(tiny_cache(), count)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["init_entries", "recur_entries", "wm_entries"])
def test_bad_capacity_or_policy_leaves_the_cache_without_a_manager(name: str) -> None:
    cache = tiny_cache(1)
    with pytest.raises(BadCount, match=r"max_entries is 0, allowed is None or an integer >= 1"):
        KVCacheManager(cache, 1, **{name: 0})  # type: ignore[arg-type]
    with pytest.raises(UnknownPolicy, match="eviction policy 'newest' is not usable"):
        KVCacheManager(cache, 1, wm_policy="newest")
    assert cache._reclaimer is None


def test_one_sequence_lies_in_one_pool() -> None:
    _, manager, (recur, *_) = loaded()
    with pytest.raises(HandleInUse, match="already stored under key 'r'"):
        manager.set_init_cache(0, "x", recur)
    assert keys(manager) == [["r"], ["w"], ["i0"], ["i1"]]
    manager.check()


def test_check_sees_a_sequence_that_no_pool_holds() -> None:
    _, manager, _ = loaded()
    manager._owners[1] = "ghost"
    with pytest.raises(CorruptCache, match="4 entries, but 5 owned sequences"):
        manager.check()


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
