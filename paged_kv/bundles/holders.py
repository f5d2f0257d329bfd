"""Indexes, which own sequences and can be taken along with them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from paged_kv.pages.change import Edit, Store
from paged_kv.turns import Turns


class IndexBook(NamedTuple):
    """The entries of an index: one list a field, with rows instead of sequences."""

    rows: list[int]
    keys: list[Hashable]
    priorities: list[float | None]
    added: list[int]
    used: list[int]
    pins: list[int]
    clock: int  # the next number of `added` and `used`
    counted: tuple[int, ...]  # hits, misses, of these second queries, evictions, insertions


class Adoption(NamedTuple):
    """What makes an index hold entries, for a change."""

    owned: Edit
    keys: Edit
    stores: Sequence[Store]


class Shelf(Protocol):
    """The entries of one index, as far as they can be taken along."""

    def sequences(self) -> list[int]:
        """Those that it owns."""

    def book(self, rows: Mapping[int, int]) -> IndexBook:
        """Its entries, with the rows of their sequences."""

    def checked(self, book: Any, rows: int, held: Callable[[list[int]], int]) -> IndexBook:
        """A book of at most so many sequences that it has room for, and is empty for.

        `held` counts the pages of some rows. Raises BadBundle, CapacityExceeded, BadArgument.
        """

    def adoption(self, book: IndexBook, seqs: Sequence[int]) -> Adoption:
        """What makes it hold the entries of a book that was checked."""


class Holder(Protocol):
    """An index, or a manager of several."""

    turns: Turns

    @property
    def shelves(self) -> Sequence[Shelf]:
        """Its entries, index by index."""
