"""Caches so small that eviction and exhaustion happen all the time, and all that can be seen of
them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from paged_kv import PagedKVCache
from paged_kv.events import Event
from paged_kv.index import CacheIndex
from paged_kv.pages.books import Books


def tiny_cache(pages: int = 6, page_size: int = 2) -> PagedKVCache:
    return PagedKVCache(
        layers=1, heads=1, head_size=2, page_size=page_size, num_pages=pages, grow=False
    )


def grow(cache: PagedKVCache, seqs: list[int], count: int) -> None:
    """Append `count` tokens to each sequence."""
    kv = torch.zeros(1, len(seqs), 1, count, 2)
    cache.append(seqs, kv, kv)


def filled(cache: PagedKVCache, *counts: int) -> list[int]:
    """New sequences of that many tokens each."""
    seqs = cache.new(len(counts))
    for seq, count in zip(seqs, counts):
        grow(cache, [seq], count)
    return seqs


def step(cache: PagedKVCache, parents: list[int], count: int) -> list[int]:
    """Children of `count` more tokens, as a model step makes them."""
    opened = cache.open(parents, count)
    kv = torch.zeros(len(parents), 1, count, 2)
    opened.update(0, kv, kv)
    return opened.commit()


def pages(cache: PagedKVCache, seqs: Iterable[int]) -> list[set[int]]:
    return [set(table) - {0} for table in cache.block_tables(list(seqs))[0].tolist()]


def held(cache: PagedKVCache, seqs: Iterable[int]) -> int:
    """Pages that these sequences hold, each counted once."""
    return len(set().union(*pages(cache, seqs)))


def saved(cache: PagedKVCache, busy: Collection[int], doomed: Collection[int]) -> int:
    """Pages that `busy` sequences would copy before they write on in them, but not once these are
    gone: nobody else holds them then.
    """
    holders = Counter(page for table in cache.page_tables(cache.live()) for page in table)
    for step in cache.books.pending.values():
        holders.update(page for record in step.records for page in record[0])
    left = holders - Counter(page for table in cache.page_tables(doomed) for page in table)
    tails = set()
    for seq in busy:
        (table,), (start,), (length,) = cache.books.windows([seq])
        end = (start + length) % cache.page_size
        if table and end and cache.books.pages.fill[table[-1]] != end:
            tails.add(table[-1])
    return sum(left[page] == 1 < holders[page] for page in tails)


def books(found: Books) -> dict[str, Any]:
    """All that block tables and pages say, the free stack in its order, as values of its own.

    Pages in use that have free slots say where these begin.
    """
    pages = found.pages
    marks = [(page, pages.fill[page]) for page, count in enumerate(pages.refs) if count]
    return {
        "records": found.items(),
        "steps": {number: list(step.records) for number, step in found.pending.items()},
        "joints": dict(found.tree.joints),
        "fill": {page: mark for page, mark in marks if 0 < mark < found.page_size},
        "owned": {seq: (entry.key, entry.pins) for seq, entry in found.owned.items()},
        "change": found.change,
        "figures": found.figures,
        "mark": found.mark(),
        "refs": list(pages.refs),
        "free": list(pages.free),
        "unsorted": pages.unsorted,
        "capacity": pages.capacity,
        "growths": pages.growths,
        "peak": pages.peak,
    }


def listened(cache: PagedKVCache) -> list[tuple[str, list[list[int]]]]:
    """From now on, each verb with the sequences that ended in each of its changes."""
    heard: list[tuple[str, list[list[int]]]] = []

    def hear(event: Event) -> None:
        heard.append((event.verb, [list(each.change.drops) for each in event.told if each]))

    cache.listen(hear)
    return heard


def state(index: CacheIndex) -> dict[str, Any]:
    """All that an index and the books of its cache say."""
    cache = index.cache
    assert isinstance(cache, PagedKVCache)
    return {
        "victims": index.victims(),
        "entries": dict(zip(index, index.handles())),
        "pinned": [key for key in index if index.pinned(key)],
        "stats": index.stats,
        **books(cache.books),
    }


class Fault(Exception):
    """Raised by the storage where a test asks for it."""


@contextmanager
def fault(cache: PagedKVCache, name: str | None, late: bool) -> Iterator[None]:
    """Let one method of the storage raise, before or after it did its work."""
    if name is None:
        yield
        return
    storage = cache._pool.storage
    real = getattr(storage, name)

    def broken(*args: Any, **kwargs: Any) -> None:
        if late:
            real(*args, **kwargs)
        raise Fault(name)

    setattr(storage, name, broken)
    try:
        yield
    finally:
        delattr(storage, name)
