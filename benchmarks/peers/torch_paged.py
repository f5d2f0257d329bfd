"""torch's experimental PagedAttention: page tables for FlexAttention, without sharing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch.nn.attention.experimental._paged_attention import PagedAttention

from .peer import KV, Handle, Peer, causal
from .workload import Workload

NO_SHARING = (
    "no sharing: rows that name one page overwrite each other, and erasing one row "
    "frees the page of both"
)


class TorchPagedPeer(Peer):
    """PagedAttention with one row a node. It cannot fork, so a child is a row of its own with a
    copy.
    """

    name = "torch PagedAttention"
    note = "copies the context"
    cannot: ClassVar[dict[str, str]] = {"fork": NO_SHARING}
    copies = True

    def __init__(self, work: Workload, nodes: int, tokens: int) -> None:
        super().__init__(work, nodes, tokens)
        pages = nodes * -(-work.window // work.page_size)
        self.paged = PagedAttention(pages, work.page_size, nodes, device="cpu")
        shape = work.layers, 2, 1, work.heads, pages * work.page_size, work.head_size
        self.pool = torch.zeros(shape, dtype=work.dtype)
        self.rows = list(range(nodes - 1, -1, -1))
        self.lengths = [0] * nodes

    def begin(self, length: int, tokens: Any = None) -> Handle:
        (row,) = self._reserved([length])
        if tokens is not None:
            self._assign([row], [0], length, tokens)
        return row

    def _reserved(self, lengths: Sequence[int]) -> list[int]:
        rows = [self.rows.pop() for _ in lengths]
        for row, length in zip(rows, lengths):
            self.paged.reserve(torch.tensor([row]), torch.tensor([length]))
            self.lengths[row] = length
        return rows

    def _assign(self, rows: Sequence[int], ends: Sequence[int], new: int, tokens: Any) -> None:
        batch = torch.tensor(rows)
        places = torch.tensor(ends)[:, None] + torch.arange(new)
        for layer, (keys, values) in enumerate(zip(*tokens)):
            self.paged.assign(batch, places, keys, values, *self.pool[layer])

    def fork(self, parents: Sequence[Handle], new: int) -> list[Handle]:
        raise NotImplementedError

    def step(
        self, parents: Sequence[Handle], tokens: Any, new: int, queries: Any = None
    ) -> list[Handle]:
        ends = [self.lengths[parent] for parent in parents]
        children = self._reserved([end + new for end in ends])
        for parent, child, end in zip(parents, children, ends):
            self._assign([child], [0], end, self.read(parent, batch=1))
        self._assign(children, ends, new, tokens)
        width = max(ends) + new
        index = torch.tensor(ends)[:, None] + new
        columns = torch.arange(width) - (width - index)  # padded on the left
        kept = columns >= 0
        pages = self.paged.page_table[torch.tensor(children)].gather(
            1, columns.clamp(min=0) // self.work.page_size
        )
        slots = torch.where(kept, pages * self.work.page_size + columns % self.work.page_size, 0)
        batch = self.pool[:, :, 0].index_select(3, slots.flatten()).unflatten(3, slots.shape)
        dense = batch.transpose(2, 3)  # [layers, 2, B, heads, W, head_size]
        if queries is not None:
            self.attend(queries, lambda layer: tuple(dense[layer]), lambda: causal(kept, new))
        return children

    def release(self, nodes: Sequence[Handle]) -> None:
        for row in nodes:
            self.paged.erase(torch.tensor([row]))
            self.rows.append(row)

    def slots(self, node: Handle) -> list[int]:
        size = self.work.page_size
        pages = self.paged.page_table[node].tolist()
        return [pages[index // size] * size + index % size for index in range(self.lengths[node])]

    def read(self, node: Handle, batch: int | None = None) -> KV:
        dense = self.pool[:, :, 0, :, self.slots(node)]
        if batch is not None:
            dense = dense[:, :, None]
        return dense[:, 0], dense[:, 1]

    def kv_bytes(self, lengths: Iterable[int]) -> int:
        size = self.work.page_size
        return sum(-(-length // size) for length in lengths) * size * self.work.token_bytes


def aliases_are_lost() -> bool:
    """Show it: two rows that name one page, as a fork would. What one writes the other reads; freed
    twice.
    """
    paged = PagedAttention(4, 2, 4, device="cpu")
    keys = torch.zeros(1, 1, 8, 1)
    values = torch.zeros(1, 1, 8, 1)
    paged.reserve(torch.tensor([0]), torch.tensor([2]))
    paged.page_table[1] = paged.page_table[0]
    paged.capacity[1] = paged.capacity[0]
    for row in range(2):  # each appends its second token
        token = torch.full((1, 1, 1, 1), 1.0 + row)
        paged.assign(torch.tensor([row]), torch.tensor([[1]]), token, token, keys, values)
    slot = int(paged.page_table[0, 0]) * 2 + 1
    overwritten = float(keys[0, 0, slot, 0]) == 2.0  # row 0 wrote 1
    for row in range(2):
        paged.erase(torch.tensor([row]))
    return overwritten and len(set(paged.empty_pages)) < len(paged.empty_pages)
