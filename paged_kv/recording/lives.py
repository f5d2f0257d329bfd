"""How long pages live: from the verb that took a page to the one that freed it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

from paged_kv.allocator import PageAllocator

# Seconds. The last bin has no upper end.
EDGES = (0.0, *(digit * 10.0**power for power in range(-4, 4) for digit in (1, 2, 5)))
FREE, BEFORE = 0.0, -1.0  # a page that is free; one that was taken before anybody looked


class PageLives:
    """Births of the pages in use; `counts` takes the lives that ended, one number an edge, at the bin they fall in.

    >>> pages, counts = PageAllocator(4, max_pages=4), [0] * len(EDGES)
    >>> lives = PageLives(pages, counts)
    >>> table = tuple(pages.take(2))
    >>> lives.born([table], 10.0)
    >>> pages.drop(table)
    2
    >>> lives.ended(table, 33.0)
    >>> [(low, count) for low, count in zip(EDGES, counts) if count]
    [(20.0, 2)]
    """

    def __init__(self, pages: PageAllocator, counts: list[int]) -> None:
        self._pages, self._counts = pages, counts
        self._births = [BEFORE if count else FREE for count in pages.refs]

    def born(self, tables: list[tuple[int, ...]], now: float) -> None:
        """The fresh pages of these tables were taken now: a verb puts them at the end."""
        births = self._fitting()
        for table in tables:
            for page in reversed(table):
                if births[page]:
                    break
                births[page] = now

    def taken(self, pages: list[int], now: float) -> None:
        """These pages were taken now."""
        births = self._fitting()
        for page in pages:
            births[page] = now

    def _fitting(self) -> list[float]:
        """The births, one a page of the pool as it is now."""
        births, pages = self._births, len(self._pages.refs)
        if len(births) < pages:
            births.extend([FREE] * (pages - len(births)))
        return births

    def ended(self, pages: Iterable[int], now: float) -> None:
        """Of these pages, those that are free now were freed now."""
        refs = self._pages.refs
        self.freed([page for page in pages if not refs[page]], now)

    def freed(self, pages: list[int], now: float) -> None:
        """These pages were freed now."""
        births, before, place = self._births, None, 0
        for page in pages:
            birth, births[page] = births[page], FREE
            if birth > FREE:
                if birth != before:  # most pages of a batch were born together
                    before, place = birth, bisect_right(EDGES, now - birth) - 1
                self._counts[place] += 1


def histogram(counts: list[int]) -> dict[str, Any]:
    """Edges in seconds, one more than counts; null stands for no end."""
    return {"edges": [*EDGES, None], "counts": list(counts)}
