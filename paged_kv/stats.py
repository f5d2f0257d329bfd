"""Counters of a cache and of an index, as numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheStats:
    """What a cache did since it was made: a snapshot. All but `growths` count sequences or pages.

    >>> CacheStats(forks=8).forks
    8
    """

    forks: int = 0
    appends: int = 0
    allocated_pages: int = 0
    copied_pages: int = 0
    freed_pages: int = 0
    growths: int = 0
    peak_pages: int = 0


@dataclass(frozen=True)
class TierStats:
    """What a place for pages holds, and what came and went since the cache was made: a snapshot.

    `hits` are pages that were asked for and found there. Pages and bytes that moved are counted at
    the place that they came from or went to beside the frames: `read` and `written`, with the
    seconds that this took. `demotions`, of the frames, counts pages that were given up, also
    without a write.
    """

    name: str
    pages: int = 0
    bytes: int = 0
    hits: int = 0
    demotions: int = 0
    read: int = 0
    written: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    seconds_read: float = 0.0
    seconds_written: float = 0.0


@dataclass(slots=True)
class IndexStats:
    """Counts since the index was made; clear() keeps them. Every query is either a hit or a miss.

    `insertions` counts put(), replacements included; `evictions` the entries that went for lack of
    room, not those replaced, removed or cleared.
    """

    queries: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    insertions: int = 0

    def __add__(self, other: IndexStats) -> IndexStats:
        return IndexStats(
            self.queries + other.queries,
            self.hits + other.hits,
            self.misses + other.misses,
            self.evictions + other.evictions,
            self.insertions + other.insertions,
        )
