"""LightZero's own names for what is stored, over pages."""

from __future__ import annotations

from paged_kv.integrations.lightzero.shared.batch import Entry
from paged_kv.integrations.lightzero.shared.state import PagedState


class EnvKeys:
    """One environment's `past_kv_cache_init_infer_envs`: key -> sequence."""

    def __init__(self, state: PagedState, env: int) -> None:
        self._state = state
        self._env = env

    def __len__(self) -> int:
        return len(self._state.manager.init_pools[self._env])

    def __contains__(self, key: str) -> bool:
        return key in self._state.manager.init_pools[self._env]

    def __setitem__(self, key: str, handle: int) -> None:
        self._state.manager.set_init_cache(self._env, key, handle)

    def get(self, key: str) -> int | None:
        """The sequence stored under a key, or None."""
        return self._state.manager.get_init_cache(self._env, key)

    def clear(self) -> None:
        """Release the environment's root."""
        self._state.forget_roots(self._env)


class SharedKeys:
    """`past_kv_cache_recurrent_infer`: key -> sequence of a search node."""

    def __init__(self, state: PagedState) -> None:
        self._state = state

    def __len__(self) -> int:
        return len(self._state.manager.recur_pool)

    def __contains__(self, key: str) -> bool:
        return key in self._state.manager.recur_pool

    def __setitem__(self, key: str, handle: int) -> None:
        self._state.manager.set_recur_cache(key, handle)

    def get(self, key: str) -> int | None:
        """The sequence stored under a key, or None."""
        return self._state.manager.get_recur_cache(key)

    def clear(self) -> None:
        """Release all search nodes."""
        self._state.forget_nodes()


class Pool:
    """`shared_pool_recur_infer`, or one environment's `shared_pool_init_infer`: sequence ->
    context.
    """

    def __init__(self, state: PagedState) -> None:
        self._state = state

    def __getitem__(self, handle: int | None) -> Entry | None:
        return None if handle is None else self._state.entry(handle)
