"""The free stack: which pages are taken next, and how a pool grows."""

from __future__ import annotations

import pytest

from paged_kv.errors import BadCount, CorruptCache
from paged_kv.pages.allocator import MANY, PageAllocator


def taken(pages: PageAllocator, count: int) -> list[int]:
    """Take pages, and hold them."""
    found = pages.peek(count)
    pages.take(count)
    pages.hold(found)
    return found


def test_a_look_at_the_pages_that_are_next() -> None:
    pages = PageAllocator(8, max_pages=8)
    assert [pages.peek(count) for count in (0, 1, 3, 9)] == [[], [1], [1, 2, 3], []]
    taken(pages, 4)
    pages.drop([2, 1])
    for count in (1, 2, 3, 6):
        assert pages.peek(count) == [2, 1, 5, 6, 7, 8][:count]
    assert taken(pages, 3) == [2, 1, 5]


def test_pages_freed_together_lie_side_by_side_again() -> None:
    pages = PageAllocator(64, max_pages=64)
    held = taken(pages, 64)
    pages.drop(held[::2] + held[1::2])
    assert taken(pages, 64) == held
    for first in range(0, 64, 8):  # a few at a time, too
        pages.drop(held[first + 7 : first : -2] + held[first : first + 8 : 2])
    assert taken(pages, 64) == held


def test_drop_says_which_pages_became_free() -> None:
    pages = PageAllocator(4, max_pages=4)
    first, second = taken(pages, 2)
    pages.hold([first])
    assert sorted(pages.drop([first, second])) == [second]
    assert pages.drop([first]) == [first]
    assert pages.free_count == 4


def test_growth_doubles_up_to_the_limit_and_reuses_old_pages_first() -> None:
    pages = PageAllocator(2, max_pages=7)
    assert taken(pages, 2) == [1, 2]
    assert (pages.growth_for(1), pages.growth_for(3), pages.growth_for(99)) == (4, 7, 7)
    assert pages.growable == 5
    pages.drop([1])
    pages.grow(4)
    assert taken(pages, 3) == [1, 3, 4]
    assert (pages.peek(1), pages.free_count, pages.peak) == ([], 0, 4)
    assert PageAllocator(1, max_pages=None).growable > 10**9


def test_references_are_counted_anew_from_tables() -> None:
    """Whatever is left of a change that was broken off, and of a growth."""
    pages = PageAllocator(4, max_pages=9)
    taken(pages, 3)
    pages.free.append(2)
    pages.refs[4] = 7
    pages.fill[4] = 3
    pages.capacity = 7
    pages.rebuild([((1, 3), 2), ((3, 5), 1), ((1,), 3), ((5,), 2)], 4)
    pages.check({1: 2, 3: 2, 5: 2})
    assert pages.free == [7, 6, 4, 2]
    assert pages.peak == 3
    assert pages.fill == [0, 4, 0, 4, 0, 2, 0, 0]
    assert pages.unsorted == 0


def test_nothing_has_happened_to_a_fresh_pool() -> None:
    pages = PageAllocator(3, max_pages=None)
    pages.check({})
    assert (pages.growths, pages.peak, pages.unsorted) == (0, 0, 0)
    assert pages.refs == pages.fill == [0, 0, 0, 0]
    assert (pages.growth_for(3), pages.growth_for(7)) == (3, 12)


def test_growth_is_counted_and_its_pages_are_empty() -> None:
    pages = PageAllocator(1, max_pages=4)
    pages.grow(2)
    pages.grow(4)
    pages.check({})
    assert pages.growths == 2
    assert pages.fill == [0] * 5


def came_back(pages: PageAllocator, count: int) -> None:
    """So many pages are taken, and come back in the wrong order."""
    pages.drop(sorted(taken(pages, count), reverse=True))


def in_order(pages: PageAllocator) -> bool:
    """Whether the lowest page is taken first."""
    return pages.free == sorted(pages.free, reverse=True)


def test_the_stack_is_sorted_each_time_many_came_back() -> None:
    pages = PageAllocator(MANY, max_pages=MANY)
    for _ in range(2):
        came_back(pages, MANY - 1)
        assert not in_order(pages)
        came_back(pages, 1)
        assert in_order(pages)
    came_back(pages, 2)
    pages.rebuild([], 4)
    came_back(pages, MANY - 1)
    assert not in_order(pages), "what came back before it was counted anew is in order"


@pytest.mark.parametrize(("capacity", "sorts"), [(8 * MANY, True), (8 * MANY + 1, False)])
def test_a_long_stack_is_sorted_less_often(capacity: int, sorts: bool) -> None:
    pages = PageAllocator(capacity, max_pages=capacity)
    came_back(pages, MANY)
    assert in_order(pages) == sorts


def damaged(pages: PageAllocator, how: str) -> None:
    """Break one rule behind the back of a pool of three pages whose last is in use."""
    if how == "null page counted":
        pages.refs[0] = 1
    elif how == "null page freed":
        pages.free.append(0)
    elif how == "freed twice":
        pages.free.append(1)
    elif how == "held by nobody":
        pages.refs[1] = 2
    elif how == "held and free":
        pages.free.append(3)
    elif how == "lost":
        pages.free.remove(1)
    else:
        pages.refs.append(0)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("null page counted", "the null page is in use"),
        ("null page freed", "the null page is in use"),
        ("freed twice", "a page is free twice: [1, 1, 2]"),
        ("held by nobody", "page 1: 2 references, 0 holders"),
        ("held and free", "page 3 with 1 references, on the free stack: True"),
        ("lost", "page 1 with 0 references, on the free stack: False"),
        ("counted too often", "5 counters for 3 pages and the null page"),
    ],
)
def test_check_says_what_is_wrong(how: str, words: str) -> None:
    pages = PageAllocator(3, max_pages=3)
    pages.free.remove(3)
    pages.hold([3])
    pages.check({3: 1})
    damaged(pages, how)
    with pytest.raises(CorruptCache) as told:
        pages.check({3: 1})
    assert str(told.value) == words


def test_check_wants_no_holder_of_the_null_page_and_each_of_the_last() -> None:
    pages = PageAllocator(3, max_pages=3)
    with pytest.raises(CorruptCache, match="the null page is in use"):
        pages.check({0: 1})
    with pytest.raises(CorruptCache, match="page 3: 0 references, 1 holders"):
        pages.check({3: 1})


@pytest.mark.parametrize(
    ("num_pages", "max_pages", "wrong"), [(0, None, "num_pages"), (2, 1, "max_pages")]
)
def test_a_pool_needs_pages(num_pages: int, max_pages: int | None, wrong: str) -> None:
    with pytest.raises(BadCount) as told:
        PageAllocator(num_pages, max_pages=max_pages)
    assert told.value.name == wrong
