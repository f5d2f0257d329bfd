"""The pages of one cache: their books, their memory, and the buffers that steps work on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from paged_kv.checks import Counts
from paged_kv.errors import OutOfPages
from paged_kv.pages.allocator import PageAllocator
from paged_kv.pages.block_tables import BlockTables
from paged_kv.pages.buffers import Buffer, Buffers, Ints, Layout
from paged_kv.pages.change import Store
from paged_kv.pages.open_steps import OpenSteps
from paged_kv.pages.plan import Plan
from paged_kv.pages.records import Record
from paged_kv.pages.storage import Places, Storage
from paged_kv.pages.tiers.contract import Tiers
from paged_kv.pages.tiers.storage import TieredStorage

Mask = npt.NDArray[np.bool_]


class Reclaimer(Protocol):
    """Who gives pages back when the pool is full and cannot grow: an index or a manager."""

    def reclaim(self, need: int, busy: Collection[int]) -> bool:
        """Free at least `need` pages, never of sequences in `busy`, or change nothing and return
        False.

        `busy` are about to be continued. A last page of theirs that would have to be copied, but
        that nobody else holds once the others have gone, may count as freed.
        It is called between two verbs, and may call any. What it freed stays free where the verb
        that asked fails after all.
        """

    def pinned_pages(self) -> int:
        """Pages that pins keep from being given back."""


class Pool:
    """Pages with their contents, in the words of whoever plans and writes tokens.

    What a method writes goes to slots that no record reads, so that one which fails has changed
    nothing.
    """

    def __init__(
        self,
        storage: Storage,
        num_pages: int,
        max_pages: int | None,
        tiers: Tiers | None = None,
    ) -> None:
        self.pages = PageAllocator(num_pages, max_pages=max_pages)
        self.tables = BlockTables(self.pages, storage.form.page_size)
        self.books = self.tables.books
        self.tiers = None if tiers is None else TieredStorage(storage, self.books, tiers)
        self.storage: Storage = storage if self.tiers is None else self.tiers
        self.steps = OpenSteps(self.tables)
        self.buffers = Buffers(storage.form)
        self.scratch = Buffer(storage.form)  # of gathers that may overwrite each other
        self.reclaimer: Callable[[], Reclaimer | None] | None = None
        parts = storage.form.parts
        self.layers = parts[0].parts // (2 if len(parts) == 1 else 1)
        self.storage.grow(num_pages)

    # -- room

    def plan(self, seqs: list[int], count: Counts, *, fork: bool = False) -> Plan:
        """A plan that the free pages can carry: grows where that may be, or raises OutOfPages."""
        plan = self.tables.plan(seqs, count, fork=fork)
        if plan.fresh > self.pages.free_count:
            self.grow_for(plan.fresh)
            plan = self.tables.plan(seqs, count, fork=fork)
        return plan

    def plan_step(self, seqs: list[int], records: list[Record], rooms: list[int]) -> Plan:
        """As `plan`, of the children of a step."""
        plan = self.steps.plan(seqs, records, rooms)
        if plan.fresh > self.pages.free_count:
            self.grow_for(plan.fresh)
            plan = self.steps.plan(seqs, records, rooms)
        return plan

    def grow_for(self, need: int) -> None:
        """Let `need` pages be free. Raises OutOfPages."""
        pages = self.pages
        if need - pages.free_count > pages.growable:
            raise OutOfPages(need, pages.free_count, pending=self.books.pending_pages)
        size = pages.growth_for(need)
        self.storage.grow(size)
        self.books.grow(size)

    def fresh_pages(self, count: int) -> list[int]:
        """The pages that are taken next, which stay free; grows where that may be, or raises
        OutOfPages.
        """
        if count > self.pages.free_count:
            self.grow_for(count)
        return sorted(self.pages.peek(count))

    def reclaim(self, full: OutOfPages, busy: Collection[int]) -> None:
        """Have as many pages freed as growth cannot give, or raise OutOfPages.

        Called between two tries of a verb, so that a reclaimer may call any verb itself.
        """
        reclaimer = None if self.reclaimer is None else self.reclaimer()
        if reclaimer is None:
            raise full
        short = full.requested - full.free - self.pages.growable
        if not reclaimer.reclaim(short, frozenset(busy)):
            pinned = reclaimer.pinned_pages()
            raise OutOfPages(full.requested, full.free, pinned, full.pending) from None

    def trim(self) -> None:
        """Keep memory for the pages in use only, which move to the front; drop unused buffers."""
        pages = self.pages
        self.buffers.trim(self.books.pending)
        self.scratch = Buffer(self.storage.form)
        size = max(pages.used_count, 1)
        if size == pages.capacity:
            return
        high = [page for page in range(size + 1, pages.capacity + 1) if pages.refs[page]]
        low = [page for page in range(1, size + 1) if not pages.refs[page]]
        names = dict(zip(high, low))
        if names:
            self.storage.copy_pages(list(names.items()))
        stores = [*self.storage.trimmed(size), Store(pages, "capacity", size)]
        self.books.rename(names, stores)

    # -- contents

    def write(self, plan: Plan, sources: Sequence[torch.Tensor], positions: Places) -> None:
        """Write the tokens of a plan [parts, B, heads, n, head_size], one source a plane."""
        if not any(plan.counts):
            return
        # else they come token by token
        pages = plan.row_pages() if sources[0].shape[1] == len(plan.seqs) else None
        if pages is None:
            self.storage.write_slots(plan.slots, sources, positions)
        else:
            self.storage.write_pages(*pages, sources, positions)

    def sources(self, keys: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
        """K and V [layers, ...] as one tensor a plane: K0, V0, K1, V1, ... where one has both."""
        keys = keys.detach()  # the pool must not hold the graph of what made the tokens
        values = values.detach()
        if len(self.storage.form.parts) == 2:
            return [keys, values]
        return [torch.stack((keys, values), dim=1).flatten(0, 1)]

    def read(
        self, records: list[Record], room: int, buffer: Buffer, *, left: bool, alike: bool
    ) -> Layout:
        """Windows as a dense batch with room behind them, in one kernel.

        Windows that end at one offset of their pages are gathered by pages, padded in front with
        the null page; so are those that are all `alike`.
        """
        if not alike:
            return self._read_mixed(records, room, buffer, left)
        _, start, past, *_ = records[0]
        layout = buffer.layout((len(records), past, room, start))
        self.storage.gather(_index([record[0] for record in records], layout), layout)
        if room and not layout.on_edge:
            layout.blank_room()
        return layout

    def _read_mixed(self, records: list[Record], room: int, buffer: Buffer, left: bool) -> Layout:
        """Windows that differ."""
        size = self.storage.form.page_size
        batch = len(records)
        if not left or len({(record[1] + record[2]) % size for record in records}) != 1:
            slots = self.slots(records, left=left)
            layout = buffer.layout((batch, slots.shape[1], room, None))
            self.storage.gather(slots[:, None], layout)
            return layout
        past = max([record[2] for record in records])
        start = (records[0][1] + records[0][2] - past) % size
        width = -((start + past) // -size) if past else 0
        layout = buffer.layout((batch, past, room, start))
        tables = [(0,) * (width - len(record[0])) + record[0] for record in records]
        self.storage.gather(_index(tables, layout), layout)
        layout.blank([(record[1], record[2]) for record in records])
        if room and not layout.on_edge:
            layout.blank_room()
        return layout

    def slots(self, records: list[Record], *, left: bool) -> Ints:
        """The slot of every token of the windows [B, longest]; 0, in the null page, in padding."""
        size = self.storage.form.page_size
        batch = len(records)
        most = max([len(record[0]) for record in records], default=0)
        if not most:
            return np.zeros((batch, 0), dtype=np.int64)
        longest = max([record[2] for record in records])
        tables = [record[0] + (0,) * (most - len(record[0])) for record in records]
        pages = np.array(tables, dtype=np.int64)
        slots = (pages[:, :, None] * size + np.arange(size)).reshape(batch, -1)
        starts = np.array([record[1] for record in records])[:, None]
        counts = np.array([record[2] for record in records])[:, None]
        # each row's own count of its tokens
        column = np.arange(longest) - (longest - counts if left else 0)
        inside = (column >= 0) & (column < counts)
        taken = np.take_along_axis(slots, np.where(inside, column + starts, 0), axis=1)
        return np.where(inside, taken, 0)

    def positions(self, records: list[Record], *, left: bool) -> tuple[Ints, Mask]:
        """Where each token of the windows was placed, 0 in padding; and which columns are tokens.

        Both [B, longest].
        """
        slots = self.slots(records, left=left)
        kept = slots >= self.storage.form.page_size
        return np.where(kept, self.storage.positions_at(slots), 0), kept

    def position_of(self, slot: int) -> int:
        """Where the token in a slot was placed."""
        return int(self.storage.positions_at(np.array([slot]))[0])

    @property
    def working_bytes(self) -> int:
        """Bytes held beside the pages: buffers, row numbers, positions."""
        return self.buffers.nbytes + self.scratch.nbytes + self.storage.nbytes


def _index(tables: list[tuple[int, ...]], layout: Layout) -> Ints:
    """The pages of windows that are gathered by pages [B, 1, pages of each]."""
    pages = list(chain.from_iterable(tables))
    return np.array(pages, np.int64).reshape(len(tables), 1, layout.filled)
