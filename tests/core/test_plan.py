"""What a plan says of pages: marks of those that are not full, and no page that is not free."""

from __future__ import annotations

import pytest

from paged_kv.pages.allocator import PageAllocator
from paged_kv.pages.plan import plan_growth
from paged_kv.pages.records import Record

SIZE = 3
EMPTY: Record = ((), 0, 0, 0, 0)


@pytest.mark.parametrize("new", range(1, 10))
def test_marks_are_of_last_pages_that_are_not_full(new: int) -> None:
    pages = PageAllocator(4, max_pages=4)
    plan = plan_growth([7], [EMPTY], [new], SIZE, pages, fork=False)
    last = -(-new // SIZE)
    assert plan.becomes[0][0] == (1, 2, 3)[:last]
    assert plan.fills == ([(last, new % SIZE)] if new % SIZE else [])


def test_a_plan_that_wants_more_pages_than_are_free_names_none_that_is_in_use() -> None:
    pages = PageAllocator(1, max_pages=1)
    pages.take(1)
    pages.hold([1, 1])
    pages.note([(1, 2)])
    tail: Record = ((1,), 0, 1, 0, 1)  # another one has written on in its page
    plan = plan_growth([7, 8], [tail, EMPTY], [1, 4], SIZE, pages, fork=True)
    assert plan.fresh == 3
    assert plan.copies == [(1, 0)]
    assert set(plan.becomes[0][0] + plan.becomes[1][0]) == {0}


@pytest.mark.parametrize("fork", [False, True])
def test_the_last_free_page_is_taken_for_a_copy_too(fork: bool) -> None:
    pages = PageAllocator(2, max_pages=2)
    pages.take(1)
    pages.hold([1, 1])
    pages.note([(1, 2)])
    tail: Record = ((1,), 0, 1, 5, 1)  # another one has written on in its page
    plan = plan_growth([7], [tail], [1], SIZE, pages, fork=fork)
    assert (plan.fresh, plan.copies) == (1, [(1, 2)])
    assert plan.becomes == [((2,), 0, 2, 7 if fork else 5, 2)]
