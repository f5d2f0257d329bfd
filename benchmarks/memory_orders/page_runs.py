"""Page numbers as a used pool gives them out, and how far they lie in runs. No tensors in here.

Windows are tables of the real `BlockTables`, after many forks, appends and releases. Beside the
allocator of the package stand three that sort or search the free pages before every step. They
are simulated: the wanted pages are put on top of the free stack, where the next plan takes them.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from paged_kv.pages.allocator import PageAllocator
from paged_kv.pages.audit import audit
from paged_kv.pages.block_tables import BlockTables

BATCH = 8
FULL = 0.8  # share of the pool that is in use before sequences are released
STEPS = 50  # of a search
MOMENTS = 20  # at which a pool is looked at, in the second half of its life
Table = tuple[int, ...]


class Shape(NamedTuple):
    """What the bookkeeping has to know of a workload."""

    prompts: Sequence[int]  # tokens of a root, one of these
    most: int | None  # tokens of the longest window: older ones slide out
    page: int
    new: int
    pages: int  # of the pool, with the null page
    trees: int  # that are searched at once: a batch takes its rows from all of them in turn


class Need(NamedTuple):
    """What one row of a step takes."""

    tail: int  # the page before, 0 where the row has none
    pages: int


# An allocator gets the needs of a step and the free pages, sorted, and returns the pages to take.
Choose = Callable[[Sequence[Need], list[int]], list[int]]


def spans(pages: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive ascending pages: the first page and their number."""
    first = -1
    count = 0
    for page in pages:
        if count and page == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first = page
        count = 1
    if count:
        yield first, count


def at_least(pages: int, tables: Iterable[Table]) -> list[Table]:
    """Those that are long enough."""
    return [table for table in tables if len(table) >= pages]


def mean_run(tables: Iterable[Table]) -> float:
    """Pages of all windows, over the runs that they lie in."""
    pages = 0
    runs = 0
    for table in tables:
        pages += len(table)
        runs += sum(1 for _ in spans(table))
    return pages / runs if runs else 0.0


class Holes:
    """The free pages as runs, the shortest first."""

    def __init__(self, free: Sequence[int]) -> None:
        self.sizes = sorted((count, first) for first, count in spans(free))
        self.starts = dict(spans(free))

    def cut(self, first: int, count: int) -> list[int]:
        """Take up to `count` pages from the front of the hole that begins at `first`, if any."""
        size = self.starts.pop(first, 0)
        if not size:
            return []
        self.sizes.pop(bisect_left(self.sizes, (size, first)))
        taken = min(size, count)
        if size > taken:
            rest = (size - taken, first + taken)
            self.sizes.insert(bisect_left(self.sizes, rest), rest)
            self.starts[first + taken] = size - taken
        return list(range(first, first + taken))

    def fitting(self, count: int) -> int:
        """Where the shortest hole begins that has room for `count`, or else the longest."""
        at = bisect_left(self.sizes, (count, 0))
        return self.sizes[min(at, len(self.sizes) - 1)][1]

    def longest(self, _: int) -> int:
        """Where the longest hole begins."""
        return self.sizes[-1][1]


def after_tail(
    needs: Sequence[Need], free: list[int], place: Callable[[Holes, int], int]
) -> list[int]:
    """The page after the tail first, for all rows; then holes as `place` finds them."""
    holes = Holes(free)
    taken = [holes.cut(need.tail + 1, need.pages) if need.tail else [] for need in needs]
    for need, pages in zip(needs, taken):
        while len(pages) < need.pages:
            missing = need.pages - len(pages)
            pages += holes.cut(place(holes, missing), missing)
    return [page for pages in taken for page in pages]


def lowest_first(needs: Sequence[Need], free: list[int]) -> list[int]:
    """The lowest free pages, whoever takes them."""
    return free[: sum(need.pages for need in needs)]


def best_fit(needs: Sequence[Need], free: list[int]) -> list[int]:
    """Beside the tail, else the shortest hole that is long enough: long holes stay for prompts."""
    return after_tail(needs, free, Holes.fitting)


def roomy(needs: Sequence[Need], free: list[int]) -> list[int]:
    """Beside the tail, else at the front of the longest hole: there a sequence can go on."""
    return after_tail(needs, free, Holes.longest)


ALLOCATORS: dict[str, Choose | None] = {
    "of the package": None,
    "lowest first": lowest_first,
    "best fit": best_fit,
    "longest hole": roomy,
}


class Pool:
    """Sequences that come and go, with an allocator of choice."""

    def __init__(self, shape: Shape, allocator: str, seed: int = 0) -> None:
        self.shape = shape
        self.choose = ALLOCATORS[allocator]
        self.random = random.Random(seed)
        pages = PageAllocator(shape.pages - 1, max_pages=shape.pages - 1)
        self.tables = BlockTables(pages, shape.page)
        self.live: list[int] = []
        self.trees: list[list[int]] = []  # of the latest searches
        self.done = 0  # forks, appends and releases so far, each of one sequence

    def grow(self, seqs: list[int], count: int | list[int], *, fork: bool = False) -> list[int]:
        """Append in place or in children; what is too long slides. Makes room by releases."""
        while True:
            slide = self._slides(seqs, count)
            plan = self.tables.plan(seqs, count, fork=fork)
            if plan.fresh <= self.tables.books.pages.free_count:
                break
            self.release([seq for seq in self.drawn(BATCH) if seq not in seqs])
        if self.choose and plan.fresh:
            self._arrange([becomes[0] for becomes in plan.becomes], plan.fresh)
            plan = self.tables.plan(seqs, count, fork=fork)
        grown = self.tables.carry_out(plan)
        if any(slide):
            self.tables.slide(grown, slide)
        self.done += len(seqs) * (1 + fork)
        if fork:
            self.live += grown
        return grown

    def _slides(self, seqs: list[int], count: int | list[int]) -> list[int]:
        lengths = self.tables.books.lengths(seqs)
        counts = count if isinstance(count, list) else [count] * len(seqs)
        most = self.shape.most
        if most is None:
            return [0] * len(seqs)
        return [min(length, max(0, length + new - most)) for length, new in zip(lengths, counts)]

    def _arrange(self, tables: list[Table], fresh: int) -> None:
        """Put the pages that the allocator chooses on top of the free stack."""
        assert self.choose
        pages = self.tables.books.pages
        new = set(pages.peek(fresh))
        needs = []
        for table in tables:
            kept = [page for page in table if page not in new]
            needs.append(Need(kept[-1] if kept else 0, len(table) - len(kept)))
        free = sorted(pages.free)
        chosen = self.choose(needs, free)
        taken = set(chosen)
        pages.free[:] = [page for page in reversed(free) if page not in taken] + chosen[::-1]

    def roots(self, count: int) -> list[int]:
        """New sequences with a prompt each. One that fills whole pages up to its end."""
        made = []
        for _ in range(count):
            tokens = self.random.choice(self.shape.prompts)
            start = -tokens % self.shape.page
            seqs = self.tables.new(1, start=start)
            self.live += self.grow(seqs, tokens)
            made += seqs
        return made

    def drawn(self, count: int) -> list[int]:
        """Different live sequences."""
        return self.random.sample(self.live, min(count, len(self.live)))

    def release(self, seqs: list[int]) -> None:
        """Let these sequences go."""
        gone = set(seqs)
        self.tables.release(seqs)
        self.live = [seq for seq in self.live if seq not in gone]
        self.done += len(seqs)

    @property
    def full(self) -> bool:
        """Whether it is time to release."""
        pages = self.tables.books.pages
        return pages.used_count > FULL * pages.capacity or len(self.live) > 2 * self.shape.pages

    def fill(self) -> None:
        """Prompts one after the other, until the pool is full: a fresh one."""
        while not self.full:
            self.roots(1)

    def churn(self, operations: int) -> None:
        """Forks, appends and releases of sequences drawn at random: hard on every allocator."""
        while self.done < operations or not self.full:
            what = self.random.random()
            if self.full or (what < 0.2 and len(self.live) > 4 * BATCH):
                self.release(self.drawn(BATCH))
            elif what < 0.3 or not self.live:
                self.roots(1)
            elif what < 0.5:
                self.grow(self.drawn(BATCH), self.shape.new)
            else:
                parents = self.random.choices(self.live, k=BATCH)
                self.grow(parents, self.shape.new, fork=True)

    def search(self, operations: int) -> None:
        """Tree searches one after the other: of each tree one node is kept, the next root."""
        while self.done < operations:
            self.trees = [[root] for root in self._next_roots()]
            for _ in range(STEPS):
                rows = [self.trees[row % len(self.trees)] for row in range(BATCH)]
                parents = [self.random.choice(tree) for tree in rows]
                for tree, child in zip(rows, self.grow(parents, self.shape.new, fork=True)):
                    tree.append(child)

    def _next_roots(self) -> list[int]:
        if not self.trees:
            return self.roots(self.shape.trees)
        roots = [self.random.choice(tree) for tree in self.trees]
        self.release([seq for tree in self.trees for seq in tree if seq not in roots])
        self._new_episodes(roots)
        return roots

    def _new_episodes(self, roots: list[int]) -> None:
        """An eighth of the roots, on average, give way to new prompts."""
        for place, root in enumerate(roots):
            if self.random.random() < 1 / BATCH:
                self.release([root])
                roots[place : place + 1] = self.roots(1)

    def wear(self, kind: str, operations: int) -> None:
        """Go on until so many operations were done in all: `fresh`, `random` or `searches`."""
        if kind == "fresh":
            self.fill()
        elif kind == "random":
            self.churn(operations)
        else:
            self.search(operations)

    def windows(self) -> list[Table]:
        """The tables of live sequences."""
        return [record[0] for _, record in self.tables.books.items()]


def used(
    shape: Shape, allocator: str, kind: str, operations: int, moments: int = MOMENTS
) -> tuple[Pool, list[Table]]:
    """A pool after so many operations, and all tables of several moments in the second half."""
    pool = Pool(shape, allocator)
    tables: list[Table] = []
    for moment in range(1, 2 * moments + 1):
        pool.wear(kind, operations * moment // (2 * moments))
        if moment > moments:
            tables += pool.windows()
    audit(pool.tables.books)
    return pool, tables
