"""Tokens are appended to sequences."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from paged_kv.checks import handles
from paged_kv.errors import OutOfPages
from paged_kv.pages.buffers import Ints
from paged_kv.pages.pool import Pool
from paged_kv.tensors import check_dense, check_tensor, own_positions
from paged_kv.turns import Turns, verb


class Appender:
    """Appends tokens to the sequences of one pool."""

    def __init__(self, pool: Pool, turns: Turns) -> None:
        self.pool = pool
        self.turns = turns

    def append(
        self,
        seqs: Iterable[int],
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor | None,
    ) -> None:
        """Append tokens to each of these sequences: see `PagedKVCache.append`."""
        rows = handles(seqs)
        count = _check_tokens(self.pool, len(rows), keys, values)
        placed = None if positions is None else own_positions(positions, (len(rows), count))
        sources = self.pool.sources(keys, values)
        try:
            self._append(rows, count, sources, placed)
        except OutOfPages as full:
            self.pool.reclaim(full, rows)
        else:
            return
        self._append(rows, count, sources, placed)

    @verb
    def _append(
        self, seqs: list[int], count: int, sources: list[torch.Tensor], positions: Ints | None
    ) -> None:
        """Take the pages, write the tokens, then let the sequences have them."""
        pool = self.pool
        pool.books.loose_records(seqs)
        plan = pool.plan(seqs, count)
        places = None
        if positions is not None and count:
            places = (positions[:, -1] + 1).tolist()
        if plan.copies:
            pool.storage.copy_pages(plan.copies)
        if positions is None:
            pool.write(plan, sources, [record[4] - count for record in plan.becomes])
        else:
            pool.write(plan, sources, positions)
        pool.tables.carry_out(plan, places)


def _check_tokens(pool: Pool, rows: int, keys: torch.Tensor, values: torch.Tensor) -> int:
    """How many tokens are to be appended to each row; or raise, as `PagedKVCache.append` says."""
    form = pool.storage.form
    heads = form.parts[0].heads
    sizes = form.parts[0].head_size, form.parts[-1].head_size
    try:
        count = keys.shape[3] if isinstance(keys, torch.Tensor) and keys.dim() == 5 else 0
        for name, tensor, size in zip(("keys", "values"), (keys, values), sizes):
            check_tensor(name, tensor, (pool.layers, rows, heads, count, size), form)
    except RuntimeError:  # of torch, for which a nested tensor has no shape
        check_dense("keys", keys)
        check_dense("values", values)
        raise
    return count
