"""What a cache looks like at one moment, as plain data: sizes, a sample, a tree, a page map.

Nothing here touches a tensor. `live` has the sequences that exist, handle -> record, oldest first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from itertools import chain, islice
from typing import Any, NamedTuple

from paged_kv.cache import PagedKVCache
from paged_kv.pages.allocator import PageAllocator
from paged_kv.pages.books import Books
from paged_kv.pages.records import Record

MOST_NODES = 4096  # of a tree
MOST_PAGES = 16384  # of a page map
BINS = (("1", 1, 1), ("2", 2, 2), ("3-4", 3, 4), ("5-8", 5, 8), ("9-16", 9, 16))
OVER = "17+"


class Slots(NamedTuple):
    """Which slots are read: whole pages, slots of each other page, tokens by sequence."""

    whole: set[int]
    partly: dict[int, int]
    logical: int

    def stored(self, page_size: int) -> int:
        """Slots that are read, each counted once."""
        return len(self.whole) * page_size + sum(self.partly.values())


class Names:
    """Short numbers for sequences, from 1, in the order in which they are first written down.

    >>> names = Names()
    >>> names.of([700, 701])
    {700: 1, 701: 2}
    >>> names.of([701, 702])        # 700 is gone, and its number with it
    {701: 2, 702: 3}
    """

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._given = 0

    def of(self, live: Iterable[int]) -> dict[int, int]:
        """The numbers of all sequences that exist, the oldest first."""
        numbers = {handle: self.number(handle) for handle in live}
        self._numbers = numbers
        return numbers

    def number(self, handle: int) -> int:
        """That of one sequence."""
        number = self._numbers.get(handle)
        if number is None:
            self._given += 1
            number = self._given
            self._numbers[handle] = number
        return number


def sizes(cache: PagedKVCache) -> dict[str, Any]:
    """What never changes of a cache."""
    return {
        "layers": cache.layers,
        "heads": cache.heads,
        "head_size": cache.head_size,
        "value_head_size": cache.value_head_size,
        "page_size": cache.page_size,
        "dtype": str(cache.dtype).removeprefix("torch."),
        "device": str(cache.device),
        "token_bytes": cache.token_bytes,
        "page_bytes": cache.page_bytes,
        "max_pages": cache.max_pages,
    }


def slots(records: Iterable[Record], size: int) -> Slots:
    """Which slots of pages of this size are read. Cost: O(sequences), and a set of all their pages.

    Only the first and the last page of a window can be read in part: those between need no
    arithmetic.
    """
    whole: set[int] = set()
    edges: dict[int, set[tuple[int, int]]] = {}
    logical = 0
    for pages, start, length, *_ in records:
        if not length:
            continue
        logical += length
        end = (start + length - 1) % size + 1
        if len(pages) == 1:
            edges.setdefault(pages[0], set()).add((start, end))
            continue
        if start:
            edges.setdefault(pages[0], set()).add((start, size))
            pages = pages[1:]
        if end < size:
            edges.setdefault(pages[-1], set()).add((0, end))
            pages = pages[:-1]
        whole.update(pages)
    partly = {page: _covered(spans) for page, spans in edges.items() if page not in whole}
    return Slots(whole, partly, logical)


def _covered(spans: set[tuple[int, int]]) -> int:
    """Slots in the union of spans [begin, end)."""
    covered = 0
    reached = 0
    for begin, end in sorted(spans):
        covered += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return covered


def state(cache: PagedKVCache) -> dict[str, Any]:
    """The fields of a sample that say how the cache is filled. Cost: O(pages + sequences)."""

    def read(books: Books) -> dict[str, Any]:
        return filled(cache, books.pages, [record for _, record in books.items()])

    return cache.look(read)


def filled(
    cache: PagedKVCache, pages: PageAllocator, records: Collection[Record]
) -> dict[str, Any]:
    """`state` of a cache whose books are at hand."""
    read = slots(records, cache.page_size)
    page_bytes = cache.page_bytes
    refs = Counter(pages.refs)
    del refs[0]
    used = pages.used_count
    stored = read.stored(cache.page_size)
    return {
        "bytes_in_use": used * page_bytes,
        "bytes_reserved": pages.capacity * page_bytes,
        "bytes_shared": (used - refs[1]) * page_bytes,
        "bytes_unique": stored * cache.token_bytes,
        "bytes_dense": read.logical * cache.token_bytes,
        "sequences": len(records),
        "pages_by_refs": binned(refs),
        "dead_slots": used * cache.page_size - stored,
        "usage": round(used / (pages.max_pages or pages.capacity), 6),
    }


def binned(refs: Counter[int]) -> dict[str, int]:
    """How many pages there are with each number of references, in the bins of a sample."""
    bins = {name: sum(refs[count] for count in range(low, high + 1)) for name, low, high in BINS}
    return {**bins, OVER: sum(refs.values()) - sum(bins.values())}


def tree(live: dict[int, Record], joints: Mapping[int, int], names: Names) -> dict[str, Any]:
    """The sequences with the nearest ones above them that live, parents first; the first 4096 only.

    `joints` have the parents of sequences that ended and hold others together.
    Cost: O(all block tables).
    """
    numbers = names.of(live)

    def above(parent: int) -> int | None:
        while parent in joints:
            parent = joints[parent]
        return numbers.get(parent)

    nodes = [
        {
            "id": numbers[handle],
            "parent": above(parent),
            "tokens": length,
            "pages": list(pages),
        }
        for handle, (pages, _, length, parent, _) in islice(live.items(), MOST_NODES)
    ]
    return {"nodes": nodes, "left_out": len(live) - len(nodes)}


def page_map(
    live: dict[int, Record], held: Iterable[Record], size: int, capacity: int, names: Names
) -> dict[str, Any]:
    """References, slots read and the oldest sequence of each page of this size, page 1 first.

    `held` has all records with references, those of open steps too.
    The first 16384 pages only. Cost: O(all block tables).
    """
    read = slots(live.values(), size)
    refs = Counter(chain.from_iterable([record[0] for record in held]))
    numbers = names.of(live)
    owner: dict[int, int] = {}
    for handle, record in reversed(live.items()):
        owner.update(dict.fromkeys(record[0], numbers[handle]))
    shown = range(1, min(capacity, MOST_PAGES) + 1)
    return {
        "refs": [refs[page] for page in shown],
        "filled": [size if page in read.whole else read.partly.get(page, 0) for page in shown],
        "owner": [owner.get(page) for page in shown],
        "left_out": capacity - len(shown),
    }
