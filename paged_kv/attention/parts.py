"""What is attended in one go: runs of pages, side by side as the groups of a part. No tensors in
here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

from paged_kv.attention.contract import Rows
from paged_kv.attention.runs import TOP, Forest, Run


class Group(NamedTuple):
    """A run of pages, and the queries of all rows that read it."""

    pages: tuple[int, ...]
    first: int  # index in the sequence of the first slot
    end: int  # one behind the index of the last token
    query: int  # number of the first query
    queries: int

    @property
    def tokens(self) -> int:
        """Tokens, and slots in front of them."""
        return self.end - self.first


class Part(NamedTuple):
    """Groups that are attended in one batch, padded to the largest."""

    groups: list[Group]
    slots: int  # of each group, a multiple of the page size
    queries: int  # of each group


class Batch:
    """The queries of a step, row by row in the order of a forest, and the tokens that they see."""

    def __init__(self, rows: Rows, page_size: int, forest: Forest) -> None:
        self.forest = forest
        self.page_size = page_size
        self.counts = [rows.counts[row] for row in forest.order]
        self.lengths = [rows.lengths[row] for row in forest.order]
        self.edges = [0, *accumulate(self.counts)]  # the first query of each row, and their number
        self.places = [  # index of each query in its sequence
            length + new for length, count in zip(self.lengths, self.counts) for new in range(count)
        ]

    @property
    def queries(self) -> int:
        """New tokens of all rows."""
        return self.edges[-1]

    def group(self, run: Run, window: int | None) -> Group | None:
        """A run without the pages in front that nobody sees any more; None if it is none of them
        sees any.
        """
        first = run.first
        pages = run.pages
        if window is not None:
            seen = min(self.lengths[run.begin_row : run.end_row]) - window + 1
            if seen >= run.end:
                return None
            skipped = max(0, seen - first) // self.page_size
            pages = pages[skipped:]
            first += skipped * self.page_size
        query = self.edges[run.begin_row]
        return Group(pages, first, run.end, query, self.edges[run.end_row] - query)

    def levels(self, kept: Sequence[bool], window: int | None) -> list[list[Group]]:
        """The groups of the shared runs that are kept, level by level, and behind them those of the
        rests: no query twice in a level.

        A run that is not kept goes to all that goes on from it, which reads its pages once more.
        """
        shared = self.forest.shared
        runs = [run for run, keep in zip(shared, kept) if keep]
        levels: dict[int, list[Group]] = {}
        for run in runs:
            group = self.group(_grown(run, shared, kept), window)
            if group is not None:
                levels.setdefault(run.depth, []).append(group)
        rests = [self.group(_grown(run, shared, kept), window) for run in self.forest.rests]
        found = [group for group in rests if group is not None]
        return [*levels.values(), *([found] if found else [])]


def divided(level: list[Group], most: int, page_size: int) -> list[list[Group]]:
    """A level as several, none with more than `most` slots in a group."""
    pages = max(1, most // page_size)
    levels: list[list[Group]] = []
    for group in level:
        for number, at in enumerate(range(0, len(group.pages), pages)):
            if number == len(levels):
                levels.append([])
            first = group.first + at * page_size
            piece = group.pages[at : at + pages]
            end = min(group.end, first + len(piece) * page_size)
            levels[number].append(group._replace(pages=piece, first=first, end=end))
    return levels


def _grown(run: Run, shared: Sequence[Run], kept: Sequence[bool]) -> Run:
    """A run with the pages of those that it goes on from and that are not kept."""
    pages = run.pages
    first = run.first
    parent = run.parent
    while parent != TOP and not kept[parent]:
        above = shared[parent]
        pages = above.pages + pages
        first = above.first
        parent = above.parent
    return run._replace(pages=pages, first=first)


def parted(
    groups: list[Group],
    page_size: int,
    most_waste: float,
    most_slots: int,
    cost: Callable[[int, int], float],
) -> list[Part]:
    """Groups as parts of about one size each: what padding costs in a part is at most `most_waste`.

    `cost(slots, queries)` is what a group costs.
    """
    sized = [(-(-group.tokens // page_size) * page_size, group.queries, group) for group in groups]
    sized.sort(key=lambda each: (-each[0], -each[1], each[2].query))
    parts: list[Part] = []
    members: list[Group] = []
    slots = queries = 0
    waste = 0.0
    for wide, tall, group in sized:
        higher = max(queries, tall)
        more = cost(slots, higher) - cost(wide, tall)
        more += len(members) * (cost(slots, higher) - cost(slots, queries))
        full = (len(members) + 1) * slots > most_slots
        if members and (full or waste + more > most_waste):
            parts.append(Part(_in_order(members), slots, queries))
            members = []
        if not members:
            slots = wide
            higher = tall
            more = waste = 0.0
        members.append(group)
        queries = higher
        waste += more
    if members:
        parts.append(Part(_in_order(members), slots, queries))
    return parts


def _in_order(groups: list[Group]) -> list[Group]:
    return sorted(groups, key=lambda group: group.query)
