"""Sequences: block tables over shared pages, and the verbs that change them. No tensors in here.

A sequence is an immutable record: its pages (a tuple, shared with the parent it was forked from),
the head offset of its first token, its length, its parent, the position of its next token. Token i
of a sequence lies at index j = start + i of its table, that is in slot pages[j // page_size] *
page_size + j % page_size. A table holds exactly the pages of the half-open interval [start, start +
length); an empty sequence holds none, and `start` is where its first token will go.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from paged_kv.checks import Counts, amount, counts, whole
from paged_kv.errors import PinnedEntry
from paged_kv.pages.allocator import PageAllocator
from paged_kv.pages.books import Books
from paged_kv.pages.change import Change, Edit, Pending, Store
from paged_kv.pages.plan import Plan, plan_growth
from paged_kv.pages.records import NO_PARENT, Fills, Record, cut, slid

IDLE = 16  # joints of the tree that may be left for no use


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
    >>> plan = tables.plan([child], 1)          # the first to write on in a page copies nothing
    >>> plan.copies, plan.slots
    ([], [10])
    """

    def __init__(self, pages: PageAllocator, page_size: int) -> None:
        self.books = Books(pages, page_size)

    # -- sequences come and go

    def new(self, count: int, *, start: int = 0) -> list[int]:
        """Make `count` empty sequences whose first token goes to offset `start` of its page."""
        books = self.books
        count = amount("count", count, 0)
        start = whole("start", start, 0, books.page_size - 1)
        seqs = books.handles.take(count)
        books.apply(Change(dict.fromkeys(seqs, ((), start, 0, NO_PARENT, 0))))
        return seqs

    def fork(
        self,
        parents: list[int],
        *,
        at: Counts | None = None,
        root: bool = False,
        position_of: Callable[[int], int] | None = None,
    ) -> list[int]:
        """Make one child a parent, sharing the pages of its first `at` tokens (all by default).

        With `root` each begins a tree of its own, and shares pages only. `position_of` says where
        the token in a slot was placed.
        """
        books = self.books
        records = books.records(parents)
        fills: Fills = []
        if at is not None:
            kept = counts("at", at, [record[2] for record in records])
            records = [
                cut(record, record[2] - length, books.page_size, fills, position_of)
                for record, length in zip(records, kept)
            ]
        above = itertools.repeat(NO_PARENT) if root else parents
        forked = [
            (pages, start, length, parent, place)
            for (pages, start, length, _, place), parent in zip(records, above)
        ]
        children = books.handles.take(len(parents))
        change = Change(dict(zip(children, forked)))
        change.gained = itertools.chain.from_iterable([record[0] for record in records])
        change.fills = fills
        change.begins = not root
        forks, appends, allocated, copied = books.counted
        change.figures = forks + len(children), appends, allocated, copied
        books.apply(change)
        return children

    def release(
        self, seqs: list[int], *, missing_ok: bool = False, edits: Sequence[Edit] = ()
    ) -> None:
        """Drop sequences and their references; `missing_ok` passes over those that were dropped
        before.
        """
        if missing_ok:
            seqs = self.books.remaining(seqs)
        self.end(seqs, self.books.loose_records(seqs), edits)

    def end(
        self,
        seqs: Sequence[int],
        records: Sequence[Record],
        edits: Sequence[Edit] = (),
        stores: Sequence[Store] = (),
    ) -> None:
        """Drop these sequences, owned or not."""
        books = self.books
        tree = books.tree
        change = Change({})
        change.drops = seqs
        joints = tree.joints_of(seqs, self._held() if books.pending else {})
        if joints and not books.pending:
            change.splices = tree.passed_over(joints, seqs)
            for joint, parent, (child,) in change.splices:
                del joints[joint]
                record = books.records([child])[0]
                change.puts[child] = (*record[:3], parent, record[4])
        change.lost = itertools.chain.from_iterable([record[0] for record in records])
        change.edits = [Edit(tree.joints, joints, ()), *edits] if joints else edits
        change.stores = stores
        books.apply(change)
        if tree.joints:
            suspects = [*joints, *(record[3] for record in records)]
            if len(tree.joints) > 2 * (books.live_count + len(seqs)) + IDLE:
                suspects = list(tree.joints)  # interrupts left many that hold nothing
            self.splice(suspects)

    def _held(self, but: int = 0) -> Mapping[int, int]:
        """Rows of open steps, `but` those of one, by the parents that they hang on."""
        steps = [step for number, step in self.books.pending.items() if number != but]
        return Counter(record[3] for step in steps for record in step.records)

    def splice(self, suspects: list[int], but: int = 0) -> None:
        """Take out those joints that hold fewer than two branches together; a step (`but`) is about
        to end.

        In changes of their own, which nobody can see: what is above and below stays the same.
        """
        books = self.books
        tree = books.tree
        held = self._held(but) if books.pending else {}
        while splices := tree.splices(suspects, held):
            change = Change({})
            joints: dict[int, int] = {}
            for _, parent, children in splices:
                for child in children:
                    if child in books:
                        record = books.records([child])[0]
                        change.puts[child] = (*record[:3], parent, record[4])
                    else:
                        joints[child] = parent
            change.edits = [Edit(tree.joints, joints, [splice.joint for splice in splices])]
            change.splices = splices
            if books.pending:
                change.opens = self._adopted({joint: parent for joint, parent, _ in splices})
            books.apply(change)
            suspects += [splice.parent for splice in splices]
            held = self._held(but) if books.pending else {}

    def _adopted(self, gone: Mapping[int, int]) -> dict[int, Pending]:
        """The open steps on sequences that go, with the parents of those instead."""
        found = {}
        for number, step in self.books.pending.items():
            if all(record[3] not in gone for record in step.records):
                continue
            records = []
            for pages, start, length, parent, place in step.records:
                while parent in gone:
                    parent = gone[parent]
                records.append((pages, start, length, parent, place))
            found[number] = step._replace(records=records)
        return found

    def end_subtrees(self, seqs: list[int]) -> None:
        """Drop whole subtrees, owned sequences too. Raises PinnedEntry where an index has pinned
        one of them.

        Indexes are told where they look for it: in `ended` of the entry.
        """
        books = self.books
        owned = books.owned
        entries = [owned[seq] for seq in seqs if seq in owned] if owned else []
        for entry in entries:
            if entry.pins:
                raise PinnedEntry(entry.key, entry.pins)
        edits = [Edit(entry.ended, {entry.handle: entry}, ()) for entry in entries]
        if entries:
            edits.append(Edit(owned, {}, [entry.handle for entry in entries]))
        self.end(seqs, books.records(seqs), edits)

    # -- sequences grow and shrink

    def plan(self, seqs: list[int], count: Counts, *, fork: bool = False) -> Plan:
        """Plan to append `count` tokens, one number or one a sequence: see `plan_growth`."""
        books = self.books
        records = books.records(seqs) if fork else books.distinct_records(seqs)
        added = counts("count", count, len(seqs))
        return plan_growth(seqs, records, added, books.page_size, books.pages, fork=fork)

    def carry_out(self, plan: Plan, places: Sequence[int] | None = None) -> list[int]:
        """Let a plan made just before take effect.

        Returns the sequences: the children, where it forks. `places` are the positions that follow
        on the last tokens, where these were placed by hand.
        """
        books = self.books
        rows = len(plan.seqs)
        forks, appends, allocated, copied = books.counted
        records = plan.becomes
        if places is not None:
            records = [(*record[:4], place) for record, place in zip(records, places)]
        seqs = plan.seqs
        if plan.fork:
            seqs = books.handles.take(rows)
            forks += rows
        change = Change(dict(zip(seqs, records)))
        change.begins = plan.fork
        self._count(change, plan)
        change.figures = (
            forks,
            appends + rows,
            allocated + plan.fresh,
            copied + len(plan.copies),
        )
        books.apply(change)
        return seqs

    def _count(self, change: Change, plan: Plan) -> None:
        """What a plan does to pages."""
        fresh = plan.fresh
        if plan.fork:
            change.gained = itertools.chain.from_iterable([record[0] for record in plan.becomes])
        else:
            change.gained = self.books.pages.free[-fresh:] if fresh else ()
            change.lost = plan.lost
        change.fresh = fresh
        change.fills = plan.fills

    def slide(self, seqs: list[int], count: Counts) -> None:
        """Drop tokens from the front; whole pages that fall out lose one reference."""
        books = self.books
        records = books.loose_records(seqs)
        drops = counts("slide", count, [record[2] for record in records])
        lost: list[int] = []
        change = Change({})
        for seq, record, drop in zip(seqs, records, drops):
            change.puts[seq] = slid(record, drop, books.page_size, lost)
        change.lost = lost
        books.apply(change)

    def truncate(
        self, seqs: list[int], count: Counts, position_of: Callable[[int], int] | None = None
    ) -> None:
        """Drop tokens from the end; whole pages that fall out lose one reference."""
        books = self.books
        records = books.loose_records(seqs)
        drops = counts("count", count, [record[2] for record in records])
        lost: list[int] = []
        fills: Fills = []
        change = Change({})
        for seq, record, drop in zip(seqs, records, drops):
            shorter = cut(record, drop, books.page_size, fills, position_of)
            lost += record[0][len(shorter[0]) :]
            change.puts[seq] = shorter
        change.lost = lost
        change.fills = fills
        books.apply(change)
