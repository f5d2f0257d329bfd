"""Hugging Face transformers: the paged cache of continuous batching, and a deep-copied
DynamicCache.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import ContinuousBatchingConfig, DynamicCache, LlamaConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.distributed import DistributedHelper
from transformers.generation.continuous_batching.utils import build_attention_mask

from .peer import KV, Handle, Peer, causal
from .workload import Workload

logging.getLogger("ContinuousBatchingLogger").setLevel(logging.WARNING)


class Request:
    """What the cache reads of a request: its name and length. RequestState proper costs more."""

    __slots__ = ("length", "request_id")

    def __init__(self, request_id: str, length: int) -> None:
        self.request_id = request_id
        self.length = length

    def current_len(self) -> int:
        """Tokens stored."""
        return self.length


class PagedAttentionPeer(Peer):
    """PagedAttentionCache with its own fork: full blocks are shared, a partial one is copied at the
    fork.
    """

    name = "HF paged cache"
    note = "its own fork; one call a request"

    def __init__(self, work: Workload, nodes: int, tokens: int) -> None:
        super().__init__(work, nodes, tokens)
        config = LlamaConfig(
            num_hidden_layers=work.layers,
            num_attention_heads=work.heads,
            num_key_value_heads=work.heads,
            head_dim=work.head_size,
            hidden_size=work.heads * work.head_size,
            vocab_size=16,
        )
        config._attn_implementation = "sdpa"
        # A partial block of every node is a copy of its own.
        blocks = 2 * nodes + tokens // work.page_size
        batching = ContinuousBatchingConfig(
            page_size=work.page_size,
            num_blocks=blocks,
            max_batch_tokens=1,
            max_memory_percent=0.95,
            max_blocks_per_request=0,
            max_requests_per_batch=work.envs,
            use_async_batching=False,
        )
        self.cache = PagedAttentionCache(
            config, batching, "cpu", DistributedHelper(None, None), work.dtype
        )
        (self.allocator,) = self.cache.cache_allocators.values()
        self.group = next(iter(self.cache.cache_allocators))
        self.number = 0
        self.written: list[int] = []
        self.copied: tuple[list[int], list[int]] = ([], [])

    def begin(self, length: int, tokens: Any = None) -> Handle:
        self.number += 1
        node = Request(str(self.number), 0)
        self._append(node, length)
        if tokens is not None:
            written = torch.tensor(self.written)
            nothing = torch.zeros(0, dtype=torch.int64)
            for layer, (keys, values) in enumerate(tokens):
                self.allocator.update(keys, values, layer, nothing, written)
        return node

    def _append(self, node: Request, new: int) -> None:
        if not self.cache.can_store_request_tokens(node, new):
            raise MemoryError
        self.written = []
        self.cache.extend_read_and_write_indices(
            node.request_id, node.length, new, None, [self.written]
        )
        node.length += new

    def fork(self, parents: Sequence[Handle], new: int) -> list[Handle]:
        cache = self.cache
        copies = {self.group: ([], [])}
        children = []
        written: list[int] = []
        for parent in parents:
            self.number += 1
            child = Request(str(self.number), parent.length)
            if not cache.prepare_fork_request(parent, [child.request_id], copies):
                raise MemoryError
            if not cache.can_store_request_tokens(child, new):
                raise MemoryError
            cache.extend_read_and_write_indices(
                child.request_id, child.length, new, None, [written]
            )
            child.length += new
            children.append(child)
        self.written = written
        self.copied = copies[self.group]
        return children

    def release(self, nodes: Sequence[Handle]) -> None:
        for node in nodes:
            self.cache.free_blocks(node.request_id)

    def placed(self) -> tuple[list[int], list[tuple[int, int]]]:
        """In slots of one layer, as `slots`: a block has a page for each layer."""
        return [self._slot(row) for row in self.written], list(zip(*self.copied))

    def _slot(self, row: int) -> int:
        block, offset = divmod(row, self.allocator.block_physical_stride)
        return block * self.work.page_size + offset

    def slots(self, node: Handle) -> list[int]:
        return [
            self._slot(row)
            for row in self.allocator.get_read_indices(node.request_id, node.length, 0)
        ]

    def arrange(self, tokens: KV) -> Any:
        """[tokens, heads, head_size] of each layer, the rows one after the other."""
        return [
            tuple(part.transpose(1, 2).flatten(0, 1).contiguous() for part in layer)
            for layer in zip(*tokens)
        ]

    def arrange_queries(self, queries: torch.Tensor) -> Any:
        """[1, heads, all new tokens, head_size] of each layer."""
        return queries.transpose(1, 2).flatten(2, 3)[:, None].contiguous()

    def step(
        self, parents: Sequence[Handle], tokens: Any, new: int, queries: Any = None
    ) -> list[Handle]:
        children = self.fork(parents, new)
        self.cache.perform_cache_copy({self.group: self.copied})
        read: list[int] = []
        for child in children:
            read += self.allocator.get_read_indices(child.request_id, child.length, 0)
        read_index = torch.tensor(read)
        write_index = torch.tensor(self.written)
        contexts = [
            self.allocator.update(keys, values, layer, read_index, write_index)
            for layer, (keys, values) in enumerate(tokens)
        ]
        if queries is not None:
            dense = [tuple(part.transpose(0, 1)[None] for part in layer) for layer in contexts]
            self.attend(queries, dense.__getitem__, lambda: self._mask(children, new))
        return children

    def _mask(self, children: Sequence[Handle], new: int) -> torch.Tensor:
        """The mask of the library: block by block along the diagonal."""
        ends = [0, *accumulate(child.length for child in children)]
        shape = (1, 1, new * len(children), ends[-1])
        mask = torch.full(shape, torch.finfo(self.work.dtype).min, dtype=self.work.dtype)
        build_attention_mask(mask, list(range(0, shape[2] + 1, new)), ends)
        return mask

    def output(self, layer: int) -> torch.Tensor:
        flat = self.outputs[layer][0]
        return flat.unflatten(1, (self.work.envs, -1)).transpose(0, 1)

    def read(self, node: Handle) -> KV:
        rows = torch.tensor(self.allocator.get_read_indices(node.request_id, node.length, 0))
        views = [self.allocator._kv_token_views[layer] for layer in range(self.work.layers)]
        keys = torch.stack([view[0][rows].transpose(0, 1) for view in views])
        values = torch.stack([view[1][rows].transpose(0, 1) for view in views])
        return keys, values

    def kv_bytes(self, lengths: Iterable[int]) -> int:
        cache = self.cache
        return cache.num_sectors * cache.bytes_per_sector - int(
            cache.compute_free_capacity(relative=False)
        )


class DynamicCachePeer(Peer):
    """One DynamicCache a node; a fork is copy.deepcopy."""

    name = "HF DynamicCache, deep copy"
    note = "copies the context; reserves nothing, tokens are appended by the write"
    copies = True

    def begin(self, length: int, tokens: Any = None) -> Handle:
        cache = DynamicCache()
        if tokens is None:
            empty = torch.zeros(
                1, self.work.heads, length, self.work.head_size, dtype=self.work.dtype
            )
            tokens = [[(empty, empty)] for _ in range(self.work.layers)]
        for layer, ((keys, values),) in enumerate(tokens):
            cache.update(keys, values, layer)
        return cache

    def fork(self, parents: Sequence[Handle], new: int) -> list[Handle]:
        return [copy.deepcopy(parent) for parent in parents]

    def release(self, nodes: Sequence[Handle]) -> None:
        """Nothing to call: the last reference goes with the caller's."""

    def arrange(self, tokens: KV) -> Any:
        """By layer and row: K and V [1, heads, n, head_size]."""
        return [list(zip(keys.split(1), values.split(1))) for keys, values in zip(*tokens)]

    def step(
        self, parents: Sequence[Handle], tokens: Any, new: int, queries: Any = None
    ) -> list[Handle]:
        children = self.fork(parents, new)
        contexts = []
        for layer, rows in enumerate(tokens):
            kept = [
                child.update(keys, values, layer) for child, (keys, values) in zip(children, rows)
            ]
            width = max(keys.shape[2] for keys, _ in kept)
            contexts.append(
                tuple(
                    torch.cat(
                        [pad(row[part], (0, 0, width - row[part].shape[2], 0)) for row in kept]
                    )
                    for part in range(2)
                )
            )
        if queries is not None:
            lengths = torch.tensor([child.get_seq_length() for child in children])[:, None]
            width = int(lengths.max())
            self.attend(
                queries,
                contexts.__getitem__,
                lambda: causal(torch.arange(width) >= width - lengths, new),
            )
        return children

    def read(self, node: Handle) -> KV:
        keys, values = zip(*((layer.keys[0], layer.values[0]) for layer in node.layers))
        return torch.stack(keys), torch.stack(values)

    def kv_bytes(self, lengths: Iterable[int]) -> int:
        return sum(lengths) * self.work.token_bytes
