"""The tensors: all layers of a page lie together, and one kernel moves a whole batch.

A plane is a tensor [pages, parts, heads, page_size, head_size]. Where K and V have one head size
there is one plane with parts K0, V0, K1, V1, ...; else K and V have a plane each. A dense batch
[parts, batch, heads, width, head_size] is then one `index_select`, whatever the number of layers:
of whole page rows [page_size * head_size] where all windows begin and end alike, of token rows
[head_size] otherwise. New tokens go back in one kernel too. Page 0 is all zeros: padding reads it.
Why this order and not token-major: docs/design.md, "Memory order".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, groupby
from operator import itemgetter
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from paged_kv.pages.buffers import Form, Ints, Layout, ordinary, wide
from paged_kv.pages.change import Store
from paged_kv.pages.plane import Plane

Mask = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]
Tensors = Sequence[torch.Tensor]
UNWRITTEN = 1024  # batches whose positions are written down at the latest

# Where new tokens are placed: [B, n], or the place of the first one of each row.
Places = Ints | list[int]
Note = tuple[list[int], int, int, Places]  # pages, offset in them, tokens of a row, positions


class Storage(Protocol):
    """Where the contents of pages lie: all that the rest of the house asks of it.

    Tokens come and go as dense tensors [parts, B, heads, n, head_size], one a plane, as `form` has
    them. Page 0 reads as zeros. A method that raises has changed nothing that a table reads.
    """

    form: Form
    page_bytes: int
    layout: str  # what records are made of; those of one name can be read

    @property
    def nbytes(self) -> int:
        """Bytes held beside the pages."""

    def grow(self, pages: int) -> None:
        """Make room for `pages` pages."""

    def trimmed(self, pages: int) -> Sequence[Store]:
        """What makes it hold the first `pages` pages only, for a change to store."""

    def gather(self, index: Ints, layout: Layout) -> None:
        """Fill the past of dense views from the pages or slots in `index` [B, 1, n], which is used
        up.
        """

    def write_pages(
        self, pages: list[int], offset: int, sources: Tensors, positions: Places
    ) -> None:
        """Write tokens to B different pages from `offset` on; `positions` are their places."""

    def write_slots(self, slots: Sequence[int], sources: Tensors, positions: Places) -> None:
        """Write tokens to B * n slots."""

    def place(self, slots: Ints | list[int], positions: Ints | list[int]) -> None:
        """Note where the tokens in these slots were placed."""

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (source, destination)."""

    def positions_at(self, slots: Ints) -> Ints:
        """Where the tokens in these slots were placed."""

    def hold(self, step: int, pages: Iterable[int]) -> None:
        """Have these pages at hand, where `slot_index` and `layer_index` say, as long as the step
        of this number is open.
        """

    # -- whole pages as bytes, whatever the memory order

    def export_pages(self, pages: Ints, kept: Mask, out: torch.Tensor) -> torch.Tensor:
        """Fill `out` [n, page_bytes], bytes on the host, with the records of pages, and return it;
        or the pages themselves where they lie so.

        Slots that are not `kept` [n, page_size] come as zeros.
        """

    def import_pages(self, pages: Ints, records: torch.Tensor) -> None:
        """Write records [n, page_bytes] of the host to pages."""

    def records_of(self, pages: Ints) -> Bytes | None:
        """The records [n, page_bytes] of pages that nobody reads, to be written to where they lie;
        None where that cannot be.
        """

    # -- one layer, as attention over pages needs it

    def slot_index(self, slots: torch.Tensor) -> torch.Tensor:
        """What `write_tokens` writes to these slots by, in every layer: int64 [N] on the device."""

    def write_tokens(
        self, layer: int, index: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Write K and V [N, heads, size] of new tokens of one layer to the slots of an index. One
        kernel a plane.
        """

    def layer_index(self, pages: Ints) -> torch.Tensor:
        """What K and V of these pages [n] are read by, in every layer: [heads, n] on the device.

        Any of it may be left out.
        """

    def as_rows(self, memory: torch.Tensor) -> torch.Tensor:
        """Contiguous memory as what `read_keys` and `read_values` fill: a view."""

    def read_keys(self, layer: int, index: torch.Tensor, rows: torch.Tensor) -> None:
        """Fill rows with the keys of a layer, [page_size, size] for each number of `index` [n].

        One kernel.
        """

    def read_values(self, layer: int, index: torch.Tensor, rows: torch.Tensor) -> None:
        """As `read_keys`."""

    def token_rows(self) -> torch.Tensor | None:
        """All tokens of all parts where they lie, as rows of one plane of the host [pages * parts *
        heads * page_size, head_size]; None where they do not lie so.

        Good as `layer_view` is; where pages move meanwhile, what it showed stays as it was.
        """

    def layer_view(self, layer: int) -> Tensors:
        """Where a layer lies, one view a plane: [pages, parts, heads, page_size, size].

        Page 0 is the null page. Good until the pool grows or is trimmed.
        """


class PagePlanes:
    """Contents of the pages, and the position each token was written at (on the host)."""

    layout = "planes of K0, V0, K1, V1, ..."

    def __init__(self, form: Form, planes: list[Plane]) -> None:
        self.form = form
        self.planes = (
            planes  # all of the same pages, parts and heads, where there are two of a part
        )
        self.page_size = form.page_size
        self.device = form.device
        self.page_rows = planes[0].page_rows  # of every plane
        self._page_stride = np.array(self.page_rows)  # numpy takes longer to read an int
        self.page_bytes = sum(plane.page_bytes for plane in planes)
        self._on_host = form.device.type == "cpu"
        self._positions: Ints = np.zeros((1, form.page_size), dtype=np.int64)  # by page and offset
        self._unwritten: list[Note] = []

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
        # One write for all that follow on each other and go to the same slots of their pages: where
        # two go to one page, the later one stays.
        for (offset, new), notes in groupby(noted, itemgetter(1, 2)):
            batches = list(notes)
            pages = list(chain.from_iterable([note[0] for note in batches]))
            rows = [placed(note[3], len(note[0]), new) for note in batches]
            self._positions[pages, offset : offset + new] = np.concatenate(rows)
        del self._unwritten[: len(noted)]

    @property
    def nbytes(self) -> int:
        """Bytes of the positions."""
        return self._positions.nbytes

    def positions_at(self, slots: Ints) -> Ints:
        """Where the tokens in these slots were placed."""
        return self.positions.reshape(-1)[slots]

    def grow(self, pages: int) -> None:
        """Make room for `pages` pages; a failed allocation leaves everything as it was."""
        planes = ordinary(lambda: [plane.resized(pages) for plane in self.planes])
        self._positions = self._resized(pages)
        self.planes = planes

    def trimmed(self, pages: int) -> Sequence[Store]:
        """What makes it hold the first `pages` pages only, for a change to store."""
        planes = ordinary(lambda: [plane.resized(pages) for plane in self.planes])
        return Store(self, "planes", planes), Store(self, "_positions", self._resized(pages))

    def _resized(self, pages: int) -> Ints:
        positions = np.zeros((pages + 1, self.page_size), dtype=np.int64)
        kept = self.positions[: len(positions)]
        positions[: len(kept)] = kept
        return positions

    def gather(self, index: Ints, layout: Layout) -> None:
        """Fill a dense batch; `index` is used up. One kernel a plane."""
        for plane, rows, flat in zip(self.planes, self.rows(index, layout), layout.flat):
            torch.index_select(plane.sources[layout.paged], 0, rows, out=flat)

    def rows(self, index: Ints, layout: Layout) -> Tensors:
        """Numbers of the rows that a dense batch is made of, one tensor a plane.

        `index` [B, 1, n] has the pages of the past where `layout.paged`, else its slots; it is used
        up: row numbers are made of it in place. The room is read from the null page.
        """
        paged = layout.paged
        if paged:
            np.multiply(index, self._page_stride, index)
        else:
            index += index // self.page_size * ((self.page_rows - 1) * self.page_size)
        if not layout.room_is_null:
            for plane, room in zip(self.planes, layout.room_rows):
                room[:] = plane.offsets[paged]
            layout.room_is_null = True
        for plane, past in zip(self.planes, layout.past_rows):
            np.add(index, plane.offsets[paged], past)
        if self._on_host:
            return layout.rows
        return [rows.to(self.device) for rows in layout.rows]

    def write_pages(
        self,
        pages: list[int],
        offset: int,
        sources: Tensors,
        positions: Places,
    ) -> None:
        """Write tokens to B different pages from `offset` on.

        One kernel a plane; pages that lie side by side are one strided block,
        without an index.
        """
        new = sources[0].shape[3]
        first = pages[0]
        rows = len(pages)
        place: slice | list[int] = pages
        if pages == list(range(first, first + rows)):
            place = slice(first, first + rows)
        for plane, source in zip(self.planes, sources):
            target = plane.targets
            if new < self.page_size:
                target = target[:, :, :, offset : offset + new]
            if type(place) is list:
                target.index_copy_(1, torch.tensor(place, device=self.device), source)
            else:
                target[:, place].copy_(source)
        self._unwritten.append((pages, offset, new, positions))
        if len(self._unwritten) >= UNWRITTEN:
            self._write_positions()

    def write_slots(self, slots: Sequence[int], sources: Tensors, positions: Places) -> None:
        """Write tokens to B * n slots. One kernel a plane."""
        rows = sources[0].shape[1]
        new = sources[0].shape[3]
        pages, offsets = np.divmod(
            np.array(slots, dtype=np.int64).reshape(rows, new), self.page_size
        )
        first = (pages * self.page_rows * self.page_size + offsets)[None, :, None, :]
        for plane, source in zip(self.planes, sources):
            at = torch.from_numpy(first + plane.offsets[False]).to(self.device)
            plane.rows.index_put_((at,), source)
        self.positions[pages, offsets] = placed(positions, rows, new)

    def place(self, slots: Ints | list[int], positions: Ints | list[int]) -> None:
        """Note where the tokens in these slots were placed."""
        self.positions.reshape(-1)[slots] = positions

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (source, destination), all layers, in two kernels a plane."""
        pairs = np.array(copies, dtype=np.int64)
        source, target = torch.from_numpy(pairs.T.copy()).to(self.device).unbind(0)
        for plane in self.planes:
            plane.pages.index_copy_(0, target, plane.pages.index_select(0, source))
        self.positions[pairs[:, 1]] = self.positions[pairs[:, 0]]

    def hold(self, step: int, pages: Iterable[int]) -> None:
        """All pages are at hand, always."""

    # -- whole pages

    def export_pages(self, pages: Ints, kept: Mask, out: torch.Tensor) -> torch.Tensor:
        """Records of pages: those of each plane one behind the other. Pages that lie side by side
        are copied once, or not at all; others twice.
        """
        together = runs(pages)
        if len(together) == len(self.planes) == 1 and self._on_host and kept.all():
            return self.planes[0].bytes_of_pages()[together[0][0]]
        chosen = torch.from_numpy(pages).to(self.device)
        partial = np.flatnonzero(~kept.all(axis=1))
        for plane, target in zip(self.planes, self._by_plane(out)):
            source = plane.bytes_of_pages()
            if len(together) == 1:
                target.copy_(source[together[0][0]])
            else:
                target.copy_(source.index_select(0, chosen))
            if len(partial):
                rows = torch.from_numpy(partial)
                target[rows] = plane.blank(target[rows], torch.from_numpy(kept[partial]))
        return out

    def import_pages(self, pages: Ints, records: torch.Tensor) -> None:
        """Write records to pages. Runs of pages are one copy each."""
        for plane, source in zip(self.planes, self._by_plane(records)):
            target = plane.bytes_of_pages()
            for run, at in runs(pages):
                target[run] = source[at]

    def records_of(self, pages: Ints) -> Bytes | None:
        """Pages that lie side by side, on the host and in one plane."""
        together = runs(pages)
        if len(together) == len(self.planes) == 1 and self._on_host:
            return self.planes[0].bytes_of_pages()[together[0][0]].numpy()
        return None

    def _by_plane(self, records: torch.Tensor) -> Tensors:
        return torch.split(records, [plane.page_bytes for plane in self.planes], dim=1)

    # -- one layer

    def slot_index(self, slots: torch.Tensor) -> torch.Tensor:
        """Rows of tokens in the first part, or the first two, of a plane [N, layer_parts * heads].

        They are the same in every plane.
        """
        plane = self.planes[0]
        pages = slots.div(self.page_size, rounding_mode="floor")
        first = slots + pages * ((self.page_rows - 1) * self.page_size)
        heads = plane.layer_parts * plane.heads
        rows = torch.arange(0, heads * self.page_size, self.page_size, device=self.device)
        return first[:, None] + rows

    def write_tokens(
        self, layer: int, index: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Write new tokens of one layer. One kernel a plane."""
        self.write_layer(layer, index, layer_sources(self.form, keys, values))

    def write_layer(self, layer: int, index: torch.Tensor, sources: Tensors) -> None:
        """As `write_tokens`, from one source [N, parts of the layer * heads, size] a plane."""
        for plane, source in zip(self.planes, sources):
            plane.tokens_of(layer * plane.layer_parts).index_put_((index,), source)

    def layer_index(self, pages: Ints) -> torch.Tensor:
        """Row numbers of the keys of layer 0 [heads, n]: all else lies a fixed distance behind."""
        heads = np.arange(self.planes[0].heads, dtype=np.int64)[:, None]
        return torch.from_numpy(heads + pages * self.page_rows).to(self.device)

    def as_rows(self, memory: torch.Tensor) -> torch.Tensor:
        """Contiguous memory as pages of one head, in numbers as wide as may be."""
        return ordinary(lambda: wide(memory.view(-1, self.page_size * memory.shape[-1])))

    def read_keys(self, layer: int, index: torch.Tensor, rows: torch.Tensor) -> None:
        """Read pages of one layer."""
        plane = self.planes[0]
        torch.index_select(plane.rows_of(layer * plane.layer_parts), 0, index, out=rows)

    def read_values(self, layer: int, index: torch.Tensor, rows: torch.Tensor) -> None:
        """Read pages of one layer."""
        plane = self.planes[-1]
        torch.index_select(plane.rows_of((layer + 1) * plane.layer_parts - 1), 0, index, out=rows)

    def token_rows(self) -> torch.Tensor | None:
        """The rows of the only plane."""
        return self.planes[0].rows if len(self.planes) == 1 and self._on_host else None

    def layer_view(self, layer: int) -> Tensors:
        """Views of one layer."""
        return [plane.layer(layer) for plane in self.planes]


def planes_of(form: Form) -> list[Plane]:
    """A plane of zeros for each part of a form, with the null page alone."""
    layer_parts = 3 - len(form.parts)
    return ordinary(
        lambda: [
            Plane(*part, form.page_size, form.dtype, form.device, layer_parts)
            for part in form.parts
        ]
    )


def layer_sources(form: Form, keys: torch.Tensor, values: torch.Tensor) -> Tensors:
    """K and V [N, heads, size] of one layer, without a graph, as one source a part of the form."""
    sources = [keys.detach(), values.detach()]
    return sources if len(form.parts) == 2 else [torch.cat(sources, dim=1)]


def runs(pages: Ints) -> list[tuple[slice, slice]]:
    """Pages that lie side by side, and their places in the list."""
    ends = [*(np.flatnonzero(np.diff(pages) != 1) + 1).tolist(), len(pages)]
    found = []
    first = 0
    for end in ends:
        page = int(pages[first])
        found.append((slice(page, page + end - first), slice(first, end)))
        first = end
    return found


def placed(positions: Places, rows: int, new: int) -> Ints:
    """Positions [rows, new]."""
    if isinstance(positions, list):
        return np.array(positions, dtype=np.int64)[:, None] + np.arange(new)
    return np.broadcast_to(positions, (rows, new))
