"""The contexts of one world model: a paged cache, its manager, and LightZero's batch and store objects over them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from paged_kv.cache import PagedKVCache
from paged_kv.errors import BadCount
from paged_kv.integrations.lightzero_positions import ReadShift, WriteShift
from paged_kv.manager import KVCacheManager
from paged_kv.staging import StagingBatch

SLIDE = 2  # a window that is full loses its oldest observation and action
ROOM = 2  # a step appends an action and an observation
AT = ("read", "write")


class EnvKeys:
    """One environment's `past_kv_cache_init_infer_envs`: key -> sequence."""

    def __init__(self, state: PagedState, env: int) -> None:
        self._state, self._env = state, env

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
    """`shared_pool_recur_infer`, or one environment's `shared_pool_init_infer`: sequence -> context."""

    def __init__(self, state: PagedState) -> None:
        self._state = state

    def __getitem__(self, handle: int | None) -> Entry | None:
        return None if handle is None else self._state.entry(handle)


class LayerHalf:
    """K or V of one layer of a batch, under LightZero's names."""

    def __init__(self, cache: torch.Tensor, size: int) -> None:
        self._cache, self._size = cache, size


class StepLayer:
    """One layer of a batch: what LightZero's attention reads and appends to."""

    __slots__ = ("_batch", "_layer")

    def __init__(self, batch: StagingBatch, layer: int) -> None:
        self._batch, self._layer = batch, layer

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Rows, heads, tokens so far, head size."""
        batch = self._batch
        _, rows, heads, _, head_size = batch.layout.planes[0].shape
        return rows, heads, batch.sizes[self._layer], head_size

    def update(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Append keys and values [B, heads, n, head_size]."""
        self._batch.update(self._layer, k, v)

    def get(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values so far, [B, heads, tokens, head_size]."""
        return self._batch.get(self._layer)

    @property
    def _k_cache(self) -> LayerHalf:
        return LayerHalf(self._batch.layout.layer(self._layer)[0], self._batch.sizes[self._layer])

    @property
    def _v_cache(self) -> LayerHalf:
        return LayerHalf(self._batch.layout.layer(self._layer)[1], self._batch.sizes[self._layer])


class StepBatch:
    """The batch in work, as LightZero's `keys_values_wm`."""

    __slots__ = ("_batch", "_keys_values")

    def __init__(self, batch: StagingBatch) -> None:
        self._batch = batch
        self._keys_values = tuple(StepLayer(batch, layer) for layer in range(len(batch.sizes)))

    def __reduce__(self) -> Any:
        return str, ("a batch that was in work where the model was copied",)

    def __getitem__(self, layer: int) -> StepLayer:
        return self._keys_values[layer]

    def __len__(self) -> int:
        return len(self._keys_values)

    @property
    def size(self) -> int:
        """Tokens so far, padding included."""
        return self._batch.size


class Entry(NamedTuple):
    """A stored context as LightZero sees it."""

    handle: int
    size: int


class PagedState:
    """The contexts of one world model, and the batch that is in work.

    `cache` and `manager` are made at the first use, on the device of the model. A copy, deep or pickled, is empty:
    a target network starts without contexts, and never shares any.
    """

    def __init__(self, options: dict[str, Any], *, envs: int, context_length: int, at: str, rotary: bool) -> None:
        if at not in AT:
            raise BadCount("at", at, " or ".join(map(repr, AT)))
        self.options, self.envs, self.context_length, self.at, self.rotary = options, envs, context_length, at, rotary
        self.read_shift = None if rotary or at == "write" or context_length <= 2 else ReadShift()
        self.write_shift = None if rotary or at == "read" or context_length <= 2 else WriteShift(context_length)
        self._cache: PagedKVCache | None = None
        self._manager: KVCacheManager | None = None
        self._batch: StagingBatch | None = None
        self._guests: list[int] = []  # contexts that live for one step: of nodes that were not found

    def __reduce__(self) -> Any:
        return _empty_state, (self.options, self.envs, self.context_length, self.at, self.rotary)

    @property
    def cache(self) -> PagedKVCache:
        """The paged cache."""
        if self._cache is None:
            self.start("cpu", torch.float32)
        assert self._cache is not None
        return self._cache

    @property
    def manager(self) -> KVCacheManager:
        """The pools: one root context an environment, and the nodes of the search."""
        self.cache  # noqa: B018  (makes both)
        assert self._manager is not None
        return self._manager

    def start(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Begin with an empty cache on a device, and drop what another one held."""
        self._batch, self._guests = None, []
        self._cache = PagedKVCache(**self.options, device=device, dtype=dtype)
        # The last root of an environment is all that a later step asks for: the step after it, and its own search.
        self._manager = KVCacheManager(self._cache, self.envs, init_entries=1)

    # -- lookups and stores ------------------------------------------------------------------------------

    def lookup(self, keys: Sequence[str]) -> list[Any]:
        """The context of each row's node, first among the roots of its environment, then among the nodes; or None."""
        if self._manager is None:
            return [None] * len(keys)
        lookup = self._manager.retrieve_cache_hierarchical
        handles = [lookup(row, key) for row, key in enumerate(keys)]
        found = [handle for handle in handles if handle is not None]
        if len(found) < len(handles):
            return [None if handle is None else self.entry(handle) for handle in handles]
        return list(map(Entry, found, self.cache.lengths(found)))

    def entry(self, handle: int) -> Entry:
        """A stored context as LightZero sees it."""
        return Entry(handle, self.cache.lengths((handle,))[0])

    def store_nodes(self, keys: Sequence[str], children: Sequence[int]) -> None:
        """Keep search nodes until the next search."""
        self.manager.set_recur_caches(keys, children)

    def store_roots(self, keys: Iterable[str], children: Iterable[int]) -> None:
        """Keep the root of each environment (rows are environments) in place of the one before."""
        for env, (key, child) in enumerate(zip(keys, children)):
            self.manager.set_init_cache(env, key, child)

    def forget_nodes(self) -> None:
        """Release the nodes of the search."""
        if self._manager is not None:
            self._manager.clear_recur_cache()

    def forget_roots(self, env: int) -> None:
        """Release the root of one environment."""
        if self._manager is not None:
            self._manager.clear_init_caches((env,))

    # -- a model step ------------------------------------------------------------------------------------

    def open(self, model: Any, contexts: Sequence[Any], sizes: Sequence[int]) -> StepBatch:
        """Gather a batch of stored contexts and of fresh `KeysValues`, left-padded."""
        self._drop_guests()
        parents = [context.handle if type(context) is Entry else 0 for context in contexts]
        if 0 in parents:
            strangers = [row for row, parent in enumerate(parents) if not parent]
            for size in {sizes[row] for row in strangers}:
                rows = [row for row in strangers if sizes[row] == size]
                guests = self.take_in(model, [contexts[row] for row in rows], len(rows), size)
                self._guests += guests
                for row, guest in zip(rows, guests):
                    parents[row] = guest
        if self.read_shift is not None:
            self.read_shift.follow(model)
        self._batch = self.cache.open(parents, ROOM, rebase=self.read_shift)
        return StepBatch(self._batch)

    def commit(self, model: Any, sizes: Sequence[int]) -> list[int]:
        """Store the batch of a search step, whose contexts have `sizes` tokens; returns the new contexts."""
        batch = self._in_work()
        return self._commit(model, batch, sizes, [None] * len(batch.parents))

    def commit_roots(self, model: Any, size: int) -> list[int]:
        """Store a batch of roots.

        LightZero 0.2.0 stores every root with the length of the longest, so that the zeros in front of a shorter
        one become tokens of it. They take part in attention from then on; here too, so that both give the same
        numbers.
        """
        batch = self._in_work()
        padded = any(batch.pads)
        return self._commit(model, batch, [size] * len(batch.parents), [0 if padded else None] * len(batch.parents))

    def close(self) -> None:
        """Give up the batch in work; nothing is stored."""
        if self._batch is not None:
            self._batch.close()
            self._batch = None
        self._drop_guests()

    def take_in(self, model: Any, contexts: Sequence[Any], rows: int, size: int) -> list[int]:
        """New sequences with the `size` tokens of one or more `KeysValues`, `rows` rows in all."""
        first = contexts[0][0]._k_cache._cache
        cache = self._cache
        if cache is None or first.device != cache.device or first.dtype != cache.dtype:
            self.start(first.device, first.dtype)
        dense = [
            torch.stack([getattr(context[layer], half)._cache[:, :, :size]
                         for layer in range(len(contexts[0])) for context in contexts])
            for half in ("_k_cache", "_v_cache")
        ]
        keys, values = (half.reshape(-1, rows, *half.shape[2:]) for half in dense)
        # Placed so that the pairs appended later fill whole pages.
        guests = self.cache.new(rows, start=-size % self.cache.page_size)
        self.cache.append(guests, keys, values)
        return guests

    def adopt(self, model: Any, context: Any) -> int:
        """A sequence of its own with the contents of a stored context or of a `KeysValues` of one row."""
        if isinstance(context, Entry):
            return self.cache.fork([context.handle])[0]
        return self.take_in(model, [context], 1, context.size)[0]

    # -- inside ------------------------------------------------------------------------------------------

    def _commit(
        self, model: Any, batch: StagingBatch, sizes: Sequence[int], rewrite: list[int | None]
    ) -> list[int]:
        limit = self.context_length - 1
        slide, late = [0] * len(sizes), [0] * len(sizes)
        full = [row for row, size in enumerate(sizes) if size >= limit]
        if full and self.write_shift is not None:
            self.write_shift.follow(model)
            self._shift_and_slide(self.write_shift, batch, sizes, full, rewrite)
        else:
            for row in full:  # what is rewritten as a whole, or has too short a parent, slides once it is stored
                (slide if rewrite[row] is None and batch.lengths[row] >= SLIDE else late)[row] = SLIDE
        children = batch.commit(slide=slide, rewrite=rewrite)
        if any(late):
            self.cache.slide(children, late)
        self._batch = None
        self._drop_guests()
        return children

    def _shift_and_slide(
        self, shift: WriteShift, batch: StagingBatch, sizes: Sequence[int], full: list[int], rewrite: list[int | None]
    ) -> None:
        """Correct the windows that slide, and have them stored anew from the third token on."""
        begins = {row: batch.size - sizes[row] + SLIDE for row in full}
        for first in set(begins.values()):
            shift.apply(batch, [row for row in full if begins[row] == first], first)
        for row, first in begins.items():
            rewrite[row] = first

    def _drop_guests(self) -> None:
        if self._guests:
            self.cache.release(self._guests)
            self._guests = []

    def _in_work(self) -> StagingBatch:
        if self._batch is None:
            raise BadCount("keys_values_wm", None, "a batch made by trim_and_pad_kv_cache")
        return self._batch


def _empty_state(options: dict[str, Any], envs: int, context_length: int, at: str, rotary: bool) -> PagedState:
    return PagedState(options, envs=envs, context_length=context_length, at=at, rotary=rotary)
