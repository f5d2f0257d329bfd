"""Pages: who holds how many references, and which ones are free. Plain python, no tensors.

Lists of small integers beat numpy rows at the batch sizes of a tree search (8 rows); see
docs/design.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from paged_kv.checks import whole
from paged_kv.errors import CorruptCache

MANY = 32  # freed pages that are worth a sort


class PageAllocator:
    """Reference counts and the free stack of a pool that grows by doubling.

    Page 0 is the null page: never handed out, never counted. Usable pages are 1..capacity.

    >>> pages = PageAllocator(2, max_pages=4)
    >>> pages.peek(2)
    [1, 2]
    >>> pages.take(2)
    >>> pages.growth_for(1), pages.free_count
    (4, 0)
    """

    __slots__ = (
        "capacity",
        "fill",
        "free",
        "gone",
        "growths",
        "max_pages",
        "peak",
        "refs",
        "unsorted",
    )

    def __init__(self, num_pages: int, *, max_pages: int | None) -> None:
        self.capacity = whole("num_pages", num_pages, 1)
        self.max_pages = None if max_pages is None else whole("max_pages", max_pages, num_pages)
        self.growths = 0
        self.peak = 0  # pages that were in use at once
        self.refs = [0] * (num_pages + 1)
        self.fill = [0] * (num_pages + 1)  # where the first free slot of a last page is
        self.free = list(range(num_pages, 0, -1))  # a stack: the lowest page is taken first
        self.unsorted = 0  # pages that came back since the stack was sorted
        self.gone: list[int] | None = None  # those that came back, for who looks there and cares

    @property
    def free_count(self) -> int:
        """Pages nobody references."""
        return len(self.free)

    @property
    def used_count(self) -> int:
        """Pages that at least one block table references."""
        return self.capacity - len(self.free)

    @property
    def growable(self) -> int:
        """Pages that growth may still add."""
        return sys.maxsize if self.max_pages is None else self.max_pages - self.capacity

    def growth_for(self, need: int) -> int:
        """Capacity after the doublings that make `need` pages free, or the limit where that is
        less.
        """
        wanted = self.capacity + need - len(self.free)
        size = self.capacity
        while size < wanted:
            size *= 2
        return size if self.max_pages is None else min(size, self.max_pages)

    def grow(self, capacity: int) -> None:
        """Add the pages up to `capacity` below the free stack, so that old pages are reused first.

        Whoever is interrupted in here has `rebuild` called before the next verb.
        """
        self.free[:0] = range(capacity, self.capacity, -1)
        self.refs.extend([0] * (capacity - self.capacity))
        self.fill.extend([0] * (capacity - self.capacity))
        self.growths += 1
        self.capacity = capacity

    def rebuild(self, tables: Iterable[tuple[Sequence[int], int]], page_size: int) -> None:
        """Count all anew, from the tables and how far each reaches into its last page.

        Every page that no table holds is free. Cost: O(everything).
        """
        refs = [0] * (self.capacity + 1)
        fill = [0] * (self.capacity + 1)
        for table, reach in tables:
            for page in table:
                refs[page] += 1
            for page in table[:-1]:
                fill[page] = page_size
            for page in table[-1:]:
                fill[page] = max(fill[page], reach)
        self.fill[:] = fill
        self.refs[:] = refs
        self.free[:] = [page for page in range(self.capacity, 0, -1) if not refs[page]]
        self.unsorted = 0
        if self.gone is not None:
            self.gone[:] = self.free
        self.note_peak()

    def note_peak(self) -> None:
        """Remember how many pages are in use, where it is more than ever."""
        used = self.capacity - len(self.free)
        if used > self.peak:
            self.peak = used

    def note(self, fills: Iterable[tuple[int, int]]) -> None:
        """Remember where the first free slot of some pages is."""
        for page, mark in fills:
            self.fill[page] = mark

    def take(self, count: int) -> None:
        """Take the next `count` pages off the free stack; who holds them says so."""
        del self.free[-count:]
        self.note_peak()

    def peek(self, count: int) -> list[int]:
        """The pages that `take` takes next, which stay free; none where they are too few."""
        return self.free[: -count - 1 : -1] if count <= len(self.free) else []

    def hold(self, pages: Iterable[int]) -> None:
        """Add one reference to each page."""
        refs = self.refs
        for page in pages:
            refs[page] += 1

    def count(self, shares: Iterable[tuple[int, int]]) -> None:
        """Let pages that nobody held have so many references."""
        for page, count in shares:
            self.refs[page] = count

    def drop(self, pages: Iterable[int]) -> list[int]:
        """Give back one reference of each page; pages that reach 0 become free, and are returned.

        They are taken again in the order they came in, and once many came back the whole stack is
        sorted: so pages that are taken together mostly lie side by side.
        """
        refs = self.refs
        free = self.free
        freed = []
        for page in pages:
            count = refs[page] - 1
            refs[page] = count
            if not count:
                freed.append(page)
        freed.reverse()
        if self.gone is not None:
            self.gone += freed
        free += freed
        self.unsorted += len(freed)
        if self.unsorted >= MANY and self.unsorted * 8 >= len(free):
            free.sort(reverse=True)
            self.unsorted = 0
        return freed

    def check(self, holders: dict[int, int]) -> None:
        """Raise CorruptCache unless references equal `holders` (page -> tables with it) and pages
        are conserved.
        """
        free = set(self.free)
        if len(free) != len(self.free):
            raise CorruptCache(f"a page is free twice: {sorted(self.free)}")
        if self.refs[0] or 0 in free or 0 in holders:
            raise CorruptCache("the null page is in use")
        for page in range(1, self.capacity + 1):
            if self.refs[page] != holders.get(page, 0):
                raise CorruptCache(
                    f"page {page}: {self.refs[page]} references, {holders.get(page, 0)} holders"
                )
            if (self.refs[page] == 0) != (page in free):
                raise CorruptCache(
                    f"page {page} with {self.refs[page]} references, on the free stack: "
                    f"{page in free}"
                )
        if len(self.refs) != self.capacity + 1:
            raise CorruptCache(
                f"{len(self.refs)} counters for {self.capacity} pages and the null page"
            )
