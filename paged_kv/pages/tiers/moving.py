"""Pages move between frames and the places for cold ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch

from paged_kv.bundles.bundle import BATCH, Source, check_chunk
from paged_kv.errors import BadArgument, OutOfFrames
from paged_kv.pages.books import Books
from paged_kv.pages.storage import Storage
from paged_kv.pages.tiers.contract import Candidates, Ints, Tiers
from paged_kv.pages.tiers.figures import Flow
from paged_kv.pages.tiers.frames import COLD, NOWHERE, SOURCES, Frames

SPARE = 16  # one in so many frames is freed at least, where one is: so that writes are batches


class Lent(NamedTuple):
    """Pages that are 0, 1, ... of a source, which are read from it as they are used."""

    pages: Ints
    source: Source


class Mover:
    """Brings pages into frames of the hot storage, and gives up others for it.

    A page whose contents are in `cold` or in a source as well is given up without a write. What
    raises or is interrupted leaves every page where its contents are: one that could not be written
    stays in its frame, one that could not be read stays where it was.
    """

    def __init__(self, hot: Storage, books: Books, tiers: Tiers) -> None:
        self.hot = hot
        self.frames = Frames(0, 0)
        self.positions: Ints = np.zeros((1, hot.form.page_size), dtype=np.int64)  # by page
        self.hits = 0  # pages that were asked for and in a frame
        self.demotions = 0  # pages that were given up
        self.flows = {"cold": Flow(), "sources": Flow()}
        self.sources: list[Source | None] = []
        self.held: dict[int, Ints] = {}  # pages, by the number of the open step that needs them
        self.beyond: Ints = np.zeros(0, dtype=np.int64)  # pages that went when the pool was trimmed
        self.lent: Lent | None = None  # what was adopted since
        self._books = books
        self.cold = None if callable(tiers.cold) else tiers.cold
        self._policy = tiers.policy
        self._memory = torch.empty(0, dtype=torch.uint8)
        if self.cold is not None:
            self.cold.begin(hot.page_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of tables, positions, and memory that is used again."""
        return self.frames.nbytes + self.positions.nbytes + self._memory.nbytes

    def trim(self) -> None:
        """Give back memory, and let go of sources that no page is read from any more."""
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._let_sources_go()

    def _let_sources_go(self) -> None:
        """Those that no page is read from any more. Cost: O(pages)."""
        used = np.bincount(self.frames.home, minlength=len(self.sources) + SOURCES)
        for number, pages in enumerate(used[SOURCES:].tolist()):
            if not pages:
                self.sources[number] = None

    # -- what a caller asks for

    def catch_up(self) -> None:
        """Pages that became free since hold nothing any more; those that were lent have a source.

        Each part may be done again by whoever comes after an interrupt.
        """
        if len(self.beyond):
            if self.cold is not None:
                self.cold.drop(self.beyond)
            self.beyond = self.beyond[:0]
        if self.lent is not None:
            self._take_in(self.lent)
            self.lent = None
        gone = self._books.pages.gone
        if not gone:
            return
        count = len(gone)
        freed = np.unique(np.array(gone[:count], dtype=np.int64))
        known = freed[freed < len(self.frames.place)]
        lazy = bool((self.frames.home[known] >= SOURCES).any())
        self.frames.forget(known)
        if self.cold is not None:
            self.cold.drop(freed)
        if lazy:
            self._let_sources_go()
        del gone[:count]  # last: whoever is interrupted does it again

    def _take_in(self, lent: Lent) -> None:
        frames = self.frames
        frames.forget(lent.pages)
        self.sources.append(lent.source)
        frames.placed[lent.pages] = False
        frames.number[lent.pages] = np.arange(len(lent.pages))
        frames.home[lent.pages] = len(self.sources) - 1 + SOURCES
        self._let_sources_go()

    def bring(self, pages: Ints) -> None:
        """Have these pages, each once, in frames. Raises OutOfFrames, TierFailed, and what a source
        raises that cannot be read.
        """
        self.catch_up()
        frames = self.frames
        missing = frames.missing(pages)
        if len(missing):
            self._make_room(pages, len(missing))
            seats = frames.free()[: len(missing)]
            self._read(missing, seats)
            frames.seat(missing, seats)
        frames.touch(pages)
        self.hits += int(np.count_nonzero(pages)) - len(missing)

    def room(self) -> int:
        """Frames that no open step keeps."""
        return self.frames.count - len(self._held())

    def pieces(self, pages: Ints, each: int = 1) -> Iterator[slice]:
        """Parts of a list of pages that can be in frames at once, if each needs so many."""
        most = max(1, self.room() // each)
        for first in range(0, len(pages), most):
            yield slice(first, first + most)

    # -- frames are given up

    def _held(self) -> Ints:
        """Frames that open steps keep."""
        pending = self._books.pending
        self.held = {step: pages for step, pages in self.held.items() if step in pending}
        if not self.held:
            return np.zeros(0, dtype=np.int64)
        return np.unique(self.frames.seats(np.concatenate(list(self.held.values()))))

    def _make_room(self, wanted: Ints, need: int) -> None:
        """Let `need` frames be free beside those of the pages that are wanted."""
        frames = self.frames
        short = need - (frames.count - frames.filled)
        if short <= 0:
            return
        spare = frames.pages > 0
        spare[frames.seats(wanted)] = False
        others = np.flatnonzero(spare)
        spare[self._held()] = False
        chosen = np.flatnonzero(spare)
        if short > len(chosen):
            kept = len(others) - len(chosen)
            raise OutOfFrames(int(np.count_nonzero(wanted)), frames.count - kept, kept)
        count = min(len(chosen), max(short, frames.count // SPARE))
        self._give_up(self._first(chosen, count))

    def _first(self, chosen: Ints, count: int) -> Ints:
        """The frames that the policy gives up first."""
        if count == len(chosen):
            return chosen
        pages = self.frames.pages[chosen]
        refs = self._books.pages.refs
        shares = np.array([refs[page] for page in pages.tolist()], dtype=np.int64)
        pinned = np.isin(pages, self._pinned())
        found = self._policy.order(Candidates(pages, self.frames.used[chosen], shares, pinned))
        order = _numbers(found)[:count]
        if len(np.intersect1d(order, np.arange(len(chosen)))) != count:
            allowed = f"the numbers 0 to {len(chosen) - 1} in some order"
            raise BadArgument("what the policy of tiers returned", found, allowed)
        first: Ints = chosen[order]
        return first

    def _pinned(self) -> list[int]:
        """Pages of entries with pins. Cost: O(entries)."""
        entries = [entry for entry in self._books.owned.values() if entry.pins]
        return [page for entry in entries for page in entry.pages]

    def _give_up(self, chosen: Ints) -> None:
        """Write what is nowhere else, then let the frames be free."""
        frames = self.frames
        pages = frames.pages[chosen]
        dirty = frames.home[pages] == NOWHERE
        self._write(pages[dirty], chosen[dirty])
        frames.clear(chosen)
        self.demotions += len(chosen)

    def _write(self, pages: Ints, seats: Ints) -> None:
        """Keep the contents of these frames in the cold tier."""
        cold = self.cold
        assert cold is not None or not len(pages), "there are frames for all"
        flow = self.flows["cold"]
        for part in self._batches(len(pages)):
            begin = perf_counter()
            whole = np.ones((len(pages[part]), self.hot.form.page_size), dtype=np.bool_)
            records = self.hot.export_pages(seats[part], whole, self._room_for(len(whole)))
            if cold is not None:
                cold.put(pages[part], records)
            self.frames.home[pages[part]] = COLD
            flow.written += len(whole)
            flow.seconds_written += perf_counter() - begin

    # -- pages are read

    def _read(self, pages: Ints, seats: Ints) -> None:
        """Fill frames with the contents of pages, those that have any."""
        homes = self.frames.home[pages]
        for home in np.unique(homes[homes != NOWHERE]).tolist():
            there = homes == home
            flow = self.flows["cold" if home == COLD else "sources"]
            for part in self._batches(int(there.sum())):
                begin = perf_counter()
                names = pages[there][part]
                if home == COLD:
                    self._read_cold(names, seats[there][part])
                else:
                    self._read_source(home - SOURCES, names, seats[there][part])
                flow.read += len(names)
                flow.seconds_read += perf_counter() - begin

    def _read_cold(self, pages: Ints, seats: Ints) -> None:
        assert self.cold is not None, "else no page is there"
        out = self._room_for(len(pages))
        self.cold.get(pages, out)
        self.hot.import_pages(seats, out)

    def _read_source(self, number: int, pages: Ints, seats: Ints) -> None:
        """Their positions come along, and are known from then on."""
        source = self.sources[number]
        assert source is not None, "pages are read from it"
        numbers = self.frames.number[pages]
        order = np.argsort(numbers)
        chunk = source.read(numbers[order])
        check_chunk(len(pages), self.hot.page_bytes, self.hot.form.page_size, *chunk)
        self.hot.import_pages(seats[order], torch.from_numpy(chunk.records))
        self.positions[pages[order]] = chunk.positions
        self.frames.placed[pages] = True

    def _batches(self, count: int) -> Iterable[slice]:
        most = max(1, BATCH // self.hot.page_bytes)
        return [slice(first, first + most) for first in range(0, count, most)]

    def _room_for(self, count: int) -> torch.Tensor:
        """Memory of the host for so many records, which is used again."""
        size = count * self.hot.page_bytes
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        return self._memory[:size].view(count, self.hot.page_bytes)


def _numbers(found: object) -> Ints:
    """What a caller's policy returned as numbers [n]; none where it is anything else."""
    with suppress(TypeError, ValueError):
        numbers = np.asarray(found)
        if numbers.ndim == 1 and numbers.dtype.kind in "iu":
            return numbers
    return np.zeros(0, dtype=np.int64)
