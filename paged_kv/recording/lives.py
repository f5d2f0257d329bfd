"""How long pages live: from the change that took a page to the one that freed it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Seconds. The last bin has no upper end.
EDGES = (0.0, *(digit * 10.0**power for power in range(-4, 4) for digit in (1, 2, 5)))
BEFORE = -1.0  # the birth of a page that was taken before anybody looked


class PageLives:
    """Births of the pages in use; `counts` takes the lives that ended: how many fall in each bin.

    >>> counts = [0] * len(EDGES)
    >>> lives = PageLives(counts)
    >>> lives.taken([1, 2], 10.0)
    >>> lives.freed([1, 2], 33.0)
    >>> [(low, count) for low, count in zip(EDGES, counts) if count]
    [(20.0, 2)]
    """

    def __init__(self, counts: list[int]) -> None:
        self._counts = counts
        self._births: dict[int, float] = {}

    def begin(self, refs: Sequence[int]) -> None:
        """Look at pages, of which those with references are in use, for the first time."""
        self._births = dict.fromkeys(_held(refs), BEFORE)

    @property
    def pages(self) -> set[int]:
        """The pages in use."""
        return set(self._births)

    def taken(self, pages: Iterable[int], now: float) -> None:
        """These pages were taken now."""
        self._births.update(dict.fromkeys(pages, now))

    def freed(self, pages: Iterable[int], now: float) -> None:
        """These pages were freed now."""
        births = self._births
        before = BEFORE
        place = 0
        for page in pages:
            birth = births.pop(page, BEFORE)
            if birth == BEFORE:
                continue
            if birth != before:  # most pages of a batch were born together
                before = birth
                place = bisect_right(EDGES, now - birth) - 1
            self._counts[place] += 1

    def move(self, names: Mapping[int, int]) -> None:
        """Pages have other numbers now, old -> new, and live on."""
        births = {names[page]: self._births.pop(page) for page in names if page in self._births}
        self._births.update(births)

    def correct(self, refs: Sequence[int], now: float) -> None:
        """Pages were taken and freed unseen: what is in use is what has references."""
        held = set(_held(refs))
        self.freed(sorted(self.pages - held), now)
        self.taken(sorted(held - self.pages), now)


def _held(refs: Sequence[int]) -> list[int]:
    return [page for page, count in enumerate(refs) if count]


def histogram(counts: list[int]) -> dict[str, Any]:
    """Edges in seconds, one more than counts; null stands for no end."""
    return {"edges": [*EDGES, None], "counts": list(counts)}
