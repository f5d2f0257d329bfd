"""Reused dense buffers: where batches are gathered to, and the views of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]
T = TypeVar("T")
CPU = torch.device("cpu")


KEPT = 4  # buffers that are used again
MOST_LAYOUTS = 256  # of a buffer: long windows come in ever new widths


class Part(NamedTuple):
    """What a dense batch takes of one plane of the storage."""

    parts: int
    heads: int
    head_size: int


class Form(NamedTuple):
    """What dense batches are made of."""

    parts: list[Part]
    page_size: int
    dtype: torch.dtype
    device: torch.device


# Of a batch: rows, columns of the past, columns of room, and the head offset of the longest window
# where all are gathered by pages, or None to gather by tokens.
Shape = tuple[int, int, int, int | None]


class Buffers:
    """A few dense buffers that open steps use in turn, each one alone."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self._kept: list[Buffer] = []

    def take(self, steps: Container[int]) -> Buffer:
        """A buffer that none of these open steps uses."""
        for buffer in self._kept:
            if buffer.step not in steps:
                return buffer
        buffer = Buffer(self.form)
        if len(self._kept) < KEPT:
            self._kept.append(buffer)
        return buffer

    def trim(self, steps: Container[int]) -> None:
        """Give back those that none of these open steps uses."""
        self._kept = [buffer for buffer in self._kept if buffer.step in steps]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._kept)


class Buffer:
    """Dense memory of one batch, at a fixed address until it must grow."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.step = 0  # the number of the last one that used it
        self._flat: list[torch.Tensor] = []
        self._rows: list[torch.Tensor] = []  # numbers of the rows that the batch is gathered from
        self._layouts: dict[Shape, Layout] = {}
        self._latest: Layout | None = None
        self.nbytes = 0  # held and written to: what is ahead of growing windows takes no memory yet

    def layout(self, shape: Shape) -> Layout:
        """The views of a batch of this shape, made once and kept."""
        found = self._layouts.get(shape)
        if found is None:
            found = ordinary(lambda: self._make(shape))
            if len(self._layouts) >= MOST_LAYOUTS:
                self._layouts.clear()
            self._layouts[shape] = found
        if found is not self._latest:
            found.room_is_null = False  # another one has used the row numbers
            self._latest = found
        return found

    def _make(self, shape: Shape) -> Layout:
        form = self.form
        batch, past, room, start = shape
        unit = 1 if start is None else form.page_size
        first = start or 0
        width = -(-(first + past + room) // unit) * unit
        shapes = [(part.parts, batch, part.heads, width, part.head_size) for part in form.parts]
        rows = [(*each[:3], width // unit) for each in shapes]
        self._flat = self._grown(self._flat, map(math.prod, shapes), form.dtype, form.device)
        self._rows = self._grown(self._rows, map(math.prod, rows), torch.int64, CPU)
        written = sum(map(math.prod, shapes)) * self._flat[0].element_size() + 8 * sum(
            map(math.prod, rows)
        )
        self.nbytes = max(self.nbytes, written)
        return Layout(
            [flat[: math.prod(each)].view(each) for flat, each in zip(self._flat, shapes)],
            [flat[: math.prod(each)].view(each) for flat, each in zip(self._rows, rows)],
            unit,
            first,
            past,
            room,
            paged=start is not None,
        )

    def _grown(
        self,
        held: list[torch.Tensor],
        sizes: Iterable[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> list[torch.Tensor]:
        """Memory for so many numbers each: what there is, or else half as much again.

        So windows that grow by a token a step need a new one once in a while. The old one goes
        first.
        """
        wanted = list(sizes)
        before = [flat.numel() for flat in held] or [0] * len(wanted)
        if held and all(size <= old for size, old in zip(wanted, before)):
            return held
        self._layouts.clear()
        held.clear()
        self.nbytes = 0
        return [
            torch.empty(max(size, old + old // 2), dtype=dtype, device=device)
            for size, old in zip(wanted, before)
        ]


class Columns(NamedTuple):
    """Some columns of every layer, and what they ask of tensors that are written there."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]  # K and V [B, heads, columns, head_size]
    key_shape: torch.Size
    value_shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Layout:
    """Dense views [parts, B, heads, past + room, head_size] of a buffer, one a plane, and row
    numbers for them.

    A search step takes a few dozen microseconds in all, so every view it needs is made once and
    kept.
    """

    def __init__(
        self,
        whole: list[torch.Tensor],
        rows: list[torch.Tensor],
        unit: int,
        first: int,
        past: int,
        room: int,
        *,
        paged: bool,
    ) -> None:
        self.paged = paged
        self.past = past
        self.room = room
        self.first = first  # columns in front of them, which the first pages brought along
        self.width = whole[0].shape[3]  # columns, those included
        # the next token of every window begins a page
        self.on_edge = paged and (first + past) % unit == 0
        self.filled = -(-(first + past) // unit) if past else 0  # pages or slots of a row's past
        self.planes = [plane[:, :, :, first : first + past + room] for plane in whole]
        self.tokens = [plane.view(-1, plane.shape[-1]) for plane in whole]  # a row for each
        self.flat = [wide(plane.view(-1, unit * plane.shape[-1])) for plane in whole]
        self.rows = [part.view(-1) for part in rows]
        self.past_rows = [part.numpy()[..., : self.filled] for part in rows]
        self.room_rows = [part.numpy()[..., self.filled :] for part in rows]
        self.room_is_null = False  # whether the numbers in `room_rows` are those of the null page
        self._columns: dict[tuple[int, int], list[torch.Tensor]] = {}
        self._layers: dict[tuple[int, int], Columns] = {}

    def columns(self, first: int, end: int) -> list[torch.Tensor]:
        """The planes from column `first` to `end`."""
        found = self._columns.get((first, end))
        if found is None:
            found = ordinary(lambda: [plane[:, :, :, first:end] for plane in self.planes])
            self._columns[first, end] = found
        return found

    def layers(self, first: int, end: int) -> Columns:
        """K and V of every layer from column `first` to `end`."""
        found = self._layers.get((first, end))
        if found is None:
            found = ordinary(lambda: self._split(first, end))
            self._layers[first, end] = found
        return found

    def _split(self, first: int, end: int) -> Columns:
        keys, values = self.keys_values(self.columns(first, end))
        layers = list(zip(keys.unbind(0), values.unbind(0)))
        return Columns(layers, keys.shape[1:], values.shape[1:], keys.dtype, keys.device)

    def blank(self, windows: Sequence[tuple[int, int]]) -> None:
        """Zero what whole pages brought along in front of windows (start, length) that end in
        column `past`.

        One kernel a plane, and none where nothing was brought along.
        """
        dead = [
            (row, column)
            for row, (start, length) in enumerate(windows)
            if length
            for column in range(max(0, self.past - length - start), self.past - length)
        ]
        if dead:
            rows, columns = (
                torch.tensor(part, device=self.planes[0].device) for part in zip(*dead)
            )
            for plane in self.planes:
                plane.permute(1, 3, 0, 2, 4)[rows, columns] = 0

    def blank_room(self) -> None:
        """Zero what the last pages brought along behind windows that end alike.

        One kernel a plane.
        """
        for plane in self.columns(self.past, self.past + self.room):
            plane.zero_()

    def all_layers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [layers, B, heads, past + room, head_size]."""
        return self.keys_values(self.planes)

    @staticmethod
    def keys_values(planes: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of all layers [layers, ...] among planes."""
        if len(planes) == 1:
            return planes[0][0::2], planes[0][1::2]
        return planes[0], planes[1]


def ordinary(make: Callable[[], T]) -> T:
    """What `make` makes, tensors and views, as if no mode of torch were on: every mode can use
    them.

    Autograd is off meanwhile, so that torch refuses to hang a graph on a view later. It is switched
    by the function of C right within `try`, and not by `torch.no_grad()`: a signal that arrives
    inside of that leaves it off for the caller.
    """
    tracked = torch.is_grad_enabled()
    try:
        torch._C._set_grad_enabled(False)
        if not torch.is_inference_mode_enabled():
            return make()
        with torch.inference_mode(False):
            torch._C._set_grad_enabled(False)
            return make()
    finally:
        torch._C._set_grad_enabled(tracked)


def wide(rows: torch.Tensor) -> torch.Tensor:
    """A view of contiguous rows as numbers of 8 bytes, where these fill a row: half as long to
    gather as bfloat16.
    """
    return rows.view(torch.int64) if rows.shape[-1] * rows.element_size() % 8 == 0 else rows
