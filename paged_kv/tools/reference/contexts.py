"""Two stores of contexts with one interface: private dense tensors as LightZero keeps them, and
pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch.nn import functional as F

from paged_kv.cache import PagedKVCache
from paged_kv.manager import KVCacheManager
from paged_kv.tools.reference.world_model import Batch

ROOT = -1  # the key of an environment's root; nodes of the search are numbered from 0
ROOM = 2  # tokens that a step adds: an action and an observation


class Contexts(Protocol):
    """Contexts by (key, environment). Windows of `limit` tokens or more lose their first two when
    they are stored.
    """

    lookups: int
    hits: int

    def open(self, keys: Sequence[int]) -> Batch:
        """The contexts of a batch, row i in environment i, left-padded; empty where
        there is none.
        """

    def store(self, key: int) -> None:
        """Keep what the open batch became, under one key for all environments."""

    def forget_nodes(self) -> None:
        """Drop all but the roots."""

    def root_tokens(self) -> int:
        """Tokens in the roots of all environments."""


class KV(NamedTuple):
    """Keys and values of one layer."""

    keys: torch.Tensor
    values: torch.Tensor


class DenseBatch:
    """One full-capacity tensor a layer for K and one for V, [B, heads, capacity, head_size]."""

    def __init__(self, layers: list[KV], lengths: list[int]) -> None:
        self.layers = layers
        self.lengths = lengths
        self.past = max(lengths)
        self.pads = [self.past - length for length in lengths]
        self.sizes = [self.past] * len(layers)

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append K and V [B, heads, n, head_size] to a layer, in place."""
        start = self.sizes[layer]
        end = start + keys.shape[2]
        self.layers[layer].keys[:, :, start:end] = keys
        self.layers[layer].values[:, :, start:end] = values
        self.sizes[layer] = end

    def get(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer as far as it is filled: views."""
        keys, values = self.layers[layer]
        return keys[:, :, : self.sizes[layer]], values[:, :, : self.sizes[layer]]


class Entry(NamedTuple):
    """A context: K and V [heads, capacity, head_size] of each layer, and its tokens."""

    layers: list[KV]
    length: int


class DenseContexts:
    """Every context a private dense tensor of full capacity: copied when found, padded, stacked,
    split, copied back.
    """

    def __init__(self, layers: int, heads: int, head_size: int, context: int, envs: int) -> None:
        self._shape = (heads, context, head_size)
        self._layers = layers
        self._limit = context - 1
        self._roots: list[Entry | None] = [None] * envs
        self._nodes: dict[tuple[int, int], Entry] = {}
        self._batch: DenseBatch | None = None
        self.lookups = self.hits = 0

    def open(self, keys: Sequence[int]) -> DenseBatch:
        """The contexts of a batch, row i in environment i, left-padded; empty where
        there is none.
        """
        found = [self._find(key, env) for env, key in enumerate(keys)]
        lengths = [entry.length for entry in found]
        longest = max(lengths)
        layers = []
        for layer in range(self._layers):
            rows = [_moved(entry.layers[layer], longest - entry.length) for entry in found]
            layers.append(
                KV(
                    torch.stack([row.keys for row in rows]),
                    torch.stack([row.values for row in rows]),
                )
            )
        self._batch = DenseBatch(layers, lengths)
        return self._batch

    def store(self, key: int) -> None:
        """Keep what the open batch became, under one key for all environments."""
        assert self._batch is not None
        batch = self._batch
        for env, pad in enumerate(batch.pads):
            size = batch.sizes[0] - pad
            drop = 2 if size >= self._limit else 0
            rows = [KV(layer.keys[env], layer.values[env]) for layer in batch.layers]
            entry = Entry([_copy(_moved(row, -pad - drop)) for row in rows], size - drop)
            if key == ROOT:
                self._roots[env] = entry
            else:
                self._nodes[key, env] = entry

    def forget_nodes(self) -> None:
        """Drop all but the roots."""
        self._nodes.clear()

    def root_tokens(self) -> int:
        """Tokens in the roots of all environments."""
        return sum(entry.length for entry in self._roots if entry is not None)

    def tensors(self) -> list[torch.Tensor]:
        """All that is stored."""
        entries = [entry for entry in (*self._roots, *self._nodes.values()) if entry is not None]
        return [half for entry in entries for layer in entry.layers for half in layer]

    def working(self) -> list[torch.Tensor]:
        """The batch in work."""
        if self._batch is None:
            return []
        return [half for layer in self._batch.layers for half in layer]

    def _find(self, key: int, env: int) -> Entry:
        found = self._roots[env] if key == ROOT else self._nodes.get((key, env))
        self.lookups += 1
        if found is None:
            shape = self._shape
            empty = [KV(torch.zeros(shape), torch.zeros(shape)) for _ in range(self._layers)]
            return Entry(empty, 0)
        self.hits += 1
        return Entry([_copy(layer) for layer in found.layers], found.length)


def _copy(layer: KV) -> KV:
    return KV(layer.keys.clone(), layer.values.clone())


def _moved(layer: KV, by: int) -> KV:
    return KV(_shift(layer.keys, by), _shift(layer.values, by))


def _shift(window: torch.Tensor, by: int) -> torch.Tensor:
    """A window [heads, capacity, head_size] moved `by` columns (to the left where negative), zeros
    moving in.
    """
    if by == 0:
        return window
    if by > 0:
        return F.pad(window[:, :-by], (0, 0, by, 0))
    return F.pad(window[:, -by:], (0, 0, 0, -by))


class PagedContexts:
    """The same contexts in shared pages."""

    def __init__(
        self, layers: int, heads: int, head_size: int, context: int, envs: int, page_size: int = 2
    ) -> None:
        self.cache = PagedKVCache(
            layers=layers, heads=heads, head_size=head_size, page_size=page_size
        )
        self.manager = KVCacheManager(self.cache, envs, init_entries=1)
        self._limit = context - 1
        self._guests: list[int] = []
        self._roots: list[int] = []
        self.lookups = self.hits = 0

    def open(self, keys: Sequence[int]) -> Batch:
        """The contexts of a batch, row i in environment i, left-padded; empty where
        there is none.
        """
        found = [
            self.manager.retrieve_cache_hierarchical(env, (key, env))
            for env, key in enumerate(keys)
        ]
        self.lookups += len(found)
        missing = [env for env, handle in enumerate(found) if handle is None]
        self.hits += len(found) - len(missing)
        # One observation in the last slot of a page: from then on every pair of tokens fills pages
        # of its own.
        self._guests = self.cache.new(len(missing), start=-1 % self.cache.page_size)
        for env, guest in zip(missing, self._guests, strict=True):
            found[env] = guest
        self._batch = self.cache.open([handle for handle in found if handle is not None], ROOM)
        return self._batch

    def store(self, key: int) -> None:
        """Keep what the open batch became, under one key for all environments."""
        batch = self._batch
        slides = [2 if batch.size - pad >= self._limit else 0 for pad in batch.pads]
        children = batch.commit(slide=slides)
        for env, child in enumerate(children):
            if key == ROOT:
                self.manager.set_init_cache(env, (key, env), child)
            else:
                self.manager.set_recur_cache((key, env), child)
        if key == ROOT:
            self._roots = children
        self.cache.release(self._guests)
        self._guests = []

    def forget_nodes(self) -> None:
        """Drop all but the roots."""
        self.manager.clear_recur_cache()

    def root_tokens(self) -> int:
        """Tokens in the roots of all environments."""
        return sum(self.cache.lengths(self._roots))
