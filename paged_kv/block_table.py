"""Sequences: block tables over shared pages, and the plans that change them. No tensors in here.

A sequence is an immutable record: its pages (a tuple, shared with the parent it was forked from), the head offset of
its first token, its length, its parent. Token i of a sequence lies at index j = start + i of its table, that is in
slot pages[j // page_size] * page_size + j % page_size. A table holds exactly the pages of the half-open interval
[start, start + length); an empty sequence holds none, and `start` is where its first token will go.

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
from paged_kv.plan import Plan

# handle = tag << 44 | number: the tag tells caches apart, numbers count up from 1 and are never used twice.
# 44 bits last for 500,000 years of a million forks a second, and a handle stays exact as a double.
NUMBER_BITS = 44
NO_PARENT = 0

Counts = int | Sequence[int]
Record = tuple[tuple[int, ...], int, int, int]  # pages, start, length, handle of the parent, which may be stale

_tags = itertools.count(1)


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
        self._first = (1 + next(_tags) % 255 << NUMBER_BITS) + 1
        self._next = self._first
        self._live: dict[int, Record] = {}

    # -- reading ---------------------------------------------------------------------------------------

    @property
    def live_count(self) -> int:
        """Sequences that exist."""
        return len(self._live)

    def live(self) -> list[int]:
        """Handles of all sequences that exist, the oldest first. Cost: O(sequences)."""
        return list(self._live)

    def records(self, seqs: Sequence[int]) -> list[Record]:
        """Pages, start, length and parent of each sequence. Raises StaleHandle or ForeignHandle."""
        live = self._live
        try:
            return [live[seq] for seq in seqs]
        except (KeyError, TypeError):
            raise self._explain(seqs) from None

    def distinct_records(self, seqs: Sequence[int]) -> list[Record]:
        """As `records`, and raises DuplicateSequence where two sequences are the same."""
        records = self.records(seqs)
        if len(set(seqs)) != len(seqs):
            raise DuplicateSequence(next(int(seq) for seq, times in Counter(seqs).items() if times > 1))
        return records

    def lengths(self, seqs: Iterable[int]) -> list[int]:
        """Tokens of each sequence."""
        return [record[2] for record in self.records(_listed(seqs))]

    def windows(self, seqs: Iterable[int]) -> tuple[list[tuple[int, ...]], list[int], list[int]]:
        """Pages, start and length of each sequence."""
        records = self.records(_listed(seqs))
        return [record[0] for record in records], [record[1] for record in records], [record[2] for record in records]

    def freed_by(self, seqs: Iterable[int]) -> int:
        """Pages that releasing all of `seqs` would free. Cost: O(their pages)."""
        held = Counter(page for record in self.distinct_records(_listed(seqs)) for page in record[0])
        refs = self.pages.refs
        return sum(refs[page] == count for page, count in held.items())

    def stored_tokens(self) -> int:
        """Slots that live sequences read, each counted once. Cost: O(all block tables)."""
        size = self.page_size
        used: set[int] = set()
        for pages, start, length, _ in self._live.values():
            used.update(pages[i // size] * size + i % size for i in range(start, start + length))
        return len(used)

    # -- sequences come and go ---------------------------------------------------------------------------

    def new(self, count: int, *, start: int = 0) -> list[int]:
        """Make `count` empty sequences whose first token goes to offset `start` of its page."""
        check_count("count", count, 0, None)
        check_count("start", start, 0, self.page_size - 1)
        return self._add([((), start, 0, NO_PARENT)] * count)

    def fork(self, parents: Iterable[int], *, at: Counts | None = None) -> list[int]:
        """Make one child a parent, sharing the pages of its first `at` tokens (all by default)."""
        parents = _listed(parents)
        records = self.records(parents)
        lengths = [record[2] for record in records]
        keep = lengths if at is None else checked_counts("at", at, lengths)
        children = []
        for parent, (pages, start, _, _), length in zip(parents, records, keep):
            kept = pages[: _pages_for(start, length, self.page_size)]
            self.pages.hold(kept)
            children.append((kept, start, length, parent))
        return self._add(children)

    def release(self, seqs: Iterable[int]) -> int:
        """Drop sequences and their references. Returns the number of pages that became free."""
        seqs = _listed(seqs)
        records = self.distinct_records(seqs)
        for seq in seqs:
            del self._live[seq]
        return self.pages.drop(itertools.chain.from_iterable(record[0] for record in records))

    def subtree(self, seq: int) -> list[int]:
        """`seq` and all descendants that hang on it by live parents. Cost: O(sequences)."""
        self.records([seq])
        children: dict[int, list[int]] = {}
        for handle, record in self._live.items():
            children.setdefault(record[3], []).append(handle)
        found = [seq]
        for handle in found:  # grows while it is walked
            found.extend(children.get(handle, ()))
        return found

    def siblings(self, seq: int) -> list[int]:
        """The other live children of the parent of `seq`, the oldest first. Cost: O(sequences)."""
        parent = self.records([seq])[0][3]
        if parent == NO_PARENT:
            return []
        return [handle for handle, record in self._live.items() if record[3] == parent and handle != seq]

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
        seqs, size = _listed(seqs), self.page_size
        records = self.records(seqs) if fork else self.distinct_records(seqs)
        counts = checked_counts("count", count, len(seqs))
        drops = checked_counts("slide", slide, [record[2] for record in records]) if slide else [0] * len(seqs)
        plan = Plan(seqs, counts, size, fork)
        if anew is not None:
            plan.counts = [new if whole is None else whole for new, whole in zip(counts, anew)]
        tables, starts, lengths, ends = plan.tables, plan.starts, plan.lengths, plan.ends
        copied: dict[int, tuple[int, int]] = {}  # shared tail page -> rows that leave it, their furthest end
        for (pages, start, length, _), new, drop, whole in zip(records, counts, drops, anew or itertools.repeat(None)):
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
            tables.append(pages)
            starts.append(start)
            lengths.append(length + new)
            ends.append(end)
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
        pages, live = self.pages, self._live
        if plan.fresh:
            del pages.free[-plan.fresh :]
        if plan.fork:
            pages.hold(itertools.chain.from_iterable(plan.tables))
            return self._add(list(zip(plan.tables, plan.starts, plan.lengths, plan.seqs)))
        for seq, table, start, length in zip(plan.seqs, plan.tables, plan.starts, plan.lengths):
            old, _, _, parent = live[seq]
            live[seq] = table, start, length, parent
            if table != old:
                pages.hold(table)  # before the old one is let go, so that no page of both is freed
                pages.drop(old)
        return plan.seqs

    def extend(self, seqs: list[int], records: list[Record], drop: int) -> list[int]:
        """Fork a child a sequence that drops `drop` pages and ends with a page of its own, the next free ones.

        This is `plan` and `apply` of what a tree search does at every step, for parents that end on a page's edge.
        """
        fresh, grown = self.pages.take(len(seqs)), (1 - drop) * self.page_size
        kept = [record[0][drop:] for record in records]
        self.pages.hold(itertools.chain.from_iterable(kept))
        return self._add([
            (pages + (page,), start, length + grown, seq)
            for pages, page, (_, start, length, _), seq in zip(kept, fresh, records, seqs)
        ])

    def slide(self, seqs: Iterable[int], count: Counts) -> int:
        """Drop tokens from the front; whole pages that fall out lose one reference. Returns the pages freed."""
        free = self.pages.free_count
        self.apply(self.plan(seqs, 0, slide=count))
        return self.pages.free_count - free

    def truncate(self, seqs: Iterable[int], count: Counts) -> int:
        """Drop tokens from the end; whole pages that fall out lose one reference. Returns the pages freed."""
        seqs, free, live = _listed(seqs), self.pages.free_count, self._live
        records = self.distinct_records(seqs)
        drops = checked_counts("count", count, [record[2] for record in records])
        for seq, (pages, start, length, parent), drop in zip(seqs, records, drops):
            kept = _pages_for(start, length - drop, self.page_size)
            live[seq] = pages[:kept], start, length - drop, parent
            self.pages.drop(pages[kept:])
        return self.pages.free_count - free

    # -- inside ------------------------------------------------------------------------------------------

    def _add(self, records: Sequence[Record]) -> list[int]:
        """The handles of new sequences."""
        handles = list(range(self._next, self._next + len(records)))
        self._live.update(zip(handles, records))
        self._next += len(records)
        return handles

    def _peek(self, plan: Plan, count: int) -> tuple[int, ...]:
        """The next pages of the free stack, which stay there; one null page where the stack is too short."""
        free, first = self.pages.free, plan.fresh + 1
        plan.fresh += count
        if plan.fresh > len(free):
            return (0,)
        return (free[-first],) if count == 1 else tuple(free[-first : -first - count : -1])

    def _explain(self, seqs: Sequence[int]) -> StaleHandle | ForeignHandle:
        for handle in seqs:
            try:
                number = operator.index(handle)
            except TypeError:
                return ForeignHandle(handle)
            if not self._first <= number < self._next:
                return ForeignHandle(handle)
            if number not in self._live:
                return StaleHandle(number)
        return ForeignHandle(seqs)

    def check(self) -> None:
        """Raise CorruptCache unless every invariant of pages and tables holds. Cost: O(everything)."""
        holders: Counter[int] = Counter()
        for handle, (table, start, length, parent) in self._live.items():
            if not (self._first <= handle < self._next and parent < handle):
                raise CorruptCache(f"sequence {handle:#x} with parent {parent:#x}, the next is {self._next:#x}")
            if len(set(table)) != len(table):
                raise CorruptCache(f"sequence {handle:#x} holds a page twice: {table}")
            if not 0 <= start < self.page_size or len(table) != _pages_for(start, length, self.page_size):
                raise CorruptCache(f"sequence {handle:#x}: pages {table}, start {start}, length {length}")
            holders.update(table)
        self.pages.check(holders)


def _listed(seqs: Iterable[int]) -> list[int]:
    """The sequences as a list."""
    return seqs if type(seqs) is list else list(seqs)


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
