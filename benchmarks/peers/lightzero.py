"""LightZero 0.2.0: a full-capacity KeysValues a node, copied when it is read and when it is stored.

The copies, the padding and the stacking are LightZero's own methods, called on an object that has
no more of a world model than these methods touch. Taking the batch apart again is spelt out here,
as `update_cache_context` does it for a window that still has room.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from lzero.model.unizero_world_models.kv_caching import KeysValues
from lzero.model.unizero_world_models.world_model import WorldModel
from torch.nn.functional import pad

from .peer import KV, Handle, Peer, causal
from .workload import Workload


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """KeysValues have torch's default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class LightZeroPeer(Peer):
    """The rings of the world model, made so long that every live node has a place of its own."""

    name = "LightZero deep copy"
    note = "copies the context at full capacity"
    cannot: ClassVar[dict[str, str]] = {"release": "none: places of a ring are overwritten in turn"}
    copies = True

    copy_to_recur = WorldModel.custom_copy_kv_cache_to_shared_recur
    copy_to_wm = WorldModel.custom_copy_kv_cache_to_shared_wm
    trim_and_pad = WorldModel.trim_and_pad_kv_cache

    def __init__(self, work: Workload, nodes: int, tokens: int) -> None:
        super().__init__(work, nodes, tokens)
        self.num_layers = work.layers
        self.shared_pool_recur_infer: list[KeysValues | None] = [None] * nodes
        self.shared_pool_wm: list[KeysValues | None] = [None] * work.envs
        self.shared_pool_size = nodes
        self.shared_pool_size_wm = work.envs
        self.shared_pool_index = self.shared_pool_index_wm = 0
        self.keys_values_wm = self._empty(work.envs)
        self.keys_values_wm_single_env = self._empty(1)
        self.keys_values_wm_list: list[KeysValues] = []
        self.keys_values_wm_size_list: list[int] = []
        self.places = list(range(nodes - 1, -1, -1))
        self.lengths = [0] * nodes

    def _empty(self, rows: int) -> KeysValues:
        work = self.work
        with default_dtype(work.dtype):
            return KeysValues(
                rows,
                work.heads,
                work.window,
                work.heads * work.head_size,
                work.layers,
                torch.device("cpu"),
            )

    def _store(self, source: KeysValues, length: int) -> int:
        self.shared_pool_index = self.places.pop()
        with default_dtype(self.work.dtype):
            place = self.copy_to_recur(source)
        self.lengths[place] = length
        return place

    def begin(self, length: int, tokens: Any = None) -> Handle:
        made = self._empty(1)
        if tokens is not None:
            for layer, (keys, values) in enumerate(zip(*tokens)):
                made[layer].update(keys, values)
        return self._store(made, length)

    def fork(self, parents: Sequence[Handle], new: int) -> list[Handle]:
        stored = self.shared_pool_recur_infer
        lengths = self.lengths
        return [self._store(stored[parent], lengths[parent] + new) for parent in parents]

    def step(
        self, parents: Sequence[Handle], tokens: Any, new: int, queries: Any = None
    ) -> list[Handle]:
        stored = self.shared_pool_recur_infer
        with default_dtype(self.work.dtype):
            self.keys_values_wm_list = [self.copy_to_wm(stored[parent]) for parent in parents]
        lengths = [self.lengths[parent] for parent in parents]
        self.keys_values_wm_size_list = lengths
        self.trim_and_pad(is_init_infer=False)
        for layer, (keys, values) in enumerate(zip(*tokens)):
            self.keys_values_wm[layer].update(keys, values)
        if queries is not None:
            width = max(lengths) + new
            kept = torch.arange(width) >= width - new - torch.tensor(lengths)[:, None]
            self.attend(
                queries, lambda layer: self.keys_values_wm[layer].get(), lambda: causal(kept, new)
            )
        return [
            self._take_out(row, max(lengths) - length, length + new)
            for row, length in enumerate(lengths)
        ]

    def _take_out(self, row: int, padding: int, length: int) -> int:
        single = self.keys_values_wm_single_env
        for source, target in zip(self.keys_values_wm._keys_values, single._keys_values):
            for part in ("_k_cache", "_v_cache"):
                kept = getattr(source, part)._cache[row]
                if padding:
                    kept = pad(kept[:, padding:], (0, 0, 0, padding))
                getattr(target, part)._cache = kept.unsqueeze(0)
                getattr(target, part)._size = length
        return self._store(single, length)

    def release(self, nodes: Sequence[Handle]) -> None:
        self.places += nodes

    def read(self, node: Handle) -> KV:
        kept = self.shared_pool_recur_infer[node]
        length = self.lengths[node]
        parts = [
            [cache._cache[0, :, :length] for cache in (layer._k_cache, layer._v_cache)]
            for layer in kept
        ]
        keys, values = zip(*parts)
        return torch.stack(keys), torch.stack(values)

    def kv_bytes(self, lengths: Iterable[int]) -> int:
        return len(list(lengths)) * self.work.window * self.work.token_bytes
