"""Contexts as dense tensors of the caller's own."""

from __future__ import annotations

from typing import NamedTuple

import torch

from paged_kv.pages.buffers import Buffer
from paged_kv.pages.pool import Pool


class Gathered(NamedTuple):
    """Dense contexts, padded to the longest."""

    keys: torch.Tensor  # [layers, B, heads, W, head_size]
    values: torch.Tensor  # [layers, B, heads, W, value_head_size]
    lengths: torch.Tensor  # [B] int64
    mask: torch.Tensor  # [B, W] bool, true at tokens
    positions: torch.Tensor  # [B, W] int64, where each token was placed; 0 in padding


def gather_windows(pool: Pool, seqs: list[int], *, left: bool, reuse: bool) -> Gathered:
    """K/V of a batch: see `PagedKVCache.gather`."""
    records = pool.books.records(seqs)
    windows = [record[1:3] for record in records]
    alike = bool(windows) and windows.count(windows[0]) == len(windows)
    buffer = pool.scratch if reuse else Buffer(pool.storage.form)
    layout = pool.read(records, 0, buffer, left=left, alike=alike)
    positions, kept = pool.positions(records, left=left)
    device = pool.storage.form.device
    keys, values = layout.all_layers()
    return Gathered(
        keys,
        values,
        torch.tensor([record[2] for record in records], dtype=torch.int64, device=device),
        torch.from_numpy(kept).to(device),
        torch.from_numpy(positions).to(device),
    )
