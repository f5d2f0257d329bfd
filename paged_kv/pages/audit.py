"""Whether the books of a pool are whole. No tensors in here."""

from __future__ import annotations

from collections import Counter

from paged_kv.errors import CorruptCache
from paged_kv.pages.books import Books
from paged_kv.pages.records import Record, pages_for, reach


def audit(books: Books) -> None:
    """Raise CorruptCache unless every invariant of pages and tables holds.

    Cost: O(everything).
    """
    holders: Counter[int] = Counter()
    pending = [("an open step", row) for step in books.pending.values() for row in step.records]
    for name, record in [*((f"sequence {seq:#x}", row) for seq, row in books.items()), *pending]:
        _check_record(books, name, record)
        holders.update(record[0])
    for seq in books.live():
        if not books.handles.gave(seq):
            raise CorruptCache(f"sequence {seq:#x}: not a number that was given out")
    if books.light:
        raise CorruptCache(f"a light step is left: {books.light}")
    books.pages.check(holders)
    _check_fill(books)
    for seq, entry in list(books.owned.items()):
        if seq not in books or entry.handle != seq:
            raise CorruptCache(
                f"sequence {seq:#x} is owned under key {entry.key!r}, and does not live"
            )


def _check_record(books: Books, name: str, record: Record) -> None:
    table, start, length, parent, _ = record
    if parent and parent not in books and parent not in books.tree.joints:
        raise CorruptCache(f"{name}: its parent {parent:#x} is neither live nor a joint")
    if len(set(table)) != len(table):
        raise CorruptCache(f"{name} holds a page twice: {table}")
    size = books.page_size
    if not 0 <= start < size or len(table) != pages_for(start, length, size):
        raise CorruptCache(f"{name}: pages {table}, start {start}, length {length}")


def _check_fill(books: Books) -> None:
    """Raise CorruptCache where a row might write on in a page that another one reads further."""
    size = books.page_size
    furthest: dict[int, int] = {}
    tails = set()
    for record in books.all_records():
        pages, end = reach(record, size)
        for page in pages[:-1]:
            furthest[page] = size
        for page in pages[-1:]:
            furthest[page] = max(end, furthest.get(page, 0))
            if end < size:
                tails.add(page)
    for page in tails:
        if books.pages.fill[page] < furthest[page]:
            raise CorruptCache(
                f"page {page}: read to {furthest[page]}, written to {books.pages.fill[page]}"
            )
