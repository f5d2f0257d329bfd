"""A storage with fewer frames than pages: tables hold names of pages, and this knows where they
are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NoReturn

import numpy as np
import torch

from paged_kv.bundles.bundle import Source
from paged_kv.errors import UnfitForKernel
from paged_kv.pages.books import Books
from paged_kv.pages.buffers import Layout
from paged_kv.pages.change import Store
from paged_kv.pages.storage import Mask, Places, Storage, Tensors, placed
from paged_kv.pages.tiers.contract import Ints, Tiers
from paged_kv.pages.tiers.figures import Flow
from paged_kv.pages.tiers.frames import NOWHERE, SOURCES
from paged_kv.pages.tiers.moving import Lent, Mover
from paged_kv.stats import TierStats


class TieredStorage:
    """A `Storage` that holds another one, of so many frames, and a place for all other pages.

    Each call brings the pages that it names into frames, all of them before anything is done, and
    then has the frames read or written. It raises OutOfFrames where there are too few, TierFailed
    where the place fails. Calls follow on each other: none is made inside another one.
    """

    def __init__(self, hot: Storage, books: Books, tiers: Tiers) -> None:
        self.form = hot.form
        self.page_bytes = hot.page_bytes
        self.layout = hot.layout
        self.hot = hot
        self._most = tiers.frames
        books.pages.gone = []
        self._mover = Mover(hot, books, tiers)

    # -- size

    @property
    def nbytes(self) -> int:
        """See `Storage`."""
        return self.hot.nbytes + self._mover.nbytes

    def _frames_for(self, pages: int) -> int:
        return pages if self._most is None else min(self._most, pages)

    def grow(self, pages: int) -> None:
        """See `Storage`. Frames are made up to their number."""
        mover = self._mover
        count = max(self._frames_for(pages), mover.frames.count)
        frames = mover.frames.resized(pages, count)
        positions = self._resized(pages)
        if count > mover.frames.count:
            self.hot.grow(count)
        mover.positions = positions
        mover.frames = frames

    def trimmed(self, pages: int) -> Sequence[Store]:
        """See `Storage`. Frames beyond the last one that is in use go."""
        mover = self._mover
        mover.catch_up()
        mover.trim()
        old = mover.frames
        kept = old.seats(np.arange(1, pages + 1))
        count = max(self._frames_for(pages), int(kept.max(initial=1)))
        stores = [
            Store(mover, "frames", old.resized(pages, min(count, old.count))),
            Store(mover, "positions", self._resized(pages)),
            Store(mover, "beyond", np.arange(pages + 1, len(old.place))),
        ]
        return [*stores, *self.hot.trimmed(count)] if count < old.count else stores

    def _resized(self, pages: int) -> Ints:
        positions = np.zeros((pages + 1, self.form.page_size), dtype=np.int64)
        kept = self._mover.positions[: len(positions)]
        positions[: len(kept)] = kept
        return positions

    def figures(self) -> list[TierStats]:
        """What lies where, and what moved."""
        mover = self._mover
        cold = mover.cold
        size = self.page_bytes
        filled = mover.frames.filled
        found = [
            TierStats("frames", filled, filled * size, hits=mover.hits, demotions=mover.demotions)
        ]
        if cold is not None:
            found.append(_stats(cold.name, len(cold), cold.nbytes, mover.flows["cold"], size))
        if mover.sources:
            lazy = int(np.count_nonzero(mover.frames.home >= SOURCES))
            found.append(_stats("snapshot", lazy, lazy * size, mover.flows["sources"], size))
        return found

    # -- frames of pages

    def _seats(self, pages: Ints) -> Ints:
        """The frames of pages of any shape, brought there if need be; 0 for the null page."""
        self._mover.bring(np.unique(pages))
        found: Ints = self._mover.frames.place[pages]
        return found

    def _seats_to_write(self, pages: Ints) -> Ints:
        """As `_seats`; and what else is known of their contents is out of date."""
        found = self._seats(pages)
        self._mover.frames.home[pages] = NOWHERE
        return found

    def hold(self, step: int, pages: Iterable[int]) -> None:
        """See `Storage`."""
        names = np.unique(np.fromiter(pages, np.int64))
        self._mover.bring(names)
        self._mover.held[step] = names

    def prefetch(self, pages: Iterable[int]) -> int:
        """Bring as many of these pages into frames as there are frames for, the first ones; returns
        how many were not there. Raises as `gather`.
        """
        mover = self._mover
        mover.catch_up()
        names = np.array(list(dict.fromkeys(pages))[: mover.room()], dtype=np.int64)
        missing = len(mover.frames.missing(names))
        mover.bring(names)
        return missing

    # -- tokens

    def gather(self, index: Ints, layout: Layout) -> None:
        """See `Storage`."""
        if layout.paged:
            index[:] = self._seats(index)
        else:
            index[:] = self._slots(index)
        self.hot.gather(index, layout)

    def _slots(self, slots: Ints) -> Ints:
        size = self.form.page_size
        pages = slots // size
        return slots + (self._seats(pages) - pages) * size

    def _slots_to_write(self, slots: Ints) -> Ints:
        size = self.form.page_size
        pages = slots // size
        return slots + (self._seats_to_write(pages) - pages) * size

    def write_pages(
        self, pages: list[int], offset: int, sources: Tensors, positions: Places
    ) -> None:
        """See `Storage`."""
        names = np.array(pages, dtype=np.int64)
        seats = self._seats_to_write(names)
        self.hot.write_pages(seats.tolist(), offset, sources, positions)
        new = sources[0].shape[3]
        where = self._mover.positions[:, offset : offset + new]
        where[names] = placed(positions, len(pages), new)

    def write_slots(self, slots: Sequence[int], sources: Tensors, positions: Places) -> None:
        """See `Storage`."""
        names = np.array(slots, dtype=np.int64)
        seats = self._slots_to_write(names)
        self.hot.write_slots(seats.tolist(), sources, positions)
        rows = sources[0].shape[1]
        new = sources[0].shape[3]
        self._mover.positions.reshape(-1)[names] = placed(positions, rows, new).reshape(-1)

    def place(self, slots: Ints | list[int], positions: Ints | list[int]) -> None:
        """See `Storage`."""
        self._mover.positions.reshape(-1)[slots] = positions

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """See `Storage`: as many at a time as there are frames for."""
        pairs = np.array(copies, dtype=np.int64)
        mover = self._mover
        for part in mover.pieces(pairs, each=2):
            sources, targets = pairs[part].T
            mover.bring(np.unique(pairs[part]))
            mover.frames.home[targets] = NOWHERE
            seats = mover.frames.place[pairs[part]]
            self.hot.copy_pages([(source, target) for source, target in seats.tolist()])
            mover.positions[targets] = mover.positions[sources]

    def positions_at(self, slots: Ints) -> Ints:
        """See `Storage`. Pages of a source that nobody has read yet are."""
        mover = self._mover
        mover.catch_up()
        if mover.sources:
            pages = np.unique(slots // self.form.page_size)
            unknown = pages[~mover.frames.placed[pages]]
            for part in mover.pieces(unknown):
                mover.bring(unknown[part])
        return mover.positions.reshape(-1)[slots]

    # -- whole pages

    def export_pages(self, pages: Ints, kept: Mask, out: torch.Tensor) -> torch.Tensor:
        """See `Storage`: as many at a time as there are frames for."""
        for part in self._mover.pieces(pages):
            seats = self._seats(pages[part])
            records = self.hot.export_pages(seats, kept[part], out[part])
            if records.data_ptr() != out[part].data_ptr():
                out[part].copy_(records)
        return out

    def import_pages(self, pages: Ints, records: torch.Tensor) -> None:
        """See `Storage`: as many at a time as there are frames for."""
        for part in self._mover.pieces(pages):
            self.hot.import_pages(self._seats_to_write(pages[part]), records[part])

    def records_of(self, pages: Ints) -> None:
        """None: they may go to frames in pieces."""

    def import_later(self, pages: Ints, source: Source) -> Store:
        """What lets these pages, which nobody reads, be the pages 0, 1, ... of a source, which are
        read and checked as they are used: for a change to store.
        """
        self._mover.catch_up()
        return Store(self._mover, "lent", Lent(pages, source))

    def catch_up(self) -> None:
        """Learn what became of pages since the last call, as each call does first."""
        self._mover.catch_up()

    # -- one layer

    def slot_index(self, slots: torch.Tensor) -> torch.Tensor:
        """See `Storage`. A step that writes by it holds the pages."""
        seats = self._slots_to_write(slots.cpu().numpy())
        return self.hot.slot_index(torch.from_numpy(seats).to(slots.device))

    def write_tokens(
        self, layer: int, index: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """See `Storage`."""
        self.hot.write_tokens(layer, index, keys, values)

    def layer_index(self, pages: Ints) -> torch.Tensor:
        """See `Storage`. A step that reads by it holds the pages."""
        return self.hot.layer_index(self._seats(pages))

    def as_rows(self, memory: torch.Tensor) -> torch.Tensor:
        """See `Storage`."""
        return self.hot.as_rows(memory)

    def read_keys(self, layer: int, index: torch.Tensor, rows: torch.Tensor) -> None:
        """See `Storage`."""
        self.hot.read_keys(layer, index, rows)

    def read_values(self, layer: int, index: torch.Tensor, rows: torch.Tensor) -> None:
        """See `Storage`."""
        self.hot.read_values(layer, index, rows)

    def token_rows(self) -> None:
        """None: pages move between tiers."""

    def layer_view(self, layer: int) -> NoReturn:
        """Raises UnfitForKernel: tables of pages would name frames of others."""
        raise UnfitForKernel(
            "a kernel of others", "pages move between tiers", "a cache without tiers"
        )


def _stats(name: str, pages: int, nbytes: int, flow: Flow, size: int) -> TierStats:
    return TierStats(
        name,
        pages,
        nbytes,
        hits=flow.read,
        read=flow.read,
        written=flow.written,
        bytes_read=flow.read * size,
        bytes_written=flow.written * size,
        seconds_read=flow.seconds_read,
        seconds_written=flow.seconds_written,
    )
