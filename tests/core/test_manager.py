"""The manager against naive pools, in a pool of pages so small that they run out all the time."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from naive_index import FullError, GoneError, NaiveIndex, World
from small_caches import books, filled, grow, held, pages, saved, step, tiny_cache

from paged_kv.errors import (
    CapacityExceeded,
    HandleInUse,
    OutOfPages,
    OwnedSequence,
    PinnedEntry,
    StaleHandle,
)
from paged_kv.eviction import POLICIES
from paged_kv.manager import KVCacheManager

KEYS = st.integers(0, 3)
ENVS = st.integers(0, 1)
POOLS = st.integers(0, 3)
PICK = st.integers(0, 100)
PRIORITIES = st.none() | st.integers(-1, 2)
CAPACITIES = st.none() | st.integers(1, 3)
MOST = 4  # sequences outside of the pools


class ManagerMachine(RuleBasedStateMachine):
    """Pools in the order of the manager's: recurrent, world model, an init pool for each of two
    environments.
    """

    @initialize(
        capacities=st.tuples(CAPACITIES, CAPACITIES, CAPACITIES),
        policies=st.tuples(*[st.sampled_from(sorted(POLICIES))] * 3),
        page_size=st.integers(1, 3),
    )
    def start(
        self,
        capacities: tuple[int | None, int | None, int | None],
        policies: tuple[str, str, str],
        page_size: int,
    ) -> None:
        self.cache = tiny_cache(6, page_size)
        init_policy, recur_policy, wm_policy = policies
        self.manager = KVCacheManager(
            self.cache,
            2,
            *capacities,
            init_policy=init_policy,
            recur_policy=recur_policy,
            wm_policy=wm_policy,
        )
        init, recur, wm = (NaiveIndex(policy, size) for policy, size in zip(policies, capacities))
        self.world = World([recur, wm, init, copy.deepcopy(init)])
        self.combined = {"queries": 0, "hits": 0, "misses": 0}
        self.world.make(filled(self.cache, 1, 2, 1), [None] * 3)
        for pool in (0, 2, 3):
            self.put(pool, 0, 0, None)

    @property
    def models(self) -> list[NaiveIndex]:
        return self.world.indexes

    def pick(self, seqs: list[int], number: int) -> int | None:
        return seqs[number % len(seqs)] if seqs else None

    def any(self, number: int) -> int | None:
        return self.pick(list(self.world.parents), number)

    def victims(self, busy: Collection[int]) -> list[int]:
        recur, wm, *inits = self.models
        ranks = [[recur], [wm], inits]
        found: list[int] = []
        while True:
            victim = self.victim(ranks, busy, found)
            if victim is None:
                return found
            found.append(victim)

    def victim(
        self, ranks: list[list[NaiveIndex]], busy: Collection[int], gone: list[int]
    ) -> int | None:
        """The next to go. Pools of one rank take turns."""
        for inner in (False, True):
            for rank in ranks:
                for model in list(rank):
                    rank.append(rank.pop(0))
                    for entry in model.ordered(busy):
                        below = {*self.world.subtree(entry.handle)} - {entry.handle, *gone}
                        if entry.handle not in gone and (inner or not below):
                            return entry.handle
        return None

    def fewest(self, need: int, busy: Collection[int]) -> list[int] | None:
        """Handles of the shortest run of victims that frees `need` pages or spares copies.

        Counted without the cache's dry run.
        """
        victims = self.victims(busy)
        holders = Counter(page for table in pages(self.cache, self.world.parents) for page in table)
        for size in range(len(victims) + 1):
            left = holders.copy()
            left.subtract(page for table in pages(self.cache, victims[:size]) for page in table)
            freed = sum(count == 0 for count in left.values())
            if freed + saved(self.cache, busy, victims[:size]) >= need:
                return victims[:size]
        return None

    def count(self, handle: int | None) -> None:
        self.combined["queries"] += 1
        self.combined["misses" if handle is None else "hits"] += 1

    def refuse(self, error: type[Exception], call: Callable[[], Any]) -> Any:
        """Call a verb that raises, and changes nothing."""
        before = books(self.cache.books)
        with pytest.raises(error) as caught:
            call()
        assert books(self.cache.books) == before
        return caught.value

    def with_room(self, call: Callable[[], Any], need: int, busy: Collection[int]) -> Any:
        """Call a verb that takes `need` pages: it evicts, where pages are short, the fewest
        entries.
        """
        free = self.cache.pages_free
        doomed = self.fewest(need - free, busy) if need > free else []
        if doomed is not None:
            self.world.evict(doomed)
            return call()
        error = self.refuse(OutOfPages, call)
        pinned = held(self.cache, self.world.pinned())
        assert (error.requested, error.free, error.pinned) == (need, free, pinned)
        return None

    # -- sequences

    @rule(number=PICK)
    def fork(self, number: int) -> None:
        parent = self.any(number)
        if len(self.world.outside()) < MOST:
            seqs = self.cache.new(1) if parent is None else self.cache.fork([parent])
            self.world.make(seqs, [parent])

    @rule(number=PICK, count=st.integers(1, 5))
    def append(self, number: int, count: int) -> None:
        seq = self.pick(self.world.outside(), number)
        if seq is not None:
            need = self.cache.pages_needed([seq], count)
            self.with_room(lambda: grow(self.cache, [seq], count), need, [seq])

    @rule(number=PICK, count=st.integers(1, 3))
    def step(self, number: int, count: int) -> None:
        """A model step from a sequence in or out of the pools, which do not evict it."""
        parent = self.any(number)
        if parent is None or len(self.world.outside()) >= MOST:
            return
        need = self.cache.pages_needed([parent], count, fork=True)
        children = self.with_room(lambda: step(self.cache, [parent], count), need, [parent])
        if children is not None:
            self.world.make(children, [parent])

    @rule(number=PICK)
    def release(self, number: int) -> None:
        seq = self.pick(self.world.outside(), number)
        if seq is not None:
            self.cache.release([seq])
            self.world.end([seq])

    @rule(number=PICK, verb=st.sampled_from(["append", "slide", "truncate", "release"]))
    def meddle(self, number: int, verb: str) -> None:
        seq = self.pick(self.world.indexed(), number)
        if seq is not None:
            calls: dict[str, Callable[[], Any]] = {
                "append": lambda: grow(self.cache, [seq], 1),
                "slide": lambda: self.cache.slide([seq], 0),
                "truncate": lambda: self.cache.truncate([seq], 0),
                "release": lambda: self.cache.release([seq]),
            }
            assert self.refuse(OwnedSequence, calls[verb]).handle == seq

    @rule(number=PICK, verb=st.sampled_from(["release_subtree", "promote"]))
    def prune(self, number: int, verb: str) -> None:
        seq = self.any(number)
        if seq is None:
            return
        doomed = self.world.subtree(seq) if verb == "release_subtree" else self.world.beside(seq)
        if set(doomed) & set(self.world.pinned()):
            self.refuse(PinnedEntry, lambda: getattr(self.cache, verb)(seq))
        else:
            assert getattr(self.cache, verb)(seq) == len(doomed)
            self.world.end(doomed)

    # -- the pools

    @rule(pool=POOLS, key=KEYS, number=PICK, priority=PRIORITIES)
    def put(self, pool: int, key: int, number: int, priority: float | None) -> None:
        seq = self.pick(self.world.outside(), number)
        if seq is None:
            return
        manager = self.manager
        try:
            ended = self.models[pool].put(key, seq, priority)
        except FullError:
            self.refuse(CapacityExceeded, lambda: manager.pools[pool].put(key, seq, priority))
            return
        if pool == 0:
            manager.set_recur_cache(key, seq, priority)
        elif pool == 1:
            manager.set_wm_cache(key, seq, priority)
        else:
            manager.set_init_cache(pool - 2, key, seq, priority)
        self.world.end(ended)

    @rule(items=st.lists(st.tuples(KEYS, PICK), max_size=4), stray=st.booleans())
    def put_nodes(self, items: list[tuple[int, int]], stray: bool) -> None:
        """All or none; a sequence of another pool is refused wherever it stands."""
        outside = self.world.outside()
        keys = [key for key, _ in items][: len(outside)]
        seqs = outside[: len(keys)]
        others = [seq for model in self.models[1:] for seq in model.handles()]
        call = lambda: self.manager.set_recur_caches(keys, seqs)  # noqa: E731
        if stray and others:
            keys.insert(len(keys) // 2, 0)
            seqs.insert(len(seqs) // 2, others[0])
            self.refuse(HandleInUse, call)
            return
        after = copy.deepcopy(self.world)
        try:
            after.end(after.indexes[0].put_batch(keys, seqs))
        except (FullError, GoneError):
            self.refuse(CapacityExceeded, call)
        else:
            call()
            self.world = after

    @rule(items=st.lists(st.tuples(ENVS, KEYS), max_size=4), pin=st.booleans(), stray=st.booleans())
    def put_roots(self, items: list[tuple[int, int]], pin: bool, stray: bool) -> None:
        """One after the other, but all or none; environments and keys may come again."""
        outside = self.world.outside()
        items = items[: len(outside)]
        envs = [env for env, _ in items]
        keys = [key for _, key in items]
        seqs = outside[: len(items)]
        others = [seq for model in self.models[:2] for seq in model.handles()]
        call = lambda: self.manager.set_init_caches(envs, keys, seqs, pin=pin)  # noqa: E731
        if stray and others:
            envs.append(0)
            keys.append(0)
            seqs.append(others[0])
            self.refuse(HandleInUse, call)
            return
        after = copy.deepcopy(self.world)
        try:
            ended = [
                seq
                for env, key, root in zip(envs, keys, seqs)
                for seq in after.indexes[2 + env].put(key, root, None, pin=pin)
            ]
        except FullError:
            self.refuse(CapacityExceeded, call)
            return
        after.end(ended)
        call()
        self.world = after

    @rule(env=ENVS, key=KEYS, check_recur=st.booleans())
    def retrieve(self, env: int, key: int, check_recur: bool) -> None:
        expected = self.models[2 + env].get(key)
        if expected is None and check_recur:
            expected = self.models[0].get(key)
        self.count(expected)
        assert self.manager.retrieve_cache_hierarchical(env, key, check_recur) == expected

    @rule(pool=POOLS, key=KEYS)
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

    @rule(pool=POOLS, key=KEYS)
    def toggle_pin(self, pool: int, key: int) -> None:
        entry = self.models[pool].find(key)
        if entry is not None:
            its = self.manager.pools[pool]
            (its.unpin if entry.pins else its.pin)(key)
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
        self.world.end([handle for model in models for handle in model.handles()])

    @rule(need=st.integers(0, 6), number=PICK)
    def reclaim(self, need: int, number: int) -> None:
        seq = self.pick(self.world.indexed(), number)
        busy = [] if seq is None else [seq]
        doomed = self.fewest(need, busy)
        assert self.manager.reclaim(need, busy) == (doomed is not None)
        self.world.evict(doomed or [])

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.cache.check()
        self.manager.check()
        assert self.cache.live() == list(self.world.parents)
        for pool, model in zip(self.manager.pools, self.models):
            assert asdict(pool.stats) == model.stats
            handles = dict(zip(pool, pool.handles()))
            assert handles == {entry.key: entry.handle for entry in model.entries}
            assert pool.victims() == [entry.key for entry in model.victims()]
        stats = asdict(self.manager.stats)
        recur, wm, *inits = [model.stats for model in self.models]
        assert (stats["recur"], stats["wm"], list(stats["init_per_env"])) == (recur, wm, inits)
        assert stats["init"] == {name: sum(init[name] for init in inits) for name in recur}
        names = ("evictions", "insertions")
        moved = {name: sum(model.stats[name] for model in self.models) for name in names}
        assert stats["combined"] == {**self.combined, **moved}
        assert self.manager.pinned_pages() == held(self.cache, self.world.pinned())
        assert sorted(self.cache.books.owned) == sorted(self.world.indexed())

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            self.cache.release(self.world.outside())
            self.manager.clear_all()
            assert self.cache.pages_in_use == self.cache.live_sequences == 0
            self.cache.check()
            for seq in self.world.parents:
                with pytest.raises(StaleHandle):
                    self.cache.lengths([seq])


TestManager = ManagerMachine.TestCase
TestManager.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
