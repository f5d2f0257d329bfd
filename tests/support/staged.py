"""Small caches for model steps, and steps of one value."""

from __future__ import annotations

from typing import Any

import torch

from paged_kv import PagedKVCache, Step


def made(device: str = "cpu", **options: Any) -> PagedKVCache:
    return PagedKVCache(
        **{
            "layers": 2,
            "heads": 1,
            "head_size": 2,
            "page_size": 2,
            "num_pages": 64,
            "device": device,
            **options,
        }
    )


def filled(cache: PagedKVCache, *lengths: int) -> list[int]:
    """Sequences of these lengths; their tokens count up from 1, so that padding is told from
    contents.
    """
    seqs = cache.new(len(lengths))
    for seq, length in zip(seqs, lengths, strict=True):
        shape = (cache.layers, 1, cache.heads, length)
        keys, values = (
            torch.arange(1.0, 1 + torch.Size((*shape, size)).numel(), device=cache.device).reshape(
                *shape, size
            )
            for size in (cache.head_size, cache.value_head_size)
        )
        cache.append([seq], keys, values)
    return seqs


def advance(batch: Step, cache: PagedKVCache, count: int = 1, value: float = -1.0) -> None:
    """Append `count` tokens of one value to all layers."""
    rows = len(batch.parents)
    keys = torch.full((rows, cache.heads, count, cache.head_size), value, device=cache.device)
    values = torch.full(
        (rows, cache.heads, count, cache.value_head_size), value, device=cache.device
    )
    for layer in range(cache.layers):
        batch.update(layer, keys, values)
