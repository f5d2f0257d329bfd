"""The free stack: which pages are taken next, and how a pool grows."""

from __future__ import annotations

from typing import Any

import pytest

from paged_kv.errors import BadCount
from paged_kv.pages.allocator import PageAllocator


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
    pages.capacity = 6
    pages.rebuild([((1, 3), 2), ((3, 5), 1), ((1,), 3), ((5,), 2)], 4)
    pages.check({1: 2, 3: 2, 5: 2})
    assert pages.free == [6, 4, 2]
    assert pages.peak == 3
    assert [pages.fill[page] for page in (1, 3, 5)] == [4, 4, 2]


@pytest.mark.parametrize(
    "arguments", [{"num_pages": 0, "max_pages": None}, {"num_pages": 2, "max_pages": 1}]
)
def test_a_pool_needs_pages(arguments: dict[str, Any]) -> None:
    with pytest.raises(BadCount):
        PageAllocator(**arguments)
