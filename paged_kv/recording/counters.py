"""What only grows while a cache is there, over all caches of a recording."""

from __future__ import annotations

from collections.abc import Mapping

from paged_kv.pages.books import Books


def counts(books: Books) -> dict[str, int]:
    """What only grows while a cache is there, as its `stats` have it."""
    done = books.figures
    freed = done.allocated - books.pages.used_count
    return {
        "copied_pages": done.copied,
        "forks": done.forks,
        "appends": done.appends,
        "freed_pages": freed,
    }


class Counters:
    """Counts since the recording began, over caches that begin again at 0.

    >>> counters = Counters()
    >>> counters.begin({"forks": 10})
    >>> counters.read({"forks": 12})
    >>> counters.begin({"forks": 0})      # another cache
    >>> counters.read({"forks": 3})
    >>> counters.totals
    {'forks': 5}
    """

    def __init__(self) -> None:
        self.totals: dict[str, int] = {}
        self._before: dict[str, int] = {}

    def begin(self, counts: Mapping[str, int]) -> None:
        """Go on from these counts, which do not count themselves."""
        self._before = dict(counts)

    def read(self, counts: Mapping[str, int]) -> None:
        """Add what was counted since the last time."""
        for name, count in counts.items():
            self.totals[name] = self.totals.get(name, 0) + count - self._before.get(name, 0)
        self._before.update(counts)
