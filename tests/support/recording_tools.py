"""What the tests of recordings share: caches, files in memory, late caches, a recount."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import torch

from paged_kv import PagedKVCache

EVERYTHING: dict[str, Any] = {"interval": 0.0, "budget": None}
COUNTERS = ("forks", "appends", "copied_pages", "freed_pages")


class Memory:
    """A file in memory, which is full after `room` bytes."""

    def __init__(self, room: int = 1 << 40) -> None:
        self.data = b""
        self.room = room

    def write(self, data: bytes) -> int:
        kept = data[: self.room - len(self.data)]
        if not kept:
            raise OSError(28, "No space left on device")
        self.data += kept
        return len(kept)

    def close(self) -> None:
        pass

    def lines(self, kind: str) -> list[dict[str, Any]]:
        return [
            line for line in map(json.loads, self.data.splitlines()) if line.get("kind") == kind
        ]


def made(**options: Any) -> PagedKVCache:
    return PagedKVCache(
        **{"layers": 1, "heads": 1, "head_size": 2, "page_size": 2, "num_pages": 8, **options}
    )


def tokens(rows: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    kv = torch.ones(1, rows, 1, count, 2)
    return kv, kv


def search(cache: PagedKVCache, steps: int = 3, rows: int = 2) -> list[int]:
    """A small search: `rows` roots, `steps` generations; returns all but the roots, released."""
    parents = cache.new(rows, start=1)
    roots = parents
    cache.append(parents, *tokens(rows, 3))
    nodes = []
    for _ in range(steps):
        batch = cache.open(parents, 2)
        batch.update(0, *(part[0] for part in tokens(rows, 2)))
        parents = batch.commit()
        nodes += parents
    cache.release(nodes)
    cache.release(roots)
    return nodes


def unhooked(cache: PagedKVCache) -> bool:
    return not any(
        callable(value) for name, value in vars(cache).items() if name in vars(PagedKVCache)
    )


def held(cache: PagedKVCache) -> set[int]:
    """The pages in use."""
    return {page for table in cache.page_tables(cache.live()) for page in table}


def recount(cache: PagedKVCache) -> dict[str, Any]:
    """A sample's fields, from the tables that anybody may ask for."""
    live = cache.live()
    tables = cache.page_tables(live)
    lengths = cache.lengths(live)
    starts = cache.block_tables(live)[2].tolist()
    size = cache.page_size
    read = {
        (table[place // size], place % size)
        for table, start, length in zip(tables, starts, lengths)
        for place in range(start, start + length)
    }
    refs = Counter(page for table in tables for page in table)
    bins = {
        "1": (1, 1),
        "2": (2, 2),
        "3-4": (3, 4),
        "5-8": (5, 8),
        "9-16": (9, 16),
        "17+": (17, 10**9),
    }
    return {
        "bytes_in_use": len(refs) * cache.page_bytes,
        "bytes_reserved": cache.bytes_reserved,
        "bytes_shared": sum(count > 1 for count in refs.values()) * cache.page_bytes,
        "bytes_unique": len(read) * cache.token_bytes,
        "bytes_dense": sum(lengths) * cache.token_bytes,
        "sequences": len(live),
        "pages_by_refs": {
            name: sum(low <= count <= high for count in refs.values())
            for name, (low, high) in bins.items()
        },
        "dead_slots": len(refs) * size - len(read),
    }


class State:
    """Contexts that make their cache at the first use, and may begin again with another."""

    def __init__(self) -> None:
        self.made: list[PagedKVCache] = []

    @property
    def started(self) -> bool:
        return bool(self.made)

    @property
    def cache(self) -> PagedKVCache:
        return self.made[-1]

    def start(self, **options: Any) -> None:
        if options.get("fails"):
            raise MemoryError("no room")
        self.made.append(made(**options))


class Model:
    """Something that holds a world model with such contexts."""

    def __init__(self, state: State) -> None:
        self.world_model = type("WorldModel", (), {})()
        self.world_model.paged = state
        self.world_model.total_query_count = 100
        self.world_model.hit_count = 90
