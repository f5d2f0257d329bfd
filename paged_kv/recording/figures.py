"""What a cache looks like at one moment, as plain data: sizes, a sample, a tree, a map of the pages.

Nothing here touches a tensor. The books are read where they lie, since copies of them would cost more than the reading.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from paged_kv.cache import PagedKVCache

MOST_NODES = 4096  # of a tree
MOST_PAGES = 16384  # of a page map
NUMBER = (1 << 44) - 1  # the part of a handle that counts sequences
BINS = (("1", 1, 1), ("2", 2, 2), ("3-4", 3, 4), ("5-8", 5, 8), ("9-16", 9, 16))
OVER = "17+"


class Slots(NamedTuple):
    """Which slots live sequences read: pages read as a whole, slots read of each other page, tokens by sequence."""

    whole: set[int]
    partly: dict[int, int]
    logical: int

    def stored(self, page_size: int) -> int:
        """Slots that are read, each counted once."""
        return len(self.whole) * page_size + sum(self.partly.values())


def sizes(cache: PagedKVCache) -> dict[str, Any]:
    """What never changes of a cache."""
    return {
        "layers": cache.layers, "heads": cache.heads, "head_size": cache.head_size,
        "value_head_size": cache.value_head_size, "page_size": cache.page_size,
        "dtype": str(cache.dtype).removeprefix("torch."), "device": str(cache.device),
        "token_bytes": cache.token_bytes, "page_bytes": cache.page_bytes, "max_pages": cache._pages.max_pages,
    }


def slots(cache: PagedKVCache) -> Slots:
    """Which slots live sequences read. Cost: O(sequences), and a set of all pages in their tables.

    Only the first and the last page of a window can be read in part, so the pages between need no arithmetic.
    """
    size = cache.page_size
    whole: set[int] = set()
    edges: dict[int, set[tuple[int, int]]] = {}
    logical = 0
    for pages, start, length, _ in cache._tables._live.values():
        if not length:
            continue
        logical += length
        end = (start + length - 1) % size + 1
        if len(pages) == 1:
            edges.setdefault(pages[0], set()).add((start, end))
            continue
        whole.update(pages[1:-1])
        if start:
            edges.setdefault(pages[0], set()).add((start, size))
        else:
            whole.add(pages[0])
        if end < size:
            edges.setdefault(pages[-1], set()).add((0, end))
        else:
            whole.add(pages[-1])
    partly = {page: _covered(spans) for page, spans in edges.items() if page not in whole}
    return Slots(whole, partly, logical)


def _covered(spans: set[tuple[int, int]]) -> int:
    """Slots in the union of spans [begin, end)."""
    covered = reached = 0
    for begin, end in sorted(spans):
        covered += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return covered


def state(cache: PagedKVCache) -> dict[str, Any]:
    """The fields of a sample that say how the cache is filled. Cost: O(pages + sequences)."""
    read, pages = slots(cache), cache._pages
    refs = Counter(pages.refs)
    free = refs.pop(0, 0) - 1  # the null page is nobody's
    used, shared = pages.capacity - free, pages.capacity - free - refs[1]
    stored, page_bytes = read.stored(cache.page_size), cache.page_bytes
    return {
        "bytes_in_use": used * page_bytes, "bytes_reserved": cache.bytes_reserved,
        "bytes_shared": shared * page_bytes, "bytes_unique": stored * cache.token_bytes,
        "bytes_dense": read.logical * cache.token_bytes, "sequences": cache.live_sequences,
        "pages_by_refs": binned(refs), "dead_slots": used * cache.page_size - stored,
        "usage": round(used / (pages.max_pages or pages.capacity), 6),
    }


def binned(refs: Counter[int]) -> dict[str, int]:
    """How many pages there are with each number of references, in the bins of a sample."""
    bins = {name: sum(refs[count] for count in range(low, high + 1)) for name, low, high in BINS}
    return {**bins, OVER: sum(refs.values()) - sum(bins.values())}


def tree(cache: PagedKVCache) -> dict[str, Any]:
    """The live sequences with their live parents, parents first. Cost: O(all block tables); the first 4096 only."""
    live = cache._tables._live
    nodes = [
        {"id": handle & NUMBER, "parent": parent & NUMBER if parent in live else None, "tokens": length,
         "pages": list(pages)}
        for (handle, (pages, _, length, parent)), _ in zip(live.items(), range(MOST_NODES))
    ]
    return {"nodes": nodes, "left_out": len(live) - len(nodes)}


def page_map(cache: PagedKVCache) -> dict[str, Any]:
    """References, slots read and the lowest sequence of each page, page 1 first. The first 16384 pages only."""
    read, size, refs = slots(cache), cache.page_size, cache._pages.refs
    owner: dict[int, int] = {}
    for handle, record in reversed(cache._tables._live.items()):
        owner.update(dict.fromkeys(record[0], handle & NUMBER))
    shown = range(1, min(cache.pages_reserved, MOST_PAGES) + 1)
    return {
        "refs": [refs[page] for page in shown],
        "filled": [size if page in read.whole else read.partly.get(page, 0) for page in shown],
        "owner": [owner.get(page) for page in shown],
        "left_out": cache.pages_reserved - len(shown),
    }
