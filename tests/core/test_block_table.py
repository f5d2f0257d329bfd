"""Pages and block tables against python lists: tokens are numbers, memory is a dict from slot to
number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from naive_index import World
from small_caches import books

from paged_kv.errors import PagedKVError, StaleHandle
from paged_kv.pages.allocator import PageAllocator
from paged_kv.pages.audit import audit
from paged_kv.pages.block_tables import BlockTables
from paged_kv.pages.change import Change, Figures, Store, Told
from paged_kv.pages.open_steps import OpenSteps
from paged_kv.pages.plan import Plan
from paged_kv.pages.records import Record

pytestmark = pytest.mark.once


class Opened(NamedTuple):
    """What a step was opened on."""

    parents: list[int]
    tokens: list[list[int]]
    rooms: list[int]


class TablesMachine(RuleBasedStateMachine):
    """`tokens` of each live sequence, `world` with their parents and `steps` are the model;
    `memory` is what a storage would hold.
    """

    @initialize(page_size=st.integers(1, 4), pages=st.integers(2, 12))
    def build(self, page_size: int, pages: int) -> None:
        self.size = page_size
        self.pages = PageAllocator(pages, max_pages=2 * pages + 1)
        self.tables = BlockTables(self.pages, page_size)
        self.books = self.tables.books
        self.open_steps = OpenSteps(self.tables)
        self.figures = Figures()
        self.peak = 0
        self.tokens: dict[int, list[int]] = {}
        self.world = World([])
        self.steps: dict[int, Opened] = {}
        self.memory: dict[int, int] = {}
        self.gone: list[int] = []
        self.names = itertools.count(1)

    def count(self, **more: int) -> None:
        """Add to the figures that are foretold."""
        done = self.figures._asdict()
        self.figures = Figures(**{name: done[name] + more.get(name, 0) for name in done})

    def changed(self, call: Callable[[], Any], freed: int | None = None) -> Any:
        """Call what changes something: it is told, with the pages that it took and those that it
        freed.
        """
        told: list[Told | None] = []
        self.books.told = told
        before = set(self.pages.free)
        refs = list(self.pages.refs)
        result = call()
        taken: list[int] = []
        given: list[int] = []
        for each in told:
            assert each is not None
            taken += each.taken
            given += each.freed
        assert (before - set(taken)) | set(given) == set(self.pages.free)
        assert told or self.pages.refs == refs
        assert freed is None or len(given) == freed
        return result

    def make(self, seqs: list[int], parents: Sequence[int | None], tokens: list[list[int]]) -> None:
        """Sequences came to be."""
        assert not set(seqs) & {*self.gone, *self.tokens}
        self.tokens.update(zip(seqs, tokens, strict=True))
        self.world.make(seqs, parents)

    def draw(self, data: st.DataObject, *, distinct: bool) -> list[int]:
        live = list(self.tokens)
        return (
            data.draw(st.lists(st.sampled_from(live), min_size=1, max_size=4, unique=distinct))
            if live
            else []
        )

    def counts(self, data: st.DataObject, seqs: list[int]) -> list[int]:
        """A number for each sequence, up to its length."""
        return [data.draw(st.integers(0, len(self.tokens[seq]))) for seq in seqs]

    def places(self, record: Record) -> list[int]:
        """The slots of the tokens of a record."""
        pages, start, length, *_ = record
        return [
            pages[i // self.size] * self.size + i % self.size for i in range(start, start + length)
        ]

    def slots(self, seq: int) -> list[int]:
        """Where the tokens of a sequence lie."""
        return self.places(self.books.records([seq])[0])

    def windows(self) -> list[tuple[list[int], list[int]]]:
        """Slots and tokens of what is read: of sequences, and of rows of open steps without their
        room.
        """
        found = [(self.slots(seq), tokens) for seq, tokens in self.tokens.items()]
        for number, opened in self.steps.items():
            for record, tokens in zip(self.books.pending[number].records, opened.tokens):
                found.append((self.places(record)[: len(tokens)], tokens))
        return found

    def write(self, slots: list[int]) -> list[int]:
        """Put new tokens into slots that nobody reads."""
        read = {slot for places, _ in self.windows() for slot in places}
        assert not read & set(slots), "writes a slot that somebody reads"
        assert len(set(slots)) == len(slots), "writes a slot twice"
        new = [next(self.names) for _ in slots]
        self.memory.update(zip(slots, new, strict=True))
        return new

    def plan(self, seqs: list[int], counts: Any, *, fork: bool) -> Plan | None:
        """A plan that there are pages for, with its copies made; or None, and a larger pool."""
        plan = self.tables.plan(seqs, counts, fork=fork)
        if plan.fresh > self.pages.free_count:
            if self.pages.growable:
                self.books.grow(self.pages.growth_for(plan.fresh))
            return None
        for source, target in plan.copies:
            assert self.pages.refs[target] == 0, "copied onto a page in use"
            for offset in range(self.size):
                self.memory[target * self.size + offset] = self.memory.get(
                    source * self.size + offset, 0
                )
        return plan

    def held(self) -> set[int]:
        """Pages in use."""
        return {page for page in range(1, self.pages.capacity + 1) if self.pages.refs[page]}

    def take(self, plan: Plan, call: Callable[[], Any]) -> Any:
        """Call what carries a plan out: it takes the pages that were foretold, and no other."""
        before = self.held()
        capacity = self.pages.capacity
        result = self.changed(call)
        dropped = len(before - self.held())
        taken = self.pages.used_count + dropped - len(before)
        assert taken == plan.fresh, "the dry run foretold other pages than were taken"
        assert self.pages.capacity == capacity
        self.count(allocated=taken, copied=len(plan.copies))
        return result

    # -- verbs

    @rule(data=st.data(), count=st.integers(0, 3))
    @precondition(lambda self: len(self.tokens) < 12)
    def new(self, data: st.DataObject, count: int) -> None:
        start = data.draw(st.integers(0, self.size - 1))
        mark = self.books.mark()
        seqs = self.changed(lambda: self.tables.new(count, start=start), freed=0)
        assert self.books.made_since(mark) == seqs[::-1]
        self.make(seqs, [None] * count, [[] for _ in seqs])

    @rule(data=st.data(), whole=st.booleans(), root=st.booleans())
    @precondition(lambda self: len(self.tokens) < 12)
    def fork(self, data: st.DataObject, whole: bool, root: bool) -> None:
        parents = self.draw(data, distinct=False)
        at = [len(self.tokens[seq]) for seq in parents] if whole else self.counts(data, parents)
        used = self.pages.used_count
        call = lambda: self.tables.fork(parents, at=None if whole else at, root=root)  # noqa: E731
        children = self.changed(call, freed=0)
        assert self.pages.used_count == used
        self.count(forks=len(parents))
        tokens = [self.tokens[seq][:kept] for seq, kept in zip(parents, at, strict=True)]
        self.make(children, [None if root else seq for seq in parents], tokens)

    @rule(data=st.data(), fork=st.booleans())
    def grow(self, data: st.DataObject, fork: bool) -> None:
        seqs = self.draw(data, distinct=not fork)
        counts = [data.draw(st.integers(0, 5)) for _ in seqs]
        before = books(self.books)
        plan = self.plan(seqs, counts, fork=fork)
        if plan is None:
            return
        assert books(self.books) == before, "a plan changed something"
        new = self.write(plan.slots)
        result = self.take(plan, lambda: self.tables.carry_out(plan))
        self.count(forks=len(seqs) if fork else 0, appends=len(seqs))
        grown = []
        for seq, count in zip(seqs, counts, strict=True):
            grown.append(self.tokens[seq] + new[:count])
            del new[:count]
        if fork:
            self.make(result, seqs, grown)
        else:
            assert result == seqs
            self.tokens.update(zip(seqs, grown))

    @rule(data=st.data(), alike=st.booleans())
    @precondition(lambda self: len(self.steps) < 3)
    def open(self, data: st.DataObject, alike: bool) -> None:
        parents = self.draw(data, distinct=False)
        rooms = [data.draw(st.integers(0, 5)) for _ in parents]
        if alike:
            rooms = rooms[:1] * len(rooms)
        plan = self.plan(parents, rooms, fork=True)
        if plan is None:
            return
        live = self.books.live()
        number = self.open_steps.number()
        self.take(plan, lambda: self.open_steps.open(number, plan, self))
        assert self.books.live() == live
        tokens = [list(self.tokens[seq]) for seq in parents]
        self.steps[number] = Opened(parents, tokens, rooms)

    @rule(data=st.data())
    @precondition(lambda self: self.steps)
    def publish(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(list(self.steps)))
        opened = self.steps[number]
        filled = [data.draw(st.integers(0, room)) for room in opened.rooms]
        slides = [data.draw(st.integers(0, len(tokens))) for tokens in opened.tokens]
        records = self.books.pending[number].records
        slots = [
            self.places(record)[len(tokens) : len(tokens) + new]
            for record, tokens, new in zip(records, opened.tokens, filled)
        ]
        written = self.write(list(itertools.chain.from_iterable(slots)))
        used = self.pages.used_count
        children = self.changed(lambda: self.open_steps.publish(number, filled, slides, None))
        assert self.pages.used_count <= used
        rows = len(opened.parents)
        self.count(forks=rows, appends=rows)
        del self.steps[number]
        tokens = []
        for kept, drop, new in zip(opened.tokens, slides, filled):
            tokens.append((kept + written[:new])[drop:])
            del written[:new]
        self.make(children, opened.parents, tokens)

    @rule(data=st.data())
    @precondition(lambda self: self.steps)
    def abandon(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(list(self.steps)))
        pending = self.books.pending_pages
        self.changed(lambda: self.open_steps.abandon(number), freed=None)
        others = self.books.pending_pages
        assert others <= pending
        del self.steps[number]

    @rule()
    def rename(self) -> None:
        """Pages move to the front, as `trim` does it."""
        size = max(self.pages.used_count, 1)
        refs = self.pages.refs
        high = [page for page in range(size + 1, self.pages.capacity + 1) if refs[page]]
        low = [page for page in range(1, size + 1) if not refs[page]]
        names = dict(zip(high, low))
        for old, new in names.items():
            for offset in range(self.size):
                self.memory[new * self.size + offset] = self.memory.get(old * self.size + offset, 0)
        self.books.rename(names, [Store(self.pages, "capacity", size)])
        assert self.pages.used_count in (0, self.pages.capacity)

    @rule(data=st.data(), front=st.booleans())
    def shorten(self, data: st.DataObject, front: bool) -> None:
        seqs = self.draw(data, distinct=True)
        counts = self.counts(data, seqs)
        shorten = self.tables.slide if front else self.tables.truncate
        self.changed(lambda: shorten(seqs, counts))
        for seq, count in zip(seqs, counts, strict=True):
            tokens = self.tokens[seq]
            self.tokens[seq] = tokens[count:] if front else tokens[: len(tokens) - count]

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.drop(self.draw(data, distinct=True))

    @rule(data=st.data())
    @precondition(lambda self: self.tokens)
    def release_subtree(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(list(self.tokens)))
        wanted = self.world.subtree(seq)
        assert sorted(self.books.tree.below([seq])) == sorted(wanted)
        self.drop(wanted)

    @rule(data=st.data())
    @precondition(lambda self: self.tokens)
    def promote(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(list(self.tokens)))
        wanted = self.world.beside(seq)
        assert sorted(self.books.tree.rivals(seq)) == sorted(wanted)
        if data.draw(st.booleans()):
            self.drop(wanted)

    def drop(self, seqs: list[int]) -> None:
        call = lambda: self.tables.release(seqs)  # noqa: E731
        self.changed(call, freed=self.books.freed_by(seqs))
        self.ended(seqs)

    def ended(self, seqs: list[int]) -> None:
        for seq in seqs:
            del self.tokens[seq]
        self.world.end(seqs)
        self.gone += seqs

    @rule(data=st.data())
    @precondition(lambda self: self.gone)
    def release_what_may_be_missing(self, data: st.DataObject) -> None:
        seqs = data.draw(st.lists(st.sampled_from([*self.tokens, *self.gone]), max_size=4))
        live = [seq for seq in dict.fromkeys(seqs) if seq in self.tokens]
        self.changed(lambda: self.tables.release(seqs, missing_ok=True), self.books.freed_by(live))
        self.ended(live)

    @rule()
    def settle(self) -> None:
        """Counted anew from the records, the pages are as they were: but the order in which they go
        is the lowest first.
        """
        refs = list(self.pages.refs)
        free = sorted(self.pages.free, reverse=True)
        self.books.settle()
        assert self.books.change is None
        change = Change({})
        self.books.change = change
        self.books.settle()
        assert self.books.change is None
        assert (self.pages.refs, self.pages.free) == (refs, free)

    # -- mistakes

    @rule(data=st.data())
    @precondition(lambda self: self.tokens)
    def mistake(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(list(self.tokens)))
        tables = self.tables
        beyond = len(self.tokens[seq]) + 1
        bad = data.draw(
            st.sampled_from(
                [*self.gone, 0, -1, ~seq, -seq, seq + 1000, seq ^ 1 << 45, 1.0, None, "1", []]
            )
        )
        calls: dict[str, tuple[Any, ...]] = {
            "new": (tables.new, -1),
            "start": (lambda: tables.new(1, start=self.size),),
            "fork": (tables.fork, [seq, bad]),
            "fork at": (lambda: tables.fork([seq], at=beyond),),
            "plan": (tables.plan, [seq, bad], 1),
            "twice": (tables.plan, [seq, seq], 1),
            "count": (tables.plan, [seq], -1),
            "slide": (tables.slide, [seq], beyond),
            "truncate": (tables.truncate, [seq], [beyond]),
            "release": (tables.release, [seq, bad]),
            "release twice": (tables.release, [seq, seq]),
            "release, missing or not": (
                lambda: tables.release([seq, seq ^ 1 << 45], missing_ok=True),
            ),
            "end of a subtree": (tables.end_subtrees, [seq, bad]),
            "rows": (tables.truncate, [seq], [0, 0]),
            "freed": (self.books.freed_by, [seq, seq]),
            "lengths": (self.books.lengths, [bad]),
        }
        call, *arguments = calls[data.draw(st.sampled_from(sorted(calls)))]
        before = books(self.books)
        with pytest.raises(PagedKVError):
            call(*arguments)
        assert books(self.books) == before

    # -- what always holds

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "tables"):
            return
        audit(self.books)
        assert self.books.live() == list(self.tokens), "the oldest first"
        assert self.books.figures == self.figures
        self.peak = max(self.peak, self.pages.used_count)
        assert self.pages.peak == self.peak
        for slots, tokens in self.windows():
            assert [self.memory[slot] for slot in slots] == tokens
        for seq in self.tokens:
            assert self.books.tree.parent(seq) == self.parent(seq)
        assert self.books.lengths(self.tokens) == [len(tokens) for tokens in self.tokens.values()]
        assert self.books.stored_tokens() == len(
            {slot for seq in self.tokens for slot in self.slots(seq)}
        )

    def parent(self, seq: int) -> int | None:
        """The nearest above that lives."""
        return next((above for above in self.world.line(seq) if above in self.tokens), None)

    def teardown(self) -> None:
        if not hasattr(self, "tables"):
            return
        for number in self.steps:
            self.open_steps.abandon(number)
        self.tables.release(list(self.tokens))
        assert self.pages.free_count == self.pages.capacity
        assert self.books.live_count == 0
        for seq in {*self.gone, *self.tokens}:
            with pytest.raises(StaleHandle):
                self.books.lengths([seq])


def test_tables_agree_with_lists() -> None:
    run_state_machine_as_test(
        TablesMachine, settings=settings(max_examples=300, stateful_step_count=40, deadline=None)
    )
