"""Open steps: children that nobody sees yet. No tensors in here.

A step is a fork that is not public yet. Its records hold the pages that its room needs and count
like all others, so its parents may change or end meanwhile.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from paged_kv.pages.block_tables import BlockTables
from paged_kv.pages.change import Change, Edit, Light, Pending, Told
from paged_kv.pages.plan import Plan, plan_growth
from paged_kv.pages.records import Fills, Record, slid, unfilled

NOTHING = Change({})  # left over, it has everything counted anew


class OpenSteps:
    """The steps on one pool that were neither published nor given up.

    >>> from paged_kv.pages.allocator import PageAllocator
    >>> tables = BlockTables(PageAllocator(8, max_pages=8), page_size=4)
    >>> steps = OpenSteps(tables)
    >>> root, = tables.new(1)
    >>> number = steps.number()
    >>> plan = steps.plan([root], tables.books.records([root]), rooms=[6])
    >>> steps.open(number, plan, user=None)
    >>> tables.books.pages.used_count, tables.books.live_count
    (2, 1)
    >>> child, = steps.publish(number, [3])        # half of the room is filled
    >>> tables.books.pages.used_count, tables.books.lengths([child])
    (1, [3])
    """

    def __init__(self, tables: BlockTables) -> None:
        self.tables = tables
        self.books = tables.books
        self._numbers = itertools.count(1)

    def number(self) -> int:
        """The number of another step."""
        return next(self._numbers)

    def __contains__(self, number: int) -> bool:
        return number in self.books.pending or number in self.books.light

    # -- steps begin

    def plan(self, seqs: list[int], records: list[Record], rooms: list[int]) -> Plan:
        """Plan children with so many new tokens each."""
        books = self.books
        return plan_growth(seqs, records, rooms, books.page_size, books.pages, fork=True)

    def open(self, number: int, plan: Plan, user: object) -> None:
        """Keep the children of a plan that forks from being seen, as a step of this number.

        `user` is kept as long as the step is open. What is counted is counted when it ends, so one
        store of its records is all that takes effect.
        """
        books = self.books
        pages = books.pages
        fresh = plan.fresh
        taken = pages.free[-fresh:] if fresh and books.told is not None else []
        books.change = NOTHING
        books.pending[number] = Pending(plan.becomes, plan.counts, fresh, len(plan.copies), user)
        if fresh:
            pages.take(fresh)
        pages.hold(itertools.chain.from_iterable([record[0] for record in plan.becomes]))
        if plan.fills:
            pages.note(plan.fills)
        books.change = None
        if books.told is not None:
            change = Change({})
            change.opens = {number: books.pending[number]}
            books.told.append(Told(change, taken, ()))

    def can_be_light(self, records: list[Record], room: int) -> bool:
        """Whether a step on these, which have one start and length, wants a page a row, from its
        edge on, and there are as many.

        Nothing is taken for such a step, as long as nobody asks for anything: there are pages, and
        its parents are what they were. It has its pages taken by whoever comes next, and saves the
        books a change if that is its own commit, as in a search it is. With a listener it takes
        them at once, for these are told of.
        """
        books = self.books
        return (
            room == books.page_size
            and books.told is None
            and not (records[0][1] + records[0][2]) % room
            and len(records) <= len(books.pages.free)
        )

    def weigh(self, number: int, light: Light, user: object) -> None:
        """Have a light step take its pages."""
        books = self.books
        if number not in books.pending:  # else an interrupt came before the last line
            rooms = [books.page_size] * len(light.records)
            self.open(number, self.plan(light.parents, light.records, rooms), user)
        del books.light[number]

    # -- steps end

    def extend(self, number: int, light: Light, pages: list[int], drop: int) -> list[int]:
        """Publish a light step: each child has one of `pages` more, the next ones of the free
        stack, and `drop` pages fewer in front.
        """
        books = self.books
        size = books.page_size
        grown = (1 - drop) * size
        records = [
            (table[drop:] + (page,), start, length + grown, seq, place + size)
            for (table, start, length, _, place), page, seq in zip(
                light.records, pages, light.parents
            )
        ]
        rows = len(records)
        children = books.handles.take(rows)
        change = Change(dict(zip(children, records)))
        change.begins = True
        change.ends = (number,)
        change.gained = itertools.chain.from_iterable([record[0] for record in records])
        change.fresh = rows
        forks, appends, allocated, copied = books.counted
        change.figures = forks + rows, appends + rows, allocated + rows, copied
        books.apply(change)
        return children

    def publish(
        self,
        number: int,
        filled: list[int],
        slides: Sequence[int] | None = None,
        places: Sequence[int] | None = None,
    ) -> list[int]:
        """End a step with its children, whose rooms are filled with so many new tokens.

        `slides` are tokens that each child drops from the front, `places` as in `carry_out`.
        """
        books = self.books
        size = books.page_size
        records, rooms, fresh, copies, _ = books.pending[number]
        lost: list[int] = []
        fills: Fills = []
        if filled != rooms:
            records = [
                unfilled(record, room - new, size, lost, fills)
                for record, room, new in zip(records, rooms, filled)
            ]
        if slides is not None:
            records = [slid(record, drop, size, lost) for record, drop in zip(records, slides)]
        if places is not None:
            records = [(*record[:4], place) for record, place in zip(records, places)]
        rows = len(records)
        children = books.handles.take(rows)
        change = Change(dict(zip(children, records)))
        change.begins = True
        change.ends = (number,)
        change.lost = lost
        change.fills = fills
        forks, appends, allocated, copied = books.counted
        change.figures = forks + rows, appends + rows, allocated + fresh, copied + copies
        books.apply(change)
        return children

    def abandon(self, number: int, edits: Sequence[Edit] = ()) -> None:
        """Give back all that an open step holds; nothing where it has ended."""
        books = self.books
        step = books.pending.get(number)
        if step is not None and books.tree.joints:
            # before, so that no joint is left where an interrupt comes between
            self.tables.splice([record[3] for record in step.records], number)
            step = books.pending[number]
        change = Change({})
        change.edits = edits
        if step is not None:
            lost: list[int] = []
            fills: Fills = []
            for record, room in zip(step.records, step.rooms):
                kept = unfilled(record, room, books.page_size, lost, fills)
                lost += kept[0]
            change.ends = (number,)
            change.lost = lost
            change.fills = fills
            forks, appends, allocated, copied = books.counted
            change.figures = forks, appends, allocated + step.fresh, copied + step.copied
        books.apply(change)
