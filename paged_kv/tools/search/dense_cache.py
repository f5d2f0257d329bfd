"""Dense caches of transformers: made, repeated, split and measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

Pair = tuple[torch.Tensor, torch.Tensor]


def pairs(cache: DynamicCache) -> Iterator[Pair]:
    """Keys and values [B, heads, tokens, size] of each layer."""
    for layer in cache.layers:
        yield layer.keys, layer.values


def nbytes(cache: DynamicCache) -> int:
    """Bytes of all keys and values."""
    return sum(part.nbytes for pair in pairs(cache) for part in pair)


def row(cache: DynamicCache, place: int) -> DynamicCache:
    """A copy of one row, as a batch of its own."""
    copy = DynamicCache()
    for layer, (keys, values) in enumerate(pairs(cache)):
        copy.update(keys[place : place + 1], values[place : place + 1], layer)
    return copy


def joined(caches: Sequence[DynamicCache], length: int) -> DynamicCache:
    """A copy of the first tokens of several caches, side by side in one batch."""
    batch = DynamicCache()
    for layer, found in enumerate(zip(*map(pairs, caches))):
        keys = [pair[0][:, :, :length] for pair in found]
        values = [pair[1][:, :, :length] for pair in found]
        batch.update(torch.cat(keys), torch.cat(values), layer)
    return batch


def repeated(cache: DynamicCache, rows: Sequence[int]) -> DynamicCache:
    """A copy with these rows of a batch, some of them several times."""
    batch = DynamicCache()
    alone = len(set(rows)) == 1
    for layer, (keys, values) in enumerate(pairs(cache)):
        batch.update(_taken(keys, rows, alone), _taken(values, rows, alone), layer)
    return batch


def _taken(part: torch.Tensor, rows: Sequence[int], alone: bool) -> torch.Tensor:
    """Rows of one tensor: a view where they are all the same, since `update` copies."""
    if alone:
        return part[rows[0] : rows[0] + 1].expand(len(rows), *part.shape[1:])
    return part[torch.tensor(rows, device=part.device)]


def last_logits(model: Any, argument: str, cache: Cache, ids: torch.Tensor) -> torch.Tensor:
    """Feed tokens [B, n] behind a cache, which grows; float32 logits [B, vocabulary] behind the
    last of them.
    """
    given = {"input_ids": ids, argument: cache, "use_cache": True, "logits_to_keep": 1}
    with torch.no_grad():
        found: torch.Tensor = model(**given).logits[:, -1]
    return found.float()
