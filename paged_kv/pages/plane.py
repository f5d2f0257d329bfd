"""One tensor of the pool, and the views of it that are made once."""

from __future__ import annotations

from copy import copy

import numpy as np
import torch

from paged_kv.pages.buffers import Ints, ordinary, wide


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
        layer_parts: int,
    ) -> None:
        self.parts = parts
        self.layer_parts = layer_parts  # of one layer: K and V, or one of them
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
        self.hold(torch.zeros(self.page_rows * page_size, head_size, dtype=dtype, device=device))

    def hold(self, rows: torch.Tensor) -> None:
        """Use these rows [pages * parts * heads * page_size, head_size]; views of them are made
        once.
        """
        self.rows = rows
        self.pages = rows.view(-1, self.parts, self.heads, self.page_size, self.head_size)
        # as a batch lies: [parts, pages, heads, page_size, head_size]
        self.targets = self.pages.transpose(0, 1)
        self.sources = wide(rows), wide(rows.view(-1, self.page_size * self.head_size))
        self._rows_of: dict[int, torch.Tensor] = {}
        self._tokens_of: dict[int, torch.Tensor] = {}

    def layer(self, layer: int) -> torch.Tensor:
        """The parts of one layer [pages, layer_parts, heads, page_size, head_size], as a view."""
        first = layer * self.layer_parts
        return self.pages[:, first : first + self.layer_parts]

    def rows_of(self, part: int) -> torch.Tensor:
        """All page rows from the first one of a part on: what has a number among those of part 0
        has it among these.
        """
        rows = self._rows_of.get(part)
        if rows is None:
            rows = ordinary(lambda: self.sources[True][part * self.heads :])
            self._rows_of[part] = rows
        return rows

    def tokens_of(self, part: int) -> torch.Tensor:
        """As `rows_of`, all rows of tokens."""
        rows = self._tokens_of.get(part)
        if rows is None:
            rows = ordinary(lambda: self.rows[part * self.heads * self.page_size :])
            self._tokens_of[part] = rows
        return rows

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.page_rows * self.page_size * self.head_size * self.rows.element_size()

    def bytes_of_pages(self) -> torch.Tensor:
        """All of it as bytes [pages, bytes of a page], as a view."""
        return self.rows.view(-1, self.page_rows * self.page_size * self.head_size).view(
            torch.uint8
        )

    def blank(self, records: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Bytes of pages [n, bytes of a page] with zeros in all slots but the `kept`
        [n, page_size].
        """
        tokens = records.reshape(len(kept), self.page_rows, self.page_size, -1)
        return (tokens * kept[:, None, :, None]).view(len(kept), -1)

    def resized(self, pages: int) -> Plane:
        """A plane with the same contents and room for `pages` pages beside the null page.

        Where that is less than before, the last pages are left out.
        """
        plane = copy(self)
        rows = self.rows.new_empty((pages + 1) * self.page_rows * self.page_size, self.head_size)
        kept = self.rows[: len(rows)]
        rows[: len(kept)] = kept
        plane.hold(rows)
        return plane
