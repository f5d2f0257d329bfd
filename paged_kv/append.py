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


def append_tokens(
    pool: Pool,
    turns: Turns,
    seqs: Iterable[int],
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor | None,
) -> None:
    """Append tokens to each of these sequences: see `PagedKVCache.append`."""
    rows = handles(seqs)
    count = _check_tokens(pool, len(rows), keys, values)
    placed = None if positions is None else own_positions(positions, (len(rows), count))
    appending = _Appending(pool, turns, rows, count, pool.sources(keys, values), placed)
    try:
        appending.append()
    except OutOfPages as full:
        pool.reclaim(full, rows)
    else:
        return
    appending.append()


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


class _Appending:
    """The verb that appends, which may be tried twice."""

    def __init__(
        self,
        pool: Pool,
        turns: Turns,
        seqs: list[int],
        count: int,
        sources: list[torch.Tensor],
        positions: Ints | None,
    ) -> None:
        self.turns = turns
        self.pool = pool
        self.seqs = seqs
        self.count = count
        self.sources = sources
        self.positions = positions

    @verb
    def append(self) -> None:
        """Take the pages, write the tokens, then let the sequences have them."""
        pool = self.pool
        count = self.count
        pool.books.loose_records(self.seqs)
        plan = pool.plan(self.seqs, count)
        places = None
        if self.positions is not None and count:
            places = (self.positions[:, -1] + 1).tolist()
        if plan.copies:
            pool.storage.copy_pages(plan.copies)
        if self.positions is None:
            pool.write(plan, self.sources, [record[4] - count for record in plan.becomes])
        else:
            pool.write(plan, self.sources, self.positions)
        pool.tables.carry_out(plan, places)
