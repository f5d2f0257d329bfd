"""Sequences: block tables over shared pages, and the plans that change them. No tensors in here.

A sequence is a row of parallel lists: its pages (a tuple, shared with the parent it was forked from), the
head offset of its first token, its length. Token i of a sequence lies at index j = start + i of its table,
that is in slot pages[j // page_size] * page_size + j % page_size. A table holds exactly the pages of the
half-open interval [start, start + length); an empty sequence holds none, and `start` is where its first token
will go.

Verbs that need pages are split in two: `plan` validates and computes without changing anything, `apply`
changes and cannot fail. Whoever writes the tensors does so between the two.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Iterable, Sequence

from paged_kv.allocator import PageAllocator
from paged_kv.errors import BadCount, CorruptCache, DuplicateSequence, ForeignHandle, StaleHandle

# handle = generation << 36 | tag << 28 | row; the tag tells caches apart
ROW_BITS, TAG_BITS = 28, 8
ROW_MASK = (1 << ROW_BITS) - 1
GENERATION = 1 << (ROW_BITS + TAG_BITS)
NO_PARENT = 0

Counts = int | Sequence[int]

_tags = itertools.count(1)


class Plan:
    """What `apply` will do: new tables of the rows, slots to write, pages to copy first.

    `slots` lists the slots of the new tokens row by row; `copies` pairs (source page, fresh page);
    `fresh` counts the pages taken from the free stack.
    """

    __slots__ = ("copies", "fork", "fresh", "lengths", "rows", "slots", "starts", "tables")

    def __init__(self, rows: list[int], fork: bool) -> None:
        self.rows, self.fork = rows, fork
        self.tables: list[tuple[int, ...]] = []
        self.starts: list[int] = []
        self.lengths: list[int] = []
        self.slots: list[int] = []
        self.copies: list[tuple[int, int]] = []
        self.fresh = 0


class BlockTables:
    """All sequences of one pool.

    >>> tables = BlockTables(PageAllocator(8, max_pages=8), page_size=4)
    >>> root, = tables.new(1)
    >>> plan = tables.plan([root], 6)
    >>> plan.fresh, plan.slots
    (2, [4, 5, 6, 7, 8, 9])
    >>> tables.apply(plan) == [root]
    True
    >>> child, = tables.fork([root])
    >>> plan = tables.plan([child], 1)          # the tail page is shared: it is copied first
    >>> plan.copies, plan.slots
    ([(2, 3)], [14])
    """

    def __init__(self, pages: PageAllocator, page_size: int) -> None:
        if page_size < 1:
            raise BadCount("page_size", page_size, ">= 1")
        self.pages, self.page_size = pages, page_size
        self._tag = next(_tags) % (1 << TAG_BITS)
        self._handles: list[int] = []  # of a live row its handle; of a free row the next one, inverted
        self._tables: list[tuple[int, ...]] = []
        self._starts: list[int] = []
        self._lengths: list[int] = []
        self._parents: list[int] = []  # handle of the parent, which may be stale
        self._free_rows: list[int] = []

    # -- reading ---------------------------------------------------------------------------------------

    @property
    def live_count(self) -> int:
        """Sequences that exist."""
        return len(self._handles) - len(self._free_rows)

    def live(self) -> list[int]:
        """Handles of all sequences that exist. Cost: O(rows)."""
        return [handle for handle in self._handles if handle > 0]

    def rows(self, seqs: Iterable[int]) -> list[int]:
        """Rows of the sequences. Raises StaleHandle or ForeignHandle."""
        seqs = list(seqs)
        handles = self._handles
        try:
            rows = [handle & ROW_MASK for handle in seqs]
            if [handles[row] for row in rows] == seqs:
                return rows
        except (TypeError, IndexError):
            pass
        raise self._explain(seqs)

    def distinct_rows(self, seqs: Iterable[int]) -> list[int]:
        """As `rows`, and raises DuplicateSequence where two are the same."""
        rows = self.rows(seqs)
        if len(set(rows)) != len(rows):
            row = next(row for row, times in Counter(rows).items() if times > 1)
            raise DuplicateSequence(self._handles[row])
        return rows

    def lengths(self, seqs: Iterable[int]) -> list[int]:
        """Tokens of each sequence."""
        return [self._lengths[row] for row in self.rows(seqs)]

    def windows(self, seqs: Iterable[int]) -> tuple[list[tuple[int, ...]], list[int], list[int]]:
        """Pages, start and length of each sequence."""
        rows = self.rows(seqs)
        tables, starts, lengths = self._tables, self._starts, self._lengths
        return [tables[row] for row in rows], [starts[row] for row in rows], [lengths[row] for row in rows]

    def freed_by(self, seqs: Iterable[int]) -> int:
        """Pages that releasing all of `seqs` would free. Cost: O(their pages)."""
        held = Counter(page for row in self.distinct_rows(seqs) for page in self._tables[row])
        refs = self.pages.refs
        return sum(refs[page] == count for page, count in held.items())

    def stored_tokens(self) -> int:
        """Slots that live sequences read, each counted once. Cost: O(all block tables)."""
        size = self.page_size
        used: set[int] = set()
        for row, handle in enumerate(self._handles):
            if handle > 0:
                start, pages = self._starts[row], self._tables[row]
                used.update(pages[i // size] * size + i % size for i in range(start, start + self._lengths[row]))
        return len(used)

    # -- sequences come and go ---------------------------------------------------------------------------

    def new(self, count: int, *, start: int = 0) -> list[int]:
        """Make `count` empty sequences whose first token goes to offset `start` of its page."""
        check_count("count", count, 0, None)
        check_count("start", start, 0, self.page_size - 1)
        return [self._add((), start, 0, NO_PARENT) for _ in range(count)]

    def fork(self, parents: Iterable[int], *, at: Counts | None = None) -> list[int]:
        """Make one child a parent, sharing the pages of its first `at` tokens (all by default)."""
        parents = list(parents)
        rows = self.rows(parents)
        lengths = [self._lengths[row] for row in rows]
        keep = lengths if at is None else checked_counts("at", at, lengths)
        children = []
        for parent, row, length in zip(parents, rows, keep):
            pages, start = self._tables[row], self._starts[row]
            kept = pages[: _pages_for(start, length, self.page_size)]
            refs = self.pages.refs
            for page in kept:
                refs[page] += 1
            children.append(self._add(kept, start, length, parent))
        return children

    def release(self, seqs: Iterable[int]) -> int:
        """Drop sequences and their references. Returns the number of pages that became free."""
        rows = self.distinct_rows(seqs)
        handles, tables, drop = self._handles, self._tables, self.pages.drop
        freed = 0
        for row in rows:
            freed += drop(tables[row])
            tables[row] = ()
            handles[row] = ~(handles[row] + GENERATION)
        self._free_rows.extend(rows)
        return freed

    def subtree(self, seq: int) -> list[int]:
        """`seq` and all descendants that hang on it by live parents. Cost: O(rows)."""
        self.rows([seq])
        children: dict[int, list[int]] = {}
        for handle, parent in zip(self._handles, self._parents):
            if handle > 0 and parent != NO_PARENT:
                children.setdefault(parent, []).append(handle)
        found = [seq]
        for handle in found:  # grows while it is walked
            found.extend(children.get(handle, ()))
        return found

    def siblings(self, seq: int) -> list[int]:
        """The other live children of the parent of `seq`, in row order. Cost: O(rows)."""
        parent = self._parents[self.rows([seq])[0]]
        if parent == NO_PARENT:
            return []
        return [h for h, p in zip(self._handles, self._parents) if p == parent and h > 0 and h != seq]

    # -- sequences grow and shrink -----------------------------------------------------------------------

    def plan(
        self,
        seqs: Iterable[int],
        count: Counts,
        *,
        fork: bool = False,
        slide: Counts = 0,
        anew: Sequence[int | None] | None = None,
    ) -> Plan:
        """Plan to drop `slide` tokens from the front and append `count`, in place or in forked children.

        A row with a number in `anew` becomes that many tokens in pages of its own instead, ending on a page's edge.
        Changes nothing. Where `plan.fresh` exceeds the free pages it is only a count: make room and plan again.
        """
        plan = Plan(self.rows(seqs) if fork else self.distinct_rows(seqs), fork)
        rows, size, slots, free = plan.rows, self.page_size, plan.slots, self.pages.free_count
        counts = checked_counts("count", count, len(rows))
        drops = checked_counts("slide", slide, [self._lengths[row] for row in rows]) if slide else [0] * len(rows)
        copied: dict[int, tuple[int, int]] = {}  # shared tail page -> rows that leave it, their furthest end
        for row, new, drop, whole in zip(rows, counts, drops, anew or itertools.repeat(None)):
            pages, start, length = self._tables[row], self._starts[row], self._lengths[row]
            if whole is not None:
                pages, start, length, new = (), -whole % size, 0, whole
            elif drop:
                length -= drop
                skipped, start = divmod(start + drop, size)
                pages = pages[skipped:] if length else ()
            end = start + length
            if new:
                if end % size and pages:  # a partial tail page is written to: it must belong to this row alone
                    pages = self._own_tail(plan, pages, end % size, copied)
                missing = -((end + new) // -size) - len(pages)
                if missing:
                    pages += self._peek(plan, missing)
                if plan.fresh <= free:
                    for index in range(end, end + new):
                        slots.append(pages[index // size] * size + index % size)
            plan.tables.append(pages)
            plan.starts.append(start)
            plan.lengths.append(length + new)
        return plan

    def _own_tail(
        self, plan: Plan, pages: tuple[int, ...], end: int, copied: dict[int, tuple[int, int]]
    ) -> tuple[int, ...]:
        """The table with a tail page to write to from offset `end`: the same where no other row reads it from there on.

        Rows of this plan that leave the page still read it until the plan is applied, which may never happen.
        """
        tail = pages[-1]
        gone, furthest = copied.get(tail, (0, 0))
        if not plan.fork and self.pages.refs[tail] - gone <= 1 and furthest <= end:
            return pages
        copied[tail] = gone + 1, max(furthest, end)
        fresh = self._peek(plan, 1)
        plan.copies.append((tail, fresh[0]))
        return pages[:-1] + fresh

    def apply(self, plan: Plan) -> list[int]:
        """Carry out a plan made just before. Returns the sequences (the children, where it forks)."""
        free, refs, handles = self.pages.free, self.pages.refs, self._handles
        if plan.fresh:
            del free[-plan.fresh :]
        if plan.fork:
            for table in plan.tables:
                for page in table:
                    refs[page] += 1
            parents = [handles[row] for row in plan.rows]
            return list(map(self._add, plan.tables, plan.starts, plan.lengths, parents))
        for row, table, start, length in zip(plan.rows, plan.tables, plan.starts, plan.lengths):
            self._set(row, table, start, length)
        return [handles[row] for row in plan.rows]

    def slide(self, seqs: Iterable[int], count: Counts) -> int:
        """Drop tokens from the front; whole pages that fall out lose one reference. Returns the pages freed."""
        free = self.pages.free_count
        self.apply(self.plan(seqs, 0, slide=count))
        return self.pages.free_count - free

    def truncate(self, seqs: Iterable[int], count: Counts) -> int:
        """Drop tokens from the end; whole pages that fall out lose one reference. Returns the pages freed."""
        free = self.pages.free_count
        rows = self.distinct_rows(seqs)
        drops = checked_counts("count", count, [self._lengths[row] for row in rows])
        for row, drop in zip(rows, drops):
            start, length = self._starts[row], self._lengths[row] - drop
            self._set(row, self._tables[row][: _pages_for(start, length, self.page_size)], start, length)
        return self.pages.free_count - free

    # -- inside ------------------------------------------------------------------------------------------

    def _add(self, pages: tuple[int, ...], start: int, length: int, parent: int) -> int:
        if self._free_rows:
            row = self._free_rows.pop()
            handle = self._handles[row] = ~self._handles[row]
            self._tables[row], self._starts[row], self._lengths[row] = pages, start, length
            self._parents[row] = parent
            return handle
        handle = GENERATION | self._tag << ROW_BITS | len(self._handles)
        self._handles.append(handle)
        self._tables.append(pages)
        self._starts.append(start)
        self._lengths.append(length)
        self._parents.append(parent)
        return handle

    def _set(self, row: int, table: tuple[int, ...], start: int, length: int) -> None:
        """Replace a table: the new one is held before the old one is let go, so that no shared page is freed."""
        refs, old = self.pages.refs, self._tables[row]
        self._tables[row], self._starts[row], self._lengths[row] = table, start, length
        if table != old:
            for page in table:
                refs[page] += 1
            self.pages.drop(old)

    def _peek(self, plan: Plan, count: int) -> tuple[int, ...]:
        """The next pages of the free stack, which stay there; one null page where the stack is too short."""
        free, first = self.pages.free, plan.fresh + 1
        plan.fresh += count
        if plan.fresh > len(free):
            return (0,)
        return (free[-first],) if count == 1 else tuple(free[-first : -first - count : -1])

    def _explain(self, seqs: list[int]) -> StaleHandle | ForeignHandle:
        for handle in seqs:
            try:
                handle = operator.index(handle)
            except TypeError:
                return ForeignHandle(handle)
            row = handle & ROW_MASK
            tag = handle >> ROW_BITS & ((1 << TAG_BITS) - 1)
            if tag != self._tag or row >= len(self._handles) or handle < GENERATION:
                return ForeignHandle(handle)
            newest = self._handles[row] if self._handles[row] > 0 else ~self._handles[row] - GENERATION
            if handle > newest:
                return ForeignHandle(handle)
            if self._handles[row] != handle:
                return StaleHandle(handle)
        return ForeignHandle(seqs)

    def check(self) -> None:
        """Raise CorruptCache unless every invariant of pages and tables holds. Cost: O(everything)."""
        holders: Counter[int] = Counter()
        for row, handle in enumerate(self._handles):
            table, start, length = self._tables[row], self._starts[row], self._lengths[row]
            if handle < 0:
                if table:
                    raise CorruptCache(f"free row {row} holds pages {table}")
                continue
            if len(set(table)) != len(table):
                raise CorruptCache(f"sequence {handle:#x} holds a page twice: {table}")
            if not 0 <= start < self.page_size or len(table) != _pages_for(start, length, self.page_size):
                raise CorruptCache(f"sequence {handle:#x}: pages {table}, start {start}, length {length}")
            holders.update(table)
        free_rows = {row for row, handle in enumerate(self._handles) if handle < 0}
        if free_rows != set(self._free_rows) or len(free_rows) != len(self._free_rows):
            raise CorruptCache(f"free rows {sorted(self._free_rows)}, rows without a sequence {sorted(free_rows)}")
        self.pages.check(holders)


def _pages_for(start: int, length: int, page_size: int) -> int:
    return -(-(start + length) // page_size) if length else 0


def check_count(name: str, value: int, low: int, high: int | None) -> None:
    """Raise BadCount unless `value` is a whole number in [low, high]."""
    if type(value) is not int or value < low or (high is not None and value > high):
        raise BadCount(name, value, f"an int >= {low}" if high is None else f"an int from {low} to {high}")


def checked_counts(name: str, counts: Counts, limits: int | list[int]) -> list[int]:
    """One checked count a row, each from 0 to its limit; an int stands for every row, as int `limits` rows do."""
    size = limits if isinstance(limits, int) else len(limits)
    if type(counts) is int and counts >= 0 and isinstance(limits, int):
        return [counts] * size
    values = list(counts) if isinstance(counts, Sequence) else [counts] * size
    if len(values) != size:
        raise BadCount(f"{name} (one a sequence)", values, f"{size} numbers")
    for row, value in enumerate(values):
        if type(value) is not int or value < 0 or not (isinstance(limits, int) or value <= limits[row]):
            check_count(name, value, 0, None if isinstance(limits, int) else limits[row])
    return values
