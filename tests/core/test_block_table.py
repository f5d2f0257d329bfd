"""Pages and block tables against python lists: tokens are numbers, memory is a dict from slot to
number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

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
from small_caches import books

from paged_kv.errors import PagedKVError, StaleHandle
from paged_kv.pages.allocator import PageAllocator
from paged_kv.pages.block_tables import BlockTables
from paged_kv.pages.change import Change, Figures
from paged_kv.pages.plan import Plan


class TablesMachine(RuleBasedStateMachine):
    """`tokens` and `parents` of each live sequence are the model; `memory` is what a storage would
    hold.
    """

    @initialize(page_size=st.integers(1, 4), pages=st.integers(2, 12))
    def build(self, page_size: int, pages: int) -> None:
        self.size = page_size
        self.pages = PageAllocator(pages, max_pages=2 * pages + 1)
        self.tables = BlockTables(self.pages, page_size)
        self.tables.listeners.append(self.hear)
        self.heard: list[tuple[Change | None, list[int], list[int]]] = []
        self.figures = Figures()
        self.peak = 0
        self.tokens: dict[int, list[int]] = {}
        self.parents: dict[int, int | None] = {}
        self.memory: dict[int, int] = {}
        self.gone: list[int] = []
        self.names = itertools.count(1)

    def hear(self, change: Change | None, taken: list[int], freed: list[int]) -> None:
        assert self.tables.change is None, "told of a change before it was done"
        self.heard.append((change, taken, freed))

    def count(self, **more: int) -> None:
        """Add to the figures that are foretold."""
        done = self.figures._asdict()
        self.figures = Figures(**{name: done[name] + more.get(name, 0) for name in done})

    def changed(self, call: Callable[[], Any], freed: int | None = None) -> Any:
        """Call what changes something: listeners hear of it, of the pages that it took and of those
        that it freed.
        """
        self.heard.clear()
        before = set(self.pages.free)
        refs = list(self.pages.refs)
        result = call()
        if not self.heard:  # for there was nothing to do
            assert (set(self.pages.free), self.pages.refs) == (before, refs)
            return result
        ((change, taken, given),) = self.heard
        assert change is not None
        assert (before - set(taken)) | set(given) == set(self.pages.free)
        assert len(taken) == change.fresh
        assert freed is None or len(given) == freed
        return result

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

    def slots(self, seq: int) -> list[int]:
        """Where the tokens of a sequence lie."""
        (pages,), (start,), (length,) = self.tables.windows([seq])
        return [
            pages[i // self.size] * self.size + i % self.size for i in range(start, start + length)
        ]

    def execute(self, plan: Plan) -> list[int] | None:
        """Do what a storage and a cache do with a plan; returns the new tokens, row by row."""
        before = books(self.tables)
        if plan.fresh > self.pages.free_count:
            if self.pages.growable:
                self.tables.grow(self.pages.growth_for(plan.fresh))
            return None
        read = {slot for seq in self.tokens for slot in self.slots(seq)}
        for source, target in plan.copies:
            assert self.pages.refs[target] == 0, "copied onto a page in use"
            for offset in range(self.size):
                self.memory[target * self.size + offset] = self.memory.get(
                    source * self.size + offset, 0
                )
        assert not read & set(plan.slots), "writes a slot that a live sequence reads"
        assert len(set(plan.slots)) == len(plan.slots), "writes a slot twice"
        assert books(self.tables) == before, "a plan changed something"
        new = [next(self.names) for _ in plan.slots]
        self.memory.update(zip(plan.slots, new, strict=True))
        return new

    # -- verbs

    @rule(data=st.data(), count=st.integers(0, 3))
    @precondition(lambda self: len(self.tokens) < 12)
    def new(self, data: st.DataObject, count: int) -> None:
        start = data.draw(st.integers(0, self.size - 1))
        mark = self.tables.mark()
        seqs = self.changed(lambda: self.tables.new(count, start=start), freed=0)
        assert self.tables.made_since(mark) == seqs[::-1]
        for seq in seqs:
            assert seq not in self.gone
            self.tokens[seq] = []
            self.parents[seq] = None

    @rule(data=st.data(), whole=st.booleans())
    @precondition(lambda self: len(self.tokens) < 12)
    def fork(self, data: st.DataObject, whole: bool) -> None:
        parents = self.draw(data, distinct=False)
        at = [len(self.tokens[seq]) for seq in parents] if whole else self.counts(data, parents)
        used = self.pages.used_count
        call = lambda: self.tables.fork(parents, at=None if whole else at)  # noqa: E731
        children = self.changed(call, freed=0)
        assert self.pages.used_count == used
        self.count(forks=len(parents))
        for parent, child, kept in zip(parents, children, at, strict=True):
            self.tokens[child] = self.tokens[parent][:kept]
            self.parents[child] = parent

    @rule(data=st.data(), fork=st.booleans())
    def grow(self, data: st.DataObject, fork: bool) -> None:
        seqs = self.draw(data, distinct=not fork)
        counts = [data.draw(st.integers(0, 5)) for _ in seqs]
        slides = self.counts(data, seqs) if data.draw(st.booleans()) else [0] * len(seqs)
        anew = [data.draw(st.one_of(st.none(), st.integers(0, 6))) for _ in seqs] if fork else None
        plan = self.tables.plan(seqs, counts, fork=fork, slide=slides, anew=anew)
        new = self.execute(plan)
        if new is None:
            return
        reserved = self.pages.capacity
        held = self.pages_of(seqs)
        free = self.pages.free_count
        copies = len(plan.copies)
        result = self.changed(lambda: self.tables.carry_out(plan))
        dropped = 0 if fork else len(held - self.pages_of(list(self.tokens)))
        taken = free - self.pages.free_count + dropped
        assert taken == plan.fresh, "the dry run foretold other pages than were taken"
        assert self.pages.capacity == reserved
        forks = len(seqs) if fork else 0
        self.count(forks=forks, appends=len(seqs), allocated=taken, copied=copies)
        self.model_growth(seqs, result, new, counts, slides, anew or [None] * len(seqs))

    def model_growth(
        self,
        seqs: list[int],
        result: list[int],
        new: list[int],
        counts: list[int],
        slides: list[int],
        anew: list[int | None],
    ) -> None:
        for seq, child, count, slide, whole in zip(seqs, result, counts, slides, anew, strict=True):
            added = count if whole is None else whole
            kept = self.tokens[seq][slide:] if whole is None else []
            if child != seq:
                self.parents[child] = seq
            self.tokens[child] = kept + new[:added]
            del new[:added]
            if whole:
                (pages,), (start,), _ = self.tables.windows([child])
                assert start == -whole % self.size, "does not end on a page's edge"
                assert all(self.pages.refs[page] == 1 for page in pages)
        assert not new

    def pages_of(self, seqs: list[int]) -> set[int]:
        return {page for table in self.tables.windows(seqs)[0] for page in table}

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
        wanted = [seq]
        for parent in wanted:
            wanted.extend(child for child, its in self.parents.items() if its == parent)
        assert sorted(self.tables.subtree(seq)) == sorted(wanted)
        self.drop(wanted)

    @rule(data=st.data())
    @precondition(lambda self: self.tokens)
    def siblings(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(list(self.tokens)))
        parent = self.parents[seq]
        wanted = [
            other
            for other, its in self.parents.items()
            if its == parent and other != seq and parent is not None
        ]
        assert sorted(self.tables.siblings(seq)) == sorted(wanted)

    def drop(self, seqs: list[int]) -> None:
        call = lambda: self.tables.release(seqs)  # noqa: E731
        self.changed(call, freed=self.tables.freed_by(seqs))
        for seq in seqs:
            del self.tokens[seq], self.parents[seq]
        self.gone += seqs

    @rule(data=st.data())
    @precondition(lambda self: self.gone)
    def release_what_may_be_missing(self, data: st.DataObject) -> None:
        seqs = data.draw(st.lists(st.sampled_from([*self.tokens, *self.gone]), max_size=4))
        live = [seq for seq in dict.fromkeys(seqs) if seq in self.tokens]
        self.changed(lambda: self.tables.release(seqs, missing_ok=True), self.tables.freed_by(live))
        for seq in live:
            del self.tokens[seq], self.parents[seq]
        self.gone += live

    @rule()
    def settle(self) -> None:
        """Counted anew from the records, the pages are as they were: but the order in which they go
        is the lowest first.
        """
        refs = list(self.pages.refs)
        free = sorted(self.pages.free, reverse=True)
        self.tables.settle()
        assert self.tables.change is None
        change = Change({})
        self.tables.change = change
        self.tables.settle()
        assert self.tables.change is None
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
            "freed": (tables.freed_by, [seq, seq]),
            "subtree": (tables.subtree, bad),
            "siblings": (tables.siblings, bad),
            "lengths": (tables.lengths, [bad]),
        }
        call, *arguments = calls[data.draw(st.sampled_from(sorted(calls)))]
        before = books(tables)
        with pytest.raises(PagedKVError):
            call(*arguments)
        assert books(tables) == before

    # -- what always holds

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "tables"):
            return
        self.tables.check()
        assert self.tables.live() == list(self.tokens), "the oldest first"
        assert self.tables.figures == self.figures
        self.peak = max(self.peak, self.pages.used_count)
        assert self.pages.peak == self.peak
        for seq, tokens in self.tokens.items():
            assert [self.memory[slot] for slot in self.slots(seq)] == tokens
        assert self.tables.lengths(self.tokens) == [len(tokens) for tokens in self.tokens.values()]
        assert self.tables.stored_tokens() == len(
            {slot for seq in self.tokens for slot in self.slots(seq)}
        )

    def teardown(self) -> None:
        if not hasattr(self, "tables"):
            return
        self.tables.release(list(self.tokens))
        assert self.pages.free_count == self.pages.capacity
        assert self.tables.live_count == 0
        for seq in {*self.gone, *self.tokens}:
            with pytest.raises(StaleHandle):
                self.tables.lengths([seq])


def test_tables_agree_with_lists() -> None:
    run_state_machine_as_test(
        TablesMachine, settings=settings(max_examples=300, stateful_step_count=30, deadline=None)
    )
