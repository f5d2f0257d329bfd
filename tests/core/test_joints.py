"""Sequences that ended and hold branches together: when they are taken out, and what becomes of
steps that hang on them.
"""

from __future__ import annotations

import pytest

from paged_kv.pages.allocator import PageAllocator
from paged_kv.pages.audit import audit
from paged_kv.pages.block_tables import BlockTables
from paged_kv.pages.open_steps import OpenSteps


class Garden:
    """`top` lives. Below it hangs `upper`, which ended, on that `beside` and `lower`, which ended,
    on that `left` and `right`.

    `on` names the parents of steps that were opened before these ended, one of a row each.
    """

    def __init__(self, *on: tuple[str, ...]) -> None:
        self.tables = BlockTables(PageAllocator(8, max_pages=8), 2)
        self.steps = OpenSteps(self.tables)
        tables = self.tables
        (self.top,) = tables.new(1)
        (self.upper,) = tables.fork([self.top])
        self.lower, self.beside = tables.fork([self.upper] * 2)
        self.left, self.right = tables.fork([self.lower] * 2)
        self.opened = [self.open([getattr(self, name) for name in names]) for names in on]
        tables.release([self.upper, self.lower])

    def open(self, parents: list[int]) -> int:
        number = self.steps.number()
        plan = self.steps.plan(parents, self.tables.books.records(parents), [1] * len(parents))
        self.steps.open(number, plan, None)
        return number

    def release(self, *names: str) -> None:
        self.tables.release([getattr(self, name) for name in names])
        audit(self.tables.books)

    def abandon(self, number: int) -> None:
        self.steps.abandon(number)
        audit(self.tables.books)

    def publish(self, number: int) -> list[int]:
        filled = [1] * len(self.tables.books.pending[number].records)
        children = self.steps.publish(number, filled)
        audit(self.tables.books)
        return children

    @property
    def joints(self) -> dict[int, int]:
        return self.tables.books.tree.joints

    def parent(self, seq: int) -> int | None:
        return self.tables.books.tree.parent(seq)


def test_a_joint_below_one_that_is_taken_out_hangs_on_what_is_above() -> None:
    garden = Garden()
    assert garden.joints == {garden.upper: garden.top, garden.lower: garden.upper}
    garden.release("beside")
    assert garden.joints == {garden.lower: garden.top}
    assert garden.parent(garden.left) == garden.parent(garden.right) == garden.top
    garden.release("right")
    assert garden.joints == {}
    assert garden.parent(garden.left) == garden.top


@pytest.mark.parametrize("names", [("beside", "right"), ("right", "beside")])
def test_joints_one_below_the_other_are_taken_out_in_one_call(names: tuple[str, str]) -> None:
    garden = Garden()
    garden.release(*names)
    assert garden.joints == {}
    assert garden.parent(garden.left) == garden.top
    assert garden.tables.books.tree.children(garden.top) == [garden.left]


@pytest.mark.parametrize("names", [("beside", "right"), ("right", "beside")])
def test_a_row_of_a_step_is_a_branch(names: tuple[str, str]) -> None:
    garden = Garden(("lower",))
    garden.release(*names)
    assert garden.joints == {garden.lower: garden.top}
    (child,) = garden.publish(garden.opened[0])
    assert garden.parent(child) == garden.parent(garden.left) == garden.top
    assert garden.tables.books.tree.rivals(child) == [garden.left]


def test_a_step_that_is_given_up_takes_all_joints_along_that_it_held() -> None:
    garden = Garden(("upper", "lower"))
    garden.release("beside", "right")
    assert garden.joints == {garden.upper: garden.top, garden.lower: garden.upper}
    garden.abandon(garden.opened[0])
    assert garden.joints == {}
    assert garden.parent(garden.left) == garden.top


def test_a_step_whose_joint_goes_hangs_on_what_is_above_it() -> None:
    """Whichever steps are open beside it."""
    garden = Garden(("top",), ("lower",), ("top",))
    garden.release("left", "right")
    assert garden.lower not in garden.joints
    garden.release("beside")
    assert garden.joints == {}
    for number in garden.opened:
        (child,) = garden.publish(number)
        assert garden.parent(child) == garden.top
