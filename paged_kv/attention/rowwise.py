"""Attention that gathers the pages of each row: the reference for all others.

Torch attends them, or a few lines where it cannot.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from paged_kv.attention.contract import Rows
from paged_kv.attention.queries import Call
from paged_kv.attention.scratch import Scratch
from paged_kv.pages.buffers import ordinary
from paged_kv.pages.storage import Storage


class DenseAttention:
    """Gathers each row of a layer and attends it with `scaled_dot_product_attention`.

    Memory: one layer of all rows, padded to the longest, in `scratch`.
    """

    def __init__(self, storage: Storage, rows: Rows, scratch: Scratch) -> None:
        self._storage = storage
        self._rows = rows
        self._scratch = scratch
        self._columns: dict[int | None, Columns] = {}
        used = np.arange(max(rows.counts, default=0)) < np.array(rows.counts)[:, None]
        self._unused = None
        if not used.all():
            self._unused = torch.from_numpy(~used[:, None, :, None]).to(storage.form.device)

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> torch.Tensor:
        """See `Attention`."""
        form = self._storage.form
        return self.answer(Call(form, self._rows, layer, queries, scale, window, soft_cap))

    def answer(self, call: Call) -> torch.Tensor:
        """Attend what was checked."""
        if not any(self._rows.counts):
            return call.nothing()
        columns = self._columns.get(call.window)
        if columns is None:
            columns = Columns(self._storage, self._rows, call.window)
            self._columns[call.window] = columns
        with torch.no_grad():
            keys, values = columns.read(self._storage, call.layer, self._scratch)
            result = _attended(call, keys, values, columns.mask)
            if self._unused is not None:
                result = result.masked_fill(self._unused, 0)
            return result


class Views(NamedTuple):
    """Memory that a layer is read to."""

    version: int  # of the scratch
    key_rows: torch.Tensor  # as it is read
    value_rows: torch.Tensor
    keys: torch.Tensor  # [B, heads, size, head size]
    values: torch.Tensor


class Columns:
    """The rows of a batch side by side, from the first page that a row sees on."""

    def __init__(self, storage: Storage, rows: Rows, window: int | None) -> None:
        form = storage.form
        size = form.page_size
        new = np.array(rows.counts)[:, None]
        past = np.array(rows.lengths)[:, None]
        start = np.array(rows.starts)[:, None]
        unseen = np.zeros_like(past) if window is None else np.maximum(0, past - window + 1)
        skipped = (start + unseen) // size  # pages
        end = start + past + new - skipped * size  # one behind the last slot of a row
        tables = [
            table[skip : -(-(begin + tokens) // size)]
            for table, begin, tokens, skip in zip(
                rows.tables, rows.starts, (past + new)[:, 0].tolist(), skipped[:, 0].tolist()
            )
        ]
        self.rows = len(tables)
        self.width = max(map(len, tables))
        pages = np.zeros((self.rows, self.width), dtype=np.int64)
        for row, table in zip(pages, tables):
            row[: len(table)] = table
        self.size = int(end.max())
        self._views: Views | None = None
        self.index = storage.layer_index(pages.reshape(-1)).view(-1)
        slot = np.arange(self.size)
        held = (slot >= start - skipped * size) & (slot < end)
        self.dead = None
        if not held.all():
            self.dead = torch.from_numpy(~held[:, None, :, None]).to(form.device)
        self.mask = self._mask(start - skipped * size, past, new, held, window, form.device)

    def _mask(
        self,
        first: np.ndarray[tuple[int, int], np.dtype[np.int64]],
        past: np.ndarray[tuple[int, int], np.dtype[np.int64]],
        new: np.ndarray[tuple[int, int], np.dtype[np.int64]],
        held: np.ndarray[tuple[int, int], np.dtype[np.bool_]],
        window: int | None,
        device: torch.device,
    ) -> torch.Tensor | None:
        """Bool [B, 1, n, size], true where a query sees a slot; None where all see all.

        Columns that a row does not use see what its last query does.
        """
        query = past + np.minimum(np.arange(int(new.max())), np.maximum(new - 1, 0))
        token = (np.arange(self.size) - first)[:, None]
        seen = held[:, None] & (token <= query[..., None])
        if window is not None:
            seen &= token > query[..., None] - window
        return None if seen.all() else torch.from_numpy(seen[:, None]).to(device)

    def read(
        self, storage: Storage, layer: int, scratch: Scratch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer [B, heads, size, head size]; zeros where no token is."""
        views = self._views
        while views is None or views.version != scratch.version:
            views = ordinary(lambda: self._make_views(storage, scratch))
            self._views = views
        storage.read_keys(layer, self.index, views.key_rows)
        storage.read_values(layer, self.index, views.value_rows)
        if self.dead is not None:
            views.keys.masked_fill_(self.dead, 0)
            views.values.masked_fill_(self.dead, 0)
        return views.keys, views.values

    def _make_views(self, storage: Storage, scratch: Scratch) -> Views:
        form = storage.form
        version = scratch.version
        shape = (form.parts[0].heads, self.rows, self.width * form.page_size)
        keys = scratch.take("row keys", (*shape, form.parts[0].head_size), form.dtype)
        values = scratch.take("row values", (*shape, form.parts[-1].head_size), form.dtype)
        return Views(
            version,
            storage.as_rows(keys),
            storage.as_rows(values),
            keys.transpose(0, 1)[:, :, : self.size],
            values.transpose(0, 1)[:, :, : self.size],
        )


def _attended(
    call: Call, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention of a dense batch, in float32 where it is float16 on a CPU, which has no arithmetic
    for that.
    """
    queries = call.queries
    stored = keys.dtype
    if stored == torch.float16 and keys.is_cpu:
        queries = queries.float()
        keys = keys.float()
        values = values.float()
    if call.groups > 1:
        keys = keys.repeat_interleave(call.groups, dim=1)
        values = values.repeat_interleave(call.groups, dim=1)
    with torch.autocast(keys.device.type, enabled=False):
        if call.soft_cap is None:
            result = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, scale=call.scale
            )
        else:
            result = _capped(queries, keys, values, mask, call.scale, call.soft_cap)
    return result.to(stored)


def _capped(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    soft_cap: float,
) -> torch.Tensor:
    """Attention with a soft cap, which torch does not have."""
    precise = torch.float64 if keys.dtype == torch.float64 else torch.float32
    scores = torch.matmul(queries.to(precise), keys.to(precise).transpose(2, 3))
    scores.mul_(scale / soft_cap).tanh_().mul_(soft_cap)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    return torch.matmul(scores.softmax(-1), values.to(precise))
