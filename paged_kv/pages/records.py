"""A sequence as a record, and the records that come of one. No tensors in here."""

from __future__ import annotations

from collections.abc import Callable

# Its pages, the offset of its first token in them, its length, the handle of its parent (NO_PARENT,
# or one that may be stale), and the default position of its next token. A plain tuple: a step makes
# one a row, and one with named fields takes four times as long.
Record = tuple[tuple[int, ...], int, int, int, int]

NO_PARENT = 0

Links = dict[int, int | dict[int, None]]  # parents with their only child, or all of them

Fills = list[tuple[int, int]]  # pages, and how far they are written to


def pages_for(start: int, length: int, page_size: int) -> int:
    """Pages that a table of this window holds."""
    return -(-(start + length) // page_size) if length else 0


def reach(record: Record, page_size: int) -> tuple[tuple[int, ...], int]:
    """The pages of a record, and how far it reaches into the last one."""
    return record[0], (record[1] + record[2] - 1) % page_size + 1


def slid(record: Record, drop: int, page_size: int, lost: list[int]) -> Record:
    """A record without its first tokens; pages that it leaves are added to `lost`."""
    pages, start, length, parent, place = record
    skipped, start = divmod(start + drop, page_size)
    if drop == length:
        skipped = len(pages)
    lost += pages[:skipped]
    return pages[skipped:], start, length - drop, parent, place


def cut(
    record: Record,
    drop: int,
    page_size: int,
    fills: Fills,
    position_of: Callable[[int], int] | None,
) -> Record:
    """A record without its last tokens.

    A last page that was read to its end may be read there by others: `fills` blocks it.
    `position_of` says where the token in a slot was placed; without it, each was placed one behind
    the token before it.
    """
    if not drop:
        return record
    pages, start, length, parent, place = record
    left = length - drop
    end = start + left
    kept = pages[: pages_for(start, left, page_size)]
    if kept and (len(kept) < len(pages) or not (start + length) % page_size):
        fills.append((kept[-1], page_size))
    if position_of is None:
        place -= drop
    elif left:
        place = position_of(kept[-1] * page_size + (end - 1) % page_size) + 1
    else:
        place = position_of(pages[end // page_size] * page_size + end % page_size)
    return kept, start, left, parent, place


def unfilled(record: Record, surplus: int, page_size: int, lost: list[int], fills: Fills) -> Record:
    """A record of a step without room that was not filled, which others may have from now on."""
    pages, start, length, parent, place = record
    left = length - surplus
    kept = pages[: pages_for(start, left, page_size)]
    lost += pages[len(kept) :]
    if surplus and kept and (start + left) % page_size:
        fills.append((kept[-1], (start + left) % page_size))
    return kept, start, left, parent, place - surplus
