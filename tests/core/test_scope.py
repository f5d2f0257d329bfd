"""Sequences that live as long as a block of code."""

from __future__ import annotations

from threading import Thread

import pytest
from small_caches import filled, grow, state, step, tiny_cache

from paged_kv import CacheIndex, PagedKVCache
from paged_kv.errors import BadArgument, ForeignHandle, StaleHandle


class Oops(Exception):
    """Raised within a scope."""


def test_what_was_made_in_the_block_ends_with_it() -> None:
    cache = tiny_cache(12)
    (before,) = filled(cache, 2)
    with cache.scope():
        made = [*cache.new(2), *cache.fork([before]), *step(cache, [before], 1)]
        grow(cache, made[2:3], 1)
        assert cache.live() == [before, *made]
    assert cache.live() == [before]
    assert cache.pages_in_use == 1
    for seq in made:
        with pytest.raises(StaleHandle):
            cache.lengths([seq])
    cache.check()


def test_what_is_kept_outlives_the_block() -> None:
    cache = tiny_cache()
    with cache.scope() as scope:
        first, second, third = cache.new(3)
        assert scope.keep([third]) == [third]
        assert scope.keep((first, first)) == [first, first]
        assert scope.keep([]) == []
    assert cache.live() == [first, third]
    assert second not in cache.books


def test_what_was_there_before_stays_even_if_it_changes() -> None:
    cache = tiny_cache()
    (before,) = filled(cache, 3)
    with cache.scope() as scope:
        cache.slide([before], 1)
        grow(cache, [before], 2)
        scope.keep([before])
    assert cache.lengths([before]) == [4]


def test_what_an_index_owns_stays() -> None:
    """Also what lay in one for a while, and what was replaced, is cleared up."""
    cache = tiny_cache()
    index = CacheIndex(cache, max_entries=2)
    with cache.scope():
        a, b, c, d = cache.new(4)
        index.put_batch(["a", "b", "c"], [a, b, c])
        before = state(index)
        assert d in cache.books
    assert cache.live() == [b, c] == index.handles()
    before["records"] = [record for record in before["records"] if record[0] != d]
    assert state(index) == before
    index.clear()
    assert cache.live() == []


def test_what_the_block_released_itself_is_no_mistake() -> None:
    cache = tiny_cache()
    with cache.scope() as scope:
        first, second, third = cache.new(3)
        scope.keep([second])
        cache.release([first, second])
    assert cache.live() == []
    assert third not in cache.books


@pytest.mark.parametrize("error", [Oops, KeyboardInterrupt, SystemExit])
def test_an_exception_ends_the_block_like_any_other(error: type[BaseException]) -> None:
    cache = tiny_cache()
    kept: list[int] = []
    with pytest.raises(error), cache.scope() as scope:
        first, second = filled(cache, 1, 2)
        kept = scope.keep([first])
        raise error
    assert cache.live() == kept
    assert cache.lengths(kept) == [1]
    assert second not in cache.books


def test_what_a_failed_call_made_ends_too() -> None:
    cache = tiny_cache(2)
    (root,) = filled(cache, 2)
    with pytest.raises(RuntimeError, match="pages requested"), cache.scope():
        for _ in range(5):
            grow(cache, cache.fork([root]), 1)
    assert cache.live() == [root]
    assert cache.pages_in_use == 1


def test_scopes_nest() -> None:
    cache = tiny_cache()
    with cache.scope() as outer:
        (first,) = cache.new()
        with cache.scope() as inner:
            second, third, fourth = cache.new(3)
            inner.keep([second, third])
        assert cache.live() == [first, second, third]
        (fifth,) = cache.new()
        outer.keep([third, fifth])
    assert cache.live() == [third, fifth]
    assert fourth not in cache.books


def test_a_scope_that_is_closed_early_has_ended() -> None:
    cache = tiny_cache()
    with cache.scope() as scope:
        first, second = cache.new(2)
        scope.keep([second])
        scope.close()
        assert cache.live() == [second]
        (third,) = cache.new()
        scope.close()
    assert cache.live() == [second, third]
    assert first not in cache.books


def test_whoever_makes_it() -> None:
    """A scope ends what other threads made meanwhile, too."""
    cache = tiny_cache()
    with cache.scope():
        thread = Thread(target=cache.new, args=(2,))
        thread.start()
        thread.join()
        assert cache.live_sequences == 2
    assert cache.live() == []


def test_many_sequences_over_several_runs_of_numbers() -> None:
    cache = tiny_cache()
    before = cache.new(100)
    with cache.scope() as scope:
        made = [seq for _ in range(30) for seq in cache.new(100)]
        kept = scope.keep(made[::7])
    assert cache.live() == [*before, *kept]


def test_to_keep_what_does_not_live_is_a_mistake() -> None:
    cache = tiny_cache()
    (gone,) = cache.new()
    cache.release([gone])
    with cache.scope() as scope:
        (made,) = cache.new()
        with pytest.raises(StaleHandle):
            scope.keep([made, gone])
        with pytest.raises(ForeignHandle):
            scope.keep([made, 7])
        with pytest.raises(BadArgument):
            scope.keep(made)  # type: ignore[arg-type]
    assert cache.live() == []


def test_live_lists_the_oldest_first() -> None:
    cache = tiny_cache(12)
    first, second, third = filled(cache, 1, 1, 1)
    (child,) = cache.fork([second])
    cache.slide([first], 1)  # a change is no birth
    grow(cache, [first, second], 1)
    cache.release([third])
    (last,) = cache.new()
    assert cache.live() == [first, second, child, last]
    mark = cache.mark()
    newer = cache.new(2)
    assert cache.made_since(mark) == newer[::-1]
    found = cache.live()
    found.clear()
    assert cache.live_sequences == 6, "a list of its own"


def test_made_since_leaves_out_what_an_index_owns() -> None:
    cache = tiny_cache()
    mark = cache.mark()
    first, second, third = cache.new(3)
    CacheIndex(cache).put("a", second)
    assert cache.made_since(mark) == [third, first]


def test_a_scope_of_a_cache_without_sequences() -> None:
    cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2)
    with cache.scope() as scope:
        scope.close()
    assert cache.live() == []
