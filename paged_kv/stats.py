"""Counters of a cache, as numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class CacheStats:
    """What a cache did since it was made. All but `growths` count sequences or pages.

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
