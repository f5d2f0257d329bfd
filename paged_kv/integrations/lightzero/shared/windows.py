"""Windows that do not go on from what is stored: taken in from outside, or stored anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from paged_kv.cache import PagedKVCache
from paged_kv.integrations.lightzero.shared.positions import WriteShift
from paged_kv.step import Step

SLIDE = 2  # a window that is full loses its oldest observation and action


def side_by_side(
    contexts: Sequence[Any], rows: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [layers, rows, heads, size, head_size] of the first `size` columns of one or more
    `KeysValues`, `rows` rows in all.
    """
    keys, values = (
        torch.stack(
            [
                getattr(context[layer], half)._cache[:, :, :size]
                for layer in range(len(contexts[0]))
                for context in contexts
            ]
        )
        for half in ("_k_cache", "_v_cache")
    )
    return (
        keys.reshape(-1, rows, *keys.shape[2:]),
        values.reshape(-1, rows, *values.shape[2:]),
    )


def slid(
    batch: Step, shift: WriteShift, sizes: Sequence[int], full: Sequence[int]
) -> dict[int, int]:
    """Correct the `full` rows of a batch, whose windows slide; returns the column from which each
    is to be stored anew, that of its third token.
    """
    begins = {row: batch.size - sizes[row] + SLIDE for row in full}
    for first in set(begins.values()):
        shift.apply(batch, [row for row in full if begins[row] == first], first)
    return begins


def store_anew(cache: PagedKVCache, batch: Step, begins: dict[int, int]) -> dict[int, int]:
    """Rows of a batch from a column on, as sequences that share nothing; by row.

    Each ends on a page's edge, so that later pairs fill whole pages.
    """
    found: dict[int, int] = {}
    for first in set(begins.values()):
        rows = [row for row, column in begins.items() if column == first]
        tokens = batch.columns(first, batch.size)[0][:, rows]
        seqs = cache.new(len(rows), start=-(batch.size - first) % cache.page_size)
        cache.append(seqs, tokens[0::2], tokens[1::2])
        found.update(zip(rows, seqs))
    return found
