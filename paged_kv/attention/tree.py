"""Attention that reads every page once, however many rows share it.

The queries of all rows below a run of pages are attended to it side by side; a batch of such runs
is a part. What a query finds in the parts is merged by the sums of its weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from paged_kv.attention.contract import Rows
from paged_kv.attention.cost import Shape, arranged
from paged_kv.attention.layout import PartLayout, lay_out
from paged_kv.attention.parts import Batch
from paged_kv.attention.queries import Call, Packing
from paged_kv.attention.scratch import Scratch
from paged_kv.pages.storage import Storage

MOST_READ = 8 << 20  # bytes of pages that are read in one go, where one head is not more
MOST_SCORES = 16 << 20  # bytes of scores that are held, where those of one query are not more


class TreeAttention:
    """Attends each run of pages that rows share once.

    Works on any device with the functions of torch. Scores and the merge are in float32 (float64
    where the pages are). Memory: the queries and results of a layer, and a few MiB for pages and
    scores, all of `scratch`.
    """

    def __init__(
        self, storage: Storage, rows: Rows, batch: Batch, shape: Shape, scratch: Scratch
    ) -> None:
        self._storage = storage
        self._rows = rows
        self._batch = batch
        self._shape = shape
        self._scratch = scratch
        self._packing = Packing(batch.forest.order, rows, storage.form.device)
        self._layouts: dict[int | None, list[PartLayout]] = {}
        self._works: dict[tuple[int | None, int], Work] = {}

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
        call = Call(form, self._rows, queries, scale, window, soft_cap)
        if not self._packing.size:
            return call.nothing()
        with torch.no_grad():
            work = self._work(call)
            self._packing.pack(call, work.queries)
            for part in work.parts:
                part.attend(self._storage, layer, call.soft_cap)
            return self._packing.unpack(work.merged(), form.dtype)

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
            parts = arranged(self._batch, window, self._shape)
            layouts = [lay_out(part, self._batch, window, self._storage) for part in parts]
            self._layouts[window] = layouts
        return layouts


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
            PartWork(storage, layout, self.queries, Found(*each), scratch)
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
    """Some heads of a part: what is read, and where it is attended. H heads x G groups are B."""

    pages: torch.Tensor  # what is read
    read: list[torch.Tensor]  # where to, flat, one a plane
    keys: torch.Tensor  # [B, T, size]
    values: torch.Tensor
    slots: torch.Tensor  # values with all slots of the groups [H, G * slots, size]
    queries: torch.Tensor  # [B, R * groups, size]
    found: Found  # the same shape


class PartWork:
    """Attends one part, a few heads at a time."""

    def __init__(
        self,
        storage: Storage,
        layout: PartLayout,
        queries: torch.Tensor,
        found: Found,
        scratch: Scratch,
    ) -> None:
        self.layout = layout
        self.scratch = scratch
        self.queries = queries
        self.found = found
        heads, _, groups, size = queries.shape
        rows = layout.groups * layout.queries
        self.chosen = queries
        self.partial = found
        if layout.sources is not None:
            self.chosen = scratch.take("chosen", (heads, rows, groups, size), queries.dtype)
            self.partial = Found(
                scratch.take(
                    "partial", (heads, rows, groups, found.results.shape[-1]), queries.dtype
                ),
                scratch.take("partial tops", (heads, rows, groups), queries.dtype),
                scratch.take("partial shares", (heads, rows, groups), queries.dtype),
            )
        self.groups = groups
        form = storage.form
        sizes = [part.head_size for part in form.parts] * (2 // len(form.parts))
        head_bytes = layout.groups * layout.slots * sum(sizes) * form.dtype.itemsize
        step = max(1, MOST_READ // head_bytes)
        self.blocks = [
            self._block(storage, first, min(first + step, heads), sizes)
            for first in range(0, heads, step)
        ]

    def _block(self, storage: Storage, first: int, end: int, sizes: list[int]) -> Block:
        layout = self.layout
        form = storage.form
        shape = (end - first, layout.groups, layout.slots)
        planes = [
            self.scratch.take(
                f"pages {number}",
                (len(sizes) // len(form.parts), *shape, part.head_size),
                form.dtype,
            )
            for number, part in enumerate(form.parts)
        ]
        keys = planes[0][0]
        values = planes[-1][-1]
        batch = shape[0] * layout.groups
        rows = layout.queries * self.groups
        seen = slice(layout.begin, layout.end)
        return Block(
            layout.pages[:, first:end].contiguous(),
            [plane.view(-1) for plane in planes],
            keys[:, :, seen].flatten(0, 1),
            values[:, :, seen].flatten(0, 1),
            values.flatten(1, 2),
            self.chosen[first:end].view(batch, rows, -1),
            Found(
                self.partial.results[first:end].view(batch, rows, -1),
                self.partial.tops[first:end].view(batch, rows),
                self.partial.shares[first:end].view(batch, rows),
            ),
        )

    def attend(self, storage: Storage, layer: int, soft_cap: float | None) -> None:
        """Attend to the pages of a layer."""
        layout = self.layout
        if layout.sources is not None:
            torch.index_select(self.queries, 1, layout.sources, out=self.chosen)
        for block in self.blocks:
            storage.read_layer(layer, block.pages, block.read)
            if layout.dead is not None:
                block.slots.index_fill_(1, layout.dead, 0)
            self._attend(block, soft_cap)
        if layout.targets is not None:
            for whole, partial in zip(self.found, self.partial):
                torch.index_select(partial, 1, layout.targets, out=whole)

    def _attend(self, block: Block, soft_cap: float | None) -> None:
        """Attend a block, so many queries at a time that their scores fit."""
        dtype = block.queries.dtype
        keys = self._as(block.keys, dtype, "keys").transpose(1, 2)
        kept = block.values.dtype if block.values.dtype == torch.bfloat16 else dtype
        values = self._as(block.values, kept, "values")
        batch, tokens, _ = block.values.shape
        step = max(1, MOST_SCORES // (batch * self.groups * tokens * dtype.itemsize))
        if step >= self.layout.queries:
            self._softmax(block.queries, keys, values, block.found, 0, soft_cap)
            return
        for first in range(0, self.layout.queries, step):
            rows = slice(first * self.groups, (first + step) * self.groups)
            found = Found(*[each[:, rows].contiguous() for each in block.found])
            self._softmax(block.queries[:, rows], keys, values, found, first, soft_cap)
            for whole, some in zip(block.found, found):
                whole[:, rows] = some

    def _softmax(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        found: Found,
        first: int,
        soft_cap: float | None,
    ) -> None:
        """Attend queries [B, r, size], those from the `first` one of each group on."""
        shape = (*queries.shape[:2], keys.shape[2])
        scores = self.scratch.take("scores", shape, queries.dtype)
        torch.bmm(queries, keys, out=scores)
        if soft_cap is not None:
            scores.div_(soft_cap).tanh_().mul_(soft_cap)
        self._hide(scores, first)
        torch.amax(scores, -1, out=found.tops)
        weights = scores
        if not scores.is_cpu:
            weights = self.scratch.take("weights", shape, queries.dtype)
        torch.softmax(scores, -1, out=weights)
        torch.amax(weights, -1, out=found.shares)
        weights = self._as(weights, values.dtype, "weights")
        if values.dtype == found.results.dtype:
            torch.bmm(weights, values, out=found.results)
        else:
            found.results.copy_(torch.bmm(weights, values))

    def _hide(self, scores: torch.Tensor, first: int) -> None:
        """Take what a query does not see out of its scores.

        By the least number and not by -inf, so that a query which sees nothing here finds weights,
        if only such as the merge makes to nothing.
        """
        layout = self.layout
        if layout.mask is None:
            return
        rows, tokens = scores.shape[1:]
        queries = rows // self.groups
        hidden = layout.mask[:, first : first + queries]
        split = scores.view(-1, layout.groups, queries, self.groups, tokens)
        least = torch.finfo(scores.dtype).min
        split[..., layout.masked :].masked_fill_(hidden[:, :, None], least)

    def _as(self, tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
        """Numbers in another dtype."""
        if tensor.dtype == dtype:
            return tensor
        return self.scratch.take(name, tuple(tensor.shape), dtype).copy_(tensor)


def _precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32
