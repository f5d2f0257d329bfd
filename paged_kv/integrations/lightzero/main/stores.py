"""The names of LightZero's main for what is stored, over pages.

Main keeps contexts either in dictionaries and rings of its world model or in a cache manager. Here
both are views of the same pools, and both are there whichever of them the model was built with.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from paged_kv.index import CacheIndex
from paged_kv.integrations.lightzero.main.batch import Context
from paged_kv.integrations.lightzero.main.state import MainState


class Keys(MutableMapping[str, int]):
    """`past_kv_cache_init_infer_envs[env]`, or without one `past_kv_cache_recurrent_infer`: key ->
    sequence.
    """

    def __init__(self, state: MainState, env: int | None = None) -> None:
        self._state = state
        self._env = env

    @property
    def index(self) -> CacheIndex:
        """The pool behind it."""
        manager = self._state.manager
        return manager.recur_pool if self._env is None else manager.init_pools[self._env]

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self.index))  # type: ignore[arg-type]  # LightZero's keys are strings

    def __contains__(self, key: object) -> bool:
        return key in self.index

    def __getitem__(self, key: str) -> int:
        handle = self.index.get(key)
        if handle is None:
            raise KeyError(key)
        return handle

    def __setitem__(self, key: str, handle: int) -> None:
        self.index.put(key, handle)

    def __delitem__(self, key: str) -> None:
        if key not in self.index:
            raise KeyError(key)
        self.index.remove(key)

    def get(self, key: str, default: Any = None) -> Any:
        """The sequence stored under a key, or `default`; of roots that of the phase which runs."""
        handle = self.index.get(key if self._env is None else self._state.named(key))
        if handle is None and self._env is None:
            self._state.missed()
        return default if handle is None else handle

    def clear(self) -> None:
        """Release every sequence."""
        if self._env is None:
            self._state.forget_nodes()
        else:
            self._state.forget_roots(self._env)


class PoolView:
    """A pool of LightZero's cache manager: key -> context."""

    def __init__(self, state: MainState, keys: Keys, pool_size: int | None) -> None:
        self._state = state
        self._key_to_index = keys
        self.pool_size = pool_size

    def __len__(self) -> int:
        return len(self._key_to_index)

    def get(self, cache_key: str) -> Context | None:
        """The context of a key, or None."""
        handle = self._key_to_index.get(cache_key)
        return None if handle is None else self._state.entry(handle)

    def clear(self) -> None:
        """Release every context."""
        self._key_to_index.clear()


class ManagerView:
    """LightZero's `kv_cache_manager`."""

    def __init__(self, state: MainState, inits: list[Keys], recur: Keys, pool_size: int) -> None:
        self._state = state
        self.env_num = len(inits)
        self.enable_stats = True
        self.init_pools = [PoolView(state, keys, pool_size) for keys in inits]
        self.recur_pool = PoolView(state, recur, None)

    def get_init_cache(self, env_id: int, cache_key: str) -> Context | None:
        """The root of an environment, or None."""
        return self._init_pool(env_id).get(cache_key)

    def get_recur_cache(self, cache_key: str) -> Context | None:
        """A search node, or None."""
        return self.recur_pool.get(cache_key)

    def hierarchical_get(self, env_id: int, cache_key: str) -> Context | None:
        """The root of an environment, else a search node, else None."""
        root = self.get_init_cache(env_id, cache_key)
        return self.get_recur_cache(cache_key) if root is None else root

    def clear_recur_cache(self) -> None:
        """Release all search nodes."""
        self.recur_pool.clear()

    def clear_init_caches(self) -> None:
        """Release all roots."""
        for pool in self.init_pools:
            pool.clear()

    def clear_all(self) -> None:
        """Release everything."""
        self.clear_init_caches()
        self.clear_recur_cache()

    def get_stats_summary(self) -> dict[str, Any]:
        """Counts of lookups and insertions, by pool; and of roots that went on from contexts of
        weights that changed since.
        """
        return {
            "stats_enabled": True,
            "stats": self._state.manager.stats,
            "old_contexts_used": self._state.old.used,
        }

    def _init_pool(self, env_id: int) -> PoolView:
        if not 0 <= env_id < self.env_num:
            raise ValueError(f"environment id is {env_id}, allowed is 0 to {self.env_num - 1}")
        return self.init_pools[env_id]
