"""One model step: contexts as a dense batch, room for new tokens, and the children that
come of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn
from weakref import ref

import numpy as np
import torch

from paged_kv.checks import Counts, amount, counts, function, handles, whole
from paged_kv.errors import (
    BadArgument,
    BadCount,
    ClosedStep,
    NotCopyable,
    OutOfPages,
)
from paged_kv.pages.buffers import Ints, Layout
from paged_kv.pages.change import Record
from paged_kv.pages.plan import Plan
from paged_kv.pages.pool import Pool
from paged_kv.tensors import check_dense, check_tensor, is_left, own_positions
from paged_kv.turns import Turns, light_verb, reader, verb

Hook = Callable[["Step"], None]


class Lease:
    """The buffer of a step and its number, shared by the step and its layers. It points at neither.

    So all of them are freed by reference count, and the step is given up when its lease is.
    """

    __slots__ = (
        "__weakref__",
        "layout",
        "light",
        "number",
        "parents",
        "pool",
        "records",
        "steps",
    )

    def __init__(
        self, pool: Pool, layout: Layout, number: int, parents: list[int], records: list[Record]
    ) -> None:
        self.pool = pool
        self.parents = parents
        self.records = records  # as they were when it was opened
        self.steps = pool.tables.steps  # open ones
        self.light = pool.tables.light
        self.layout = layout
        self.number = number

    @property
    def closed(self) -> bool:
        """Whether the step was committed or closed."""
        return self.number not in self.steps and self.number not in self.light

    def check(self, what: str) -> None:
        """Raise ClosedStep, which names the call, unless the step is open."""
        if self.closed:
            raise ClosedStep(what)

    def windows(self, what: str) -> list[Record]:
        """Whose pages the windows lie in: of the children that the step will publish, or else of
        its parents, where it is light.

        Raises ClosedStep, which names the call.
        """
        if self.number in self.light:
            return self.records
        step = self.steps.get(self.number)
        if step is None:
            raise ClosedStep(what)
        return step.records


class StepLayer:
    """One layer of a step, as attention reads it and appends to it.

    `size` counts its columns filled so far.
    """

    __slots__ = ("_index", "_lease", "size")

    def __init__(self, lease: Lease, index: int) -> None:
        self._lease = lease
        self._index = index
        self.size = lease.layout.past

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Rows, heads, columns filled so far, head size of the keys."""
        plane = self._lease.layout.planes[0].shape
        return plane[1], plane[2], self.size, plane[4]

    def update(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append K and V [B, heads, n, head_size], in place. Two kernels.

        Raises BadArgument, BadShape, BadDtype, BadDevice, ClosedStep; BadCount where the room is
        used up.
        """
        lease = self._lease
        if lease.number not in lease.light and lease.number not in lease.steps:
            raise ClosedStep("update")
        if not isinstance(keys, torch.Tensor):
            raise BadArgument("keys", keys, "a tensor")
        if not isinstance(values, torch.Tensor):
            raise BadArgument("values", values, "a tensor")
        layout = lease.layout
        first = self.size
        try:
            end = first + (keys.shape[2] if keys.dim() == 4 else 0)
            if end > layout.past + layout.room:
                allowed = f"0 to the room of {layout.room} that open() was given"
                raise BadCount("new tokens", end - layout.past, allowed)
            key_slots, value_slots = layout.layers(first, end)[self._index]
            shape = key_slots.shape
            dtype = key_slots.dtype
            device = key_slots.device
            if keys.shape != shape or keys.dtype != dtype or keys.device != device:
                check_tensor("keys", keys, shape, key_slots)
            if (
                values.shape != value_slots.shape
                or values.dtype != dtype
                or values.device != device
            ):
                check_tensor("values", values, value_slots.shape, value_slots)
            # the buffers outlive the step, and must not hold its graph
            if keys.requires_grad or values.requires_grad:
                keys = keys.detach()
                values = values.detach()
            key_slots.copy_(keys)
            value_slots.copy_(values)
        except RuntimeError:
            # Of torch, where a tensor is not dense: that is not asked before, to save the time.
            check_dense("keys", keys)
            check_dense("values", values)
            raise
        self.size = end

    def get(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, as far as they are filled: views."""
        lease = self._lease
        if lease.closed:
            raise ClosedStep("get")
        return lease.layout.layers(0, self.size)[self._index]


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

    Attributes: `parents`; `past`, `room`; `layers`; `uniform`, whether all windows begin at one
    offset of their pages and have one length: then nothing is padding.
    """

    def __init__(
        self,
        lease: Lease,
        turns: Turns,
        ends: list[int] | None,
        windows: list[tuple[int, int]],
        left: bool,
        uniform: bool,
    ) -> None:
        self.turns = turns
        self.parents = lease.parents
        self.left = left
        self.uniform = uniform
        self._lease = lease
        self._ends = ends  # where in the tables new tokens go; None: behind the windows
        self._windows = windows
        layout = lease.layout
        self._layout = layout
        self.past = layout.past
        self.room = layout.room
        self.layers = [StepLayer(lease, index) for index in range(lease.pool.layers)]

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
    def planes(self) -> list[torch.Tensor]:
        """The whole dense batch, one tensor a plane: [parts, B, heads, past + room, head_size].

        Autograd does not follow what is done to them.
        """
        return [plane.detach() for plane in self._layout.planes]

    def columns(self, first: int, end: int) -> list[torch.Tensor]:
        """Columns `first` to `end` of `planes`: views that are made once for each pair.

        What is done to columns of new tokens before `commit` is what will be stored. Raises
        BadCount, ClosedStep.
        """
        self._lease.check("columns")
        end = whole("end", end, 0, self.past + self.room)
        return self._layout.columns(whole("first", first, 0, end), end)

    @property
    def closed(self) -> bool:
        """Whether it was committed or closed."""
        return self._lease.closed

    @property
    def size(self) -> int:
        """Columns filled so far in layer 0, padding included."""
        return self.layers[0].size

    @property
    def lengths(self) -> list[int]:
        """Tokens of each window [B]."""
        return [length for _, length in self._windows]

    @property
    def pads(self) -> list[int]:
        """Columns of padding in front of each window [B]: 0 in a batch padded on the right."""
        return [self.past - length if self.left else 0 for _, length in self._windows]

    @reader
    def _positions(self) -> Ints:
        records = self._lease.windows("then")
        windows = [
            (record[0], start, length, *record[3:])
            for record, (start, length) in zip(records, self._windows)
        ]
        return self._lease.pool.positions(windows, left=self.left)[0]

    @property
    def then(self) -> Ints:
        """The position each token of the windows was placed at [B, past], 0 in padding.

        On the host. Raises ClosedStep.
        """
        return self._positions()

    @property
    def now(self) -> Ints:
        """The index of each token in its window [B, past], 0 in padding. On the host."""
        index = np.arange(self.past) - np.array(self.pads)[:, None]
        return np.where((index >= 0) & (index < np.array(self.lengths)[:, None]), index, 0)

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
        """Append K and V [B, heads, n, head_size] to a layer; see `StepLayer.update`."""
        self._layer(layer).update(keys, values)

    def mask(self) -> torch.Tensor:
        """Bool [B, size], true at tokens, false at padding."""
        self._lease.check("mask")
        columns = np.arange(self.size)
        pads = np.array(self.pads)[:, None]
        lengths = np.array(self.lengths)[:, None]
        kept = (columns >= pads) & ((columns < pads + lengths) | (columns >= self.past))
        return torch.from_numpy(kept).to(self._layout.planes[0].device)

    def _layer(self, layer: int) -> StepLayer:
        if type(layer) is not int or layer < 0 or layer >= len(self.layers):
            layer = whole("layer", layer, 0, len(self.layers) - 1)
        return self.layers[layer]

    # -- how it ends

    @light_verb
    def commit(
        self, *, slide: Counts = 0, positions: torch.Tensor | Ints | None = None
    ) -> list[int]:
        """Store the new tokens and return the children, one a row; ends the step.

        `slide`: tokens that each child drops from the front, one number or one a row, at most the
        length of its window. `positions` [B, n] of the new tokens; by default they go on where the
        last token of the window was placed. One kernel for all layers. Raises BadCount, BadShape,
        BadDtype, BadArgument, BadDevice, ClosedStep.
        """
        lease = self._lease
        pool = lease.pool
        tables = pool.tables
        light = lease.number in tables.light
        if tables.light and not light:
            self.turns.settle()
        records = lease.windows("commit")
        rows = len(records)
        new = self.filled()
        slides = None
        if type(slide) is not int or slide:
            slides = counts("slide", slide, self.lengths)
        places = None
        if positions is not None:
            positions = own_positions(positions, (rows, new))
            places = (positions[:, -1] + 1).tolist() if new else None
        ahead = 0 if light else self.room
        if light:
            plan = tables.plan_step(self.parents, records, new, True)
        else:
            ends = self._ends or [start + length for start, length in self._windows]
            plan = Plan(self.parents, [new] * rows, pool.tables.page_size, records, ends, 0)
        if new:
            sources = self._layout.columns(self.past, self.past + new)
            if positions is None:
                pool.write(plan, sources, [record[4] - ahead for record in records])
            else:
                pool.write(plan, sources, positions)
        if light:
            return tables.publish_light(lease.number, plan, slides, places)
        return tables.publish(lease.number, new, slides, places)

    def filled(self) -> int:
        """New tokens of every layer. Raises BadCount where the layers differ."""
        sizes = [layer.size for layer in self.layers]
        if sizes.count(sizes[0]) != len(sizes):
            raise BadCount("columns filled, by layer", sizes, "the same number in every layer")
        return sizes[0] - self.past

    def close(self) -> None:
        """Give the step up; nothing is stored, its pages are free. Closing twice is fine.

        May be called at any time, as `PagedKVCache.release`.
        """
        self.turns.abandon(self._lease.number)


def open_step(
    pool: Pool,
    turns: Turns,
    seqs: Iterable[int],
    room: int,
    pad: str,
    hook: Hook | None,
) -> Step:
    """A step on these sequences: see `PagedKVCache.open`."""
    if hook is not None:
        function("rebase", hook, "None or a function of the step")
    opening = _Opening(pool, turns, handles(seqs), amount("room", room, 0), is_left(pad))
    try:
        step = opening.open()
    except OutOfPages as full:
        pool.reclaim(full, opening.parents)
        step = opening.open()
    if hook is not None:
        try:
            hook(step)
        except BaseException:
            step.close()
            raise
    return step


class _Opening:
    """The verb that opens a step, which may be tried twice."""

    def __init__(self, pool: Pool, turns: Turns, parents: list[int], room: int, left: bool) -> None:
        self.turns = turns
        self.pool = pool
        self.parents = parents
        self.room = room
        self.left = left

    @verb
    def open(self) -> Step:
        """Gather, take the pages, keep the children."""
        pool = self.pool
        tables = pool.tables
        records = tables.records(self.parents)
        windows = [record[1:3] for record in records]
        alike = bool(windows) and windows.count(windows[0]) == len(windows)
        light = tables.can_be_light(records, self.room, alike)
        plan = None if light else pool.plan_step(self.parents, records, self.room, alike)
        buffer = pool.buffers.take(tables.steps)
        layout = pool.read(records, self.room, buffer, left=self.left, alike=alike)
        number = tables.number()
        lease = Lease(pool, layout, number, self.parents, records)
        buffer.step = number
        if plan is None:
            tables.light[number] = ref(lease)
        else:
            if plan.copies:
                pool.storage.copy_pages(plan.copies)
            tables.open(number, plan, self.room, self.turns.watch(lease, number))
        ends = None if plan is None else plan.ends
        return Step(lease, self.turns, ends, windows, self.left, alike)
