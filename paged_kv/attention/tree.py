"""Attention that reads every page once, however many rows share it.

The queries of all rows below a run of pages are attended to it side by side; a batch of such runs
is a part. What a query finds in the parts is merged by the sums of its weights.
"""

from __future__ import annotations

import torch

from paged_kv.attention.contract import Rows
from paged_kv.attention.cost import Shape, arranged, rows_are_cheaper
from paged_kv.attention.layout import PartLayout, lay_out
from paged_kv.attention.part_work import Found, PartWork, precise
from paged_kv.attention.parts import Batch, Part
from paged_kv.attention.queries import Call, Packing
from paged_kv.attention.runs import plant
from paged_kv.attention.scratch import Scratch
from paged_kv.pages.buffers import Form, ordinary
from paged_kv.pages.storage import Storage


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
                part.attend(call.layer, call.soft_cap)
            return self._packing.unpack(work.weighed(), self._storage.form.dtype)

    def _work(self, call: Call) -> Work:
        """Views of the scratch for calls of this kind: made once for all layers."""
        key = (call.window, call.groups)
        work = self._works.get(key)
        scratch = self._scratch
        while work is None or work.version != scratch.version:
            # where the making of views replaces memory, they are made anew
            work = ordinary(lambda: self._make_work(call))
            self._works[key] = work
        return work

    def _make_work(self, call: Call) -> Work:
        scratch = self._scratch
        layouts = self._layout(call.window)
        return Work(self._storage, layouts, self._packing.size, call, scratch, scratch.version)

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
        dtype = precise(storage.form.dtype)
        shape = (call.heads, size, call.groups)
        parts = len(layouts)
        self.version = version  # of the scratch
        self.queries = scratch.take("queries", (*shape, call.queries.shape[3]), dtype)
        self._results = scratch.take("results", (parts, *shape, call.value_size), dtype)
        self._tops = scratch.take("tops", (parts, *shape), dtype)
        self._shares = scratch.take("shares", (parts, *shape), dtype)
        self._missing = [
            (number, layout.missing)
            for number, layout in enumerate(layouts)
            if layout.missing is not None
        ]
        found = zip(self._results, self._tops, self._shares)
        self.parts = [
            PartWork(storage, layout, self.queries, Found(*each), scratch, alone=parts == 1)
            for layout, each in zip(layouts, found)
        ]

    def weighed(self) -> torch.Tensor:
        """What the parts found [parts, heads, N, groups, size], of which the sum is the answer."""
        if len(self.parts) == 1:
            return self._results
        sums = self._tops.sub_(self._shares.log_())  # logarithms of the sums of weights
        for number, missing in self._missing:
            sums[number].masked_fill_(missing[:, None], -torch.inf)
        return self._results.mul_(sums.softmax(0)[..., None])


def shape_of(form: Form) -> Shape:
    """What a token takes in a layer."""
    keys = form.parts[0]
    return Shape(keys.heads, keys.head_size, form.parts[-1].head_size, form.dtype.itemsize)
