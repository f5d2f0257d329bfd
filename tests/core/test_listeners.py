"""Who listens is told of every verb once it is done, may read and release, and can disturb
nobody.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
from small_caches import books, filled, grow, step, tiny_cache

from paged_kv import CacheIndex, errors
from paged_kv.events import Event
from paged_kv.pages.change import Change


class Ear:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.heard: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.heard.append(event)

    def last(self) -> tuple[str, list[int], list[int], list[int], list[int]]:
        """The only verb; sequences that began or changed and that ended, pages that were taken and
        freed.
        """
        (event,) = self.heard
        self.heard.clear()
        assert not event.failed
        assert event.begin <= event.end
        puts: dict[int, object] = {}
        drops: list[int] = []
        taken: list[int] = []
        freed: list[int] = []
        for told in event.told:
            assert told is not None
            puts.update(told.change.puts)
            drops += told.change.drops
            taken += told.taken
            freed += told.freed
        return event.verb, list(puts), drops, sorted(taken), sorted(freed)


def test_each_verb_is_told_with_its_sequences_and_pages() -> None:
    cache = tiny_cache()
    ear = Ear()
    cache.listen(ear)
    ear.heard.clear()
    (seq,) = cache.new(1)
    assert ear.last() == ("new", [seq], [], [], [])
    grow(cache, [seq], 3)
    assert ear.last() == ("append", [seq], [], [1, 2], [])
    (child, other) = cache.fork([seq, seq])
    assert ear.last() == ("fork", [child, other], [], [], [])
    grow(cache, [child], 1)  # writes on in the last page
    assert ear.last() == ("append", [child], [], [], [])
    grow(cache, [other], 1)  # copies it
    assert ear.last() == ("append", [other], [], [3], [])
    cache.slide([seq], 3)
    assert ear.last() == ("slide", [seq], [], [], [])
    cache.release([other])
    assert ear.last() == ("release", [], [other], [], [3])
    (grandchild,) = step(cache, [child], 2)
    opened, committed = ear.heard
    (told,) = opened.told
    assert (opened.verb, told.change.puts) == ("open", {})
    assert [pending.rooms for pending in told.change.opens.values()] == [[2]]
    assert (list(told.taken), list(told.freed)) == ([3], [])
    ear.heard = [committed]
    assert ear.last() == ("commit", [grandchild], [], [], [])
    cache.release([child, grandchild])
    assert ear.last() == ("release", [], [child, grandchild], [], [1, 2, 3])
    cache.lengths([seq])
    assert ear.heard == [], "a reader changes nothing"
    cache.unlisten(ear)
    ear.heard.clear()
    cache.new(1)
    assert ear.heard == []


def test_a_step_that_needs_no_page_is_told_with_none() -> None:
    cache = tiny_cache()
    (seq,) = filled(cache, 1)
    ear = Ear()
    cache.listen(ear)
    ear.heard.clear()
    with cache.open([seq], 1):
        assert ear.last() == ("open", [], [], [], [])
    assert ear.last() == ("close", [], [], [], [])


def test_a_step_that_is_given_up_is_told_with_its_pages() -> None:
    cache = tiny_cache()
    (seq,) = filled(cache, 1)
    ear = Ear()
    for end in ("close", "drop"):
        opened = [cache.open([seq], 4)]
        cache.listen(ear)
        ear.heard.clear()
        if end == "close":
            opened[0].close()
        opened.clear()
        assert cache.open_steps == 0
        assert ear.last() == ("close", [], [], [], [2, 3])
        cache.unlisten(ear)


def test_an_index_tells_of_what_it_ends() -> None:
    cache = tiny_cache()
    index = CacheIndex(cache, max_entries=1)
    first, second = filled(cache, 1, 1)
    index.put("a", first)
    ear = Ear()
    cache.listen(ear)
    ear.heard.clear()
    index.put("b", second)
    assert ear.last() == ("put", [], [first], [], [1])


def test_a_call_that_fails_tells_of_no_change() -> None:
    cache = tiny_cache(2)
    (seq,) = filled(cache, 2)
    ear = Ear()
    cache.listen(ear)
    ear.heard.clear()
    with pytest.raises(errors.OutOfPages):
        grow(cache, [seq], 5)
    with pytest.raises(errors.DuplicateSequence):
        cache.release([seq, seq])
    assert [(event.verb, event.failed, event.told) for event in ear.heard] == [
        ("append", True, []),
        ("release", True, []),
    ]


def test_a_listener_may_read_and_release() -> None:
    cache = tiny_cache()
    (seq,) = filled(cache, 2)
    seen: list[Any] = []

    def read(event: Event) -> None:
        seen.append((cache.lengths(cache.live()), cache.pages_in_use, cache.stats.forks))
        cache.check()
        for told in event.told:
            if told is not None and told.change.puts:
                cache.release(list(told.change.puts))

    cache.listen(read)
    seen.clear()
    (child,) = cache.fork([seq])
    assert seen == [([2, 2], 1, 1), ([2], 1, 1)]
    assert child not in cache.live()
    cache.unlisten(read)


def test_a_listener_calls_no_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tiny_cache()
    heard: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: heard.append(told.exc_value))

    def meddle(event: Event) -> None:
        cache.new(1)

    cache.listen(meddle)
    heard.clear()
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

    def fail(event: Event) -> None:
        raise OSError("the disk is full")

    ear = Ear()
    cache.listen(fail)
    cache.listen(ear)
    ear.heard.clear()
    heard.clear()
    (seq,) = cache.new(1)
    assert ear.last() == ("new", [seq], [], [], [])
    assert [str(error) for error in heard] == ["the disk is full"]


def test_a_change_that_was_settled_is_told_without_its_pages() -> None:
    """Whoever counts pages has to count anew."""
    cache = tiny_cache()
    (seq,) = filled(cache, 3)
    before = books(cache.books)
    ear = Ear()
    cache.listen(ear)
    ear.heard.clear()
    # as an interrupt leaves one: it says what is there already
    change = Change({seq: ((1, 2), 0, 3, 0, 3)})
    cache._pool.books.change = change
    assert cache.live() == [seq]
    assert [(event.verb, event.told) for event in ear.heard] == [("settle", [None])]
    assert cache.books.change is None
    assert {**books(cache.books), "unsorted": 0} == {**before, "unsorted": 0}


def test_who_asked_twice_is_told_twice() -> None:
    cache = tiny_cache()
    ear = Ear()
    cache.listen(ear)
    cache.listen(ear)
    ear.heard.clear()
    cache.new(1)
    assert len(ear.heard) == 2
    cache.unlisten(ear)
    ear.heard.clear()
    cache.new(1)
    assert len(ear.heard) == 1
    cache.unlisten(ear)
    with pytest.raises(errors.BadArgument, match="allowed is one that listens"):
        cache.unlisten(ear)
