"""Pages and block tables against python lists: tokens are numbers, memory is a dict from slot to number."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
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

from paged_kv.allocator import PageAllocator
from paged_kv.block_table import NO_PARENT, BlockTables
from paged_kv.errors import (
    BadCount,
    CorruptCache,
    DuplicateSequence,
    ForeignHandle,
    OutOfPages,
    PagedKVError,
    StaleHandle,
)
from paged_kv.plan import Plan


def snapshot(tables: BlockTables) -> dict[str, Any]:
    """All state, copied deep."""
    pages = {name: copy.deepcopy(getattr(tables.pages, name)) for name in PageAllocator.__slots__}
    return {**{name: copy.deepcopy(value) for name, value in vars(tables).items() if name != "pages"}, **pages}


class TablesMachine(RuleBasedStateMachine):
    """`tokens` and `parents` of each live sequence are the model; `memory` is what a storage would hold."""

    @initialize(page_size=st.integers(1, 4), pages=st.integers(2, 12))
    def build(self, page_size: int, pages: int) -> None:
        self.size, self.pages = page_size, PageAllocator(pages, max_pages=2 * pages + 1)
        self.tables = BlockTables(self.pages, page_size)
        self.tokens: dict[int, list[int]] = {}
        self.parents: dict[int, int | None] = {}
        self.memory: dict[int, int] = {}
        self.gone: list[int] = []
        self.names = itertools.count(1)

    def draw(self, data: st.DataObject, *, distinct: bool) -> list[int]:
        live = list(self.tokens)
        return data.draw(st.lists(st.sampled_from(live), min_size=1, max_size=4, unique=distinct)) if live else []

    def counts(self, data: st.DataObject, seqs: list[int]) -> list[int]:
        """A number for each sequence, up to its length."""
        return [data.draw(st.integers(0, len(self.tokens[seq]))) for seq in seqs]

    def slots(self, seq: int) -> list[int]:
        """Where the tokens of a sequence lie."""
        (pages,), (start,), (length,) = self.tables.windows([seq])
        return [pages[i // self.size] * self.size + i % self.size for i in range(start, start + length)]

    def execute(self, plan: Plan) -> list[int] | None:
        """Do what a storage and a cache do with a plan; returns the new tokens, row by row."""
        before = snapshot(self.tables)
        if plan.fresh > self.pages.free_count:
            if self.pages.growable:
                self.pages.grow(self.pages.growth_for(plan.fresh))
            return None
        read = {slot for seq in self.tokens for slot in self.slots(seq)}
        for source, target in plan.copies:
            assert self.pages.refs[target] == 0, "copied onto a page in use"
            for offset in range(self.size):
                self.memory[target * self.size + offset] = self.memory.get(source * self.size + offset, 0)
        assert not read & set(plan.slots), "writes a slot that a live sequence reads"
        assert len(set(plan.slots)) == len(plan.slots), "writes a slot twice"
        assert snapshot(self.tables) == before, "a plan changed something"
        new = [next(self.names) for _ in plan.slots]
        self.memory.update(zip(plan.slots, new, strict=True))
        return new

    # -- verbs -------------------------------------------------------------------------------------------

    @rule(data=st.data(), count=st.integers(0, 3))
    @precondition(lambda self: len(self.tokens) < 12)
    def new(self, data: st.DataObject, count: int) -> None:
        for seq in self.tables.new(count, start=data.draw(st.integers(0, self.size - 1))):
            assert seq not in self.gone
            self.tokens[seq], self.parents[seq] = [], None

    @rule(data=st.data(), whole=st.booleans())
    @precondition(lambda self: len(self.tokens) < 12)
    def fork(self, data: st.DataObject, whole: bool) -> None:
        parents = self.draw(data, distinct=False)
        at = [len(self.tokens[seq]) for seq in parents] if whole else self.counts(data, parents)
        used = self.pages.used_count
        children = self.tables.fork(parents, at=None if whole else at)
        assert self.pages.used_count == used
        for parent, child, kept in zip(parents, children, at, strict=True):
            self.tokens[child], self.parents[child] = self.tokens[parent][:kept], parent

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
        reserved, free, held = self.pages.capacity, self.pages.free_count, self.pages_of(seqs)
        result = self.tables.apply(plan)
        dropped = 0 if fork else len(held - self.pages_of(list(self.tokens)))
        assert free - self.pages.free_count + dropped == plan.fresh, (
            "the dry run predicted other pages than were taken"
        )
        assert self.pages.capacity == reserved
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
        counts, free = self.counts(data, seqs), self.pages.free_count
        freed = (self.tables.slide if front else self.tables.truncate)(seqs, counts)
        assert freed == self.pages.free_count - free
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
            other for other, its in self.parents.items() if its == parent and other != seq and parent is not None
        ]
        assert sorted(self.tables.siblings(seq)) == sorted(wanted)

    def drop(self, seqs: list[int]) -> None:
        predicted, free = self.tables.freed_by(seqs), self.pages.free_count
        assert self.tables.release(seqs) == predicted == self.pages.free_count - free
        for seq in seqs:
            del self.tokens[seq], self.parents[seq]
        self.gone += seqs

    # -- mistakes ----------------------------------------------------------------------------------------

    @rule(data=st.data())
    @precondition(lambda self: self.tokens)
    def mistake(self, data: st.DataObject) -> None:
        seq, tables = data.draw(st.sampled_from(list(self.tokens))), self.tables
        beyond = len(self.tokens[seq]) + 1
        bad = data.draw(
            st.sampled_from([*self.gone, 0, -1, ~seq, -seq, seq + 1000, seq ^ 1 << 45, 1.0, None, "1", []])
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
            "rows": (tables.truncate, [seq], [0, 0]),
            "freed": (tables.freed_by, [seq, seq]),
            "subtree": (tables.subtree, bad),
            "siblings": (tables.siblings, bad),
            "lengths": (tables.lengths, [bad]),
        }
        call, *arguments = calls[data.draw(st.sampled_from(sorted(calls)))]
        before = snapshot(tables)
        with pytest.raises(PagedKVError):
            call(*arguments)
        assert snapshot(tables) == before

    # -- what always holds -------------------------------------------------------------------------------

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "tables"):
            return
        self.tables.check()
        assert sorted(self.tables.live()) == sorted(self.tokens)
        for seq, tokens in self.tokens.items():
            assert [self.memory[slot] for slot in self.slots(seq)] == tokens
        assert self.tables.lengths(self.tokens) == [len(tokens) for tokens in self.tokens.values()]
        assert self.tables.stored_tokens() == len({slot for seq in self.tokens for slot in self.slots(seq)})

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


def made(page_size: int, pages: int = 8) -> BlockTables:
    return BlockTables(PageAllocator(pages, max_pages=pages), page_size)


def filled(tables: BlockTables, *lengths: int) -> list[int]:
    seqs = tables.new(len(lengths))
    tables.apply(tables.plan(seqs, lengths))
    return seqs


def test_the_last_owner_writes_in_place_only_where_the_others_end() -> None:
    """Two owners of a tail page append at once: whoever stays must not write what the other still reads."""
    tables = made(4)
    (long,) = filled(tables, 3)
    (short,) = tables.fork([long], at=2)
    assert len(tables.plan([short, long], 1).copies) == 1
    both = tables.plan([long, short], 1)
    assert len(both.copies) == 2
    tables.apply(both)
    tables.check()
    assert tables.pages.used_count == 2


def test_numpy_integers_are_handles_but_no_counts() -> None:
    """Handles may pass through an array; a count must be an int, so that a float or a bool never slips in."""
    tables = made(2)
    (seq,) = filled(tables, 3)
    assert tables.lengths(np.array([seq])) == [3]
    (child,) = tables.fork([np.int64(seq)])
    assert type(child) is int
    assert tables.subtree(np.int64(seq)) == [seq, child]
    tables.release([child])
    with pytest.raises(StaleHandle):
        tables.lengths(np.array([seq, child]))
    for count in (np.int64(1), True, 1.0, "1", None, np.array([1])):
        with pytest.raises(BadCount):
            tables.truncate([seq], count)


def test_a_handle_is_never_used_twice() -> None:
    tables = made(2)
    (first,) = tables.new(1)
    tables.release([first])
    with pytest.raises(ForeignHandle):  # the next handle, which nobody was given yet
        tables.lengths([first + 1])
    (second,) = tables.new(1)
    assert second == first + 1
    with pytest.raises(StaleHandle):
        tables.lengths([first])
    with pytest.raises(ForeignHandle):
        tables.lengths([first - 1])
    assert tables.siblings(second) == []


def test_rows_that_write_to_a_page_each() -> None:
    """A page a row and one offset; whatever needs more than that has none."""
    tables = made(2)
    roots = filled(tables, 2, 4)  # pages 1 and 2, 3
    assert tables.plan(roots, 2, fork=True).row_pages() == ([4, 5], 0)
    assert tables.plan(roots, 1, fork=True).row_pages() == ([4, 5], 0)
    children = tables.apply(tables.plan(roots, 1, fork=True))
    assert tables.plan(children, 1).row_pages() == ([4, 5], 1)
    assert tables.plan(children[::-1], 1).row_pages() == ([5, 4], 1)
    assert tables.plan(roots, 3, fork=True).row_pages() is None, "two pages a row"
    assert tables.plan(roots, [1, 2], fork=True).row_pages() is None, "different numbers"
    assert tables.plan([roots[0], children[1]], 1, fork=True).row_pages() is None, "different offsets"
    assert tables.plan([], 1).row_pages() is None
    assert tables.plan(tables.new(2, start=1), 0).row_pages() is None, "nothing to write"


def test_extend_is_plan_and_apply_of_a_search_step() -> None:
    for drop in (0, 1):
        short, long = made(2, 16), made(2, 16)
        roots = [filled(tables, 4, 6) for tables in (short, long)]
        assert short.pages.peek(2) == [6, 7]
        children = short.extend(roots[0], short.records(roots[0]), drop)
        others = long.apply(long.plan(roots[1], 2, fork=True, slide=2 * drop))
        assert short.windows(children) == long.windows(others)
        assert [short.siblings(child) for child in children] == [[], []]
        assert (short.pages.refs, short.pages.free) == (long.pages.refs, long.pages.free)
        short.check()


def test_a_look_at_the_pages_that_are_next() -> None:
    pages = PageAllocator(8, max_pages=8)
    assert [pages.peek(count) for count in (0, 1, 3, 9)] == [[], [1], [1, 2, 3], []]
    pages.take(4)
    pages.drop([2, 1])
    for count in (1, 2, 3, 6):
        assert pages.peek(count) == [2, 1, 5, 6, 7, 8][:count]
    assert pages.take(3) == [2, 1, 5]


def test_pages_freed_together_lie_side_by_side_again() -> None:
    pages = PageAllocator(64, max_pages=64)
    taken = pages.take(64)
    pages.drop(taken[::2] + taken[1::2])
    assert pages.take(64) == taken
    for first in range(0, 64, 8):  # a few at a time, too
        pages.drop(taken[first + 7 : first : -2] + taken[first : first + 8 : 2])
    assert pages.take(64) == taken


def test_a_handle_of_another_cache_is_refused() -> None:
    ours, theirs = made(2), made(2)
    ours.new(1)
    (other,) = theirs.new(1)
    with pytest.raises(ForeignHandle, match=f"{other} is not a sequence of this cache"):
        ours.lengths([other])
    for number in (True, ours.live()[0] + 1):  # of a row that does not exist
        with pytest.raises(ForeignHandle):
            ours.lengths([number])
    with pytest.raises(TypeError):
        ours.lengths(5)  # type: ignore[arg-type]


def test_growth_doubles_up_to_the_limit_and_reuses_old_pages_first() -> None:
    pages = PageAllocator(2, max_pages=7)
    assert pages.take(2) == [1, 2]
    assert (pages.growth_for(1), pages.growth_for(3), pages.growth_for(99)) == (4, 7, 7)
    assert pages.growable == 5
    pages.drop([1])
    pages.grow(4)
    assert pages.take(3) == [1, 3, 4]
    with pytest.raises(OutOfPages) as caught:
        pages.take(1)
    assert (caught.value.requested, caught.value.free) == (1, 0)
    assert PageAllocator(1, max_pages=None).growable > 10**9


@pytest.mark.parametrize("arguments", [{"num_pages": 0, "max_pages": None}, {"num_pages": 2, "max_pages": 1}])
def test_a_pool_needs_pages(arguments: dict[str, Any]) -> None:
    with pytest.raises(BadCount):
        PageAllocator(**arguments)
    with pytest.raises(BadCount, match="page_size is 0"):
        made(0)


def change(tables: BlockTables, **fields: Any) -> None:
    """Other fields in the record of the oldest sequence."""
    seq, record = next(iter(tables._live.items()))
    names = ("pages", "start", "length", "parent")
    tables._live[seq] = tuple(fields.get(name, value) for name, value in zip(names, record))  # type: ignore[assignment]


def corrupt(tables: BlockTables, how: str) -> None:
    """Break one invariant behind the back of a cache with a shared page, a released row and a free page."""
    pages = tables.pages
    actions = {
        "free twice": lambda: pages.free.append(pages.free[0]),
        "null page freed": lambda: pages.free.append(0),
        "null page held": lambda: change(tables, pages=(0, 2)),
        "lost reference": lambda: pages.refs.__setitem__(1, 1),
        "lost page": lambda: pages.free.pop(),
        "counter too many": lambda: pages.refs.append(0),
        "page twice": lambda: change(tables, pages=(1, 1)),
        "short table": lambda: change(tables, pages=(1,)),
        "bad start": lambda: change(tables, start=7),
        "parent to come": lambda: change(tables, parent=tables._next),
        "number to come": lambda: tables._live.__setitem__(tables._next, ((), 0, 0, NO_PARENT)),
    }
    actions[how]()


@pytest.mark.parametrize(
    "how",
    [
        "free twice",
        "null page freed",
        "null page held",
        "lost reference",
        "lost page",
        "counter too many",
        "page twice",
        "short table",
        "bad start",
        "parent to come",
        "number to come",
    ],
)
def test_check_finds_what_is_broken(how: str) -> None:
    tables = made(2)
    (root,) = filled(tables, 3)
    tables.fork([root])
    tables.release(tables.fork([root]))
    tables.check()
    corrupt(tables, how)
    with pytest.raises(CorruptCache):
        tables.check()


def test_a_duplicate_is_named() -> None:
    tables = made(2)
    one, two = tables.new(2)
    with pytest.raises(DuplicateSequence) as caught:
        tables.plan([one, two, two], 1)
    assert caught.value.handle == two
