"""Block tables in single cases: tail pages, handles, search steps, and what `check` finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from paged_kv.errors import (
    BadCount,
    CorruptCache,
    DuplicateSequence,
    ForeignHandle,
    StaleHandle,
)
from paged_kv.pages.allocator import PageAllocator
from paged_kv.pages.audit import audit
from paged_kv.pages.block_tables import BlockTables
from paged_kv.pages.open_steps import OpenSteps
from paged_kv.pages.records import NO_PARENT


def made(page_size: int, pages: int = 8) -> BlockTables:
    return BlockTables(PageAllocator(pages, max_pages=pages), page_size)


def filled(tables: BlockTables, *lengths: int) -> list[int]:
    seqs = tables.new(len(lengths))
    return tables.carry_out(tables.plan(seqs, lengths))


@pytest.mark.parametrize("turned", [False, True])
def test_of_several_owners_that_one_writes_in_place_who_reads_to_the_end(turned: bool) -> None:
    """Two owners of a tail page append at once: whoever stays must not write what the other still
    reads.
    """
    tables = made(4)
    (long,) = filled(tables, 3)
    (short,) = tables.fork([long], at=2)
    seqs = [short, long] if turned else [long, short]
    both = tables.plan(seqs, 1)
    assert both.copies == [(1, 2)]
    tables.carry_out(both)
    assert tables.books.windows([long, short])[0] == [(1,), (2,)]
    audit(tables.books)
    assert tables.books.pages.used_count == 2


def test_a_handle_is_never_used_twice() -> None:
    tables = made(2)
    (first,) = tables.new(1)
    tables.release([first])
    with pytest.raises(ForeignHandle):  # the next handle, which nobody was given yet
        tables.books.lengths([first + 1])
    (second,) = tables.new(1)
    assert second == first + 1
    with pytest.raises(StaleHandle):
        tables.books.lengths([first])
    with pytest.raises(ForeignHandle):
        tables.books.lengths([first - 1])
    assert tables.books.tree.rivals(second) == []


def test_a_handle_of_another_cache_is_refused() -> None:
    ours = made(2)
    theirs = made(2)
    (own,) = ours.new(1)
    (other,) = theirs.new(1)
    with pytest.raises(ForeignHandle, match=f"{other} is not a sequence of this cache"):
        ours.books.lengths([other])
    for number in (True, own + 1):  # the second is in reach, and nobody was given it yet
        with pytest.raises(ForeignHandle):
            ours.books.lengths([number])


def test_rows_that_write_to_a_page_each() -> None:
    """A page a row and one offset; whatever needs more than that has none."""
    tables = made(2)
    roots = filled(tables, 2, 4)  # pages 1 and 2, 3
    assert tables.plan(roots, 2, fork=True).row_pages() == ([4, 5], 0)
    assert tables.plan(roots, 1, fork=True).row_pages() == ([4, 5], 0)
    children = tables.carry_out(tables.plan(roots, 1, fork=True))
    assert tables.plan(children, 1).row_pages() == ([4, 5], 1)
    assert tables.plan(children[::-1], 1).row_pages() == ([5, 4], 1)
    assert tables.plan(roots, 3, fork=True).row_pages() is None, "two pages a row"
    assert tables.plan(roots, [1, 2], fork=True).row_pages() is None, "different numbers"
    mixed = [roots[0], tables.fork(children, at=3)[1]]
    assert tables.plan(mixed, 1, fork=True).row_pages() is None, "different offsets"
    assert tables.plan([], 1).row_pages() is None
    assert tables.plan(tables.new(2, start=1), 0).row_pages() is None, "nothing to write"


def alike(tables: BlockTables, others: BlockTables) -> None:
    """Pages and figures say the same."""
    pages = tables.books.pages
    theirs = others.books.pages
    assert (pages.refs, pages.free, pages.peak) == (theirs.refs, theirs.free, theirs.peak)
    assert [fill for fill, refs in zip(pages.fill, pages.refs) if refs] == [
        fill for fill, refs in zip(theirs.fill, theirs.refs) if refs
    ]
    assert tables.books.figures == others.books.figures
    audit(tables.books)


@pytest.mark.parametrize("drop", [0, 1, 2])
@pytest.mark.parametrize("length", [3, 4])
def test_a_step_is_a_fork_that_nobody_sees_yet(length: int, drop: int) -> None:
    """Planned, opened and published, it leaves what forking, growing and sliding leave."""
    short = made(2, 16)
    long = made(2, 16)
    roots = [filled(tables, length, length) for tables in (short, long)]
    steps = OpenSteps(short)
    plan = steps.plan(roots[0], short.books.records(roots[0]), [2, 2])
    number = steps.number()
    steps.open(number, plan, None)
    assert short.books.live() == roots[0]
    assert short.books.pending[number].rooms == [2, 2]
    assert short.books.pending_pages == plan.fresh == 2
    children = steps.publish(number, [2, 2], [drop, drop] if drop else None)
    others = long.carry_out(long.plan(roots[1], 2, fork=True))
    long.slide(others, drop)
    assert short.books.pending == {}
    assert short.books.windows(children) == long.books.windows(others)
    assert [short.books.tree.rivals(child) for child in children] == [[], []]
    alike(short, long)


@pytest.mark.parametrize("new", [0, 1, 2, 3, 4])
def test_room_that_was_not_filled_is_given_back(new: int) -> None:
    short = made(2, 16)
    long = made(2, 16)
    roots = [filled(tables, 3) for tables in (short, long)]
    steps = OpenSteps(short)
    number = steps.number()
    steps.open(number, short.plan(roots[0], 4, fork=True), None)
    children = steps.publish(number, [new])
    others = long.carry_out(long.plan(roots[1], new, fork=True))
    assert short.books.windows(children) == long.books.windows(others)
    assert short.books.pages.refs == long.books.pages.refs
    assert short.plan(children, 1).slots == long.plan(others, 1).slots
    audit(short.books)


def test_a_step_that_is_given_up_leaves_nothing() -> None:
    tables = made(2, 16)
    roots = filled(tables, 3, 4)
    refs = list(tables.books.pages.refs)
    plan = tables.plan(roots, 3, fork=True)
    steps = OpenSteps(tables)
    number = steps.number()
    steps.open(number, plan, None)
    assert tables.books.pages.refs != refs
    assert tables.plan(roots[:1], 1).copies, "the step has the rest of the page"
    steps.abandon(number)
    steps.abandon(number)
    assert (tables.books.pages.refs, tables.books.pending) == (refs, {})
    assert not tables.plan(roots[:1], 1).copies
    audit(tables.books)


def opened(steps: OpenSteps, parents: list[int], room: int) -> int:
    """The number of a new step."""
    number = steps.number()
    plan = steps.plan(parents, steps.books.records(parents), [room] * len(parents))
    steps.open(number, plan, None)
    return number


def test_slots_of_a_step_that_is_given_up_are_free_again_in_pages_that_several_hold() -> None:
    tables = made(4)
    (root,) = filled(tables, 2)
    (other,) = tables.fork([root])
    steps = OpenSteps(tables)
    steps.abandon(opened(steps, [root], 1))
    plan = tables.plan([other], 1)
    assert (plan.copies, plan.slots) == ([], [6])


def test_a_step_below_a_joint_gives_everything_back_once() -> None:
    tables = made(2)
    (root,) = filled(tables, 2)
    children = tables.fork([root] * 2)
    steps = OpenSteps(tables)
    number = opened(steps, [root], 2)
    tables.release([root])
    assert number in steps
    assert list(tables.books.tree.joints) == [root]
    for _ in range(2):
        steps.abandon(number)
        assert number not in steps
        assert tables.books.pending == {}
        assert tables.books.pages.used_count == 1
        assert tables.books.tree.rivals(children[0]) == children[1:]
        audit(tables.books)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_step_is_light_where_each_row_takes_exactly_one_page(size: int) -> None:
    """All windows end at an edge of a page, and there is a page for each."""
    for start in range(size):
        for length in range(2 * size):
            tables = made(size, 5)
            root = tables.new(1, start=start)
            tables.carry_out(tables.plan(root, length))
            records = tables.books.records(root)
            steps = OpenSteps(tables)
            on_edge = (start + length) % size == 0
            assert steps.can_be_light(records, size) == on_edge
            assert not steps.can_be_light(records, size + 1)
            rows = tables.books.pages.free_count
            assert steps.can_be_light(records * rows, size) == on_edge
            assert not steps.can_be_light(records * (rows + 1), size)


def test_a_duplicate_is_named() -> None:
    tables = made(2)
    one, two = tables.new(2)
    with pytest.raises(DuplicateSequence) as caught:
        tables.plan([one, two, two], 1)
    assert caught.value.handle == two


def test_a_page_holds_a_token() -> None:
    with pytest.raises(BadCount, match="page_size is 0"):
        made(0)


def test_what_was_made_since_a_moment_that_lives() -> None:
    tables = made(2)
    marks = [tables.books.mark()]
    (first,) = tables.new(1)
    marks.append(tables.books.mark())
    second, third = tables.fork([first, first])
    marks.append(tables.books.mark())
    assert [tables.books.made_since(mark) for mark in marks] == [
        [third, second, first],
        [third, second],
        [],
    ]
    tables.release([second])
    assert tables.books.made_since(marks[1]) == [third]
    many = tables.new(1000)  # over several runs of numbers
    assert tables.books.made_since(marks[2]) == many[::-1]
    assert tables.books.made_since(marks[0]) == [*many[::-1], third, first]


# -- check


def change(tables: BlockTables, **fields: Any) -> None:
    """Other fields in the record of the oldest sequence."""
    seq, record = tables.books.items()[0]
    names = ("pages", "start", "length", "parent", "place")
    changed = tuple(fields.get(name, value) for name, value in zip(names, record))
    tables.books._live[seq] = changed


def to_come(tables: BlockTables) -> int:
    """A number that nobody was given yet."""
    return max(tables.books.live()) + 50


def add(tables: BlockTables) -> None:
    """A sequence under such a number."""
    tables.books._live[to_come(tables)] = ((), 0, 0, NO_PARENT, 0)


def reach(tables: BlockTables) -> None:
    """A last page that is read further than it was written to."""
    tables.books.pages.fill[2] = 0


# Each breaks one invariant behind the back of tables with a shared page, a released sequence and a
# free page.
DAMAGES: dict[str, tuple[str, Callable[[BlockTables], Any]]] = {
    "free twice": (
        "is free twice",
        lambda tables: tables.books.pages.free.append(tables.books.pages.free[0]),
    ),
    "null page freed": ("null page", lambda tables: tables.books.pages.free.append(0)),
    "null page held": ("null page", lambda tables: change(tables, pages=(0, 2))),
    "null page counted": ("null page", lambda tables: tables.books.pages.refs.__setitem__(0, 1)),
    "lost reference": (
        "page 1: 1 references, 2 holders",
        lambda tables: tables.books.pages.refs.__setitem__(1, 1),
    ),
    "lost page": (
        "with 0 references, on the free stack: False",
        lambda tables: tables.books.pages.free.pop(),
    ),
    "counter too many": ("counters for 8 pages", lambda tables: tables.books.pages.refs.append(0)),
    "page twice": ("holds a page twice", lambda tables: change(tables, pages=(1, 1))),
    "short table": (r"pages \(1,\), start 0, length 3", lambda tables: change(tables, pages=(1,))),
    "bad start": ("start 7", lambda tables: change(tables, start=7)),
    "parent to come": (
        "is neither live nor a joint",
        lambda tables: change(tables, parent=to_come(tables)),
    ),
    "free slot that is read": ("page 2: read to 1, written to 0", reach),
    "number to come": ("not a number that was given out", add),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_check_finds_what_is_broken(how: str) -> None:
    words, damage = DAMAGES[how]
    tables = made(2)
    (root,) = filled(tables, 3)
    tables.fork([root])
    tables.release(tables.fork([root]))
    audit(tables.books)
    damage(tables)
    with pytest.raises(CorruptCache, match=words):
        audit(tables.books)
