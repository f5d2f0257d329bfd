"""The tensors: all layers of a page lie together, and one kernel moves a whole batch.

A plane is a tensor [pages, parts, heads, page_size, head_size]. Where K and V have one head size
there is one plane with parts K0, V0, K1, V1, ...; else K and V have a plane each. A dense batch
[parts, batch, heads, width, head_size] is then one `index_select`, whatever the number of layers:
of whole page rows [page_size * head_size] where all windows begin and end alike, of token rows
[head_size] otherwise. New tokens go back in one kernel too. Page 0 is all zeros: padding reads it.
Why this order and not token-major: docs/design.md, "Memory order".
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np
import torch

from paged_kv.pages.buffers import Ints, Layout, ordinary, wide

Tensors = Sequence[torch.Tensor]
UNWRITTEN = 1024  # batches whose positions are written down at the latest


class Plane:
    """One tensor of the pool, with the row numbers of its parts and heads."""

    def __init__(
        self,
        parts: int,
        heads: int,
        head_size: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.parts = parts
        self.heads = heads
        self.head_size = head_size
        self.page_size = page_size
        self.dtype = dtype
        self.device = device
        self.page_rows = parts * heads  # of a page
        # Added to the first row of a page, [1, batch, 1, width]: of its page rows, of its token
        # rows.
        offsets = np.arange(self.page_rows, dtype=np.int64).reshape(parts, 1, heads, 1)
        self.offsets: tuple[Ints, Ints] = (offsets * page_size, offsets)
        self._hold(torch.zeros(self.page_rows * page_size, head_size, dtype=dtype, device=device))

    def _hold(self, rows: torch.Tensor) -> None:
        """Use these rows [pages * parts * heads * page_size, head_size]; views of them are made
        once.
        """
        self.rows = rows
        self.pages = rows.view(-1, self.parts, self.heads, self.page_size, self.head_size)
        # as a batch lies: [parts, pages, heads, page_size, head_size]
        self.targets = self.pages.transpose(0, 1)
        self.sources = wide(rows), wide(rows.view(-1, self.page_size * self.head_size))

    def grown(self, pages: int) -> Plane:
        """A plane with the same contents and room for `pages` pages beside the null page."""
        plane = copy(self)
        rows = self.rows.new_empty((pages + 1) * self.page_rows * self.page_size, self.head_size)
        kept = self.rows[: len(rows)]  # less than all, where an interrupted call had grown further
        rows[: len(kept)] = kept
        plane._hold(rows)
        return plane


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
        self.layers = layers
        self.page_size = page_size
        self.dtype = dtype
        self._on_host = device.type == "cpu"
        shapes = [(layers, head_size), (layers, value_head_size)]
        if head_size == value_head_size:
            shapes = [(2 * layers, head_size)]
        self.planes = ordinary(
            lambda: [Plane(parts, heads, size, page_size, dtype, device) for parts, size in shapes]
        )
        self.device = self.planes[0].rows.device  # with its number, where `device` had none
        self.page_rows = self.planes[0].page_rows  # of every plane
        self.page_bytes = sum(
            plane.rows.numel() * plane.rows.element_size() for plane in self.planes
        )
        self._positions: Ints = np.zeros((1, page_size), dtype=np.int64)  # by page and offset
        self._unwritten: list[tuple[slice | list[int], int, Ints]] = []  # pages, offset, positions

    @property
    def positions(self) -> Ints:
        """The position each token was written at [pages, page_size].

        Few read them, so batches are noted and written down together: numpy is slow to wake up
        between two model steps.
        """
        if self._unwritten:
            self._write_positions()
        return self._positions

    def _write_positions(self) -> None:
        noted = list(self._unwritten)  # what is noted meanwhile, by a finalizer, waits
        for pages, offset, positions in noted:
            self._positions[pages, offset : offset + positions.shape[1]] = positions
        del self._unwritten[: len(noted)]

    def grow(self, pages: int) -> None:
        """Make room for `pages` pages; a failed allocation leaves everything as it was."""
        planes = ordinary(lambda: [plane.grown(pages) for plane in self.planes])
        positions = np.zeros((pages + 1, self.page_size), dtype=np.int64)
        kept = self.positions[: len(positions)]
        positions[: len(kept)] = kept
        self._positions = positions
        self.planes = planes

    def gather(self, index: Ints, layout: Layout) -> None:
        """Fill the past of the dense views. One kernel a plane.

        `index` [B, n] has the pages of the windows where `layout.paged`, else the slots of their
        tokens. It is used up: row numbers are made of it in place.
        """
        paged = layout.paged
        if paged:
            index *= self.page_rows
        else:
            index += index // self.page_size * ((self.page_rows - 1) * self.page_size)
        first = index[:, None, :]
        for plane, flat, past, rows in zip(
            self.planes, layout.flat, layout.past_rows, layout.gather_rows
        ):
            np.add(first, plane.offsets[paged], past)
            torch.index_select(
                plane.sources[paged], 0, rows if self._on_host else rows.to(self.device), out=flat
            )

    def write_pages(
        self,
        pages: list[int],
        offset: int,
        sources: Tensors,
        positions: Ints,
        less: Tensors | None = None,
    ) -> None:
        """Write tokens [parts, B, heads, n, head_size], one source a plane, to B different pages
        from `offset` on.

        `less` is subtracted. One kernel a plane; pages that lie side by side are one strided block,
        without an index.
        """
        new = sources[0].shape[3]
        first = pages[0]
        rows = len(pages)
        place: slice | list[int] = (
            slice(first, first + rows) if pages == list(range(first, first + rows)) else pages
        )
        for number, (plane, source) in enumerate(zip(self.planes, sources)):
            target = (
                plane.targets
                if new == self.page_size
                else plane.targets[:, :, :, offset : offset + new]
            )
            if type(place) is list:
                index = torch.tensor(place, device=self.device)
                target.index_copy_(1, index, source if less is None else source - less[number])
            elif less is None:
                target[:, place].copy_(source)
            else:
                torch.sub(source, less[number], out=target[:, place])
        self._unwritten.append((place, offset, positions))
        if len(self._unwritten) >= UNWRITTEN:
            self._write_positions()

    def scatter(
        self, slots: Sequence[int], sources: Tensors, positions: Ints, less: Tensors | None = None
    ) -> None:
        """Write tokens [parts, B, heads, n, head_size], one source a plane, to B * n slots; `less`
        is subtracted.
        """
        _, rows, _, new, _ = sources[0].shape
        pages, offsets = np.divmod(
            np.array(slots, dtype=np.int64).reshape(rows, new), self.page_size
        )
        first = (pages * self.page_rows * self.page_size + offsets)[None, :, None, :]
        for number, (plane, source) in enumerate(zip(self.planes, sources)):
            at = torch.from_numpy(first + plane.offsets[False]).to(self.device)
            plane.rows.index_put_((at,), source if less is None else source - less[number])
        self.positions[pages, offsets] = positions

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (source, destination), all layers, in two kernels a plane."""
        pairs = np.array(copies, dtype=np.int64)
        source, target = torch.from_numpy(pairs.T.copy()).to(self.device).unbind(0)
        for plane in self.planes:
            plane.pages.index_copy_(0, target, plane.pages.index_select(0, source))
        self.positions[pairs[:, 1]] = self.positions[pairs[:, 0]]


def window_slots(
    tables: Sequence[tuple[int, ...]],
    starts: Sequence[int],
    lengths: Sequence[int],
    page_size: int,
    *,
    left: bool,
) -> Ints:
    """The slot of every token, [B, longest]; 0, in the null page, in the padding."""
    batch = len(tables)
    most = max(map(len, tables), default=0)
    if not most:
        return np.zeros((batch, 0), dtype=np.int64)
    length = max(lengths)
    pages = np.array([(*table, *(0,) * (most - len(table))) for table in tables], dtype=np.int64)
    slots = (pages[:, :, None] * page_size + np.arange(page_size)).reshape(batch, -1)
    counts = np.array(lengths, dtype=np.int64)[:, None]
    # each row's own count of its tokens
    column = np.arange(length) - (length - counts if left else 0)
    inside = (column >= 0) & (column < counts)
    taken = np.take_along_axis(
        slots, np.where(inside, column + np.array(starts)[:, None], 0), axis=1
    )
    return np.where(inside, taken, 0)
