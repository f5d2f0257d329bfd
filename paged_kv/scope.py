"""Sequences that live as long as a block of code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from paged_kv.checks import handles


class Cache(Protocol):
    """What a scope needs of a cache."""

    def mark(self) -> tuple[int, int]: ...

    def made_since(self, mark: tuple[int, int]) -> list[int]: ...

    def lengths(self, seqs: Iterable[int]) -> list[int]: ...

    def release(self, seqs: Iterable[int], *, missing_ok: bool = False) -> None: ...


class Scope:
    """At its end, releases what was made since it began, whoever made it, and neither kept nor put
    into an index.

    Made by `PagedKVCache.scope`, to be used as a context manager; `close` ends it early.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._mark = cache.mark()
        self._kept: set[int] = set()
        self._ended = False

    def keep(self, seqs: Iterable[int]) -> list[int]:
        """Let these sequences outlive the block; returns them. Raises StaleHandle or
        ForeignHandle.
        """
        kept = handles(seqs, ordered=False)
        self._cache.lengths(kept)
        self._kept.update(kept)
        return kept

    def close(self) -> None:
        """Release what was made so far and not kept; the scope ends with it.

        Cost: O(sequences made since it began).
        """
        if self._ended:
            return
        doomed = [seq for seq in self._cache.made_since(self._mark) if seq not in self._kept]
        self._cache.release(doomed, missing_ok=True)
        self._ended = True

    def __enter__(self) -> Scope:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
