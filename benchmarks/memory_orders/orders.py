"""The pool in one memory order of the family [chunk, layer, K/V, head, slot, size].

A chunk is a run of consecutive pages whose slots lie side by side inside each layer, K or V and
head. Chunks of one page are the order of the package: all of a page lies together. One chunk for
the whole pool keeps all pages of a head together. What is read and written is the same in all
orders, and as far as possible so is the way: a gather is one `index_select` of whole page rows, a
write one strided copy or one indexed kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]
Spans = Sequence[tuple[int, int]]  # first page and number of pages of every run
# The kernel behind `scaled_dot_product_attention` on a CPU: it also returns the logarithm of the
# sum of the weights, without which parts cannot be merged.
attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class Sizes(NamedTuple):
    """Of the tensors of a pool."""

    layers: int
    heads: int
    size: int
    page: int
    pages: int
    dtype: torch.dtype

    @property
    def parts(self) -> int:
        """K and V of every layer: K0, V0, K1, V1, ..."""
        return 2 * self.layers

    @property
    def rows(self) -> int:
        """Rows of a page, one a part and head."""
        return self.parts * self.heads

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.rows * self.page * self.size * self.dtype.itemsize


class Block(NamedTuple):
    """A part of a run that is one strided view: whole chunks, or a stretch of one chunk."""

    chunks: slice
    within: slice
    pages: int


class Order:
    """A pool with chunks of `chunk` pages, and the contents of `like`."""

    def __init__(self, sizes: Sizes, chunk: int, like: Order | None = None) -> None:
        assert sizes.pages % chunk == 0
        self.sizes = sizes
        self.chunk = chunk
        shape = sizes.pages // chunk, sizes.parts, sizes.heads, chunk, sizes.page, sizes.size
        self.pool = torch.empty(shape, dtype=sizes.dtype)
        if like is None:
            self.pool.normal_()
        else:
            chunks = like.by_page().reshape(shape[0], chunk, *shape[1:3], *shape[4:])
            self.pool.copy_(chunks.permute(0, 2, 3, 1, 4, 5))
        self.token_rows = self.pool.view(-1, sizes.size)
        page_rows = self.pool.view(-1, sizes.page * sizes.size)
        # rows as numbers of 8 bytes: half as long to gather as bfloat16
        self.page_rows = page_rows.view(torch.int64)
        offsets = np.arange(sizes.rows, dtype=np.int64) * chunk
        self.offsets = offsets.reshape(sizes.parts, 1, sizes.heads, 1)

    def by_page(self) -> torch.Tensor:
        """The contents [pages, parts, heads, page, size], as a view or a copy."""
        return self.pool.permute(0, 3, 1, 2, 4, 5).flatten(0, 1)

    def first_rows(self, pages: Ints) -> Ints:
        """The first of the rows of each page."""
        if self.chunk == 1:
            return pages * self.sizes.rows
        if self.chunk == self.sizes.pages:
            return pages
        return pages + pages // self.chunk * ((self.sizes.rows - 1) * self.chunk)

    def gather(self, pages: Ints, dense: torch.Tensor, rows: Ints) -> None:
        """Fill a batch [parts, B, heads, W, size] with windows of whole pages [B, n].

        `rows` [parts, B, heads, n] is overwritten.
        """
        np.add(self.first_rows(pages)[:, None, :], self.offsets, out=rows)
        flat = dense.view(-1, self.sizes.page * self.sizes.size).view(torch.int64)
        torch.index_select(self.page_rows, 0, torch.from_numpy(rows).view(-1), out=flat)

    def write_pages(self, pages: list[int], source: torch.Tensor) -> None:
        """Write tokens [parts, B, heads, n, size] to the front of B different pages."""
        first = pages[0]
        if pages == list(range(first, first + len(pages))):
            self._write_run(first, source)
            return
        new = source.shape[3]
        index = torch.tensor(pages)
        if self.chunk == 1:
            self.pool[:, :, :, 0, :new].index_copy_(0, index, source.transpose(0, 1))
        elif self.chunk == self.sizes.pages:
            self.pool[0, :, :, :, :new].index_copy_(2, index, source.transpose(1, 2))
        else:
            place = index // self.chunk, slice(None), slice(None), index % self.chunk
            self.pool[(*place, slice(new))] = source.transpose(0, 1)

    def _write_run(self, first: int, source: torch.Tensor) -> None:
        """The same to consecutive pages: a copy a block, without an index."""
        done = 0
        for block in blocks(first, source.shape[1], self.chunk):
            target = self.at(block)[..., : source.shape[3], :]
            part = source[:, done : done + block.pages]
            part = part.reshape(len(part), target.shape[0], target.shape[3], *part.shape[2:])
            target.copy_(part.permute(1, 0, 3, 2, 4, 5))
            done += block.pages

    def scatter(self, pages: Ints, offsets: Ints, source: torch.Tensor) -> None:
        """Write tokens [parts, B, heads, n, size] to single slots [B, n]."""
        first = (self.first_rows(pages) * self.sizes.page + offsets)[None, :, None, :]
        rows = torch.from_numpy(first + self.offsets * self.sizes.page)
        self.token_rows.index_put_((rows,), source)

    def copy_pages(self, sources: list[int], targets: list[int]) -> None:
        """Copy whole pages, as a sequence does that leaves a shared page to write to it."""
        source = torch.tensor(sources)
        target = torch.tensor(targets)
        if self.chunk == 1:
            self.pool.index_copy_(0, target, self.pool.index_select(0, source))
        elif self.chunk == self.sizes.pages:
            self.pool.index_copy_(3, target, self.pool.index_select(3, source))
        else:
            offsets = torch.from_numpy(self.offsets).view(-1, 1)
            rows = [
                (torch.from_numpy(self.first_rows(np.array(pages))) + offsets).view(-1)
                for pages in (sources, targets)
            ]
            self.page_rows.index_copy_(0, rows[1], self.page_rows.index_select(0, rows[0]))

    def at(self, block: Block) -> torch.Tensor:
        """The pages of a block [chunks, parts, heads, pages of a chunk, page, size]."""
        return self.pool[block.chunks, :, :, block.within]

    def in_place(self, spans: Spans, queries: torch.Tensor) -> list[torch.Tensor]:
        """Attention of all rows over one prefix where it lies, layer by layer.

        Queries [layers, B, heads, n, size]. A call a block and layer: the chunks of a block are
        rows of its batch. Several parts are merged by their sums.
        """
        views = [
            self.at(block).flatten(3, 4).transpose(0, 1).unbind(0)
            for first, count in spans
            for block in blocks(first, count, self.chunk)
        ]
        outs = []
        for layer, query in enumerate(queries.unbind(0)):
            together = side_by_side(query)
            found = [
                attention(together.expand(len(view[0]), -1, -1, -1), *view[2 * layer :][:2])
                for view in views
            ]
            out = found[0][0] if len(found) == 1 else torch.cat([out for out, _ in found])
            if len(out) > 1:
                out = merged(out, torch.cat([sums for _, sums in found]))
            outs.append(apart(out, query))
        return outs

    def grown(self) -> torch.Tensor:
        """A pool with twice the pages, the old ones copied."""
        chunks, parts, heads, chunk, page, size = self.pool.shape
        if chunks == 1:
            pool = self.pool.new_empty(1, parts, heads, 2 * chunk, page, size)
            pool[:, :, :, :chunk] = self.pool
        else:
            pool = self.pool.new_empty(2 * chunks, *self.pool.shape[1:])
            pool[:chunks] = self.pool
        return pool


def blocks(first: int, count: int, chunk: int) -> Iterator[Block]:
    """A run of pages as blocks: the end of a chunk, whole chunks, the beginning of one."""
    end = first + count
    while first < end:
        number, within = divmod(first, chunk)
        if within or end - first < chunk:
            pages = min(chunk - within, end - first)
            yield Block(slice(number, number + 1), slice(within, within + pages), pages)
        else:
            pages = (end - first) // chunk * chunk
            yield Block(slice(number, number + pages // chunk), slice(0, chunk), pages)
        first += pages


def side_by_side(query: torch.Tensor) -> torch.Tensor:
    """The queries of all rows as queries of one row: [B, heads, n, size] as [1, heads, B * n,
    size].
    """
    return query.transpose(0, 1).flatten(1, 2)[None]


def apart(out: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """The answers of one row as answers of all rows."""
    rows, heads, count, size = query.shape
    return out[0].reshape(heads, rows, count, size).transpose(0, 1)


def merged(out: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Attention over all parts [1, heads, q, size] from that over each part [n, heads, q, size]."""
    shares = torch.softmax(sums.view(out.shape[:-1]), dim=0)
    return (out * shares[..., None]).sum(dim=0, keepdim=True).to(out.dtype)


def each_row(dense: torch.Tensor, queries: torch.Tensor) -> list[torch.Tensor]:
    """Attention over a batch of gathered windows, layer by layer: what a model does today."""
    return [
        torch.nn.functional.scaled_dot_product_attention(query, keys, values)
        for query, keys, values in zip(queries.unbind(0), dense[0::2], dense[1::2])
    ]


def all_at_once(dense: torch.Tensor, queries: torch.Tensor) -> list[torch.Tensor]:
    """Attention of all rows over one gathered prefix [parts, 1, heads, W, size]."""
    outs = []
    for query, keys, values in zip(queries.unbind(0), dense[0::2], dense[1::2]):
        out = torch.nn.functional.scaled_dot_product_attention(side_by_side(query), keys, values)
        outs.append(apart(out, query))
    return outs


def exact(prefix: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """The same in 64 bits, step by step, from a prefix [parts, heads, W, size]."""
    keys = prefix[0::2, None].double()
    values = prefix[1::2, None].double()
    scores = queries.double() @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
    return torch.softmax(scores, dim=-1) @ values
