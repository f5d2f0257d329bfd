"""What the tests of recordings share: caches, files in memory, late caches, a recount."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch

from paged_kv import PagedKVCache, Step
from paged_kv.recording import Recorder, Recording, record

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


def filled(cache: PagedKVCache, count: int = 1, length: int = 4) -> list[int]:
    """New sequences of some tokens."""
    seqs = cache.new(count)
    cache.append(seqs, *tokens(count, length))
    return seqs


def opened(cache: PagedKVCache, seqs: list[int], room: int, new: int) -> Step:
    """A step of which `new` tokens are filled."""
    step = cache.open(seqs, room)
    step.update(0, *(part[0] for part in tokens(len(seqs), new)))
    return step


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


def unheard(cache: PagedKVCache) -> bool:
    """Whether nobody listens, so that nothing is collected."""
    return not cache.turns.listeners and cache.books.told is None


def references(cache: PagedKVCache) -> Counter[int]:
    """How many sequences, those of open steps too, hold each page."""
    tables = cache.page_tables(cache.live())
    tables += [record[0] for step in cache.books.pending.values() for record in step.records]
    return Counter(page for table in tables for page in table)


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
    refs = references(cache)
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


def totals(events: Iterable[dict[str, Any]], field: str) -> Counter[str]:
    """The sum of a field, by the name of the event."""
    found = Counter[str]()
    for event in events:
        found[event["name"]] += event[field]
    return found


def in_memory(cache: PagedKVCache, file: Memory) -> AbstractContextManager[Recorder]:
    options: dict[str, Any] = {"opener": lambda path: file, "accesses": True, **EVERYTHING}
    return record(cache, "run.jsonl", **options)


def alive(lines: Iterable[dict[str, Any]]) -> list[int]:
    """The numbers of the sequences that live after these lines of accesses, the oldest first."""
    found: dict[int, None] = {}
    for line in lines:
        for what, ids in zip(line["what"], line["ids"]):
            if what == "begin":
                found.update(dict.fromkeys(ids))
            for number in ids if what == "end" else ():
                found.pop(number, None)
    return list(found)


def agrees(cache: PagedKVCache, recorder: Recorder, file: Memory) -> None:
    """The last sample, the mirror of the cache and the pages that are known to live are right."""
    cache.new(0)  # takes a sample
    sample = file.lines("sample")[-1]
    wanted = recount(cache)
    assert {name: sample[name] for name in wanted} == wanted
    verbs = recorder._verbs
    assert verbs is not None
    books = cache.books
    assert verbs.mirror.live == dict(books.items())
    assert list(verbs.mirror.live) == cache.live()
    recorder.snapshot("now")
    shown = [node["id"] for node in file.lines("tree")[-1]["nodes"]]
    assert sorted(alive(file.lines("accesses"))) == sorted(shown)
    assert verbs.mirror.steps == {number: step.records for number, step in books.pending.items()}
    assert verbs.mirror.joints == books.tree.joints
    assert verbs.mirror.lives.pages == set(references(cache))


def complete(cache: PagedKVCache, found: Recording) -> None:
    """The events have every page that is in use, and the lives every page that was freed."""
    pages = totals(found.events, "pages")
    del pages["grow"]
    assert sum(pages.values()) == cache.pages_in_use
    assert sum(found.lives[-1]["counts"]) == cache.stats.freed_pages


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
