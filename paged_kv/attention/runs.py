"""The block tables of a batch as a tree of runs of pages. No tensors in here."""

from __future__ import annotations

from typing import NamedTuple

from paged_kv.attention.contract import Rows

TOP = -1  # parent of runs that hang below no other one


class Run(NamedTuple):
    """Pages that follow on each other in the tables of consecutive rows."""

    pages: tuple[int, ...]
    first: int  # index in the sequence of the first slot; below 0 where no token lies there
    end: int  # one behind the index of the last token
    begin_row: int  # in `Forest.order`
    end_row: int
    parent: int  # number of the run that it goes on from, or TOP
    depth: int


class Forest(NamedTuple):
    """Rows in an order in which each run is read by rows that stand side by side.

    `shared` holds the runs that several rows read, each behind the one that it goes on from.
    `rests` holds what is left of each row, in that order: its own pages, and those of which it
    reads a part.

    >>> rows = Rows([(1, 2, 3), (1, 2, 4), (1, 5)], [0, 0, 0], [4, 4, 3], [1, 1, 1])
    >>> forest = plant(rows, page_size=2)
    >>> [(run.pages, run.begin_row, run.end_row) for run in forest.shared]
    [((1,), 0, 3), ((2,), 0, 2)]
    >>> [(run.pages, run.first, run.end) for run in forest.rests]
    [((3,), 4, 5), ((4,), 4, 5), ((5,), 2, 4)]
    """

    order: list[int]  # rows of the batch that have new tokens
    shared: list[Run]
    rests: list[Run]


class _Branch(NamedTuple):
    """Rows that have their first pages in common."""

    rows: list[int]
    depth_in_pages: int
    parent: int
    depth: int


def plant(rows: Rows, page_size: int) -> Forest:
    """The forest of a batch. Rows whose windows begin at different offsets share nothing.

    Cost: one comparison of tables a row and level; equal prefixes compare in a nanosecond a page.
    """
    full = [(start + past) // page_size for start, past in zip(rows.starts, rows.lengths)]
    forest = Forest([], [], [])
    branches = [
        _Branch(group, 0, TOP, 0)
        for group in _grouped([row for row, new in enumerate(rows.counts) if new], rows.starts)
    ]
    branches.reverse()
    while branches:
        branch = branches.pop()
        if len(branch.rows) == 1:
            _add_rest(forest, rows, page_size, branch)
        elif min([full[row] for row in branch.rows]) == branch.depth_in_pages:
            branches += reversed(_parted(rows, full, branch))
        else:
            branches += reversed(_trunk(forest, rows, full, page_size, branch))
    return forest


def _grouped(rows: list[int], keys: list[int]) -> list[list[int]]:
    """Rows with the same key side by side; groups and rows stay in order."""
    groups: dict[int, list[int]] = {}
    for row in rows:
        groups.setdefault(keys[row], []).append(row)
    return list(groups.values())


def _parted(rows: Rows, full: list[int], branch: _Branch) -> list[_Branch]:
    """The branches of rows by their next page; rows that share no more are alone.

    Shared are pages that a row reads to the end and has had since before the step.
    """
    at = branch.depth_in_pages
    alone = [[row] for row in branch.rows if full[row] <= at]
    sharing = [row for row in branch.rows if full[row] > at]
    keys = {row: rows.tables[row][at] for row in sharing}
    groups: dict[int, list[int]] = {}
    for row in sharing:
        groups.setdefault(keys[row], []).append(row)
    parts = sorted([*alone, *groups.values()])
    return [branch._replace(rows=part) for part in parts]


def _trunk(
    forest: Forest, rows: Rows, full: list[int], page_size: int, branch: _Branch
) -> list[_Branch]:
    """Add the run that all rows of a branch share, and return what goes on from it."""
    at = branch.depth_in_pages
    tables = [rows.tables[row] for row in branch.rows]
    most = min([full[row] for row in branch.rows])
    end = _common(min(tables), max(tables), at, most)
    if end == at:
        return _parted(rows, full, branch)
    start = rows.starts[branch.rows[0]]
    begin = len(forest.order)
    run = Run(
        tables[0][at:end],
        at * page_size - start,
        end * page_size - start,
        begin,
        begin + len(branch.rows),
        branch.parent,
        branch.depth,
    )
    forest.shared.append(run)
    below = _Branch(branch.rows, end, len(forest.shared) - 1, branch.depth + 1)
    return _parted(rows, full, below)


def _common(low: tuple[int, ...], high: tuple[int, ...], at: int, most: int) -> int:
    """Where two tables that agree before `at` part, at the latest at `most`."""
    while at < most:
        if low[at:most] == high[at:most]:
            return most
        middle = (at + most) // 2
        if low[at : middle + 1] == high[at : middle + 1]:
            at = middle + 1
        else:
            most = middle
    return at


def _add_rest(forest: Forest, rows: Rows, page_size: int, branch: _Branch) -> None:
    """Add what a row does not share."""
    (row,) = branch.rows
    at = branch.depth_in_pages
    start = rows.starts[row]
    end = rows.lengths[row] + rows.counts[row]
    pages = rows.tables[row][at : -(-(start + end) // page_size)]
    here = len(forest.order)
    forest.order.append(row)
    forest.rests.append(
        Run(pages, at * page_size - start, end, here, here + 1, branch.parent, branch.depth)
    )
