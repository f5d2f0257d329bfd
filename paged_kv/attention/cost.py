"""What attention costs, by shapes: which runs of pages are worth a part of their own, and whether
reading each row by itself is cheaper. No tensors in here.

The constants were measured as docs/attention.md says; they are of one core of an AMD EPYC (Zen 4).
Only their ratios matter, which differ less from machine to machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from paged_kv.attention.contract import Rows
from paged_kv.attention.parts import Batch, Group, Part, divided, parted
from paged_kv.attention.runs import TOP

PART = 75e-6  # seconds that a part takes in a layer beside its work: some ten calls of torch
LAYER = 60e-6  # that queries, merge and result take in a layer
ROWS_LAYER = 45e-6  # that gather and attention by rows take in a layer
BYTE = 1 / 8.3e9  # to read a byte of K or V out of the pages, and once more out of the scratch
SCORE = 0.7e-9  # softmax of one number
FLOP = 1 / 80e9
ROWS_BYTE = 1 / 6.9e9  # to read a byte by rows, with one query at a time
ROWS_FLOP = 1 / 55e9
HALF = 40e-9  # what a slot of a head takes more where numbers have 16 bits, to be made wider
ROWS_HALF = 100e-9  # the same by rows, where torch is slow at single queries
MOST_SLOTS = 4096  # of a group: longer runs are attended piece by piece
MOST_PART_SLOTS = 16384  # of all groups of a part that has several


class Shape(NamedTuple):
    """What one token takes in a layer."""

    heads: int  # of K/V
    head_size: int
    value_head_size: int
    itemsize: int
    groups: int = 1  # query heads of each K/V head

    @property
    def token_bytes(self) -> int:
        """K and V of one token in one layer."""
        return self.heads * (self.head_size + self.value_head_size) * self.itemsize

    @property
    def score_seconds(self) -> float:
        """One query and one token, all heads."""
        flops = 2 * (self.head_size + self.value_head_size)
        return self.heads * self.groups * (flops * FLOP + SCORE)

    @property
    def half_heads(self) -> int:
        """Heads whose numbers have 16 bits."""
        return self.heads if self.itemsize == 2 else 0

    def group_seconds(self, slots: int, queries: int) -> float:
        """A group of a part, in a layer."""
        slot = self.token_bytes * BYTE + self.half_heads * HALF
        return slots * (slot + queries * self.score_seconds)

    def part_seconds(self, part: Part) -> float:
        """A part, in a layer."""
        return PART + len(part.groups) * self.group_seconds(part.slots, part.queries)

    def tree_seconds(self, parts: Sequence[Part]) -> float:
        """All parts, in a layer."""
        return LAYER + sum([self.part_seconds(part) for part in parts])

    def rows_seconds(self, rows: int, slots: int, queries: int) -> float:
        """Rows one by one, padded to one length, in a layer; K and V once for each query head."""
        flops = 2 * self.heads * (self.head_size + self.value_head_size) * queries
        slot = self.token_bytes * ROWS_BYTE + flops * ROWS_FLOP + self.half_heads * ROWS_HALF
        return ROWS_LAYER + rows * slots * slot * self.groups

    def dense_seconds(self, groups: Sequence[Group]) -> float:
        """As `rows_seconds`, of groups that are rows."""
        slots = max([group.tokens for group in groups], default=0)
        queries = max([group.queries for group in groups], default=0)
        return self.rows_seconds(len(groups), slots, queries)


def worth_keeping(batch: Batch, window: int | None, shape: Shape) -> list[bool]:
    """Which shared runs are attended by themselves, decided level by level from below.

    A level is kept where reading its pages once, and not once for each branch above them, saves
    more than a part costs.
    """
    shared = batch.forest.shared
    branches = [0] * len(shared)  # groups that go on from a run, and would have to read its pages
    for rest in batch.forest.rests:
        if rest.parent != TOP:
            branches[rest.parent] += 1
    kept = [True] * len(shared)
    levels: dict[int, list[int]] = {}
    for number, run in enumerate(shared):
        levels.setdefault(run.depth, []).append(number)
    for depth in sorted(levels, reverse=True):
        saved = 0
        for number in levels[depth]:
            group = batch.group(shared[number], window)
            if group is not None:
                saved += (branches[number] - 1) * group.tokens
        keep = saved * shape.token_bytes * BYTE > PART
        for number in levels[depth]:
            kept[number] = keep
            parent = shared[number].parent
            if parent != TOP:
                branches[parent] += 1 if keep else branches[number]
    return kept


def arranged(
    batch: Batch, window: int | None, shape: Shape, depth: int | None = None
) -> list[Part]:
    """The parts that a batch is attended in; with `depth`, from so many levels of shared runs."""
    if depth is None:
        kept = worth_keeping(batch, window, shape)
    else:
        kept = [run.depth < depth for run in batch.forest.shared]
    levels = batch.levels(kept, window)
    return [
        part
        for level in levels
        for piece in divided(level, MOST_SLOTS, batch.page_size)
        for part in parted(piece, batch.page_size, PART, MOST_PART_SLOTS, shape.group_seconds)
    ]


def rows_are_few(rows: Rows, window: int | None, shape: Shape) -> bool:
    """Whether reading each row by itself costs no more than two parts do beside their work, so that
    nothing needs to be planned: a run that is shared, and what is not.
    """
    queries = max(rows.counts, default=0)
    slots = max(rows.lengths, default=0) + queries
    if window is not None:
        slots = min(slots, window + queries)
    return shape.rows_seconds(len(rows.counts), slots, queries) <= LAYER + 2 * PART


def rows_are_cheaper(batch: Batch, window: int | None, shape: Shape, parts: Sequence[Part]) -> bool:
    """Whether a layer costs less where each row is read by itself than in these parts."""
    levels = batch.levels([False] * len(batch.forest.shared), window)
    rows = levels[0] if levels else []
    return shape.dense_seconds(rows) <= shape.tree_seconds(parts)
