"""Attention that reads every page once, however many rows share it.

The queries of all rows below a run of pages are attended to it side by side; a batch of such runs
is a part. What a query finds in the parts is merged by the sums of its weights.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import NamedTuple

import torch

from paged_kv.attention.contract import Rows
from paged_kv.attention.cost import Shape, arranged, rows_are_cheaper
from paged_kv.attention.layout import PartLayout, lay_out
from paged_kv.attention.part_work import Found, Joined, PartWork, precise, summing
from paged_kv.attention.parts import Batch, Part
from paged_kv.attention.queries import Call, Packing
from paged_kv.attention.runs import plant
from paged_kv.attention.scratch import Scratch
from paged_kv.pages.buffers import Form, ordinary
from paged_kv.pages.storage import Storage

MOST_JOINED = (
    4 << 20
)  # bytes of scores, counted in 32 bits, of parts whose weights are made at once


class Setting(NamedTuple):
    """What a layer is attended with."""

    storage: Storage
    layouts: list[PartLayout]
    shape: tuple[int, int, int]  # K/V heads, N queries, query heads of each K/V head
    scratch: Scratch


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
        self._works: dict[tuple[int | None, int], Work | JoinedWork] = {}

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
            found = work.attend(call.layer, call.soft_cap)
            return self._packing.unpack(found, self._storage.form.dtype)

    def _work(self, call: Call) -> Work | JoinedWork:
        """Views of the scratch for calls of this kind: made once for all layers."""
        key = (call.window, call.groups)
        work = self._works.get(key)
        scratch = self._scratch
        while work is None or work.version != scratch.version:
            # where the making of views replaces memory, they are made anew
            work = ordinary(lambda: self._make_work(call))
            self._works[key] = work
        return work

    def _make_work(self, call: Call) -> Work | JoinedWork:
        shape = (call.heads, self._packing.size, call.groups)
        setting = Setting(self._storage, self._layout(call.window), shape, self._scratch)
        kind = JoinedWork if can_join(setting) else Work
        return kind(setting, self._scratch.version)

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
    """The parts of a layer, each by itself; what they find is merged by the sums of weights."""

    def __init__(self, setting: Setting, version: int) -> None:
        storage, layouts, shape, scratch = setting
        dtype = precise(storage.form.dtype)
        parts = len(layouts)
        keys, values = storage.form.parts[0].head_size, storage.form.parts[-1].head_size
        self.version = version  # of the scratch
        self.queries = scratch.take("queries", (*shape, keys), dtype)
        self._results = scratch.take("results", (parts, *shape, values), dtype)
        self._tops = scratch.take("tops", (parts, *shape), dtype)
        self._shares = scratch.take("shares", (parts, *shape), dtype)
        self._missing = [
            (number, layout.missing)
            for number, layout in enumerate(layouts)
            if layout.missing is not None
        ]
        found = zip(self._results, self._tops, self._shares)
        self._parts = [
            PartWork(storage, layout, self.queries, Found(*each), scratch, merges=parts > 1)
            for layout, each in zip(layouts, found)
        ]

    def attend(self, layer: int, soft_cap: float | None) -> torch.Tensor:
        """What the parts found [parts, heads, N, groups, size], of which the sum is the answer."""
        for part in self._parts:
            part.attend(layer, soft_cap)
        if len(self._parts) == 1:
            return self._results
        sums = self._tops.sub_(self._shares.log_())  # logarithms of the sums of weights
        for number, missing in self._missing:
            sums[number].masked_fill_(missing[:, None], -torch.inf)
        return self._results.mul_(sums.softmax(0)[..., None])


class JoinedWork:
    """The parts of a layer, if every query is in all of them and there are not many scores: these
    stand side by side, so that weights are made at once and nothing is merged.

    Beside small parts each call of torch counts, and this saves half of them.
    """

    def __init__(self, setting: Setting, version: int) -> None:
        storage, layouts, shape, scratch = setting
        dtype = precise(storage.form.dtype)
        keys, values = storage.form.parts[0].head_size, storage.form.parts[-1].head_size
        self.version = version  # of the scratch
        self.queries = scratch.take("queries", (*shape, keys), dtype)
        self._results = scratch.take("results", (1, *shape, values), dtype)
        widths = [layout.end - layout.begin for layout in layouts]
        self._scores = scratch.take("scores", (*shape, sum(widths)), dtype)
        self._weights = self._scores
        if summing(storage.form.dtype) != dtype:
            other = summing(storage.form.dtype)
            self._weights = scratch.take("weights", (*shape, sum(widths)), other)
        found = Found(self._results[0], self.queries, self.queries)  # there is nothing to merge
        ends = list(accumulate(widths))
        joined = [
            Joined(f"scores of part {number}", self._weights[..., end - width : end], number > 0)
            for number, (end, width) in enumerate(zip(ends, widths))
        ]
        self._parts = [
            PartWork(storage, layout, self.queries, found, scratch, joined=each)
            for layout, each in zip(layouts, joined)
        ]

    def attend(self, layer: int, soft_cap: float | None) -> torch.Tensor:
        """The answer [1, heads, N, groups, size]."""
        scores = [
            part.score(layer, soft_cap).view(*self._scores.shape[:-1], -1) for part in self._parts
        ]
        torch.cat(scores, -1, out=self._scores)
        torch.softmax(self._scores, -1, out=self._scores)
        if self._weights is not self._scores:
            self._weights.copy_(self._scores)
        for part in self._parts:
            part.sum(layer)
        return self._results


def can_join(setting: Setting) -> bool:
    """Whether `JoinedWork` can do it."""
    _, layouts, shape, _ = setting
    width = sum([layout.end - layout.begin for layout in layouts])
    small = math.prod(shape) * width * 4 <= MOST_JOINED
    return small and len(layouts) > 1 and all(layout.sources is None for layout in layouts)


def shape_of(form: Form) -> Shape:
    """What a token takes in a layer."""
    keys = form.parts[0]
    return Shape(keys.heads, keys.head_size, form.parts[-1].head_size, form.dtype.itemsize)
