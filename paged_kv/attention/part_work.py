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


class Joined(NamedTuple):
    """Where the weights of a part are, if those of all parts are made at once."""

    name: str  # of its scores
    weights: torch.Tensor  # [heads, N, groups, T]
    adds: bool  # whether another part has filled the results before


class PartWork:
    """Attends one part, a piece at a time.

    `merges`: whether there are other parts, and its results are merged with theirs. `joined`:
    instead, weights are made for all parts at once, between `score` and `sum`.
    """

    def __init__(
        self,
        storage: Storage,
        layout: PartLayout,
        queries: torch.Tensor,
        found: Found,
        scratch: Scratch,
        *,
        merges: bool = False,
        joined: Joined | None = None,
    ) -> None:
        self._storage = storage
        self._layout = layout
        self._scratch = scratch
        self._queries = queries
        self._found = found
        self._merges = merges
        self._joined = joined
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
        name = "scores" if self._joined is None else self._joined.name
        scores = self._scratch.take(name, (*shape, layout.end - layout.begin), self._dtype)
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
        summed = summing(self._storage.form.dtype)
        values = self._pages(count, parts[-1].head_size, summed)
        scores = scores[:count].view(rows)
        if self._joined is None:
            weights = self._other("weights", scores, summed)
        else:
            joined = self._joined.weights[first:end].flatten(1, 2)
            weights = joined.view(count, layout.groups, -1, joined.shape[-1]).flatten(0, 1)
        return Block(
            layout.pages[first:end].reshape(-1),
            keys,
            values,
            keys.wide.transpose(1, 2),
            queries,
            scores,
            weights,
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

    # -- a layer

    def attend(self, layer: int, soft_cap: float | None) -> None:
        """Attend to the pages of a layer."""
        layout = self._layout
        if layout.sources is not None:
            torch.index_select(self._queries, 1, layout.sources, out=self._chosen)
        for piece in self._pieces:
            self._score(piece, layer, soft_cap)
            self._weigh(piece)
            self._sum(piece, layer)
        if layout.targets is not None:
            for whole, partial in zip(self._found, self._partial):
                torch.index_select(partial, 1, layout.targets, out=whole)

    def score(self, layer: int, soft_cap: float | None) -> torch.Tensor:
        """The scores of a part that is joined [heads, N, groups, T]."""
        (piece,) = self._pieces
        self._score(piece, layer, soft_cap)
        return piece.scores.flatten(1, 2)

    def sum(self, layer: int) -> None:
        """Sum values, once the weights of all parts are made."""
        (piece,) = self._pieces
        self._sum(piece, layer)

    def _score(self, piece: Piece, layer: int, soft_cap: float | None) -> None:
        """Make scores.

        What a query does not see is hidden by the least number and not by -inf, so that one which
        sees nothing here finds weights, if only such as the merge makes to nothing.
        """
        for block in piece.blocks:
            keys = block.keys
            self._storage.read_keys(layer, block.numbers, keys.rows)
            if keys.wide is not keys.seen:
                keys.wide.copy_(keys.seen)
            torch.bmm(block.queries, block.turned_keys, out=block.scores)
        if soft_cap is not None:
            piece.scores.div_(soft_cap).tanh_().mul_(soft_cap)
        if piece.hidden is not None:
            piece.masked.masked_fill_(piece.hidden, torch.finfo(self._dtype).min)

    def _weigh(self, piece: Piece) -> None:
        """Make weights of scores, in place."""
        scores = piece.scores
        if self._merges:
            torch.amax(scores, -1, out=piece.tops)
        torch.softmax(scores, -1, out=scores)
        if self._merges:
            torch.amax(scores, -1, out=piece.shares)

    def _sum(self, piece: Piece, layer: int) -> None:
        """Sum values by their weights; those of slots without a token are zero, not NaN."""
        for block in piece.blocks:
            values = block.values
            self._storage.read_values(layer, block.numbers, values.rows)
            if self._layout.dead is not None:
                values.slots.index_fill_(1, self._layout.dead, 0)
            if values.wide is not values.seen:
                values.wide.copy_(values.seen)
            if self._joined is None and block.weights is not block.scores:
                block.weights.copy_(block.scores)
            self._multiply(block.weights, values.wide, block.results)

    def _multiply(self, weights: torch.Tensor, values: torch.Tensor, results: torch.Tensor) -> None:
        adds = self._joined is not None and self._joined.adds
        if values.dtype != results.dtype or not results.is_contiguous():
            products = torch.bmm(weights, values)
            results.copy_(results + products if adds else products)
        elif adds:
            torch.baddbmm(results, weights, values, out=results)
        else:
            torch.bmm(weights, values, out=results)


def precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def summing(dtype: torch.dtype) -> torch.dtype:
    """The dtype that values are multiplied in: torch does it faster in bfloat16 than in float32,
    and adds up in float32.
    """
    return dtype if dtype == torch.bfloat16 else precise(dtype)
