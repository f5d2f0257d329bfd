"""The pools of a planning agent: root contexts per environment, search nodes, the world model's own
contexts.

The manager knows keys and sequences, and nothing of padding, positions, models or searches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

from paged_kv.checks import amount, flag, handle_set, handles, limit, listed, whole
from paged_kv.draft import put, reclaim
from paged_kv.entries import clear, look_up, pinned_pages
from paged_kv.errors import BadCount, NotCopyable, PagedKVError, UnknownEnv
from paged_kv.eviction import Policy
from paged_kv.index import CacheIndex
from paged_kv.shelf import EntryShelf
from paged_kv.stats import IndexStats
from paged_kv.turns import reader, verb

if TYPE_CHECKING:
    import torch

    from paged_kv.cache import PagedKVCache

PolicyMaker = str | Callable[[], Policy]


@dataclass(frozen=True, slots=True)
class ManagerStats:
    """Counts per pool, and of all of them together.

    `init` sums the pools of `init_per_env`. In `combined` a lookup counts once, however many pools
    it asked: it is a hit where one of them had the key.
    """

    init_per_env: tuple[IndexStats, ...]
    init: IndexStats
    recur: IndexStats
    wm: IndexStats
    combined: IndexStats


class KVCacheManager:
    """One init pool per environment, one recurrent and one world-model pool over one cache.

    `init_entries` bounds each init pool, `recur_entries` and `wm_entries` the shared ones; None
    bounds nothing. A policy is a name or something that makes a `Policy` when called without
    arguments. The manager becomes the cache's reclaimer: when pages run out, search nodes go first,
    then world-model contexts, then roots, of the environments in turn; but nothing goes before what
    hangs on it, unless nothing else is left. Lookups and insertions are O(1).

    >>> from paged_kv import PagedKVCache
    >>> cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2, num_pages=4)
    >>> manager = KVCacheManager(cache, env_count=2)
    >>> root, node = cache.new(2)
    >>> manager.set_init_cache(0, "obs", root)
    >>> manager.set_recur_cache("latent", node)
    >>> manager.retrieve_cache_hierarchical(0, "latent") == node
    True
    >>> manager.retrieve_cache_hierarchical(1, "obs") is None
    True
    >>> manager.stats.combined.hits, manager.stats.combined.misses, manager.stats.recur.queries
    (1, 1, 2)
    """

    def __init__(
        self,
        cache: PagedKVCache,
        env_count: int,
        init_entries: int | None = 2,
        recur_entries: int | None = None,
        wm_entries: int | None = None,
        *,
        init_policy: PolicyMaker = "fifo",
        recur_policy: PolicyMaker = "lru",
        wm_policy: PolicyMaker = "lru",
    ) -> None:
        envs = range(amount("env_count", env_count, 1))
        bounds = {
            "init_entries": init_entries,
            "recur_entries": recur_entries,
            "wm_entries": wm_entries,
        }
        for name, entries in bounds.items():
            limit(name, entries, 1, "None or an integer >= 1")
        self.init_pools = tuple(CacheIndex(cache, init_policy, init_entries) for _ in envs)
        self.recur_pool = CacheIndex(cache, recur_policy, recur_entries)
        self.wm_pool = CacheIndex(cache, wm_policy, wm_entries)
        self.cache = cache
        self.turns = cache.turns
        cache.set_reclaimer(self)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise NotCopyable(type(self).__name__)

    def __repr__(self) -> str:
        try:
            roots = sum(map(len, self.init_pools))
            stats = self.stats.combined
        except PagedKVError:  # inside a verb
            return f"<KVCacheManager of {self.env_count} environments>"
        return (
            f"<KVCacheManager of {self.env_count} environments: {roots} roots, "
            f"{len(self.recur_pool)} search nodes, {len(self.wm_pool)} world-model contexts; "
            f"{stats.hits} of {stats.queries} lookups hit>"
        )

    @property
    def env_count(self) -> int:
        """Number of environments."""
        return len(self.init_pools)

    @property
    def pools(self) -> tuple[CacheIndex, ...]:
        """All pools, in the order in which they give up entries: recurrent, world model, init."""
        return (self.recur_pool, self.wm_pool, *self.init_pools)

    @property
    def shelves(self) -> tuple[EntryShelf, ...]:
        """What `export` takes along, of each pool."""
        return tuple(shelf for pool in self.pools for shelf in pool.shelves)

    @property
    def stats(self) -> ManagerStats:
        """A snapshot of the counts, per pool and combined."""
        per_env = tuple(pool.stats for pool in self.init_pools)
        init = sum(per_env, IndexStats())
        recur = self.recur_pool.stats
        wm = self.wm_pool.stats
        combined = init + recur + wm
        # A lookup that went on from init to recurrent stands in both pools, as a miss in the first.
        combined.queries -= self.recur_pool.second_lookups
        combined.misses -= self.recur_pool.second_lookups
        return ManagerStats(per_env, init, recur, wm, combined)

    # -- lookups and insertions

    @verb
    def retrieve_cache_hierarchical(
        self, env_id: SupportsIndex, cache_key: Hashable, check_recur: bool = True
    ) -> int | None:
        """The sequence of `cache_key` in the environment's init pool, else in the recurrent pool,
        else None.

        `check_recur=False` asks the init pool alone. The handle stays the manager's own: fork it.
        Raises UnknownEnv.
        """
        init = self._init_pool(env_id).entries
        if flag("check_recur", check_recur):
            return look_up((init, self.recur_pool.entries), cache_key)
        return look_up((init,), cache_key)

    def get_init_cache(self, env_id: SupportsIndex, key: Hashable) -> int | None:
        """The sequence of `key` in one environment's init pool, or None. Raises UnknownEnv."""
        return self._init_pool(env_id).get(key)

    def set_init_cache(
        self, env_id: SupportsIndex, key: Hashable, seq: int, priority: float | None = None
    ) -> None:
        """Hand `seq` over to one environment's init pool. Raises UnknownEnv, and as `put` does."""
        self._init_pool(env_id).put(key, seq, priority)

    @verb
    def set_init_caches(
        self,
        env_ids: Iterable[SupportsIndex],
        keys: Iterable[Hashable],
        seqs: Iterable[int],
        *,
        pin: bool = False,
    ) -> None:
        """Hand one sequence per environment over to its init pool, in order: all or none, in one
        change of the books.

        With `pin`, a key that is not pinned yet gets one pin: no lack of pages takes the root of a
        search. Raises UnknownEnv, BadCount for unequal numbers, and as `put_batch` does.

        >>> from paged_kv import PagedKVCache
        >>> cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2)
        >>> manager = KVCacheManager(cache, env_count=2)
        >>> for _ in range(3): manager.set_init_caches([0, 1], ["root"] * 2, cache.new(2), pin=True)
        >>> cache.live_sequences, manager.init_pools[1].pinned("root")
        (2, True)
        """
        envs = listed("env_ids", env_ids, "a list of environment ids")
        names = listed("keys", keys, "a list of keys")
        rows = handles(seqs)
        for name, values in (("env_ids", envs), ("keys", names)):
            if len(values) != len(rows):
                raise BadCount(f"{name} (one a sequence)", len(values), f"{len(rows)} {name}")
        pools = [self._init_pool(env).entries for env in envs]
        put(self.turns.tables, pools, names, rows, pin=flag("pin", pin))

    def get_recur_cache(self, key: Hashable) -> int | None:
        """The sequence of `key` in the recurrent pool, or None."""
        return self.recur_pool.get(key)

    def set_recur_cache(self, key: Hashable, seq: int, priority: float | None = None) -> None:
        """Hand `seq` over to the recurrent pool. Raises as `CacheIndex.put` does."""
        self.recur_pool.put(key, seq, priority)

    def set_recur_caches(self, keys: Sequence[Hashable], seqs: Sequence[int]) -> None:
        """Hand one sequence a key over to the recurrent pool. Raises as `CacheIndex.put_batch`
        does.
        """
        self.recur_pool.put_batch(keys, seqs)

    def get_wm_cache(self, key: Hashable) -> int | None:
        """The sequence of `key` in the world-model pool, or None."""
        return self.wm_pool.get(key)

    def set_wm_cache(self, key: Hashable, seq: int, priority: float | None = None) -> None:
        """Hand `seq` over to the world-model pool. Raises as `CacheIndex.put` does."""
        self.wm_pool.put(key, seq, priority)

    def block_tables(
        self, handles: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pages int32 [B, P], lengths int32 [B] and starts int32 [B] of retrieved sequences."""
        return self.cache.block_tables(handles)

    # -- clearing

    @verb
    def clear_init_caches(self, env_ids: Iterable[SupportsIndex] | None = None) -> None:
        """Release the root contexts of some environments (None: of all) in one call. Raises
        UnknownEnv.
        """
        pools: Iterable[CacheIndex] = self.init_pools
        if env_ids is not None:
            ids = listed("env_ids", env_ids, "None or a list of environment ids", ordered=False)
            pools = dict.fromkeys(map(self._init_pool, ids))  # cleared once, if named twice
        self._clear(pools)

    @verb
    def clear_recur_cache(self) -> None:
        """Release all search nodes in one call."""
        self._clear((self.recur_pool,))

    @verb
    def clear_wm_cache(self) -> None:
        """Release all world-model contexts in one call."""
        self._clear((self.wm_pool,))

    @verb
    def clear_all(self) -> None:
        """Release everything in one call, pinned entries too."""
        self._clear(self.pools)

    def _clear(self, pools: Iterable[CacheIndex]) -> None:
        clear(self.turns.tables, [pool.entries for pool in pools])

    # -- page pressure

    @verb
    def reclaim(self, need: int, busy: Collection[int] = ()) -> bool:
        """Free at least `need` pages by evicting the fewest entries in order, or none and return
        False.

        Entries that are pinned or in `busy` stay, and leaves go first: see `CacheIndex.reclaim`.
        The cache calls this before it gives up with OutOfPages.
        """
        pages = whole("need", need, 0)
        kept = handle_set(busy, "busy")
        recur, wm, *roots = [pool.entries for pool in self.pools]
        return reclaim(self.turns.tables, ((recur,), (wm,), roots), pages, kept)

    @reader
    def pinned_pages(self) -> int:
        """Pages that pinned entries hold, each counted once. Cost: O(their pages)."""
        return pinned_pages([pool.entries for pool in self.pools])

    def check(self) -> None:
        """Raise CorruptCache unless every pool is whole and no sequence lies in two of them."""
        for pool in self.pools:
            pool.check()

    def _init_pool(self, env_id: object) -> CacheIndex:
        try:
            return self.init_pools[whole("env_id", env_id, 0, len(self.init_pools) - 1)]
        except BadCount:
            raise UnknownEnv(env_id, len(self.init_pools)) from None
