"""Sequences: block tables over shared pages, and the changes of them. No tensors in here.

A sequence is an immutable record: its pages (a tuple, shared with the parent it was forked from),
the head offset of its first token, its length, its parent. Token i of a sequence lies at index j =
start + i of its table, that is in slot pages[j // page_size] * page_size + j % page_size. A table
holds exactly the pages of the half-open interval [start, start + length); an empty sequence holds
none, and `start` is where its first token will go.

Every verb comes in two halves. The first validates, computes a `Change`, and changes nothing.
`apply` makes it take effect with the store of one attribute, and then does what it says. Whoever
finds a change that an interrupt left there calls `settle`. Who writes tensors does so between the
two halves, to slots that no sequence reads.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from operator import is_

from paged_kv.checks import Counts, amount, counts, whole
from paged_kv.errors import (
    BadArgument,
    CorruptCache,
    DuplicateSequence,
    ForeignHandle,
    OwnedSequence,
    PinnedEntry,
    StaleHandle,
    unraisable,
)
from paged_kv.pages.allocator import PageAllocator
from paged_kv.pages.change import Change, Closable, Edit, Entry, Figures, Record, Store
from paged_kv.pages.handles import Handles
from paged_kv.pages.plan import Plan

NO_PARENT = 0

# Told of a change after it was carried out, with the pages that were taken and freed; with None
# instead where an interrupted change was carried out by `settle`, so that all has to be looked at
# again. May read, and release.
Listener = Callable[[Change | None, Sequence[int], Sequence[int]], None]


class BlockTables:
    """All sequences of one pool.

    >>> tables = BlockTables(PageAllocator(8, max_pages=8), page_size=4)
    >>> root, = tables.new(1)
    >>> plan = tables.plan([root], 6)
    >>> plan.fresh, plan.slots
    (2, [4, 5, 6, 7, 8, 9])
    >>> tables.carry_out(plan) == [root]
    True
    >>> child, = tables.fork([root])
    >>> plan = tables.plan([child], 1)          # the tail page is shared: it is copied first
    >>> plan.copies, plan.slots
    ([(2, 3)], [14])
    """

    def __init__(self, pages: PageAllocator, page_size: int) -> None:
        self.pages = pages
        self.page_size = whole("page_size", page_size, 1)
        self.owned: dict[int, Entry] = {}  # sequences that belong to an index
        self.change: Change | None = None  # took effect, and is not carried out to its end
        self.listeners: list[Listener] = []
        self._figures: tuple[int, int, int, int] = (0, 0, 0, 0)
        self._handles = Handles()
        self._live: dict[int, Record] = {}

    # -- reading

    @property
    def live_count(self) -> int:
        """Sequences that exist."""
        return len(self._live)

    @property
    def figures(self) -> Figures:
        """What was done since the cache was made."""
        return Figures._make(self._figures)

    def live(self) -> list[int]:
        """Handles of all sequences that exist, the oldest first. Cost: O(sequences)."""
        return list(self._live)

    def items(self) -> list[tuple[int, Record]]:
        """Handle and record of all sequences that exist, the oldest first. Cost: O(sequences)."""
        return list(self._live.items())

    def __contains__(self, seq: int) -> bool:
        return seq in self._live

    def records(self, seqs: Sequence[int]) -> list[Record]:
        """Pages, start, length and parent of each sequence. Raises StaleHandle or ForeignHandle."""
        live = self._live
        try:
            return [live[seq] for seq in seqs]
        except (KeyError, TypeError):
            raise self._explain(seqs) from None

    def are_still(self, seqs: Sequence[int], records: Sequence[Record]) -> bool:
        """Whether all sequences exist, with the very records that were read before."""
        return all(map(is_, map(self._live.get, seqs), records))

    def distinct_records(self, seqs: Sequence[int]) -> list[Record]:
        """As `records`, and raises DuplicateSequence where two sequences are the same."""
        records = self.records(seqs)
        if len(set(seqs)) != len(seqs):
            raise DuplicateSequence(next(seq for seq, times in Counter(seqs).items() if times > 1))
        return records

    def loose_records(self, seqs: Sequence[int]) -> list[Record]:
        """As `distinct_records`, and raises OwnedSequence where a sequence belongs to an index."""
        records = self.distinct_records(seqs)
        if self.owned and not self.owned.keys().isdisjoint(seqs):
            owned = next(seq for seq in seqs if seq in self.owned)
            raise OwnedSequence(owned, self.owned[owned].key)
        return records

    def lengths(self, seqs: Sequence[int]) -> list[int]:
        """Tokens of each sequence."""
        return [record[2] for record in self.records(seqs)]

    def windows(self, seqs: Sequence[int]) -> tuple[list[tuple[int, ...]], list[int], list[int]]:
        """Pages, start and length of each sequence."""
        records = self.records(seqs)
        return (
            [record[0] for record in records],
            [record[1] for record in records],
            [record[2] for record in records],
        )

    def freed_by(self, seqs: Sequence[int]) -> int:
        """Pages that releasing all of `seqs` would free. Cost: O(their pages)."""
        held = Counter(page for record in self.distinct_records(seqs) for page in record[0])
        refs = self.pages.refs
        return sum(refs[page] == count for page, count in held.items())

    def stored_tokens(self) -> int:
        """Slots that live sequences read, each counted once. Cost: O(all block tables)."""
        size = self.page_size
        used: set[int] = set()
        for _, (pages, start, length, _) in self.items():
            used.update(pages[i // size] * size + i % size for i in range(start, start + length))
        return len(used)

    # -- changes take effect

    def apply(self, change: Change) -> None:
        """Let a change take effect, at once and for good, and carry it out."""
        live = self._live
        pages = self.pages
        self.change = change  # from here on it is done, whatever happens: see `settle`
        for seq in change.drops:
            del live[seq]
        live.update(change.puts)
        taken: Sequence[int] = ()
        freed: Sequence[int] = ()
        if change.fresh:
            if self.listeners:
                taken = pages.free[-change.fresh :]
            del pages.free[-change.fresh :]
        if change.gained:
            pages.hold(change.gained)
        if change.lost:
            freed = pages.drop(change.lost)
        if change.fresh:
            pages.note_peak()
        if change.figures is not None:
            self._figures = change.figures
        if change.edits or change.stores:
            change.edit()
        elif change.closes is not None:
            change.closes.closed = True
        self.change = None
        if self.listeners and (change.puts or change.drops):
            self._tell(change, taken, freed)

    def _tell(self, change: Change | None, taken: Sequence[int], freed: Sequence[int]) -> None:
        for listener in list(self.listeners):
            try:
                listener(change, taken, freed)
            except Exception as error:
                # What was done is done: the caller of the verb is not to blame.
                unraisable(error)

    def settle(self) -> None:
        """Carry out to its end a change that an interrupt left half done. Cost: O(all block
        tables).
        """
        change = self.change
        if change is None:
            return
        for seq in change.drops:
            self._live.pop(seq, None)
        self._live.update(change.puts)
        if change.figures is not None:
            self._figures = change.figures
        change.edit_each()
        self.pages.rebuild(record[0] for record in self._live.values())
        self.change = None
        if self.listeners:
            self._tell(None, (), ())

    def grow(self, capacity: int) -> None:
        """Let there be `capacity` pages."""
        pages = self.pages
        stores = Store(pages, "capacity", capacity), Store(pages, "growths", pages.growths + 1)
        change = Change({})
        change.stores = stores
        self.change = change
        pages.grow(capacity)
        self.change = None

    # -- sequences come and go

    def new(self, count: int, *, start: int = 0) -> list[int]:
        """Make `count` empty sequences whose first token goes to offset `start` of its page."""
        count = amount("count", count, 0)
        start = whole("start", start, 0, self.page_size - 1)
        seqs = self._handles.take(count)
        self.apply(Change(dict.fromkeys(seqs, ((), start, 0, NO_PARENT))))
        return seqs

    def fork(self, parents: list[int], *, at: Counts | None = None) -> list[int]:
        """Make one child a parent, sharing the pages of its first `at` tokens (all by default)."""
        records = self.records(parents)
        if at is None:
            kept = [
                (pages, start, length, seq)
                for (pages, start, length, _), seq in zip(records, parents)
            ]
        else:
            kept = []
            lengths = counts("at", at, [record[2] for record in records])
            for (pages, start, _, _), length, seq in zip(records, lengths, parents):
                kept.append(
                    (pages[: _pages_for(start, length, self.page_size)], start, length, seq)
                )
        children = self._handles.take(len(parents))
        change = Change(dict(zip(children, kept)))
        change.gained = itertools.chain.from_iterable([record[0] for record in kept])
        forks, appends, allocated, copied = self._figures
        change.figures = forks + len(children), appends, allocated, copied
        self.apply(change)
        return children

    def release(
        self, seqs: list[int], *, missing_ok: bool = False, edits: Sequence[Edit] = ()
    ) -> None:
        """Drop sequences and their references; `missing_ok` passes over those that were dropped
        before.
        """
        if missing_ok:
            seqs = self._remaining(seqs)
        self.end(seqs, self.loose_records(seqs), edits)

    def end(
        self,
        seqs: Sequence[int],
        records: Sequence[Record],
        edits: Sequence[Edit] = (),
        stores: Sequence[Store] = (),
    ) -> None:
        """Drop these sequences, owned or not."""
        change = Change({})
        change.drops = seqs
        change.lost = itertools.chain.from_iterable([record[0] for record in records])
        change.edits = edits
        change.stores = stores
        self.apply(change)

    def end_subtrees(self, seqs: list[int]) -> None:
        """Drop whole subtrees, owned sequences too. Raises PinnedEntry where an index has pinned
        one of them.

        Indexes are told where they look for it: in `ended` of the entry.
        """
        entries = [self.owned[seq] for seq in seqs if seq in self.owned] if self.owned else []
        for entry in entries:
            if entry.pins:
                raise PinnedEntry(entry.key, entry.pins)
        edits = [Edit(entry.ended, {entry.handle: entry}, ()) for entry in entries]
        if entries:
            edits.append(Edit(self.owned, {}, [entry.handle for entry in entries]))
        self.end(seqs, self.records(seqs), edits)

    def subtree(self, seq: int) -> list[int]:
        """`seq` and all descendants that hang on it by live parents. Cost: O(sequences)."""
        self.records([seq])
        children: dict[int, list[int]] = {}
        for handle, record in self.items():
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
        return [handle for handle, record in self.items() if record[3] == parent and handle != seq]

    def mark(self) -> tuple[int, int]:
        """This moment, for `made_since`."""
        return self._handles.mark()

    def made_since(self, mark: tuple[int, int]) -> list[int]:
        """Live sequences that were made after a moment, the newest first. Cost: O(their number)."""
        if not self._handles.is_mark(mark):
            raise BadArgument("mark", mark, "what mark() of this cache returned")
        since = self._handles.since
        return list(itertools.takewhile(lambda seq: since(seq, mark), reversed(self.live())))

    # -- sequences grow and shrink

    def plan(
        self,
        seqs: list[int],
        count: Counts,
        *,
        fork: bool = False,
        slide: Counts = 0,
        anew: Sequence[int | None] | None = None,
    ) -> Plan:
        """Plan to drop `slide` tokens from the front and append `count`, in place or in forked
        children.

        A row with a number in `anew` becomes that many tokens in pages of its own instead, ending
        on a page's edge. Changes nothing. Where `plan.fresh` exceeds the free pages it is only a
        count: make room and plan again.
        """
        size = self.page_size
        records = self.records(seqs) if fork else self.distinct_records(seqs)
        rows = len(seqs)
        added = (
            [count] * rows if type(count) is int and count >= 0 else counts("count", count, rows)
        )
        slides = [0] * rows
        if type(slide) is not int or slide:
            slides = counts("slide", slide, [record[2] for record in records])
        if anew is not None:
            added = [new if fresh is None else fresh for new, fresh in zip(added, anew)]
        plan = Plan(seqs, added, size, fork)
        becomes = plan.becomes
        ends = plan.ends
        free = self.pages.free
        # shared tail page -> rows that leave it, their furthest end
        copied: dict[int, tuple[int, int]] = {}
        parents = seqs if fork else [record[3] for record in records]
        for (pages, start, length, _), parent, new, drop, fresh in zip(
            records, parents, added, slides, anew or itertools.repeat(None)
        ):
            if fresh is not None:
                pages = ()
                start = -fresh % size
                length = 0
            elif drop:
                length -= drop
                skipped, start = divmod(start + drop, size)
                if not length:
                    skipped = len(pages)
                plan.lost += pages[:skipped]
                pages = pages[skipped:]
            end = start + length
            if new:
                # a partial tail page is written to: it must belong to this row alone
                if end % size and pages:
                    pages = self._own_tail(plan, pages, end % size, copied)
                missing = -((end + new) // -size) - len(pages)
                if missing == 1 and plan.fresh < len(free):  # as in `_peek`
                    plan.fresh += 1
                    pages += (free[-plan.fresh],)
                elif missing:
                    pages += self._peek(plan, missing)
            becomes.append((pages, start, length + new, parent))
            ends.append(end)
        return plan

    def _own_tail(
        self, plan: Plan, pages: tuple[int, ...], end: int, copied: dict[int, tuple[int, int]]
    ) -> tuple[int, ...]:
        """The table with a tail page to write to from offset `end`: the same where no other row
        reads it from there on.

        Rows of this plan that leave the page still read it until the plan is applied, which may
        never happen.
        """
        tail = pages[-1]
        gone, furthest = copied.get(tail, (0, 0))
        if not plan.fork and self.pages.refs[tail] - gone <= 1 and furthest <= end:
            return pages
        copied[tail] = gone + 1, max(furthest, end)
        fresh = self._peek(plan, 1)
        plan.copies.append((tail, fresh[0]))
        plan.lost.append(tail)
        return pages[:-1] + fresh

    def carry_out(self, plan: Plan, closes: Closable | None = None) -> list[int]:
        """Let a plan made just before take effect. Returns the sequences (the children, where it
        forks).
        """
        rows = len(plan.seqs)
        fresh = plan.fresh
        forks, appends, allocated, copied = self._figures
        if plan.fork:
            seqs = self._handles.take(rows)
            change = Change(dict(zip(seqs, plan.becomes)))
            change.gained = itertools.chain.from_iterable([record[0] for record in plan.becomes])
            forks += rows
        else:
            seqs = plan.seqs
            change = Change(dict(zip(seqs, plan.becomes)))
            change.gained = self.pages.free[-fresh:] if fresh else ()
            change.lost = plan.lost
        change.fresh = fresh
        change.figures = forks, appends + rows, allocated + fresh, copied + len(plan.copies)
        change.closes = closes
        self.apply(change)
        return seqs

    def extend(
        self, seqs: list[int], records: list[Record], drop: int, fresh: list[int], closes: Closable
    ) -> list[int]:
        """Fork a child a sequence that drops `drop` pages and ends with one page of `fresh`, the
        next free ones.

        This is `plan` and `carry_out` of what a tree search does at every step, for parents that
        end on a page's edge.
        """
        rows = len(seqs)
        grown = (1 - drop) * self.page_size
        kept = [
            (pages[drop:] + (page,), start, length + grown, seq)
            for (pages, start, length, _), page, seq in zip(records, fresh, seqs)
        ]
        children = self._handles.take(rows)
        change = Change(dict(zip(children, kept)))
        change.gained = itertools.chain.from_iterable([record[0] for record in kept])
        change.fresh = rows
        forks, appends, allocated, copied = self._figures
        change.figures = forks + rows, appends + rows, allocated + rows, copied
        change.closes = closes
        self.apply(change)
        return children

    def slide(self, seqs: list[int], count: Counts) -> None:
        """Drop tokens from the front; whole pages that fall out lose one reference."""
        records = self.loose_records(seqs)
        drops = counts("slide", count, [record[2] for record in records])
        puts = {}
        lost: list[int] = []
        for seq, (pages, start, length, parent), drop in zip(seqs, records, drops):
            skipped, start = divmod(start + drop, self.page_size)
            if drop == length:
                skipped = len(pages)
            lost += pages[:skipped]
            puts[seq] = pages[skipped:], start, length - drop, parent
        self._shorten(puts, lost)

    def truncate(self, seqs: list[int], count: Counts) -> None:
        """Drop tokens from the end; whole pages that fall out lose one reference."""
        records = self.loose_records(seqs)
        drops = counts("count", count, [record[2] for record in records])
        puts = {}
        lost: list[int] = []
        for seq, (pages, start, length, parent), drop in zip(seqs, records, drops):
            kept = _pages_for(start, length - drop, self.page_size)
            lost += pages[kept:]
            puts[seq] = pages[:kept], start, length - drop, parent
        self._shorten(puts, lost)

    def _shorten(self, puts: dict[int, Record], lost: list[int]) -> None:
        change = Change(puts)
        change.lost = lost
        self.apply(change)

    # -- inside

    def _peek(self, plan: Plan, count: int) -> tuple[int, ...]:
        """The next pages of the free stack, which stay there; one null page where the stack is too
        short.
        """
        free = self.pages.free
        first = plan.fresh + 1
        plan.fresh += count
        if plan.fresh > len(free):
            return (0,)
        return (free[-first],) if count == 1 else tuple(free[-first : -first - count : -1])

    def _remaining(self, seqs: list[int]) -> list[int]:
        """Those that still live, each once. Raises ForeignHandle for what was never given out."""
        for seq in seqs:
            if seq not in self._live and not self._handles.gave(seq):
                raise ForeignHandle(seq)
        return [seq for seq in dict.fromkeys(seqs) if seq in self._live]

    def _explain(self, seqs: Sequence[int]) -> StaleHandle | ForeignHandle:
        for seq in seqs:
            if type(seq) is not int or not (seq in self._live or self._handles.gave(seq)):
                return ForeignHandle(seq)
            if seq not in self._live:
                return StaleHandle(seq)
        return ForeignHandle(seqs)

    def check(self) -> None:
        """Raise CorruptCache unless every invariant of pages and tables holds. Cost:
        O(everything).
        """
        holders: Counter[int] = Counter()
        for seq, (table, start, length, parent) in self.items():
            if not self._handles.gave(seq) or (
                parent != NO_PARENT and not self._handles.gave(parent)
            ):
                raise CorruptCache(
                    f"sequence {seq:#x} with parent {parent:#x}: not a number that was given out"
                )
            if len(set(table)) != len(table):
                raise CorruptCache(f"sequence {seq:#x} holds a page twice: {table}")
            if not 0 <= start < self.page_size or len(table) != _pages_for(
                start, length, self.page_size
            ):
                raise CorruptCache(
                    f"sequence {seq:#x}: pages {table}, start {start}, length {length}"
                )
            holders.update(table)
        self.pages.check(holders)
        for seq, entry in list(self.owned.items()):
            if seq not in self._live or entry.handle != seq:
                raise CorruptCache(
                    f"sequence {seq:#x} is owned under key {entry.key!r}, and does not live"
                )


def _pages_for(start: int, length: int, page_size: int) -> int:
    return -(-(start + length) // page_size) if length else 0
