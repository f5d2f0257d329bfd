"""One model step: contexts as a dense batch, room for new tokens, and the children that
come of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch

from paged_kv import checks
from paged_kv.attention.dense import DenseLayer, Windows
from paged_kv.attention.in_pages import InPages, PageRows
from paged_kv.checks import Counts, whole
from paged_kv.errors import BadCount, NotCopyable
from paged_kv.pages.buffers import Ints, Layout
from paged_kv.pages.lease import Lease
from paged_kv.pages.plan import Plan
from paged_kv.pages.pool import Pool
from paged_kv.pages.records import Record, pages_for
from paged_kv.pages.storage import Places
from paged_kv.tensors import own_positions
from paged_kv.turns import Turns, light_verb, page_reader, verb

Hook = Callable[["Step"], None]


class Late(NamedTuple):
    """What a step does once its windows are copied, and where they lie until then."""

    hook: Hook | None
    pages: PageRows


class Step:
    """A batch of contexts as an ordinary dense cache, with room for new tokens.

    Made by `PagedKVCache.open`. The windows end in column `past`; shorter ones are padded on the
    left with zeros (or on the right, with `pad="right"`: there new tokens follow the longest
    window, in the same columns). `update` appends in place, `keys` and `values` are views, `layers`
    holds each layer as a cache of its own, `commit` stores the new tokens of all layers and returns
    the children.

    It is a fork that nobody sees yet: it holds the pages that its room needs, and keeps what it was
    opened on, so that its parents may change or end meanwhile. Several may be open, each with a
    buffer of its own. One that is closed, or dropped, gives everything back; `with` closes it at
    the end of the block. Buffers are used again: views of them are good until the step has ended.
    Where it was opened with `gather="later"`, windows that can stay in their pages are copied once
    something asks for them, to a buffer to which the new tokens move, too: views of these are good
    until then. `in_pages` attends to windows without.

    Attributes: `parents`; `past`, `room`; `left`, whether padding is in front; `uniform`,
    whether all windows begin at one
    offset of their pages and have one length: then nothing is padding.
    """

    def __init__(
        self,
        pool: Pool,
        turns: Turns,
        lease: Lease,
        layout: Layout,
        sizes: list[tuple[int, int]],
        left: bool,
        uniform: bool,
        late: Late | None = None,
        filled: list[int] | None = None,
    ) -> None:
        self.turns = turns
        self.parents = lease.parents
        self.left = left
        self.uniform = uniform
        self.past = layout.past if late is None else max([size for _, size in sizes], default=0)
        self.room = layout.room
        self._late = late
        # columns of each layer
        self._filled = [self.past] * pool.layers if filled is None else filled
        self._layers: list[DenseLayer] | None = None
        self._pool = pool
        self._lease = lease
        self._layout = layout
        self._sizes = sizes

    def __enter__(self) -> Step:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise NotCopyable("Step")

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.size - self.past} of {self.room} filled"
        return f"<Step of {len(self.parents)} rows, past {self.past}, {state}>"

    # -- as attention reads it

    @property
    def layers(self) -> list[DenseLayer]:
        """Each layer as a cache of its own."""
        if self._absent:
            self._copy_windows()
        if self._layers is None:
            self._layers = [
                DenseLayer(self._lease, self._layout, self._filled, index)
                for index in range(len(self._filled))
            ]
        return self._layers

    @property
    def planes(self) -> list[torch.Tensor]:
        """The whole dense batch, one tensor a plane: [parts, B, heads, past + room, head_size].

        Autograd does not follow what is done to them.
        """
        if self._absent:
            self._copy_windows()
        return [plane.detach() for plane in self._layout.planes]

    def columns(self, first: int, end: int) -> list[torch.Tensor]:
        """Columns `first` to `end` of `planes`: views that are made once for each pair.

        What is done to columns of new tokens before `commit` is what will be stored. Raises
        BadCount, ClosedStep.
        """
        self._lease.check("columns")
        end = whole("end", end, 0, self.past + self.room)
        first = whole("first", first, 0, end)
        if first < self._absent:
            self._copy_windows()
        return self._columns(first, end)

    def _columns(self, first: int, end: int) -> list[torch.Tensor]:
        """Some columns; those of new tokens only, where windows were not copied."""
        absent = self._absent
        return self._layout.columns(first - absent, end - absent)

    @property
    def _absent(self) -> int:
        """Columns that the layout lacks: those of the windows, until they are copied."""
        return self.past - self._layout.past

    def in_pages(self, shift: torch.Tensor | None = None) -> InPages | None:
        """Attention to the windows where their pages lie, for one new token a row at a time; None
        where they have to be copied.

        That is where the step was not opened with `gather="later"`, K and V differ in size, are not
        on the CPU in float32 or float64, lie in tiers or as int8, or numba is missing. Each row
        sees its own window, without padding. `shift` [2 * layers, 1, heads, past or more,
        head_size], K before V, is added to windows as they are read, by index. Raises ClosedStep;
        BadArgument, BadShape, BadDtype and BadDevice where that is no such tensor.

        >>> from paged_kv import PagedKVCache
        >>> cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2)
        >>> root, = cache.new()
        >>> cache.append([root], torch.ones(1, 1, 1, 2, 2), torch.ones(1, 1, 1, 2, 2))
        >>> step = cache.open([root], 2, gather="later")
        >>> attention = step.in_pages()
        >>> if attention is not None:  # queries, keys and values of a token
        ...     seen = attention.see(0, 0, torch.ones(1, 1, 3, 2))
        """
        self._lease.check("in_pages")
        if self._late is None:
            return None
        return InPages(self._lease, self._late.pages, lambda: self._layout, shift)

    def _copy_windows(self) -> None:
        """Copy the windows next to the new tokens, since somebody asks for them."""
        layout = self._gathered()
        hook = None if self._late is None else self._late.hook
        if hook is not None:
            before = list(self._filled)
            try:
                hook(self._with(layout))
            except BaseException:
                self._filled[:] = before
                raise
        self._layout = layout

    def _with(self, layout: Layout) -> Step:
        """The same step, with windows that were copied."""
        shared = self._sizes, self.left, self.uniform, None, self._filled
        return Step(self._pool, self.turns, self._lease, layout, *shared)

    @verb
    def _gathered(self) -> Layout:
        """The windows, and the new tokens behind them, in a buffer of their own."""
        windows = self._records("gather")
        pool = self._pool
        buffer = pool.buffers.take(pool.books.pending)
        layout = pool.read(windows, self.room, buffer, left=self.left, alike=self.uniform)
        buffer.step = self._lease.number
        for target, source in zip(
            layout.columns(self.past, self.past + self.room), self._layout.planes
        ):
            target.copy_(source)
        return layout

    @property
    def closed(self) -> bool:
        """Whether it was committed or closed."""
        return self._lease.closed

    @property
    def size(self) -> int:
        """Columns filled so far in layer 0, padding included."""
        return self._filled[0]

    @property
    def _windows(self) -> Windows:
        return Windows(self._sizes, self.past, self.left)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each window [B]."""
        return [length for _, length in self._sizes]

    @property
    def pads(self) -> list[int]:
        """Columns of padding in front of each window [B]: 0 in a batch padded on the right."""
        return self._windows.pads

    @page_reader
    def _positions(self) -> Ints:
        return self._pool.positions(self._records("then"), left=self.left)[0]

    def _records(self, what: str) -> list[Record]:
        """The windows as they lie now, without the room.

        Raises ClosedStep, which names the call.
        """
        size = self._pool.books.page_size
        return [
            (record[0][: pages_for(start, length, size)], start, length, *record[3:])
            for record, (start, length) in zip(self._lease.windows(what), self._sizes)
        ]

    @property
    def then(self) -> Ints:
        """The position each token of the windows was placed at [B, past], 0 in padding.

        On the host. Raises ClosedStep.
        """
        return self._positions()

    @property
    def now(self) -> Ints:
        """The index of each token in its window [B, past], 0 in padding. On the host."""
        return self._windows.places()

    def keys(self, layer: int) -> torch.Tensor:
        """K [B, heads, size, head_size] of a layer: a view."""
        return self.get(layer)[0]

    def values(self, layer: int) -> torch.Tensor:
        """V [B, heads, size, value_head_size] of a layer: a view."""
        return self.get(layer)[1]

    def get(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer, as far as it is filled: views."""
        return self._layer(layer).get()

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append K and V [B, heads, n, head_size] to a layer; see `DenseLayer.update`."""
        self._layer(layer).update(keys, values)

    def mask(self) -> torch.Tensor:
        """Bool [B, size], true at tokens, false at padding."""
        self._lease.check("mask")
        return self._windows.mask(self.size).to(self._layout.planes[0].device)

    def _layer(self, layer: int) -> DenseLayer:
        if type(layer) is not int or layer < 0 or layer >= len(self._filled):
            layer = whole("layer", layer, 0, len(self._filled) - 1)
        return self.layers[layer]

    # -- how it ends

    @light_verb
    def commit(
        self,
        *,
        counts: Counts | None = None,
        slide: Counts = 0,
        positions: torch.Tensor | Ints | None = None,
    ) -> list[int]:
        """Store the new tokens and return the children, one a row; ends the step.

        `counts`: new tokens that each child keeps, the first ones; all by default. `slide`: tokens
        that each child drops from the front, one number or one a row, at most the length of its
        window. `positions` [B, n] of the new tokens; by default they go on where the last token of
        the window was placed. One kernel for all layers. Raises BadCount, BadShape, BadDtype,
        BadArgument, BadDevice, ClosedStep.
        """
        lease = self._lease
        books = self._pool.books
        new = self.filled()
        if (
            lease.number in books.light
            and positions is None
            and counts is None
            and new == self.room
            and type(slide) is int
            and 0 <= slide <= self.past
            and not slide % new
        ):  # what a search does: each child fills a page, and drops so many in front
            return self._extend(slide // new)
        if books.light:
            self.turns.settle()
        records = lease.windows("commit")
        rows = len(records)
        filled = [new] * rows
        if counts is not None:
            filled = checks.counts("counts", counts, filled)
        slides = None
        if type(slide) is not int or slide:
            slides = checks.counts("slide", slide, self.lengths)
        places = None
        placed: Places = [record[4] - self.room for record in records]
        if positions is not None:
            placed = own_positions(positions, (rows, new))
            places = self._places_behind(placed, filled, [record[4] for record in records])
        if new:
            ends = [start + length for start, length in self._sizes]
            plan = Plan(self.parents, [new] * rows, books.page_size, records, ends, 0)
            self._pool.write(plan, self._columns(self.past, self.past + new), placed)
        return self._pool.steps.publish(lease.number, filled, slides, places)

    def _places_behind(self, placed: Ints, filled: list[int], all_filled: list[int]) -> list[int]:
        """Where the next token of each child goes: behind the last one that it keeps."""
        return [
            int(row[kept - 1]) + 1 if kept else place - self.room
            for row, kept, place in zip(placed, filled, all_filled)
        ]

    def _extend(self, drop: int) -> list[int]:
        """Commit a light step whose room is filled; each child drops so many pages in front."""
        lease = self._lease
        pool = self._pool
        pages = pool.pages.peek(len(lease.records))
        sources = self._columns(self.past, self.past + self.room)
        pool.storage.write_pages(pages, 0, sources, [record[4] for record in lease.records])
        return pool.steps.extend(lease.number, lease, pages, drop)

    def filled(self) -> int:
        """New tokens of every layer. Raises BadCount where the layers differ."""
        filled = self._filled
        if filled.count(filled[0]) != len(filled):
            allowed = "the same number in every layer"
            raise BadCount("columns filled, by layer", list(filled), allowed)
        return filled[0] - self.past

    def fill(self, count: int) -> None:
        """Count so many more columns as filled, in every layer: K and V were written to `columns`.

        Raises BadCount, ClosedStep.
        """
        self._lease.check("fill")
        filled = self._filled
        more = whole("count", count, 0, self.past + self.room - max(filled))
        filled[:] = [size + more for size in filled]

    def close(self) -> None:
        """Give the step up; nothing is stored, its pages are free. Closing twice is fine.

        May be called at any time, as `PagedKVCache.release`.
        """
        self.turns.abandon(self._lease.number)
