"""How changes take effect, whole or after an interrupt; and what an audit of the books finds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from paged_kv.errors import BadArgument, CorruptCache, StaleHandle
from paged_kv.pages.allocator import PageAllocator
from paged_kv.pages.audit import audit
from paged_kv.pages.block_tables import BlockTables
from paged_kv.pages.books import Books
from paged_kv.pages.change import Change, Entry, Figures, Home, Pending
from paged_kv.pages.open_steps import OpenSteps


def made(page_size: int, pages: int = 16) -> BlockTables:
    return BlockTables(PageAllocator(pages, max_pages=pages), page_size)


def filled(tables: BlockTables, *lengths: int) -> list[int]:
    seqs = tables.new(len(lengths))
    return tables.carry_out(tables.plan(seqs, lengths))


def life(tables: BlockTables) -> Iterator[str]:
    """All that may happen to sequences, one verb after the other."""
    steps = OpenSteps(tables)

    def opened(parents: list[int], room: int) -> int:
        number = steps.number()
        plan = steps.plan(parents, tables.books.records(parents), [room] * len(parents))
        steps.open(number, plan, None)
        return number

    root, other = filled(tables, 3, 4)
    yield "grown"
    first, second, third = tables.fork([root, root, other])
    yield "forked"
    tables.carry_out(tables.plan([first, second], 2))
    yield "copied"
    tables.carry_out(tables.plan([first], 2, fork=True))
    yield "forked and grown"
    tables.slide([third, first], [2, 3])
    yield "slid"
    tables.truncate([second, root], [3, 1])
    yield "cut"
    kept = opened([root, other], 3)
    lost = opened([root], 2)
    tables.release([root, third])
    yield "parents released"
    steps.abandon(lost)
    yield "given up"
    steps.publish(kept, [1, 1], [1, 0], [70, 80])
    yield "published"
    tables.release([first, second])
    yield "branches released"
    tables.release(tables.books.live())
    yield "all released"


def seen(tables: BlockTables) -> list[Any]:
    """All that the books say, whatever names pages and sequences have."""
    books = tables.books
    names = {seq: name for name, seq in enumerate(books.live())}
    pages = books.pages
    used = Counter(pages.refs[1:])
    records = [record[1:3] + record[4:] for record in books.all_records()]
    above = [names.get(books.tree.parent(seq) or 0) for seq in names]
    audit(books)
    return [records, above, len(books.tree.joints), used, pages.peak, books.figures]


def only_stored(books: Books, change: Change) -> None:
    """An interrupt came right after the store."""
    books.change = change
    books.settle()


APPLY = Books.apply


def done_again(books: Books, change: Change) -> None:
    """An interrupt came right before the end."""
    APPLY(books, change)
    books.change = change
    books.settle()


@pytest.mark.parametrize("apply", [only_stored, done_again])
def test_whenever_an_interrupt_comes_a_change_is_carried_out(
    apply: Callable[[Books, Change], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = made(2)
    wanted = [(what, seen(plain)) for what in life(plain)]
    monkeypatch.setattr(Books, "apply", apply)
    broken = made(2)
    assert [(what, seen(broken)) for what in life(broken)] == wanted


def test_verbs_are_counted_with_the_pages_that_they_took() -> None:
    tables = made(2)
    found = {}
    for what in life(tables):
        found[what] = tables.books.figures
    assert found["forked"] == Figures(3, 2, 4, 0)
    assert found["copied"] == Figures(3, 2 + 2, 4 + 1 + 2, 1)
    assert found["forked and grown"] == Figures(3 + 1, 4 + 1, 7 + 1, 1)
    assert found["parents released"] == Figures(4, 5, 8 + 2 * 2 + 1, 1)
    assert found["all released"] == Figures(4 + 2, 5 + 2, 13, 1)


def test_a_fork_that_was_interrupted_has_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = made(2)
    (root,) = filled(tables, 3)

    def interrupted(pages: PageAllocator, held: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PageAllocator, "hold", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tables.fork([root])
    tables.books.settle()
    audit(tables.books)
    assert tables.books.lengths(tables.books.live()) == [3, 3]
    assert tables.books.figures.forks == 1


@pytest.mark.parametrize("late", [False, True])
def test_a_growth_that_was_interrupted_is_one_growth(
    late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    books = BlockTables(PageAllocator(2, max_pages=4), 2).books
    grow = PageAllocator.grow

    def interrupted(pages: PageAllocator, capacity: int) -> None:
        if late:
            grow(pages, capacity)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PageAllocator, "grow", interrupted)
        with pytest.raises(KeyboardInterrupt):
            books.grow(3)
    books.settle()
    assert (books.pages.capacity, books.pages.growths) == (3, 1)
    books.grow(4)
    books.settle()
    assert (books.pages.capacity, books.pages.growths, books.pages.free_count) == (4, 2, 4)
    audit(books)


@pytest.mark.parametrize("where", ["take", "hold", "note"])
def test_a_step_that_was_interrupted_while_it_opened_can_be_given_up(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = made(2)
    (root,) = filled(tables, 3)
    steps = OpenSteps(tables)
    plan = steps.plan([root], tables.books.records([root]), [2])

    def interrupted(pages: PageAllocator, *arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PageAllocator, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            steps.open(1, plan, None)
    tables.books.settle()
    audit(tables.books)
    assert tables.books.pages.used_count == 3
    steps.abandon(1)
    audit(tables.books)
    assert tables.books.pages.used_count == 2


def test_nothing_has_happened_at_first() -> None:
    tables = made(1)
    assert tables.books.figures == Figures(0, 0, 0, 0)
    assert (tables.books.live(), tables.books.live_count, tables.books.stored_tokens()) == (
        [],
        0,
        0,
    )


def test_a_moment_of_another_cache_is_refused() -> None:
    with pytest.raises(BadArgument) as told:
        made(2).books.made_since((1, 2))
    assert (told.value.name, told.value.value) == ("mark", (1, 2))
    assert str(told.value).endswith("what mark() of this cache returned")


def test_a_release_names_what_ended_before_unless_that_may_be() -> None:
    tables = made(2)
    (seq,) = filled(tables, 1)
    tables.release([seq])
    with pytest.raises(StaleHandle):
        tables.release([seq])
    tables.release([seq], missing_ok=True)


@pytest.mark.parametrize("commit", [False, True])
def test_pages_of_a_step_count_as_taken_and_copied_however_it_ends(commit: bool) -> None:
    tables = made(2)
    (root,) = filled(tables, 3)
    steps = OpenSteps(tables)
    plan = steps.plan([root, root], tables.books.records([root, root]), [2, 2])
    number = steps.number()
    steps.open(number, plan, None)
    assert tables.books.figures == Figures(0, 1, 2 + 3, 1)
    if commit:
        steps.publish(number, [2, 2])
        assert tables.books.figures == Figures(2, 3, 2 + 3, 1)
    else:
        steps.abandon(number)
        assert tables.books.figures == Figures(0, 1, 2 + 3, 1)


# -- what an audit finds


def test_a_page_that_is_read_further_than_it_was_written_to() -> None:
    """By any sequence, if another one ends there; in its last page or before."""
    tables = made(4)
    long, short = filled(tables, 3, 6)
    tables.fork([long, short], at=[1, 2])
    audit(tables.books)
    for page, mark, words in (
        (1, 2, "page 1: read to 3, written to 2"),
        (2, 3, "page 2: read to 4"),
    ):
        fill = tables.books.pages.fill[page]
        tables.books.pages.fill[page] = mark
        with pytest.raises(CorruptCache, match=words):
            audit(tables.books)
        tables.books.pages.fill[page] = fill
    audit(tables.books)


def test_an_open_step_that_is_broken() -> None:
    tables = made(2)
    filled(tables, 2)
    tables.books.pending[1] = Pending([((1, 1), 0, 3, 0, 3)], [1], 0, 0, None)
    with pytest.raises(CorruptCache, match=r"^an open step holds a page twice: \(1, 1\)"):
        audit(tables.books)


def test_a_sequence_that_begins_behind_its_first_page() -> None:
    tables = made(2)
    (seq,) = filled(tables, 4)
    tables.books._live[seq] = ((1, 2), 2, 2, 0, 4)
    with pytest.raises(CorruptCache, match=rf"sequence {seq:#x}: pages .* start 2, length 2"):
        audit(tables.books)


def test_an_entry_of_what_does_not_live_or_of_another_sequence() -> None:
    tables = made(2)
    live, other = filled(tables, 1, 1)
    entry = Entry("k", live, None, 0, 0, Home(tables.books.tree))
    tables.books.owned[live] = entry
    audit(tables.books)
    del tables.books.owned[live]
    tables.release([live])
    for seq in (live, other):
        tables.books.owned = {seq: entry}
        with pytest.raises(CorruptCache, match=rf"^sequence {seq:#x} is owned under key 'k'"):
            audit(tables.books)


def test_a_light_step_that_was_left() -> None:
    tables = made(2)
    tables.books.light[5] = None  # type: ignore[assignment]
    with pytest.raises(CorruptCache, match=r"a light step is left: \{5: None\}"):
        audit(tables.books)


# -- what books say


def test_windows_and_slots_that_are_read() -> None:
    """Of a head offset, of pages that several hold, and of a sequence without any."""
    tables = made(3)
    (root,) = tables.new(1, start=1)
    tables.carry_out(tables.plan([root], 6))  # slots 4 to 9
    (child,) = tables.fork([root])
    tables.carry_out(tables.plan([child], 3))  # 10 to 12
    tables.slide([root], 2)
    (empty,) = tables.new(1, start=1)
    books = tables.books
    assert books.windows([root, child, empty]) == (
        [(2, 3), (1, 2, 3, 4), ()],
        [0, 1, 1],
        [4, 9, 0],
    )
    assert books.stored_tokens() == 9
    tables.release([child])
    assert books.stored_tokens() == books.lengths([root])[0] == 4


@pytest.mark.parametrize("left", [0, 1, 3])
def test_the_next_position_follows_on_the_last_token_that_is_left(left: int) -> None:
    """Tokens were placed by hand: the one in slot n at 10 n."""
    tables = made(2)
    (root,) = filled(tables, 4)  # slots 2 to 5
    (child,) = tables.fork([root], at=left, position_of=lambda slot: 10 * slot)
    tables.truncate([root], 4 - left, lambda slot: 10 * slot)
    places = [record[4] for record in tables.books.records([root, child])]
    assert places == [10 * (left + 1) + 1 if left else 20] * 2
