"""Who listens is told of every change once it is done, may read and release, and can disturb
nobody.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
from small_caches import books, filled, grow, step, tiny_cache

from paged_kv import CacheIndex, errors
from paged_kv.pages.change import Change


class Ear:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[Change | None, list[int], list[int]]] = []

    def __call__(self, change: Change | None, taken: list[int], freed: list[int]) -> None:
        self.heard.append((change, list(taken), list(freed)))

    def last(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """Sequences that begin or change and that end, pages that were taken and freed, of the only
        change.
        """
        ((change, taken, freed),) = self.heard
        self.heard.clear()
        assert change is not None
        return list(change.puts), list(change.drops), sorted(taken), sorted(freed)


def test_each_verb_is_told_with_its_sequences_and_pages() -> None:
    cache = tiny_cache()
    ear = Ear()
    cache.listen(ear)
    (seq,) = cache.new(1)
    assert ear.last() == ([seq], [], [], [])
    grow(cache, [seq], 3)
    assert ear.last() == ([seq], [], [1, 2], [])
    (child,) = cache.fork([seq])
    assert ear.last() == ([child], [], [], [])
    grow(cache, [child], 1)  # copies the tail page
    assert ear.last() == ([child], [], [3], [])
    cache.slide([seq], 3)
    assert ear.last() == ([seq], [], [], [2])
    (grandchild,) = step(cache, [child], 2)
    assert ear.last() == ([grandchild], [], [2], [])
    cache.release([child, grandchild])
    assert ear.last() == ([], [child, grandchild], [], [1, 2, 3])
    cache.gather([seq])
    cache.lengths([seq])
    assert ear.heard == [], "nothing changed"
    cache.unlisten(ear)
    cache.new(1)
    assert ear.heard == []


def test_an_index_tells_of_what_it_ends() -> None:
    cache = tiny_cache()
    index = CacheIndex(cache, max_entries=1)
    first, second = filled(cache, 1, 1)
    index.put("a", first)
    ear = Ear()
    cache.listen(ear)
    index.put("b", second)
    assert ear.last() == ([], [first], [], [1])


def test_a_call_that_fails_tells_nothing() -> None:
    cache = tiny_cache(2)
    (seq,) = filled(cache, 2)
    ear = Ear()
    cache.listen(ear)
    with pytest.raises(errors.OutOfPages):
        grow(cache, [seq], 5)
    with pytest.raises(errors.DuplicateSequence):
        cache.release([seq, seq])
    assert ear.heard == []


def test_a_listener_may_read_and_release() -> None:
    cache = tiny_cache()
    (seq,) = filled(cache, 2)
    seen: list[Any] = []

    def read(change: Change | None, taken: list[int], freed: list[int]) -> None:
        seen.append((cache.lengths(cache.live()), cache.pages_in_use, cache.stats.forks))
        cache.check()
        if change is not None and change.puts:
            cache.release(list(change.puts))

    cache.listen(read)
    (child,) = cache.fork([seq])
    assert seen == [([2, 2], 1, 1), ([2], 1, 1)]
    assert child not in cache.live()
    cache.unlisten(read)


def test_a_listener_calls_no_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tiny_cache()
    heard: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: heard.append(told.exc_value))

    def meddle(change: Change | None, taken: list[int], freed: list[int]) -> None:
        cache.new(1)

    cache.listen(meddle)
    (seq,) = cache.new(1)
    assert cache.live() == [seq]
    (error,) = heard
    assert isinstance(error, errors.NestedCall)
    assert (error.what, error.running) == ("new", "new")


def test_what_a_listener_raises_disturbs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the verb nor the other listeners."""
    cache = tiny_cache()
    heard: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: heard.append(told.exc_value))

    def fail(change: Change | None, taken: list[int], freed: list[int]) -> None:
        raise OSError("the disk is full")

    ear = Ear()
    cache.listen(fail)
    cache.listen(ear)
    (seq,) = cache.new(1)
    assert ear.last() == ([seq], [], [], [])
    assert [str(error) for error in heard] == ["the disk is full"]


def test_a_change_that_was_settled_is_told_without_its_pages() -> None:
    """Whoever counts pages has to count anew."""
    cache = tiny_cache()
    (seq,) = filled(cache, 3)
    before = books(cache.tables)
    ear = Ear()
    cache.listen(ear)
    # as an interrupt leaves one: it says what is there already
    change = Change({seq: ((1, 2), 0, 3, 0)})
    cache._tables.change = change
    assert cache.live() == [seq]
    assert ear.heard == [(None, [], [])]
    assert cache.tables.change is None
    assert {**books(cache.tables), "unsorted": 0} == {**before, "unsorted": 0}


def test_who_asked_twice_is_told_twice() -> None:
    cache = tiny_cache()
    ear = Ear()
    cache.listen(ear)
    cache.listen(ear)
    cache.new(1)
    assert len(ear.heard) == 2
    cache.unlisten(ear)
    cache.new(1)
    assert len(ear.heard) == 3
    cache.unlisten(ear)
    with pytest.raises(errors.BadArgument, match="allowed is one that listens"):
        cache.unlisten(ear)
