"""The forest of a batch's block tables, and the parts that come of it: numbers only."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged_kv.attention import Rows
from paged_kv.attention.cost import Shape, arranged, rows_are_cheaper, rows_are_few, worth_keeping
from paged_kv.attention.parts import Batch, Group
from paged_kv.attention.runs import TOP, Forest, plant

LLM = Shape(heads=8, head_size=64, value_head_size=64, itemsize=4)
UNIZERO = Shape(heads=8, head_size=96, value_head_size=96, itemsize=4)


def forked(trunk: int, branches: list[int], own: int, page_size: int = 4) -> Rows:
    """A trunk of so many pages, branches of two pages below it with so many rows each, which have
    `own` pages and one new token.
    """
    numbers = iter(range(1, 100_000))
    first = tuple(next(numbers) for _ in range(trunk))
    tables = []
    for rows in branches:
        branch = first + (next(numbers), next(numbers))
        for _ in range(rows):
            tables.append(branch + tuple(next(numbers) for _ in range(own + 1)))
    past = [(len(table) - 1) * page_size for table in tables]
    return Rows(tables, [0] * len(tables), past, [1] * len(tables))


class Drawn(NamedTuple):
    """Rows of a random tree."""

    rows: Rows
    page_size: int


@st.composite
def trees(draw: st.DrawFn) -> Drawn:
    """Tables that begin alike or not, with any start, length and number of new tokens."""
    page_size = draw(st.integers(1, 3))
    tables: list[tuple[int, ...]] = []
    starts: list[int] = []
    lengths: list[int] = []
    counts: list[int] = []
    fresh = iter(range(1, 10_000))
    for _ in range(draw(st.integers(1, 7))):
        start = draw(st.integers(0, page_size - 1))
        table: tuple[int, ...] = ()
        if tables and draw(st.booleans()):
            other = draw(st.integers(0, len(tables) - 1))
            table = tables[other][: draw(st.integers(0, len(tables[other])))]
            start = starts[other]
        length = draw(st.integers(0, 9))
        count = draw(st.integers(0, 3))
        need = -(-(start + length + count) // page_size)
        table = (table + tuple(next(fresh) for _ in range(need)))[: max(need, 0)]
        tables.append(table)
        starts.append(start)
        lengths.append(length)
        counts.append(count)
    return Drawn(Rows(tables, starts, lengths, counts), page_size)


def read_by(forest: Forest, row: int) -> list[tuple[int, int]]:
    """What a row of the order reads by its runs: pairs of page and index of its first slot."""
    run = forest.rests[row]
    found = [run]
    while run.parent != TOP:
        run = forest.shared[run.parent]
        assert run.begin_row <= row < run.end_row
        found.append(run)
    return [
        (page, each.first, number)
        for each in reversed(found)
        for number, page in enumerate(each.pages)
    ]


@given(trees())
def test_each_row_reads_its_table_once(drawn: Drawn) -> None:
    rows, size = drawn
    forest = plant(rows, size)
    assert sorted(forest.order) == [row for row, count in enumerate(rows.counts) if count]
    assert len(forest.rests) == len(forest.order)
    for here, row in enumerate(forest.order):
        end = rows.starts[row] + rows.lengths[row] + rows.counts[row]
        table = rows.tables[row][: -(-end // size)]
        found = read_by(forest, here)
        assert tuple(page for page, _, _ in found) == table
        firsts = [first + number * size for _, first, number in found]
        assert firsts == [index * size - rows.starts[row] for index in range(len(table))]


@given(trees())
def test_runs_are_shared_and_full_and_as_long_as_may_be(drawn: Drawn) -> None:
    rows, size = drawn
    forest = plant(rows, size)
    for run in forest.shared:
        assert run.pages
        assert run.end_row - run.begin_row > 1
        for here in range(run.begin_row, run.end_row):
            row = forest.order[here]
            assert run.end <= rows.lengths[row]  # none of its tokens is new
    for one, here in enumerate(forest.order):
        for two, there in enumerate(forest.order[:one]):
            if rows.starts[here] != rows.starts[there]:
                continue
            full = min((rows.starts[row] + rows.lengths[row]) // size for row in (here, there))
            pairs = zip(rows.tables[here][:full], rows.tables[there][:full])
            common = 0
            for left, right in pairs:
                if left != right:
                    break
                common += 1
            both = [run for run in forest.shared if run.begin_row <= two and one < run.end_row]
            assert sum(len(run.pages) for run in both) == common


@given(trees(), st.none() | st.integers(1, 9), st.integers(0, 3))
def test_parts_hold_what_each_query_sees_once(drawn: Drawn, window: int | None, depth: int) -> None:
    rows, size = drawn
    batch = Batch(rows, size, plant(rows, size))
    seen: dict[int, list[int]] = {query: [] for query in range(batch.queries)}
    for part in arranged(batch, window, LLM, depth):
        assert part.slots % size == 0
        queries = [
            query
            for group in part.groups
            for query in range(group.query, group.query + group.queries)
        ]
        assert len(set(queries)) == len(queries)
        for group in part.groups:
            assert len(group.pages) * size <= part.slots
            assert group.queries <= part.queries
            for query in range(group.query, group.query + group.queries):
                seen[query] += range(group.first, group.end)
    for query, place in enumerate(batch.places):
        first = 0 if window is None else max(0, place - window + 1)
        visible = [index for index in seen[query] if first <= index <= place]
        assert sorted(visible) == list(range(first, place + 1))


def test_copies_of_one_parent_share_all_but_their_tails() -> None:
    rows = Rows([(1, 2, 3), (1, 2, 4), (1, 2, 5)], [0] * 3, [6] * 3, [1] * 3)
    forest = plant(rows, page_size=2 + 1)
    assert [run.pages for run in forest.shared] == [(1, 2)]
    assert [run.pages for run in forest.rests] == [(3,), (4,), (5,)]


def test_rows_of_one_branch_stand_side_by_side() -> None:
    rows = Rows([(1, 2, 9), (1, 3, 8), (1, 2, 7), (1, 3, 6)], [0] * 4, [4] * 4, [1] * 4)
    forest = plant(rows, page_size=2)
    assert forest.order == [0, 2, 1, 3]
    assert [(run.pages, run.depth) for run in forest.shared] == [((1,), 0), ((2,), 1), ((3,), 1)]


def test_windows_that_begin_at_different_offsets_share_nothing() -> None:
    rows = Rows([(1, 2, 3), (1, 2, 4)], [0, 1], [8, 7], [1, 1])
    assert not plant(rows, page_size=4).shared


def test_a_chain_of_a_thousand_levels_is_planted() -> None:
    """As in a beam that lost one row at each token: no recursion."""
    tables = [(*range(1, length + 1), 10_000 + length) for length in range(1, 1001)]
    forest = plant(Rows(tables, [0] * 1000, list(range(1, 1001)), [1] * 1000), page_size=1)
    assert len(forest.shared) == 999
    assert max(run.depth for run in forest.shared) == 998


class Kept(NamedTuple):
    """What is made of a batch."""

    kept: list[bool]
    parts: int


def kept(rows: Rows, shape: Shape, page_size: int = 4) -> Kept:
    batch = Batch(rows, page_size, plant(rows, page_size))
    return Kept(worth_keeping(batch, None, shape), len(arranged(batch, None, shape)))


def test_levels_are_kept_where_they_pay() -> None:
    assert kept(forked(128, [4, 4, 4, 4], 4), LLM).kept[0]
    assert kept(forked(1, [2], 1), LLM).kept == [False]
    # the trunk pays, branches of two pages do not
    found = kept(forked(200, [2, 2], 2), LLM)
    assert found.kept == [True, False, False]


def test_rests_of_very_different_lengths_are_attended_apart() -> None:
    tables = [(1,), (2,), (3,), tuple(range(4, 1004))]
    rows = Rows(tables, [0] * 4, [3, 3, 3, 3999], [1] * 4)
    assert kept(rows, LLM).parts == 2


def test_a_run_that_is_very_long_is_attended_in_pieces() -> None:
    rows = Rows([tuple(range(1, 2502))], [0], [10_000], [1])
    batch = Batch(rows, 4, plant(rows, 4))
    parts = arranged(batch, None, LLM)
    assert [part.slots for part in parts] == [4096, 4096, 10_004 - 2 * 4096]


def cheaper(rows: Rows, window: int | None, shape: Shape, page_size: int) -> bool:
    """Whether rows are read one by one."""
    batch = Batch(rows, page_size, plant(rows, page_size))
    return rows_are_cheaper(batch, window, shape, arranged(batch, window, shape))


@pytest.mark.parametrize("own", [0, 4])
def test_small_windows_are_read_row_by_row(own: int) -> None:
    """As in UniZero; nothing is planned for it."""
    rows = forked(5 - own, [8], own, page_size=2)
    assert rows_are_few(rows, None, UNIZERO)
    assert cheaper(rows, None, UNIZERO, 2)


def test_long_shared_prefixes_are_read_once() -> None:
    rows = forked(128, [8], 16)
    assert not rows_are_few(rows, None, LLM)
    assert not cheaper(rows, None, LLM, 4)
    assert rows_are_few(rows, 8, LLM)  # a window hides it


def test_a_group_begins_with_the_first_page_that_somebody_sees() -> None:
    rows = Rows([(1, 2, 3, 4, 5)], [1], [7], [2])
    batch = Batch(rows, 2, plant(rows, 2))
    levels = batch.levels([], 3)
    assert levels == [[Group(pages=(4, 5), first=5, end=9, query=0, queries=2)]]
