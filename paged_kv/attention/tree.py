"""Attention that reads every page once, however many rows share it.

The queries of all rows below a run of pages are attended to it side by side; a batch of such runs
is a part. What a query finds in the parts is merged by the sums of its weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from paged_kv.attention.contract import Rows
from paged_kv.attention.cost import Shape, arranged, rows_are_cheaper
from paged_kv.attention.layout import PartLayout, lay_out
from paged_kv.attention.parts import Batch, Part
from paged_kv.attention.queries import Call, Packing
from paged_kv.attention.runs import plant
from paged_kv.attention.scratch import Scratch
from paged_kv.pages.buffers import Form
from paged_kv.pages.storage import Storage

MOST_READ = 1 << 20  # bytes of keys, or of values, that are read in one go: they stay in a cache
MOST_SCORES = 16 << 20  # bytes of scores that are held, where those of one query are not more


class TreeAttention:
    """Attends each run of pages that rows share once.

    Works on any device with the functions of torch. Scores and the merge are in float32 (float64
    where the pages are). Memory: the queries and results of a layer, and a few MiB for pages and
    scores, all of `scratch`.
    """

    def __init__(
        self, storage: Storage, rows: Rows, scratch: Scratch, depth: int | None = None
    ) -> None:
        form = storage.form
        self._storage = storage
        self._rows = rows
        self._scratch = scratch
        self._depth = depth
        self._shape = shape_of(form)
        self._batch = Batch(rows, form.page_size, plant(rows, form.page_size))
        self._packing = Packing(self._batch.forest.order, rows, form.device)
        self._parts: dict[int | None, list[Part]] = {}
        self._layouts: dict[int | None, list[PartLayout]] = {}
        self._works: dict[tuple[int | None, int], Work] = {}

    def pays(self, window: int | None, groups: int) -> bool:
        """Whether it costs less than attending each row by itself."""
        shape = self._shape._replace(groups=groups)
        return not rows_are_cheaper(self._batch, window, shape, self._arranged(window))

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
        if not self._packing.size:
            return call.nothing()
        with torch.no_grad():
            work = self._work(call)
            self._packing.pack(call, work.queries)
            for part in work.parts:
                part.attend(self._storage, call.layer, call.soft_cap)
            return self._packing.unpack(work.merged(), self._storage.form.dtype)

    def _work(self, call: Call) -> Work:
        """Views of the scratch for calls of this kind: made once for all layers."""
        key = (call.window, call.groups)
        work = self._works.get(key)
        scratch = self._scratch
        while work is None or work.version != scratch.version:
            version = (
                scratch.version
            )  # where the making of views replaces memory, they are made anew
            layouts = self._layout(call.window)
            work = Work(self._storage, layouts, self._packing.size, call, scratch, version)
            self._works[key] = work
        return work

    def _layout(self, window: int | None) -> list[PartLayout]:
        layouts = self._layouts.get(window)
        if layouts is None:
            parts = self._arranged(window)
            layouts = [lay_out(part, self._batch, window, self._storage) for part in parts]
            self._layouts[window] = layouts
        return layouts

    def _arranged(self, window: int | None) -> list[Part]:
        parts = self._parts.get(window)
        if parts is None:
            parts = arranged(self._batch, window, self._shape, self._depth)
            self._parts[window] = parts
        return parts


class Work:
    """The parts of a layer, and what they find."""

    def __init__(
        self,
        storage: Storage,
        layouts: list[PartLayout],
        size: int,
        call: Call,
        scratch: Scratch,
        version: int,
    ) -> None:
        dtype = _precise(storage.form.dtype)
        shape = (call.heads, size, call.groups)
        parts = len(layouts)
        self.queries = scratch.take("queries", (*shape, call.queries.shape[3]), dtype)
        self.results = scratch.take("results", (parts, *shape, call.value_size), dtype)
        self.tops = scratch.take("tops", (parts, *shape), dtype)  # the largest score
        self.shares = scratch.take("shares", (parts, *shape), dtype)  # its share of the weights
        self.missing = [
            (number, layout.missing)
            for number, layout in enumerate(layouts)
            if layout.missing is not None
        ]
        found = zip(self.results, self.tops, self.shares)
        self.parts = [
            PartWork(storage.form, layout, self.queries, Found(*each), scratch)
            for layout, each in zip(layouts, found)
        ]
        self.version = version  # of the scratch

    def merged(self) -> torch.Tensor:
        """The results of all parts as one [heads, N, groups, size]."""
        if len(self.parts) == 1:
            return self.results[0]
        sums = self.tops - self.shares.log_()  # logarithms of the sums of weights
        for number, missing in self.missing:
            sums[number].masked_fill_(missing[:, None], -torch.inf)
        self.results.mul_(sums.softmax(0)[..., None])
        return self.results.sum(0)


class Found(NamedTuple):
    """What queries find in a part."""

    results: torch.Tensor  # [heads, N, groups, size]
    tops: torch.Tensor  # [heads, N, groups]
    shares: torch.Tensor


class Block(NamedTuple):
    """Some heads of a part: what is read of the pages, and where it is multiplied.

    H heads x G groups are B; T are the slots that somebody sees.
    """

    pages: torch.Tensor  # what is read [H, G * pages]
    keys: torch.Tensor  # where to [H, G * slots, size]
    values: torch.Tensor
    seen_keys: torch.Tensor  # [B, T, size]
    seen_values: torch.Tensor
    queries: torch.Tensor  # [B, r, size]
    scores: torch.Tensor  # [B, r, T]
    results: torch.Tensor  # [B, r, value size]


class Piece(NamedTuple):
    """Some heads, and some queries of each group, whose scores are held at once."""

    blocks: list[Block]
    first: int  # query of each group
    scores: torch.Tensor  # [H, G, queries, groups, T]
    tops: torch.Tensor  # [H, G, queries, groups]
    shares: torch.Tensor


class PartWork:
    """Attends one part, a piece at a time."""

    def __init__(
        self,
        form: Form,
        layout: PartLayout,
        queries: torch.Tensor,
        found: Found,
        scratch: Scratch,
    ) -> None:
        self._layout = layout
        self._scratch = scratch
        self._queries = queries
        self._found = found
        self._chosen = queries
        self._partial = found
        heads, _, groups, size = queries.shape
        if layout.sources is not None:
            shape = (heads, layout.groups * layout.queries, groups)
            dtype = queries.dtype
            self._chosen = scratch.take("chosen", (*shape, size), dtype)
            self._partial = Found(
                scratch.take("partial results", (*shape, found.results.shape[-1]), dtype),
                scratch.take("partial tops", shape, dtype),
                scratch.take("partial shares", shape, dtype),
            )
        self._groups = groups
        self._pieces = list(self._cut(form))

    def _cut(self, form: Form) -> Iterator[Piece]:
        """Pieces of all heads where their scores fit, of some heads or some queries of one."""
        layout = self._layout
        heads = self._queries.shape[0]
        row = layout.groups * self._groups * (layout.end - layout.begin)
        head = row * layout.queries
        most = MOST_SCORES // self._queries.element_size()
        tall = max(1, most // head)
        step = layout.queries if head <= most else max(1, most // row)
        for first in range(0, heads, tall):
            for query in range(0, layout.queries, step):
                end = min(first + tall, heads)
                yield self._piece(form, first, end, query, min(query + step, layout.queries))

    def _piece(self, form: Form, first: int, end: int, query: int, last: int) -> Piece:
        """The heads `first` to `end`, and queries `query` to `last` of each group."""
        layout = self._layout
        seen = layout.end - layout.begin
        shape = (end - first, layout.groups, last - query, self._groups)
        scores = self._scratch.take("scores", (*shape, seen), self._queries.dtype)
        widest = max(part.head_size for part in form.parts)
        bytes_of_head = layout.groups * layout.slots * widest * form.dtype.itemsize
        step = max(1, MOST_READ // bytes_of_head)
        blocks = [
            self._block(form, head, min(head + step, end), query, last, scores[head - first :])
            for head in range(first, end, step)
        ]
        tops, shares = [
            each.view(-1, layout.groups, layout.queries, self._groups)[first:end, :, query:last]
            for each in (self._partial.tops, self._partial.shares)
        ]
        return Piece(blocks, query, scores, tops, shares)

    def _block(
        self, form: Form, first: int, end: int, query: int, last: int, scores: torch.Tensor
    ) -> Block:
        layout = self._layout
        count = end - first
        slots = layout.groups * layout.slots
        keys, values = [
            self._scratch.take("pages", (count, slots, part.head_size), form.dtype)
            for part in (form.parts[0], form.parts[-1])
        ]
        batch = count * layout.groups
        seen_keys, seen_values = [
            each.view(batch, layout.slots, -1)[:, layout.begin : layout.end]
            for each in (keys, values)
        ]
        shape = (count, layout.groups, layout.queries, self._groups, -1)
        rows = (batch, (last - query) * self._groups, -1)
        queries, results = [
            each[first:end].view(shape)[:, :, query:last].view(rows)
            for each in (self._chosen, self._partial.results)
        ]
        return Block(
            layout.pages[first:end].contiguous(),
            keys,
            values,
            seen_keys,
            seen_values,
            queries,
            scores[:count].view(rows),
            results,
        )

    def attend(self, storage: Storage, layer: int, soft_cap: float | None) -> None:
        """Attend to the pages of a layer."""
        layout = self._layout
        if layout.sources is not None:
            torch.index_select(self._queries, 1, layout.sources, out=self._chosen)
        for piece in self._pieces:
            for block in piece.blocks:
                storage.read_keys(layer, block.pages, block.keys)
                keys = self._as(block.seen_keys, block.queries.dtype, "wide")
                torch.bmm(block.queries, keys.transpose(1, 2), out=block.scores)
            self._weigh(piece, soft_cap)
            for block in piece.blocks:
                storage.read_values(layer, block.pages, block.values)
                self._sum(block)
        if layout.targets is not None:
            for whole, partial in zip(self._found, self._partial):
                torch.index_select(partial, 1, layout.targets, out=whole)

    def _weigh(self, piece: Piece, soft_cap: float | None) -> None:
        """Make weights of scores, in place."""
        scores = piece.scores
        if soft_cap is not None:
            scores.div_(soft_cap).tanh_().mul_(soft_cap)
        self._hide(piece)
        torch.amax(scores, -1, out=piece.tops)
        torch.softmax(scores, -1, out=scores)
        torch.amax(scores, -1, out=piece.shares)

    def _hide(self, piece: Piece) -> None:
        """Take what a query does not see out of its scores.

        By the least number and not by -inf, so that a query which sees nothing here finds weights,
        if only such as the merge makes to nothing.
        """
        layout = self._layout
        if layout.mask is not None:
            hidden = layout.mask[:, piece.first : piece.first + piece.scores.shape[2], None]
            least = torch.finfo(piece.scores.dtype).min
            piece.scores[..., layout.masked :].masked_fill_(hidden, least)

    def _sum(self, block: Block) -> None:
        """Sum values by their weights; those of slots without a token are nothing, not NaN."""
        if self._layout.dead is not None:
            block.values.index_fill_(1, self._layout.dead, 0)
        # torch multiplies bfloat16 faster than float32, and adds up in float32
        half = block.values.dtype == torch.bfloat16
        dtype = torch.bfloat16 if half else block.scores.dtype
        values = self._as(block.seen_values, dtype, "wide")
        weights = self._as(block.scores, dtype, "weights")
        if not half and block.results.is_contiguous():
            torch.bmm(weights, values, out=block.results)
        else:
            block.results.copy_(torch.bmm(weights, values))

    def _as(self, tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
        """Numbers in another dtype."""
        if tensor.dtype == dtype:
            return tensor
        return self._scratch.take(name, tuple(tensor.shape), dtype).copy_(tensor)


def shape_of(form: Form) -> Shape:
    """What a token takes in a layer."""
    keys = form.parts[0]
    return Shape(keys.heads, keys.head_size, form.parts[-1].head_size, form.dtype.itemsize)


def _precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32
