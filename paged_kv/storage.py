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
        self.parts, self.heads, self.head_size, self.page_size = parts, heads, head_size, page_size
        self.rows_per_page = parts * heads * page_size
        self.rows = torch.zeros(self.rows_per_page, head_size, dtype=dtype, device=device)
        offsets = np.arange(parts * heads, dtype=np.int64) * page_size
        self.offsets: Ints = offsets.reshape(parts, 1, heads, 1)  # of [parts, batch, heads, width]

    def grow(self, pages: int) -> None:
        """Make room for `pages` pages beside the null page."""
        rows = self.rows.new_empty((pages + 1) * self.rows_per_page, self.head_size)
        rows[: len(self.rows)] = self.rows
        self.rows = rows

    def index(self, slots: Ints, out: Ints | None = None) -> Ints:
        """Rows [parts, B, heads, W] of the tokens in slots [B, W]."""
        first = slots // self.page_size
        first *= self.rows_per_page - self.page_size
        first += slots
        return np.add(first[None, :, None, :], self.offsets, out=out)

    def pages(self) -> torch.Tensor:
        """The plane as [pages, parts * heads * page_size * head_size]."""
        return self.rows.view(-1, self.rows_per_page * self.head_size)


class Workspace:
    """Reused dense buffers of a batch and the index that fills them, at a fixed address until they must grow."""

    def __init__(self) -> None:
        self._flat: list[torch.Tensor] = []
        self._layouts: dict[tuple[int, int], Layout] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(flat.numel() * flat.element_size() for flat in self._flat)

    def layout(self, planes: Sequence[Plane], batch: int, width: int) -> Layout:
        """The buffers for `batch` rows of `width` tokens: views made once and kept."""
        found = self._layouts.get((batch, width))
        if found is None:
            found = self._layouts[batch, width] = self._make(planes, batch, width)
        return found

    def _make(self, planes: Sequence[Plane], batch: int, width: int) -> Layout:
        shapes = [(plane.parts, batch, plane.heads, width, plane.head_size) for plane in planes]
        sizes = [int(np.prod(shape)) for shape in shapes]
        if not self._flat or any(size > flat.numel() for size, flat in zip(sizes, self._flat)):
            self._flat = [plane.rows.new_empty(size) for plane, size in zip(planes, sizes)]
            self._layouts.clear()
        if len(self._layouts) >= 256:  # long windows of ever new widths
            self._layouts.clear()
        return Layout([flat[:size].view(shape) for flat, size, shape in zip(self._flat, sizes, shapes)])


class Layout:
    """Dense views [parts, B, heads, W, head_size] of a workspace, one a plane, and their row index on the host."""

    def __init__(self, planes: list[torch.Tensor]) -> None:
        self.planes = planes
        self.flat = [plane.view(-1, plane.shape[-1]) for plane in planes]
        self.index_arrays = [np.empty(plane.shape[:-1], dtype=np.int64) for plane in planes]
        self.index = [torch.from_numpy(array).view(-1) for array in self.index_arrays]
        self.views: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def slice(self, layer: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [B, heads, end - first, head_size] of a layer: views, made once and kept."""
        found = self.views.get((layer, first, end))
        if found is None:
            keys, values = self.layer(layer)
            found = self.views[layer, first, end] = keys[:, :, first:end], values[:, :, first:end]
        return found

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [B, heads, W, head_size] of a layer."""
        if len(self.planes) == 1:
            return self.planes[0][2 * layer], self.planes[0][2 * layer + 1]
        return self.planes[0][layer], self.planes[1][layer]

    def all_layers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [layers, B, heads, W, head_size]."""
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
        self.positions = np.zeros(page_size, dtype=np.int64)
        self.page_bytes = sum(p.rows_per_page * p.head_size * p.rows.element_size() for p in self.planes)

    def grow(self, pages: int) -> None:
        """Make room for `pages` pages; a failed allocation leaves everything as it was."""
        grown = [plane.rows for plane in self.planes]
        try:
            for plane in self.planes:
                plane.grow(pages)
        except BaseException:
            for plane, rows in zip(self.planes, grown):
                plane.rows = rows
            raise
        positions = np.zeros((pages + 1) * self.page_size, dtype=np.int64)
        positions[: len(self.positions)] = self.positions
        self.positions = positions

    def gather(self, slots: Ints, layout: Layout) -> None:
        """Fill the dense views with the tokens in slots [B, W]. One kernel a plane."""
        for plane, flat, array, index in zip(self.planes, layout.flat, layout.index_arrays, layout.index):
            plane.index(slots, out=array)
            torch.index_select(plane.rows, 0, self._to_device(index), out=flat)

    def scatter(self, slots: Ints, sources: Sequence[torch.Tensor], positions: Ints) -> None:
        """Write tokens [parts, B, heads, W, head_size], one source a plane, to slots [B, W]. One kernel a plane."""
        for plane, source in zip(self.planes, sources):
            index = self._to_device(torch.from_numpy(plane.index(slots)))
            plane.rows.index_put_((index,), source)
        self.positions[slots] = positions

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (source, destination), all layers, in two kernels a plane."""
        if not copies:
            return
        pairs = np.array(copies, dtype=np.int64)
        source, target = self._to_device(torch.from_numpy(pairs.T.copy())).unbind(0)
        for plane in self.planes:
            pages = plane.pages()
            pages.index_copy_(0, target, pages.index_select(0, source))
        by_page = self.positions.reshape(-1, self.page_size)
        by_page[pairs[:, 1]] = by_page[pairs[:, 0]]

    def _to_device(self, index: torch.Tensor) -> torch.Tensor:
        return index if self.device.type == "cpu" else index.to(self.device, non_blocking=False)


def window_slots(
    tables: Sequence[tuple[int, ...]],
    starts: Sequence[int],
    lengths: Sequence[int],
    width: int,
    page_size: int,
    *,
    left: bool,
) -> Ints:
    """Slots [B, width] of the windows, left- or right-padded with slot 0 of the null page."""
    batch, longest = len(tables), max(map(len, tables), default=0)
    out = np.zeros((batch, width), dtype=np.int64)
    if not longest:
        return out
    length, start = max(lengths), starts[0]
    same = min(lengths) == length and min(starts) == max(starts) == start
    rows = tables if same else [(*table, *(0,) * (longest - len(table))) for table in tables]
    pages = np.array(rows, dtype=np.int64)
    pages *= page_size
    slots = (pages[:, :, None] + np.arange(page_size)).reshape(batch, -1)
    if same:
        out[:, :length] = slots[:, start : start + length]
        return out
    counts = np.array(lengths, dtype=np.int64)[:, None]
    first = length - counts if left else np.zeros_like(counts)  # column of each row's first token
    column = np.arange(length) - first
    inside = (column >= 0) & (column < counts)
    taken = np.take_along_axis(slots, np.where(inside, column + np.array(starts)[:, None], 0), axis=1)
    out[:, :length] = np.where(inside, taken, 0)
    return out
