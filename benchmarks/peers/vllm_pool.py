"""vLLM's BlockPool with a fork made by hand: its own cache manager has none.

The pool is plain python and needs no accelerator; tables, copies and slots are kept here, as its
caller would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockPool

from .peer import Handle, Peer
from .workload import Workload


class VllmPoolPeer(Peer):
    """Blocks of the pool in one list a node."""

    name = "vLLM BlockPool"
    note = "a fork by hand on its pool"

    def __init__(self, work: Workload, nodes: int, tokens: int) -> None:
        super().__init__(work, nodes, tokens)
        self.size = work.page_size
        self.pool = BlockPool(
            1 + nodes + tokens // self.size, enable_caching=False, hash_block_size=self.size
        )
        self.tables: dict[int, list[Any]] = {}
        self.lengths: dict[int, int] = {}
        self.next = 0
        self.written: list[int] = []
        self.copied: list[tuple[int, int]] = []

    def begin(self, length: int, tokens: Any = None) -> Handle:
        self.tables[self.next] = []
        self.lengths[self.next] = 0
        self.next += 1
        (made,) = self.fork([self.next - 1], length)
        self.release([self.next - 2])
        return made

    def fork(self, parents: Sequence[Handle], new: int) -> list[Handle]:
        pool = self.pool
        tables = self.tables
        lengths = self.lengths
        size = self.size
        written = []
        copied = []
        children = []
        for parent in parents:
            end = lengths[parent]
            source = tables[parent]
            full = end // size
            blocks = source[:full]
            pool.touch(blocks)
            blocks = blocks + pool.get_new_blocks(-(-(end + new) // size) - full)
            if end % size:
                copied.append((source[full].block_id, blocks[full].block_id))
            for index in range(end, end + new):
                written.append(blocks[index // size].block_id * size + index % size)
            child = self.next
            tables[child] = blocks
            lengths[child] = end + new
            self.next = child + 1
            children.append(child)
        self.written = written
        self.copied = copied
        return children

    def release(self, nodes: Sequence[Handle]) -> None:
        for node in nodes:
            self.pool.free_blocks(self.tables.pop(node))
            del self.lengths[node]

    def placed(self) -> tuple[list[int], list[tuple[int, int]]]:
        return self.written, self.copied

    def slots(self, node: Handle) -> list[int]:
        blocks = self.tables[node]
        size = self.size
        return [
            blocks[index // size].block_id * size + index % size
            for index in range(self.lengths[node])
        ]
