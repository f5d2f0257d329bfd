"""`paged_kv` itself: its tables alone, and the whole cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from paged_kv import PagedKVCache
from paged_kv.pages.allocator import PageAllocator
from paged_kv.pages.block_tables import BlockTables

from .peer import KV, Handle, Peer, causal
from .workload import Workload


class PagedTables(Peer):
    """The control plane: handles are checked, a batch is planned as a whole and then applied."""

    name = "paged_kv"
    note = "every handle and count checked, a batch whole or not at all"

    def __init__(self, work: Workload, nodes: int, tokens: int) -> None:
        super().__init__(work, nodes, tokens)
        pages = PageAllocator(nodes + tokens // work.page_size, max_pages=None)
        self.tables = BlockTables(pages, work.page_size)

    def begin(self, length: int, tokens: Any = None) -> Handle:
        (node,) = self.tables.new(1, start=-length % self.work.page_size)
        self.plan = self.tables.plan([node], length)
        self.tables.carry_out(self.plan)
        return node

    def fork(self, parents: Sequence[Handle], new: int) -> list[Handle]:
        tables = self.tables
        plan = tables.plan(list(parents), new, fork=True)
        self.plan = plan
        if plan.fresh > tables.books.pages.free_count:
            raise MemoryError
        if plan.row_pages() is None:  # else the page of each row says it all
            _ = plan.slots
        return tables.carry_out(plan)

    def release(self, nodes: Sequence[Handle]) -> None:
        self.tables.release(list(nodes))

    def placed(self) -> tuple[list[int], list[tuple[int, int]]]:
        return self.plan.slots, self.plan.copies

    def slots(self, node: Handle) -> list[int]:
        (pages,), (start,), (length,) = self.tables.books.windows([node])
        size = self.work.page_size
        return [
            pages[index // size] * size + index % size for index in range(start, start + length)
        ]


class PagedCache(Peer):
    """The cache as a model uses it: open, update every layer, commit."""

    name = "paged_kv"

    def __init__(self, work: Workload, nodes: int, tokens: int) -> None:
        super().__init__(work, nodes, tokens)
        self.cache = PagedKVCache(
            layers=work.layers,
            heads=work.heads,
            head_size=work.head_size,
            page_size=work.page_size,
            dtype=work.dtype,
            num_pages=nodes + tokens // work.page_size,
        )

    def begin(self, length: int, tokens: Any = None) -> Handle:
        (node,) = self.cache.new(start=-length % self.work.page_size)
        self.cache.append([node], *tokens)
        return node

    def fork(self, parents: Sequence[Handle], new: int) -> list[Handle]:
        raise NotImplementedError

    def step(
        self, parents: Sequence[Handle], tokens: Any, new: int, queries: Any = None
    ) -> list[Handle]:
        keys, values = tokens
        batch = self.cache.open(parents, new)
        for layer, context in enumerate(batch.layers):
            context.update(keys[layer], values[layer])
        if queries is not None:
            self.attend(queries, batch.get, lambda: causal(batch.mask(), new))
        return batch.commit()

    def release(self, nodes: Sequence[Handle]) -> None:
        self.cache.release(nodes)

    def read(self, node: Handle) -> KV:
        found = self.cache.gather([node])
        return found.keys[:, 0].clone(), found.values[:, 0].clone()

    def kv_bytes(self, lengths: Iterable[int]) -> int:
        return self.cache.bytes_in_use
