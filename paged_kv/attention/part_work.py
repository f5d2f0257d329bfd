"""One part of a step, attended in a layer: pages are read, scores made, values summed.

All memory is of a scratch, and all views of it are made once for the layers of a step: beside a few
megabytes of pages in the caches of a core, each call of torch and each view counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from paged_kv.attention.layout import PartLayout
from paged_kv.attention.scratch import Scratch
from paged_kv.pages.storage import Storage

MOST_READ = 1 << 20  # bytes of keys, or of values, that are read in one go: they stay in a cache
MOST_SCORES = 16 << 20  # bytes of scores that are held, where those of one query are not more


class Found(NamedTuple):
    """What queries find in a part."""

    results: torch.Tensor  # [heads, N, groups, size]
    tops: torch.Tensor  # the largest score [heads, N, groups]
    shares: torch.Tensor  # its share of the weights


class Pages(NamedTuple):
    """Keys or values of a block. H heads x G groups are B; T are the slots that somebody sees."""

    rows: torch.Tensor  # as they are read
    slots: torch.Tensor  # [H, G * slots, size]
    seen: torch.Tensor  # [B, T, size]
    wide: torch.Tensor  # the same, or where it is made wider


class Block(NamedTuple):
    """Some heads of a part: what is read of the pages, and where it is multiplied."""

    numbers: torch.Tensor  # of pages [H * G * pages]
    keys: Pages
    values: Pages
    turned_keys: torch.Tensor  # [B, size, T]
    queries: torch.Tensor  # [B, r, size]
    scores: torch.Tensor  # [B, r, T]
    weights: torch.Tensor  # the same, or where they are rounded
    results: torch.Tensor  # [B, r, value size]


class Piece(NamedTuple):
    """Some heads, and some queries of each group, whose scores are held at once."""

    blocks: list[Block]
    scores: torch.Tensor  # [H, G, queries, groups, T]
    masked: torch.Tensor  # those of which some are hidden
    hidden: torch.Tensor | None  # [G, queries, 1, those]
    tops: torch.Tensor  # [H, G, queries, groups]
    shares: torch.Tensor


class PartWork:
    """Attends one part, a piece at a time. `alone`: there is nothing to merge with."""

    def __init__(
        self,
        storage: Storage,
        layout: PartLayout,
        queries: torch.Tensor,
        found: Found,
        scratch: Scratch,
        *,
        alone: bool,
    ) -> None:
        self._storage = storage
        self._layout = layout
        self._scratch = scratch
        self._queries = queries
        self._found = found
        self._alone = alone
        self._chosen = queries
        self._partial = found
        self._dtype = queries.dtype
        heads, _, groups, size = queries.shape
        if layout.sources is not None:
            shape = (heads, layout.groups * layout.queries, groups)
            self._chosen = scratch.take("chosen", (*shape, size), self._dtype)
            self._partial = Found(
                scratch.take("partial results", (*shape, found.results.shape[-1]), self._dtype),
                scratch.take("partial tops", shape, self._dtype),
                scratch.take("partial shares", shape, self._dtype),
            )
        self._groups = groups
        self._pieces = list(self._cut())

    # -- views

    def _cut(self) -> Iterator[Piece]:
        """Pieces of all heads where their scores fit, of some heads or some queries of one."""
        layout = self._layout
        heads = self._queries.shape[0]
        row = layout.groups * self._groups * (layout.end - layout.begin)
        head = row * layout.queries
        most = MOST_SCORES // self._dtype.itemsize
        tall = max(1, most // head)
        step = layout.queries if head <= most else max(1, most // row)
        for first in range(0, heads, tall):
            for query in range(0, layout.queries, step):
                chosen = slice(query, min(query + step, layout.queries))
                yield self._piece(first, min(first + tall, heads), chosen)

    def _piece(self, first: int, end: int, chosen: slice) -> Piece:
        """The heads `first` to `end`, and some queries of each group."""
        layout = self._layout
        form = self._storage.form
        shape = (end - first, layout.groups, chosen.stop - chosen.start, self._groups)
        scores = self._scratch.take("scores", (*shape, layout.end - layout.begin), self._dtype)
        widest = max(part.head_size for part in form.parts)
        head_bytes = layout.groups * layout.slots * widest * form.dtype.itemsize
        step = max(1, MOST_READ // head_bytes)
        tops, shares = [
            each.view(-1, layout.groups, layout.queries, self._groups)[first:end, :, chosen]
            for each in (self._partial.tops, self._partial.shares)
        ]
        return Piece(
            [
                self._block(head, min(head + step, end), chosen, scores[head - first :])
                for head in range(first, end, step)
            ],
            scores,
            scores[..., layout.masked :],
            None if layout.mask is None else layout.mask[:, chosen, None],
            tops,
            shares,
        )

    def _block(self, first: int, end: int, chosen: slice, scores: torch.Tensor) -> Block:
        layout = self._layout
        parts = self._storage.form.parts
        count = end - first
        shape = (count, layout.groups, layout.queries, self._groups, -1)
        rows = (count * layout.groups, (chosen.stop - chosen.start) * self._groups, -1)
        queries, results = [
            each[first:end].view(shape)[:, :, chosen].view(rows)
            for each in (self._chosen, self._partial.results)
        ]
        keys = self._pages(count, parts[0].head_size, self._dtype)
        values = self._pages(count, parts[-1].head_size, self._summed)
        scores = scores[:count].view(rows)
        return Block(
            layout.pages[first:end].reshape(-1),
            keys,
            values,
            keys.wide.transpose(1, 2),
            queries,
            scores,
            self._other("weights", scores, self._summed),
            results,
        )

    def _pages(self, heads: int, size: int, dtype: torch.dtype) -> Pages:
        """Memory for keys or values, which replace each other."""
        layout = self._layout
        shape = (heads, layout.groups * layout.slots, size)
        slots = self._scratch.take("pages", shape, self._storage.form.dtype)
        groups = slots.view(heads * layout.groups, layout.slots, size)
        seen = groups[:, layout.begin : layout.end]
        rows = self._storage.as_rows(slots)
        return Pages(rows, slots, seen, self._other("wide", seen, dtype))

    def _other(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The tensor itself, or memory for its numbers in another dtype."""
        if tensor.dtype == dtype:
            return tensor
        return self._scratch.take(name, tuple(tensor.shape), dtype)

    @property
    def _summed(self) -> torch.dtype:
        """The dtype that values are multiplied in: torch does it faster in bfloat16 than in
        float32, and adds up in float32.
        """
        stored = self._storage.form.dtype
        return stored if stored == torch.bfloat16 else self._dtype

    # -- a layer

    def attend(self, layer: int, soft_cap: float | None) -> None:
        """Attend to the pages of a layer."""
        storage = self._storage
        layout = self._layout
        if layout.sources is not None:
            torch.index_select(self._queries, 1, layout.sources, out=self._chosen)
        for piece in self._pieces:
            for block in piece.blocks:
                storage.read_keys(layer, block.numbers, block.keys.rows)
                self._score(block)
            self._weigh(piece, soft_cap)
            for block in piece.blocks:
                storage.read_values(layer, block.numbers, block.values.rows)
                self._sum(block)
        if layout.targets is not None:
            for whole, partial in zip(self._found, self._partial):
                torch.index_select(partial, 1, layout.targets, out=whole)

    def _score(self, block: Block) -> None:
        keys = block.keys
        if keys.wide is not keys.seen:
            keys.wide.copy_(keys.seen)
        torch.bmm(block.queries, block.turned_keys, out=block.scores)

    def _weigh(self, piece: Piece, soft_cap: float | None) -> None:
        """Make weights of scores, in place.

        What a query does not see is hidden by the least number and not by -inf, so that one which
        sees nothing here finds weights, if only such as the merge makes to nothing.
        """
        scores = piece.scores
        if soft_cap is not None:
            scores.div_(soft_cap).tanh_().mul_(soft_cap)
        if piece.hidden is not None:
            piece.masked.masked_fill_(piece.hidden, torch.finfo(self._dtype).min)
        if not self._alone:
            torch.amax(scores, -1, out=piece.tops)
        torch.softmax(scores, -1, out=scores)
        if not self._alone:
            torch.amax(scores, -1, out=piece.shares)

    def _sum(self, block: Block) -> None:
        """Sum values by their weights; those of slots without a token are zero, not NaN."""
        values = block.values
        if self._layout.dead is not None:
            values.slots.index_fill_(1, self._layout.dead, 0)
        if values.wide is not values.seen:
            values.wide.copy_(values.seen)
        if block.weights is not block.scores:
            block.weights.copy_(block.scores)
        if values.wide.dtype == self._dtype and block.results.is_contiguous():
            torch.bmm(block.weights, values.wide, out=block.results)
        else:
            block.results.copy_(torch.bmm(block.weights, values.wide))


def precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32
