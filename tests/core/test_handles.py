"""Handles: numbers that no other cache of the process uses, nor one of a forked process."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from threading import Thread

import pytest
from interrupts import interrupted
from small_caches import filled, tiny_cache

import paged_kv.pages.handles
from paged_kv import PagedKVCache
from paged_kv.errors import ForeignHandle, StaleHandle
from paged_kv.pages.allocator import PageAllocator
from paged_kv.pages.block_tables import BlockTables
from paged_kv.pages.handles import UNIT, UNITS, Handles


def made() -> BlockTables:
    return BlockTables(PageAllocator(1, max_pages=1), page_size=2)


def test_a_handle_of_one_of_many_caches_is_never_accepted_by_another() -> None:
    """Whichever they drew first, and after longer runs of numbers too."""
    caches = [made() for _ in range(600)]
    owned = [cache.new(1 + number % 3) for number, cache in enumerate(caches)]
    for cache, seqs in zip(caches[::40], owned[::40]):
        seqs += cache.new(500)
    every = [seq for seqs in owned for seq in seqs]
    assert len(set(every)) == len(every)
    for cache, seqs in zip(caches, owned):
        assert [seq for seq in every if seq in cache.books] == seqs
        cache.books.lengths(seqs)
    for place, cache in enumerate(caches):
        near = [*owned[place - 1], *owned[(place + 1) % len(owned)], *owned[(7 * place + 11) % 600]]
        for seq in near:
            with pytest.raises(ForeignHandle):
                cache.books.lengths([seq])


def test_a_released_handle_of_another_cache_is_foreign_not_stale() -> None:
    ours = tiny_cache()
    theirs = tiny_cache()
    (own,) = filled(ours, 1)
    (other,) = filled(theirs, 1)
    theirs.release([other])
    with pytest.raises(ForeignHandle):
        ours.lengths([other])
    with pytest.raises(StaleHandle):
        theirs.lengths([other])
    with pytest.raises(ForeignHandle):
        theirs.release([own], missing_ok=True)
    with pytest.raises(ForeignHandle):  # nobody was given it yet
        theirs.release([other + 1], missing_ok=True)
    assert ours.lengths([own]) == [1]


def test_a_handle_is_exact_as_a_double() -> None:
    seqs = [seq for _ in range(50) for seq in made().new(100)]
    assert all(0 < seq < 2**53 for seq in seqs)
    assert all(int(float(seq)) == seq for seq in seqs)


@pytest.fixture
def at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter of the process is about to go round."""
    monkeypatch.setattr(paged_kv.pages.handles, "_units", itertools.count(UNITS - 2))


@pytest.mark.parametrize("sizes", [(10, 200, 3, 5000), (1,) * 300, (1000,), (64, 64, 64)])
def test_numbers_go_round_below_the_limit(at_the_end: None, sizes: tuple[int, ...]) -> None:
    first = made()
    second = made()
    taken: list[int] = []
    mark = first.books.mark()
    for size in sizes:
        taken += first.new(size)
        with pytest.raises(ForeignHandle):
            second.books.lengths(taken[-1:])
        second.new(1)
    assert len(set(taken)) == sum(sizes)
    assert all(UNIT <= seq < 2**53 for seq in taken), "no sequence has a number of the first unit"
    assert min(taken) < max(taken) - 2**52 or len(taken) <= 2 * UNIT
    assert first.books.live() == taken
    assert first.books.made_since(mark) == taken[::-1]
    for seq in second.books.live():
        with pytest.raises(ForeignHandle):
            first.books.lengths([seq])


def test_each_number_is_given_once_and_known_to_its_giver() -> None:
    issuers = [Handles() for _ in range(5)]
    given: dict[int, int] = {}
    for number, size in enumerate([1, 63, 64, 65, 1, 700, 0, 129] * 5):
        issuer = issuers[number % 5]
        mark = issuer.mark()
        taken = issuer.take(size)
        assert len(taken) == size
        assert all(issuer.since(seq, mark) for seq in taken)
        assert not any(issuer.since(seq, mark) for seq, its in given.items() if its == number % 5)
        given.update(dict.fromkeys(taken, number % 5))
    assert len(given) == 5 * sum([1, 63, 64, 65, 1, 700, 0, 129])
    for seq, owner in given.items():
        assert [issuer.gave(seq) for issuer in issuers] == [place == owner for place in range(5)]


def test_threads_draw_different_numbers() -> None:
    taken: list[list[int]] = []

    def draw() -> None:
        tables = made()
        taken.append([seq for _ in range(50) for seq in tables.new(97)])

    threads = [Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    every = [seq for seqs in taken for seq in seqs]
    assert len(set(every)) == len(every) == 4 * 50 * 97


class Child:
    """A forked process that is sent numbers, refuses those that it should, and sends its own."""

    def __init__(self, cache: PagedKVCache, parents: list[int]) -> None:
        numbers, send_numbers = os.pipe()
        answers, send_answer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            failed = 1
            try:
                os.close(send_numbers)
                with os.fdopen(numbers) as text:
                    foreign = [int(line) for line in text]
                made = [*cache.new(300), *cache.fork(parents)]
                assert cache.lengths(parents) == [1] * len(parents)
                other = tiny_cache().new(2)
                with os.fdopen(send_answer, "w") as out:
                    out.writelines(f"{seq}\n" for seq in [*made, *other])
                refused = list(refusals(cache, foreign))
                failed = int(refused != foreign)
            finally:
                os._exit(failed)
        os.close(numbers)
        os.close(send_answer)
        self.send_numbers = send_numbers
        self.answers = answers

    def tell(self, numbers: list[int]) -> list[int]:
        """Send numbers; returns those that the child drew."""
        with os.fdopen(self.send_numbers, "w") as out:
            out.writelines(f"{number}\n" for number in numbers)
        with os.fdopen(self.answers) as text:
            drawn = [int(line) for line in text]
        _, status = os.waitpid(self.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, "the child accepted a handle of the parent"
        return drawn


def refusals(cache: PagedKVCache, seqs: list[int]) -> Iterator[int]:
    """Those that are foreign to the cache."""
    for seq in seqs:
        try:
            cache.lengths([seq])
        except ForeignHandle:
            yield seq
        except StaleHandle:
            pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_after_a_fork_parent_and_child_draw_different_numbers() -> None:
    """What either makes from then on is foreign to the other; what both had before is known to
    both.
    """
    cache = tiny_cache()
    before = filled(cache, 1, 1)
    child = Child(cache, before)
    after = [*cache.new(300), *cache.fork(before)]
    drawn = child.tell(after)
    assert len(drawn) == 304
    assert list(refusals(cache, drawn)) == drawn
    assert not set(drawn) & set(after)
    assert cache.lengths(before) == [1, 1]


@pytest.fixture
def scattered(monkeypatch: pytest.MonkeyPatch) -> Handles:
    """Its runs of numbers are the units 11, 5 and 10; other caches drew those between."""
    monkeypatch.setattr(paged_kv.pages.handles, "_units", iter([11, 5, 99, 10, 99, 60, 99]))
    return Handles()


def one_by_one(issuer: Handles, count: int) -> list[int]:
    """Numbers of the shortest runs: who takes many at once draws longer ones."""
    return [seq for _ in range(count) for seq in issuer.take(1)]


def test_what_was_given_since_a_moment_wherever_the_numbers_lie(scattered: Handles) -> None:
    given: list[int] = []
    marks = [scattered.mark()]
    for size in (30, 34, 1, 63, 0, 40, 24):  # whole runs, and parts of them
        given += scattered.take(size)
        marks.append(scattered.mark())
    assert [given[place] // UNIT for place in (0, 64, 128)] == [11, 5, 10]
    counts = [sum(scattered.since(seq, mark) for seq in given) for mark in marks]
    assert counts == [192, 162, 128, 127, 64, 64, 24, 0]
    for mark, count in zip(marks, counts):
        assert scattered.is_mark(mark)
        assert [scattered.since(seq, mark) for seq in given] == [
            place >= len(given) - count for place in range(len(given))
        ]
    # an interrupt may leave a run of which nothing was given yet
    assert scattered.since(given[64], (2, given[64]))


@pytest.mark.parametrize(
    "mark",
    [
        [0, 0],
        (0,),
        (0, 0, 0),
        (False, 0),
        (1, 11.0 * UNIT),
        (0, 1),
        (-1, 11 * UNIT),
        (1, 11 * UNIT - 1),
        (1, 12 * UNIT + 1),
        (2, 11 * UNIT),
        (1, 5 * UNIT),
        (3, 5 * UNIT),
        None,
    ],
)
def test_what_cannot_be_a_moment(scattered: Handles, mark: object) -> None:
    assert scattered.is_mark((0, 0))
    assert not scattered.is_mark((1, 11 * UNIT)), "nothing was given yet"
    one_by_one(scattered, UNIT + 1)
    for runs, unit in ((1, 11), (2, 5)):
        assert scattered.is_mark((runs, unit * UNIT))
        assert scattered.is_mark((runs, (unit + 1) * UNIT))
    assert not scattered.is_mark(mark)


@pytest.mark.parametrize("size", [0, 1, UNIT - 1, UNIT, UNIT + 1])
def test_in_a_forked_process_the_rest_of_a_run_is_left_to_the_other(
    scattered: Handles, size: int
) -> None:
    given = one_by_one(scattered, size)
    scattered.begin_anew()
    assert all(map(scattered.gave, given))
    more = scattered.take(2)
    assert {seq // UNIT for seq in more}.isdisjoint(seq // UNIT for seq in given)
    every = range(13 * UNIT)
    assert {seq for seq in every if scattered.gave(seq)} == {*given, *more}


def test_runs_double_so_that_few_hold_many_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_kv.pages.handles, "_units", itertools.count(1))
    ours = Handles()
    theirs = Handles()
    for _ in range(2000):  # a thousand units each, of runs of 1, 2, 4, ... 512 units
        ours.take(UNIT // 2)
        theirs.take(UNIT // 2)
    assert (ours.mark()[0], theirs.mark()[0]) == (10, 10)
    alone = Handles()
    for _ in range(2000):
        alone.take(UNIT // 2)
    assert alone.mark()[0] == 1, "what nobody else drew in between is one run"


def test_who_takes_many_draws_no_more_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_kv.pages.handles, "_units", itertools.count(1))
    issuer = Handles()
    issuer.take(10)  # of unit 1
    issuer.take(3 * UNIT)  # the rest of it, and 138 numbers of the units 2 to 4
    assert Handles().take(1) == [5 * UNIT]


def test_what_happens_in_a_forked_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here, where it can be looked at: see above for a process that was forked."""
    monkeypatch.setattr(paged_kv.pages.handles, "_units", itertools.count(1))
    issuers = [Handles(), Handles()]
    before = [issuer.take(1)[0] for issuer in issuers]
    paged_kv.pages.handles._after_fork()
    for issuer, seq in zip(issuers, before):
        (other,) = issuer.take(1)
        assert other // UNIT != seq // UNIT
        assert other // UNIT > 1000, "by all odds, since it begins at a random place"
        assert issuer.gave(seq)
        assert not issuer.gave(seq + 1)


@pytest.mark.parametrize("size", [0, UNIT - 1])
@pytest.mark.parametrize("forked", [False, True])
def test_a_call_that_is_broken_off_anywhere_spoils_no_number(
    monkeypatch: pytest.MonkeyPatch, forked: bool, size: int
) -> None:
    """Also where another cache drew in between, or none: runs grow, or begin elsewhere."""
    for units in ([11, 5, 99, 10, 99, 60, 99, 70, 99], [11, 12, 13, 14, 15, 16, 17, 18, 19]):
        for at in itertools.count(1):
            monkeypatch.setattr(paged_kv.pages.handles, "_units", iter(units))
            issuer = Handles()
            given = issuer.take(size)
            shot = interrupted(lambda: issuer.take(3), at)  # noqa: B023
            if not shot.fired:
                break
            if forked:
                issuer.begin_anew()
            mark = issuer.mark()
            assert issuer.is_mark(mark)
            assert issuer.take(0) == []
            assert issuer.mark() == mark
            more = issuer.take(2)
            assert set(given).isdisjoint(more)
            assert all(map(issuer.gave, [*given, *more]))
            assert not any(issuer.since(seq, mark) for seq in given)
            assert all(issuer.since(seq, mark) and seq for seq in more)
        assert at > 50
