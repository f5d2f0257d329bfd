"""The pages as kernels that others wrote read them: views of a layer, and tables of a batch.

No K or V is copied. What a format has no place for is refused by name.
"""

from __future__ import annotations

from itertools import accumulate, chain
from typing import NamedTuple

import torch

from paged_kv.attention.contract import Rows
from paged_kv.errors import UnfitForKernel
from paged_kv.pages.storage import Storage

FLASH_ATTENTION = "flash_attn_with_kvcache"
FLASHINFER = "FlashInfer"


class FlashInferPages(NamedTuple):
    """What FlashInfer's wrappers of paged K/V plan and run on, in their layout "HND".

    `cache` [pages, 2, heads, page_size, head_size] is their `paged_kv_cache` where K and V have one
    size; else it is None. `keys` and `values` [pages, heads, page_size, size] are the pair that
    they take in its place. Row r reads the pages `indices[indptr[r] : indptr[r + 1]]`, of the last
    one `last_page_len[r]` slots.
    """

    cache: torch.Tensor | None
    keys: torch.Tensor
    values: torch.Tensor
    indptr: torch.Tensor  # [B + 1] int32
    indices: torch.Tensor  # int32
    last_page_len: torch.Tensor  # [B] int32, from 1 to page_size


class FlashAttentionPages(NamedTuple):
    """What `flash_attn_with_kvcache` takes, of which only the sizes are contiguous."""

    k_cache: torch.Tensor  # [pages, page_size, heads, head_size]
    v_cache: torch.Tensor
    block_table: torch.Tensor  # [B, n] int32, padded with the null page
    cache_seqlens: torch.Tensor  # [B] int32


def flashinfer_pages(storage: Storage, rows: Rows, layer: int) -> FlashInferPages:
    """A layer as FlashInfer reads it, the new tokens of the rows included.

    Good until the pool grows or is trimmed; the tables are the same in every layer. Cost: the pages
    of the tables. Raises UnfitForKernel where the first token of a row is not at the beginning of
    its page, or a row has no token.
    """
    _check_rows(FLASHINFER, rows)
    size = storage.form.page_size
    tables = _tables(rows, size)
    views = storage.layer_view(layer)
    totals = _totals(rows)
    for row, total in enumerate(totals):
        if not total:
            raise UnfitForKernel(FLASHINFER, f"row {row} has no token", "at least one in every row")
    return FlashInferPages(
        views[0] if len(views) == 1 else None,
        views[0][:, 0],
        views[-1][:, -1],
        _ints(storage, [0, *accumulate(map(len, tables))]),
        _ints(storage, list(chain.from_iterable(tables))),
        _ints(storage, [(total - 1) % size + 1 for total in totals]),
    )


def flash_attention_pages(
    storage: Storage, rows: Rows, layer: int, *, multiple: int = 256
) -> FlashAttentionPages:
    """A layer as `flash_attn_with_kvcache` reads it, the new tokens of the rows included.

    `multiple` is what its page size is a multiple of: 256 in the kernels of flash-attn 2, 16 in the
    build of vLLM. Good until the pool grows or is trimmed. Cost: the pages of the tables. Raises
    UnfitForKernel where pages are of another size, K and V differ in size, or the first token of a
    row is not at the beginning of its page.
    """
    form = storage.form
    size = form.page_size
    if size % multiple:
        raise UnfitForKernel(FLASH_ATTENTION, f"page_size is {size}", f"a multiple of {multiple}")
    keys, values = form.parts[0].head_size, form.parts[-1].head_size
    if keys != values:
        found = f"K has size {keys} and V {values}"
        raise UnfitForKernel(FLASH_ATTENTION, found, "one size for both")
    _check_rows(FLASH_ATTENTION, rows)
    tables = _tables(rows, size)
    longest = max(map(len, tables), default=0)
    padded = [[*table, *[0] * (longest - len(table))] for table in tables]
    views = storage.layer_view(layer)
    return FlashAttentionPages(
        views[0][:, 0].transpose(1, 2),
        views[-1][:, -1].transpose(1, 2),
        _ints(storage, padded).view(len(tables), longest),
        _ints(storage, _totals(rows)),
    )


def _check_rows(kernel: str, rows: Rows) -> None:
    """Raise UnfitForKernel unless every row begins with the first slot of a page."""
    for row, start in enumerate(rows.starts):
        if start:
            found = f"the first token of row {row} is at offset {start} of its page"
            raise UnfitForKernel(
                kernel, found, "offset 0: its tables have no place for another one"
            )


def _totals(rows: Rows) -> list[int]:
    return [past + new for past, new in zip(rows.lengths, rows.counts)]


def _tables(rows: Rows, page_size: int) -> list[tuple[int, ...]]:
    """The pages that hold tokens of each row."""
    return [table[: -(-total // page_size)] for table, total in zip(rows.tables, _totals(rows))]


def _ints(storage: Storage, numbers: list[int] | list[list[int]]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=storage.form.device)
