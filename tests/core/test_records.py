"""What becomes of a record, against the slots that its sequence reads one by one."""

from __future__ import annotations

import pytest

from paged_kv.pages.records import Fills, Record, cut, pages_for, reach, slid, unfilled

PARENT = 9
PLACE = 100
WINDOWS = [
    (size, start, length) for size in (1, 2, 3, 4) for start in range(size) for length in range(9)
]
windows = pytest.mark.parametrize(("size", "start", "length"), WINDOWS)


def record_of(size: int, start: int, length: int) -> Record:
    """A window on pages that lie anywhere, in any order."""
    numbers = (5, 3, 8, 1, 7, 2, 9, 4, 6)
    needed = {(start + index) // size for index in range(length)}
    return numbers[: len(needed)], start, length, PARENT, PLACE


def slots(record: Record, size: int) -> list[int]:
    """Where its tokens lie."""
    pages, start, length, *_ = record
    return [pages[at // size] * size + at % size for at in range(start, start + length)]


def whole(record: Record, size: int) -> bool:
    """Whether it holds the pages that its tokens lie in, and begins in the first one."""
    pages, start, *_ = record
    return 0 <= start < size and list(pages) == list(
        dict.fromkeys(slot // size for slot in slots(record, size))
    )


@windows
def test_pages_and_reach(size: int, start: int, length: int) -> None:
    record = record_of(size, start, length)
    assert pages_for(start, length, size) == len(record[0])
    if length:
        assert reach(record, size) == (record[0], slots(record, size)[-1] % size + 1)


@windows
def test_slid(size: int, start: int, length: int) -> None:
    before = record_of(size, start, length)
    for drop in range(length + 1):
        lost = [77]
        after = slid(before, drop, size, lost)
        assert slots(after, size) == slots(before, size)[drop:]
        assert whole(after, size)
        assert after[1] == (start + drop) % size, "the next token goes where it would have gone"
        assert after[3:] == (PARENT, PLACE)
        assert [77, *before[0]] == [*lost, *after[0]]


def place_after(drop: int, left: list[int], placed: dict[int, int]) -> int:
    """One behind the last token that is left, or else where the first one was."""
    if not drop:
        return PLACE
    return placed[left[-1]] + 1 if left else 0


@windows
def test_cut(size: int, start: int, length: int) -> None:
    before = record_of(size, start, length)
    read = slots(before, size)
    placed = {slot: 10 * index for index, slot in enumerate(read)}
    for drop in range(length + 1):
        fills: Fills = []
        after = cut(before, drop, size, fills, placed.__getitem__)
        left = read[: length - drop]
        assert slots(after, size) == left
        assert whole(after, size)
        assert (after[1], after[3]) == (start, PARENT)
        assert after[4] == place_after(drop, left, placed)
        by_count = cut(before, drop, size, [], None)
        assert by_count == (*after[:4], PLACE - drop)
        # where the last page was read to its end, nobody but its only holder may write on in it
        read_on = drop and left and left[-1] // size * size + size - 1 in read
        assert fills == ([(after[0][-1], size)] if read_on else [])


@windows
def test_unfilled(size: int, start: int, length: int) -> None:
    before = record_of(size, start, length)
    for surplus in range(length + 1):
        lost = [77]
        fills: Fills = []
        after = unfilled(before, surplus, size, lost, fills)
        left = slots(before, size)[: length - surplus]
        assert slots(after, size) == left
        assert whole(after, size)
        assert (after[1], after[3], after[4]) == (start, PARENT, PLACE - surplus)
        assert [*after[0], *lost[1:]] == list(before[0])
        offset = (left[-1] + 1) % size if left else 0
        assert fills == ([(after[0][-1], offset)] if surplus and offset else [])
