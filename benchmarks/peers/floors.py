"""The least that paged bookkeeping does in python: no handles, no checks, no errors, nothing to
undo.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from .peer import KV, Handle, Peer, causal
from .workload import Workload


class PythonFloor(Peer):
    """Lists of pages, reference counts in a dictionary, a free stack."""

    name = "python floor"
    note = "lists and dictionaries without any check"

    def __init__(self, work: Workload, nodes: int, tokens: int) -> None:
        super().__init__(work, nodes, tokens)
        self.size = work.page_size
        self.free = list(range(nodes + tokens // self.size, 0, -1))
        self.refs: dict[int, int] = {}
        self.tables: dict[int, list[int]] = {}
        self.starts: dict[int, int] = {}
        self.ends: dict[int, int] = {}
        self.next = 0
        self.written: list[int] = []
        self.copied: list[tuple[int, int]] = []

    def begin(self, length: int, tokens: Any = None) -> Handle:
        self.tables[self.next] = []
        self.starts[self.next] = self.ends[self.next] = -length % self.size
        self.next += 1
        (made,) = self.fork([self.next - 1], length)
        self.release([self.next - 2])
        return made

    def fork(self, parents: Sequence[Handle], new: int) -> list[Handle]:
        tables = self.tables
        starts = self.starts
        ends = self.ends
        refs = self.refs
        free = self.free
        size = self.size
        written = []
        copied = []
        children = []
        for parent in parents:
            end = ends[parent]
            pages = tables[parent].copy()
            if end % size and pages:  # a page that others read, too
                pages[-1] = free.pop()
                copied.append((tables[parent][-1], pages[-1]))
            while len(pages) * size < end + new:
                pages.append(free.pop())
            for page in pages:
                refs[page] = refs.get(page, 0) + 1
            for index in range(end, end + new):
                written.append(pages[index // size] * size + index % size)
            child = self.next
            tables[child] = pages
            starts[child] = starts[parent]
            ends[child] = end + new
            self.next = child + 1
            children.append(child)
        self.written = written
        self.copied = copied
        return children

    def release(self, nodes: Sequence[Handle]) -> None:
        tables = self.tables
        starts = self.starts
        ends = self.ends
        refs = self.refs
        free = self.free
        for node in nodes:
            for page in tables.pop(node):
                count = refs[page] - 1
                if count:
                    refs[page] = count
                else:
                    del refs[page]
                    free.append(page)
            del starts[node], ends[node]

    def placed(self) -> tuple[list[int], list[tuple[int, int]]]:
        return self.written, self.copied

    def slots(self, node: Handle) -> list[int]:
        pages = self.tables[node]
        size = self.size
        window = range(self.starts[node], self.ends[node])
        return [pages[index // size] * size + index % size for index in window]


class NumpyTables(Peer):
    """Tables as rows of an array, reference counts as an array; a batch is done in whole-array
    calls.
    """

    name = "numpy floor"
    note = "arrays without any check"

    def __init__(self, work: Workload, nodes: int, tokens: int) -> None:
        super().__init__(work, nodes, tokens)
        self.size = work.page_size
        pages = nodes + tokens // work.page_size
        self.free = np.arange(pages, 0, -1)
        self.free_count = pages
        self.refs = np.zeros(pages + 1, np.int32)
        # 0: no page
        self.tables = np.zeros((nodes + work.envs + 1, -(-work.window // self.size) + 1), np.int64)
        self.starts = np.zeros(len(self.tables), np.int64)
        self.ends = np.zeros(len(self.tables), np.int64)
        self.rows = np.arange(len(self.tables) - 1, -1, -1)  # a stack of free rows
        self.row_count = len(self.rows)
        self.written = np.zeros(0, np.int64)
        self.copied = np.zeros((0, 2), np.int64)

    def begin(self, length: int, tokens: Any = None) -> Handle:
        empty = self.rows[self.row_count - 1 : self.row_count].copy()
        self.row_count -= 1
        self.tables[empty] = 0
        self.starts[empty] = self.ends[empty] = -length % self.size
        made = self.fork(empty, length)
        self.rows[self.row_count] = empty[0]
        self.row_count += 1
        return made[0]

    def fork(self, parents: Sequence[Handle], new: int) -> Any:
        parents = np.asarray(parents)
        size = self.size
        batch = len(parents)
        self.row_count -= batch
        children = self.rows[self.row_count : self.row_count + batch].copy()
        tables = self.tables[parents]
        starts = self.starts[parents]
        ends = self.ends[parents]
        first = ends // size
        total = -(-(ends + new) // size)
        columns = np.arange(tables.shape[1])
        # a partial tail page is made anew
        fresh = (columns >= first[:, None]) & (columns < total[:, None])
        count = int(np.count_nonzero(fresh))
        self.free_count -= count
        rows = np.flatnonzero((ends % size > 0) & (ends > starts))
        old = tables[rows, first[rows]]
        tables[fresh] = self.free[self.free_count : self.free_count + count]
        self.copied = np.stack((old, tables[rows, first[rows]]), 1)
        np.add.at(self.refs, tables.ravel(), 1)
        self.tables[children] = tables
        self.starts[children] = starts
        self.ends[children] = ends + new
        index = ends[:, None] + np.arange(new)
        self.written = np.take_along_axis(tables, index // size, 1) * size + index % size
        return children

    def release(self, nodes: Sequence[Handle]) -> None:
        nodes = np.asarray(nodes)
        pages = self.tables[nodes].ravel()
        np.subtract.at(self.refs, pages, 1)
        self.refs[0] = 1  # the page of the padding is never freed
        freed = np.unique(pages[self.refs[pages] == 0])
        self.free[self.free_count : self.free_count + len(freed)] = freed
        self.free_count += len(freed)
        self.rows[self.row_count : self.row_count + len(nodes)] = nodes
        self.row_count += len(nodes)

    def placed(self) -> tuple[list[int], list[tuple[int, int]]]:
        return self.written.ravel().tolist(), [tuple(pair) for pair in self.copied.tolist()]

    def slots(self, node: Handle) -> list[int]:
        index = np.arange(self.starts[node], self.ends[node])
        return (self.tables[node, index // self.size] * self.size + index % self.size).tolist()


class NumpyFloor(NumpyTables):
    """The same with K/V in one array [slots, layers, K and V, heads, head_size], read and written
    by index.
    """

    def __init__(self, work: Workload, nodes: int, tokens: int) -> None:
        super().__init__(work, nodes, tokens)
        shape = len(self.refs) * self.size, work.layers, 2, work.heads, work.head_size
        self.torch_dtype = work.dtype
        # numpy has no bfloat16: its bits
        dtype = np.float32 if work.dtype == torch.float32 else np.uint16
        self.pool = np.zeros(shape, dtype)

    def _array(self, tensor: torch.Tensor) -> Any:
        return (tensor if self.pool.dtype == np.float32 else tensor.view(torch.uint16)).numpy()

    def arrange(self, tokens: KV) -> Any:
        """[B, n, layers, 2, heads, head_size]."""
        return self._array(torch.stack(tokens).permute(2, 4, 1, 0, 3, 5).contiguous())

    def begin(self, length: int, tokens: Any = None) -> Handle:
        made = super().begin(length)
        if tokens is not None:
            self.pool[self.written] = tokens
        return made

    def step(self, parents: Sequence[Handle], tokens: Any, new: int, queries: Any = None) -> Any:
        children = self.fork(parents, new)
        if len(self.copied):
            pages = self.pool.reshape(-1, self.size, *self.pool.shape[1:])
            pages[self.copied[:, 1]] = pages[self.copied[:, 0]]
        self.pool[self.written] = tokens
        starts = self.starts[children]
        ends = self.ends[children]
        width = (ends - starts).max()
        index = np.arange(width) + (ends - width)[:, None]  # padded on the left
        inside = index >= starts[:, None]
        pages = np.take_along_axis(
            self.tables[children], np.where(inside, index // self.size, 0), 1
        )
        # slot 0 is never written: zeros
        slots = np.where(inside, pages * self.size + index % self.size, 0)
        batch = self.pool[slots]  # [B, W, layers, 2, heads, head_size]
        if queries is not None:
            dense = torch.from_numpy(batch).view(self.torch_dtype).permute(2, 3, 0, 4, 1, 5)
            self.attend(
                queries,
                lambda layer: tuple(dense[layer]),
                lambda: causal(torch.from_numpy(inside), new),
            )
        return children

    def read(self, node: Handle) -> KV:
        dense = (
            torch.from_numpy(self.pool[self.slots(node)])
            .view(self.torch_dtype)
            .permute(1, 2, 3, 0, 4)
        )
        return dense[:, 0], dense[:, 1]

    def kv_bytes(self, lengths: Iterable[int]) -> int:
        return (len(self.refs) - 1 - self.free_count) * self.size * self.work.token_bytes
