"""The entries of an index leave it as a book, and come out of one. No tensors in here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

from paged_kv.bundles.holders import Adoption, IndexBook
from paged_kv.checks import key as check_key
from paged_kv.checks import priority
from paged_kv.entries import Counts, Entries
from paged_kv.errors import BadArgument, BadBundle, BadKey, BadPriority, CapacityExceeded
from paged_kv.pages.change import Edit, Entry, Store

COUNTS = ("hits", "misses", "second", "evictions", "insertions")
LISTS = ("rows", "keys", "priorities", "added", "used", "pins")


class EntryShelf:
    """The entries of one index, to be taken along with their sequences."""

    def __init__(self, entries: Entries) -> None:
        self.entries = entries

    def sequences(self) -> list[int]:
        """Those that the index owns."""
        return [entry.handle for entry in self.entries.alive()]

    def book(self, rows: Mapping[int, int]) -> IndexBook:
        """All entries, with the rows of their sequences."""
        found = self.entries.alive()
        counts = self.entries.counts
        used = [entry.used for entry in found]
        return IndexBook(
            [rows[entry.handle] for entry in found],
            [entry.key for entry in found],
            [entry.priority for entry in found],
            [entry.added for entry in found],
            used,
            [entry.pins for entry in found],
            max(used, default=-1) + 1,
            tuple([getattr(counts, name) for name in COUNTS]),
        )

    def checked(self, book: Any, rows: int, held: Callable[[list[int]], int]) -> IndexBook:
        """A book, which is not trusted, for an index that is empty and has room for it.

        Raises BadArgument, BadBundle, CapacityExceeded.
        """
        self.entries.tidy()
        if self.entries.by_key:
            raise BadArgument("indexes", list(self.entries.by_key), "an index without entries")
        found = checked_book(book, rows)
        self._see_room(found.rows, held)
        return found

    def adoption(self, book: IndexBook, seqs: Sequence[int]) -> Adoption:
        """What makes the index hold the entries of a book that was checked."""
        entries = self.entries
        made = []
        for row, key, rank, added, used, pins in zip(*(getattr(book, name) for name in LISTS)):
            entry = Entry(key, seqs[row], rank, added, pins, entries.home)
            entry.used = used
            made.append(entry)
        counts = Counts()
        for name, value in zip(COUNTS, book.counted):
            setattr(counts, name, value)
        return Adoption(
            Edit(entries.books.owned, {entry.handle: entry for entry in made}, ()),
            Edit(entries.by_key, {entry.key: entry for entry in made}, ()),
            (
                Store(entries, "in_order", False),  # its policy is told when it is needed
                Store(entries, "counts", counts),
                Store(entries, "clock", count(book.clock)),
            ),
        )

    def _see_room(self, rows: list[int], held: Callable[[list[int]], int]) -> None:
        most = self.entries.max_entries
        if most is not None and len(rows) > most:
            raise CapacityExceeded("entries", len(rows), most, 0)
        size = self.entries.max_bytes
        wanted = held(rows) * self.entries.page_bytes
        if size is not None and wanted > size:
            raise CapacityExceeded("bytes", wanted, size, 0)


def checked_book(book: Any, rows: int) -> IndexBook:
    """A book as one, of at most so many sequences. Raises BadBundle."""
    if type(book) is not dict or book.keys() != {*LISTS, "clock", "counted"}:
        raise BadBundle("an index has other fields than it should have")
    if any(type(book[name]) is not list for name in LISTS):
        raise BadBundle("an index has no lists of entries")
    found = IndexBook(**book)
    if len({len(book[name]) for name in LISTS}) != 1:
        raise BadBundle("the lists of an index differ in length")
    if type(found.counted) is not tuple or len(found.counted) != len(COUNTS):
        raise BadBundle("an index has no counts")
    numbers = [*found.rows, *found.added, *found.used, *found.pins, found.clock, *found.counted]
    if set(map(type, numbers)) != {int} or min(numbers) < 0:
        raise BadBundle("an index holds what is no number of it")
    if len(set(found.rows)) != len(found.rows) or max(found.rows, default=-1) >= rows:
        raise BadBundle("an index holds a sequence twice, or one that did not come along")
    _check_keys(found)
    _check_ages(found)
    return found


def _check_keys(book: IndexBook) -> None:
    try:
        for key in book.keys:
            check_key(key)
        ranks = [priority(rank) for rank in book.priorities]
    except (BadKey, BadPriority) as error:
        raise BadBundle(f"an entry cannot be: {error}") from error
    if len(set(book.keys)) != len(book.keys):
        raise BadBundle("an index holds a key twice")
    book.priorities[:] = ranks


def _check_ages(book: IndexBook) -> None:
    """No two things happened at once, and none after now."""
    hits = [used for added, used in zip(book.added, book.used) if used != added]
    moments = [*book.added, *hits]
    early = any(used < added for added, used in zip(book.added, book.used))
    if early or len(set(moments)) != len(moments) or max(moments, default=-1) >= book.clock:
        raise BadBundle("the ages of entries contradict each other")
