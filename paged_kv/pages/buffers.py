"""Reused dense buffers: where batches are gathered to, and the views of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]
T = TypeVar("T")


class PlaneLike(Protocol):
    """What a buffer needs to know of a plane of the pool."""

    parts: int
    heads: int
    head_size: int
    page_size: int
    rows: torch.Tensor


class Workspace:
    """Reused dense buffers of a batch, at a fixed address until they must grow."""

    def __init__(self) -> None:
        self._flat: list[torch.Tensor] = []
        self._layouts: dict[tuple[int, int, int, int | None], Layout] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(flat.numel() * flat.element_size() for flat in self._flat)

    def layout(
        self, planes: Sequence[PlaneLike], batch: int, past: int, room: int, start: int | None
    ) -> Layout:
        """The buffers for `batch` windows of `past` + `room` tokens: views made once and kept.

        `start` is the head offset of the longest window, where all are gathered by pages, or None
        to gather by tokens.
        """
        found = self._layouts.get((batch, past, room, start))
        if found is None:
            found = ordinary(lambda: self._make(planes, batch, past, room, start))
            self._layouts[batch, past, room, start] = found
        return found

    def _make(
        self, planes: Sequence[PlaneLike], batch: int, past: int, room: int, start: int | None
    ) -> Layout:
        unit = 1 if start is None else planes[0].page_size
        first = start or 0
        width = -(-(first + past + room) // unit) * unit
        shapes = [(plane.parts, batch, plane.heads, width, plane.head_size) for plane in planes]
        sizes = [int(np.prod(shape)) for shape in shapes]
        if not self._flat or any(size > flat.numel() for size, flat in zip(sizes, self._flat)):
            self._flat = [plane.rows.new_empty(size) for plane, size in zip(planes, sizes)]
            self._layouts.clear()
        if len(self._layouts) >= 256:  # long windows of ever new widths
            self._layouts.clear()
        whole = [flat[:size].view(shape) for flat, size, shape in zip(self._flat, sizes, shapes)]
        return Layout(whole, unit, first, past, room, paged=start is not None)


class Layout:
    """Dense views [parts, B, heads, past + room, head_size] of a workspace, one a plane, and row
    numbers for them.

    A search step takes a few dozen microseconds in all, so every view it needs is made once and
    kept.
    """

    def __init__(
        self, whole: list[torch.Tensor], unit: int, first: int, past: int, room: int, *, paged: bool
    ) -> None:
        self.paged = paged
        self.past = past
        self.room = room
        # the next token of every window begins a page
        self.on_edge = paged and (first + past) % unit == 0
        self.planes = [plane[:, :, :, first : first + past + room] for plane in whole]
        self.flat = [wide(plane.view(-1, unit * plane.shape[-1])) for plane in whole]
        arrays = [
            np.zeros((*plane.shape[:3], plane.shape[3] // unit), dtype=np.int64) for plane in whole
        ]
        self.gather_rows = [torch.from_numpy(array).view(-1) for array in arrays]
        filled = -(-(first + past) // unit) if past else 0
        # the room is read from the null page
        self.past_rows = [array[..., :filled] for array in arrays]
        self._columns: dict[tuple[int, int], list[torch.Tensor]] = {}
        self._layers: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._next: dict[int, Ints] = {}

    def columns(self, first: int, end: int) -> list[torch.Tensor]:
        """The planes from column `first` to `end`."""
        found = self._columns.get((first, end))
        if found is None:
            found = ordinary(lambda: [plane[:, :, :, first:end] for plane in self.planes])
            self._columns[first, end] = found
        return found

    def layers(self, first: int, end: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """K and V [B, heads, end - first, head_size] of every layer."""
        found = self._layers.get((first, end))
        if found is None:
            found = ordinary(lambda: self._split(first, end))
            self._layers[first, end] = found
        return found

    def _split(self, first: int, end: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        keys, values = self.keys_values(self.columns(first, end))
        return list(zip(keys.unbind(0), values.unbind(0)))

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

    def next_positions(self, new: int) -> Ints:
        """The positions [1, new] after the windows of a batch of equal ones."""
        found = self._next.get(new)
        if found is None:
            found = self._next[new] = np.arange(self.past, self.past + new, dtype=np.int64)[None]
        return found

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
