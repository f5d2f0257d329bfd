"""Pages of int8 codes: a quarter of float32, half of bfloat16.

What is written is encoded as it is written; what is read is decoded while it is gathered or
attended. In between bytes are moved: a copy, a record, a page that others share hold the same codes
to the last bit, and nothing is encoded twice. Beside each plane of codes lies one of peaks, with a
number for each row of it. What codes and peaks are: `codes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from paged_kv.errors import UnfitForKernel
from paged_kv.pages.buffers import Form, Ints, Layout
from paged_kv.pages.change import Store
from paged_kv.pages.codes import CODES, PEAKS, decode, encoded
from paged_kv.pages.plane import Plane
from paged_kv.pages.storage import (
    Mask,
    PagePlanes,
    Places,
    Tensors,
    layer_sources,
    planes_of,
)

PIECE = 4 << 20  # bytes of float32 that are decoded at once on a CPU


class QuantisedPages:
    """Contents of the pages as codes with their peaks; see `Storage`."""

    layout = f"int8 codes, in {PagePlanes.layout}; peaks of bfloat16, likewise"

    def __init__(self, form: Form) -> None:
        self.form = form
        self._count = len(form.parts)
        peaks = form._replace(
            parts=[part._replace(head_size=1) for part in form.parts], dtype=PEAKS
        )
        planes = [*planes_of(form._replace(dtype=CODES)), *planes_of(peaks)]
        self._held = PagePlanes(form, planes)
        self.page_bytes = self._held.page_bytes

    @property
    def planes(self) -> list[Plane]:
        """Those of the codes, and behind them those of the peaks."""
        return self._held.planes

    # -- bytes, which are moved as they are

    @property
    def nbytes(self) -> int:
        """Bytes of the positions."""
        return self._held.nbytes

    def grow(self, pages: int) -> None:
        """Make room for `pages` pages."""
        self._held.grow(pages)

    def trimmed(self, pages: int) -> Sequence[Store]:
        """What makes it hold the first `pages` pages only, for a change to store."""
        return self._held.trimmed(pages)

    def place(self, slots: Ints | list[int], positions: Ints | list[int]) -> None:
        """Note where the tokens in these slots were placed."""
        self._held.place(slots, positions)

    def positions_at(self, slots: Ints) -> Ints:
        """Where the tokens in these slots were placed."""
        return self._held.positions_at(slots)

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (source, destination)."""
        self._held.copy_pages(copies)

    def hold(self, step: int, pages: Iterable[int]) -> None:
        """All pages are at hand, always."""

    def export_pages(self, pages: Ints, kept: Mask, out: torch.Tensor) -> torch.Tensor:
        """Records of pages: codes, and behind them peaks."""
        return self._held.export_pages(pages, kept, out)

    def import_pages(self, pages: Ints, records: torch.Tensor) -> None:
        """Write records to pages."""
        self._held.import_pages(pages, records)

    def records_of(self, pages: Ints) -> None:
        """None: codes and peaks lie apart."""

    # -- numbers in

    def write_pages(
        self, pages: list[int], offset: int, sources: Tensors, positions: Places
    ) -> None:
        """Write tokens to B different pages from `offset` on."""
        self._held.write_pages(pages, offset, _encoded(sources), positions)

    def write_slots(self, slots: Sequence[int], sources: Tensors, positions: Places) -> None:
        """Write tokens to B * n slots."""
        self._held.write_slots(slots, _encoded(sources), positions)

    def slot_index(self, slots: torch.Tensor) -> torch.Tensor:
        """What `write_tokens` writes to these slots by."""
        return self._held.slot_index(slots)

    def write_tokens(
        self, layer: int, index: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Write K and V [N, heads, size] of new tokens of one layer."""
        sources = _encoded(layer_sources(self.form, keys, values))
        self._held.write_layer(layer, index, sources)

    # -- numbers out

    def gather(self, index: Ints, layout: Layout) -> None:
        """Fill a dense batch. A few kernels a plane; on a CPU, for each piece that its caches
        hold.
        """
        paged = layout.paged
        planes = self._held.planes
        tokens = self.form.page_size if paged else 1
        for codes, peaks, rows, flat in zip(
            planes, planes[self._count :], self._held.rows(index, layout), layout.flat
        ):
            out = flat.view(self.form.dtype).view(-1, tokens, codes.head_size)
            _read(codes.sources[paged], peaks.sources[paged], rows, out)

    def layer_index(self, pages: Ints) -> torch.Tensor:
        """What K and V of these pages are read by, in every layer."""
        return self._held.layer_index(pages)

    def as_rows(self, memory: torch.Tensor) -> torch.Tensor:
        """Contiguous memory as pages of one head [n, page_size, size]."""
        return memory.view(-1, self.form.page_size, memory.shape[-1])

    def read_keys(self, layer: int, index: torch.Tensor, rows: torch.Tensor) -> None:
        """Read and decode pages of one layer."""
        part = layer * self._held.planes[0].layer_parts
        self._read_part(0, part, index, rows)

    def read_values(self, layer: int, index: torch.Tensor, rows: torch.Tensor) -> None:
        """Read and decode pages of one layer."""
        part = (layer + 1) * self._held.planes[0].layer_parts - 1
        self._read_part(self._count - 1, part, index, rows)

    def _read_part(self, plane: int, part: int, index: torch.Tensor, out: torch.Tensor) -> None:
        planes = self._held.planes
        codes = planes[plane].rows_of(part)
        _read(codes, planes[self._count + plane].rows_of(part), index, out)

    def token_rows(self) -> None:
        """None: they are codes."""

    def layer_view(self, layer: int) -> Tensors:
        """Raises UnfitForKernel: there are no numbers to look at."""
        kernel = "a kernel that reads pages in place"
        raise UnfitForKernel(kernel, "they hold int8 codes", 'a cache with storage="exact"')


def _encoded(sources: Tensors) -> Tensors:
    """Codes of the sources, and behind them peaks."""
    found = [encoded(source) for source in sources]
    return [each.codes for each in found] + [each.peaks for each in found]


def _read(codes: torch.Tensor, peaks: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
    """Decode rows of codes, in numbers as wide as may be, to `out` [n, tokens, size]."""
    if out.device.type == "cpu":
        _read_in_pieces(codes, peaks, rows, out)
        return
    decode(
        codes.index_select(0, rows).view(CODES).view(out.shape),
        peaks.index_select(0, rows).view(PEAKS).view(*out.shape[:2], 1),
        out,
    )


def _read_in_pieces(
    codes: torch.Tensor, peaks: torch.Tensor, rows: torch.Tensor, out: torch.Tensor
) -> None:
    """As `_read`, with memory for one piece, which its caches hold."""
    count, tokens, size = out.shape
    step = max(1, min(count, PIECE // (4 * tokens * size)))
    some_codes = codes.new_empty(step, codes.shape[1])
    some_peaks = peaks.new_empty(step, peaks.shape[1])
    work = None if out.dtype == torch.float32 else torch.empty(step, tokens, size)
    for first in range(0, count, step):
        piece = rows[first : first + step]
        now = len(piece)
        decode(
            torch.index_select(codes, 0, piece, out=some_codes[:now])
            .view(CODES)
            .view(now, tokens, size),
            torch.index_select(peaks, 0, piece, out=some_peaks[:now])
            .view(PEAKS)
            .view(now, tokens, 1),
            out[first : first + step],
            work if work is None else work[:now],
        )
