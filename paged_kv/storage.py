"""The tensors: all layers of a page lie together, and one kernel moves a whole batch.

A plane is a tensor [pages, parts * heads, page_size, head_size], read as a matrix of rows of head_size numbers.
Where K and V have one head size there is one plane with parts K0, V0, K1, V1, ...; else K and V have a plane
each. A dense batch [parts, batch, heads, width, head_size] is then one `index_select` of rows, and the new
tokens go back with one `index_put_`, whatever the number of layers. Page 0 is all zeros: padding reads it.
Why this order and not token-major: docs/design.md, "Memory order".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]


class Plane:
    """One tensor of the pool, with the row numbers of its parts and heads."""

    def __init__(
        self, parts: int, heads: int, head_size: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.parts, self.heads, self.head_size = parts, heads, head_size
        self.rows_per_page = parts * heads * page_size
        self.rows = torch.zeros(self.rows_per_page, head_size, dtype=dtype, device=device)
        offsets = np.arange(parts * heads, dtype=np.int64) * page_size
        self.offsets: Ints = offsets.reshape(parts, 1, heads, 1)  # added to first rows [1, batch, 1, width]

    def grow(self, pages: int) -> None:
        """Make room for `pages` pages beside the null page."""
        rows = self.rows.new_empty((pages + 1) * self.rows_per_page, self.head_size)
        kept = self.rows[: len(rows)]  # less than all, where an interrupted call had grown further
        rows[: len(kept)] = kept
        self.rows = rows

    def pages(self) -> torch.Tensor:
        """The plane as [pages, parts * heads * page_size * head_size]."""
        return self.rows.view(-1, self.rows_per_page * self.head_size)


class Workspace:
    """Reused dense buffers of a batch, at a fixed address until they must grow."""

    def __init__(self) -> None:
        self._flat: list[torch.Tensor] = []
        self._layouts: dict[tuple[int, int, int], Layout] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(flat.numel() * flat.element_size() for flat in self._flat)

    def layout(self, planes: Sequence[Plane], batch: int, past: int, room: int) -> Layout:
        """The buffers for `batch` rows of `past` + `room` tokens: views made once and kept."""
        found = self._layouts.get((batch, past, room))
        if found is None:
            found = self._make(planes, batch, past, room)
            self._layouts[batch, past, room] = found
        return found

    def _make(self, planes: Sequence[Plane], batch: int, past: int, room: int) -> Layout:
        shapes = [(plane.parts, batch, plane.heads, past + room, plane.head_size) for plane in planes]
        sizes = [int(np.prod(shape)) for shape in shapes]
        if not self._flat or any(size > flat.numel() for size, flat in zip(sizes, self._flat)):
            self._flat = [plane.rows.new_empty(size) for plane, size in zip(planes, sizes)]
            self._layouts.clear()
        if len(self._layouts) >= 256:  # long windows of ever new widths
            self._layouts.clear()
        return Layout([flat[:size].view(shape) for flat, size, shape in zip(self._flat, sizes, shapes)], past)


class Layout:
    """Dense views [parts, B, heads, past + room, head_size] of a workspace, one a plane, and row numbers for them.

    A search step takes a few dozen microseconds in all, so every view it needs is made once and kept.
    """

    def __init__(self, planes: list[torch.Tensor], past: int) -> None:
        self.planes = planes
        self.flat = [plane.view(-1, plane.shape[-1]) for plane in planes]
        arrays = [np.zeros(plane.shape[:-1], dtype=np.int64) for plane in planes]
        self.gather_rows = [torch.from_numpy(array).view(-1) for array in arrays]
        self.past_rows = [array[..., :past] for array in arrays]  # the room is read from the null page
        self._slices: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._columns: dict[tuple[int, int], list[torch.Tensor]] = {}

    def slice(self, layer: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [B, heads, end - first, head_size] of a layer."""
        found = self._slices.get((layer, first, end))
        if found is None:
            keys, values = self.layer(layer)
            found = self._slices[layer, first, end] = keys[:, :, first:end], values[:, :, first:end]
        return found

    def columns(self, first: int, end: int) -> list[torch.Tensor]:
        """The planes from column `first` to `end`."""
        found = self._columns.get((first, end))
        if found is None:
            found = self._columns[first, end] = [plane[:, :, :, first:end] for plane in self.planes]
        return found

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [B, heads, past + room, head_size] of a layer."""
        if len(self.planes) == 1:
            return self.planes[0][2 * layer], self.planes[0][2 * layer + 1]
        return self.planes[0][layer], self.planes[1][layer]

    def all_layers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [layers, B, heads, past + room, head_size]."""
        if len(self.planes) == 1:
            return self.planes[0][0::2], self.planes[0][1::2]
        return self.planes[0], self.planes[1]


class PageStorage:
    """Contents of the pages, and the position each token was written at (on the host)."""

    def __init__(
        self,
        layers: int,
        heads: int,
        head_size: int,
        value_head_size: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layers, self.page_size, self.dtype, self.device = layers, page_size, dtype, device
        one_plane = [(2 * layers, head_size)]
        shapes = one_plane if head_size == value_head_size else [(layers, head_size), (layers, value_head_size)]
        self.planes = [Plane(parts, heads, size, page_size, dtype, device) for parts, size in shapes]
        self.rows_per_page = self.planes[0].rows_per_page  # of every plane
        self.page_bytes = sum(p.rows_per_page * p.head_size * p.rows.element_size() for p in self.planes)
        self._hold(np.zeros(page_size, dtype=np.int64))

    def _hold(self, positions: Ints) -> None:
        self.positions = positions  # by slot
        self._position_slots = memoryview(positions)  # type: ignore[arg-type]  # a few python ints go in faster here than through numpy

    def grow(self, pages: int) -> None:
        """Make room for `pages` pages; a failed allocation leaves everything as it was."""
        before = [plane.rows for plane in self.planes]
        try:
            for plane in self.planes:
                plane.grow(pages)
            positions = np.zeros((pages + 1) * self.page_size, dtype=np.int64)
        except BaseException:
            for plane, rows in zip(self.planes, before):
                plane.rows = rows
            raise
        kept = self.positions[: len(positions)]
        positions[: len(kept)] = kept
        self._hold(positions)

    def gather(self, first: Ints, layout: Layout) -> None:
        """Fill the past of the dense views with the tokens at first rows [B, past]. One kernel a plane."""
        first = first[None, :, None, :]
        for plane, flat, past, rows in zip(self.planes, layout.flat, layout.past_rows, layout.gather_rows):
            np.add(first, plane.offsets, out=past)
            torch.index_select(plane.rows, 0, self._to_device(rows), out=flat)

    def scatter(self, slots: list[int], sources: Sequence[torch.Tensor], positions: Sequence[int]) -> None:
        """Write tokens [parts, B, heads, n, head_size], one source a plane, to B * n slots. One kernel a plane."""
        size, skip = self.page_size, self.rows_per_page - self.page_size
        first = np.array([slot + slot // size * skip for slot in slots], dtype=np.int64)
        first = first.reshape(1, sources[0].shape[1], 1, sources[0].shape[3])
        for plane, source in zip(self.planes, sources):
            rows = self._to_device(torch.from_numpy(first + plane.offsets))
            plane.rows.index_put_((rows,), source.detach())  # the pool must not hold the graph of what made the tokens
        position_slots = self._position_slots
        for slot, position in zip(slots, positions):
            position_slots[slot] = position

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (source, destination), all layers, in two kernels a plane."""
        pairs = np.array(copies, dtype=np.int64)
        source, target = self._to_device(torch.from_numpy(pairs.T.copy())).unbind(0)
        for plane in self.planes:
            pages = plane.pages()
            pages.index_copy_(0, target, pages.index_select(0, source))
        by_page = self.positions.reshape(-1, self.page_size)
        by_page[pairs[:, 1]] = by_page[pairs[:, 0]]

    def _to_device(self, index: torch.Tensor) -> torch.Tensor:
        return index if self.device.type == "cpu" else index.to(self.device, non_blocking=False)


def window_index(
    tables: Sequence[tuple[int, ...]],
    starts: Sequence[int],
    lengths: Sequence[int],
    page_size: int,
    stride: int,
    *,
    left: bool,
) -> Ints:
    """page * stride + offset of every token, [B, longest]; 0, in the null page, in the padding.

    With `stride` = page_size these are slots, with `stride` = rows_per_page first rows of a plane.
    """
    batch, most = len(tables), max(map(len, tables), default=0)
    if not most:
        return np.zeros((batch, 0), dtype=np.int64)
    length, start = max(lengths), starts[0]
    same = min(lengths) == length and min(starts) == max(starts) == start
    rows = tables if same else [(*table, *(0,) * (most - len(table))) for table in tables]
    pages = np.array(rows, dtype=np.int64)
    pages *= stride
    index = (pages[:, :, None] + np.arange(page_size)).reshape(batch, -1)
    if same:
        return index[:, start : start + length]
    counts = np.array(lengths, dtype=np.int64)[:, None]
    column = np.arange(length) - (length - counts if left else 0)  # each row's own count of its tokens
    inside = (column >= 0) & (column < counts)
    taken = np.take_along_axis(index, np.where(inside, column + np.array(starts)[:, None], 0), axis=1)
    return np.where(inside, taken, 0)
