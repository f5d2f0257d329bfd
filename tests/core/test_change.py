"""A change that is done again entry by entry: what fails is left out, once it has failed often."""

from __future__ import annotations

import sys

import pytest

from paged_kv.pages.change import TRIES, Change, Edit, Store


class Key:
    """A key whose hash raises as often as a test asks for it."""

    def __init__(self, times: int, error: type[Exception] = ValueError) -> None:
        self.times = times
        self.error = error

    def __hash__(self) -> int:
        if self.times:
            self.times -= 1
            raise self.error("no hash")
        return 1


class Holder:
    """Has one attribute."""

    value = 0


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> list[BaseException | None]:
    """The errors that are told to `sys.unraisablehook`."""
    found: list[BaseException | None] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: found.append(told.exc_value))
    return found


def made(*edits: Edit) -> tuple[Change, Holder]:
    change = Change({})
    change.edits = edits
    holder = Holder()
    change.stores = [Store(holder, "value", 7)]
    return change, holder


def test_done_once_or_twice_at_once_or_each_on_its_own() -> None:
    for calls in (("edit",), ("edit_each",), ("edit", "edit_each"), ("edit_each", "edit_each")):
        book = {"a": 1, "b": 2}
        change, holder = made(Edit(book, {"c": 3, "b": 4}, ["a", "b"]), Edit(book, {}, ["x"]))
        for call in calls:
            getattr(change, call)()
        assert (book, holder.value) == ({"b": 4, "c": 3}, 7)


@pytest.mark.parametrize("drop", [False, True])
def test_a_key_that_keeps_failing_is_left_out_and_told(
    drop: bool, unraisable: list[BaseException | None]
) -> None:
    key = Key(0)
    book = {"a": 1}
    edit = Edit(book, {}, [key, "a"]) if drop else Edit(book, {key: 5, "b": 2}, ["a"])
    change, holder = made(edit)
    key.times = TRIES
    change.edit_each()
    assert (book, holder.value) == ({} if drop else {"b": 2}, 7)
    assert list(map(str, unraisable)) == ["no hash"]


def test_a_key_that_fails_now_and_then_is_tried_again(
    unraisable: list[BaseException | None],
) -> None:
    key = Key(0)
    book: dict[object, int] = {}
    change, _ = made(Edit(book, {key: 5}, [key]))
    key.times = TRIES - 1
    change.edit_each()
    assert (book, unraisable) == ({key: 5}, [])


@pytest.mark.parametrize("error", [MemoryError, RecursionError])
def test_what_is_no_fault_of_a_key_is_raised(error: type[Exception]) -> None:
    key = Key(0, error)
    change, _ = made(Edit({"a": 1}, {}, [key]))
    key.times = 1
    with pytest.raises(error):
        change.edit_each()
