"""The index as its users see it: order, capacities, pressure; and what it refuses, by name and
without a trace.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_caches import filled, grow, listened, state, step, tiny_cache

from paged_kv import PagedKVCache
from paged_kv.errors import (
    BadArgument,
    BadCount,
    BadKey,
    BadPriority,
    CapacityExceeded,
    CorruptCache,
    ForeignHandle,
    HandleInUse,
    NotPinned,
    OutOfPages,
    PinnedEntry,
    StaleHandle,
    UnknownKey,
    UnknownPolicy,
)
from paged_kv.eviction import FIFO, LRU
from paged_kv.index import CacheIndex
from paged_kv.pages.change import Home
from paged_kv.stats import IndexStats


def full_index(cache: PagedKVCache, *, entries: int = 2) -> tuple[CacheIndex, list[int]]:
    """An index at capacity with keys "a", "b", ... of two tokens each, and its handles."""
    index = CacheIndex(cache, max_entries=entries)
    seqs = filled(cache, *[2] * entries)
    for key, seq in zip("abcdef", seqs):
        index.put(key, seq)
    return index, seqs


def test_a_replaced_sequence_is_released_and_the_pin_stays() -> None:
    cache = tiny_cache()
    index, (a, _) = full_index(cache)
    index.pin("a")
    (fresh,) = filled(cache, 1)
    index.put("a", fresh)
    with pytest.raises(StaleHandle):
        cache.lengths([a])
    assert index.stats == IndexStats(insertions=3)
    assert index.victims() == ["b"]
    assert index.pinned("a")
    assert not index.pinned("b")
    assert not index.pinned("x")


def test_pins_nest_and_keep_their_place_in_the_order() -> None:
    index, _ = full_index(tiny_cache())
    index.pin("a")
    index.pin("a")
    index.unpin("a")
    assert index.victims() == ["b"]
    index.unpin("a")
    assert index.victims() == ["a", "b"]


def test_clear_is_one_change_of_the_books() -> None:
    cache = tiny_cache()
    index, seqs = full_index(cache, entries=3)
    index.pin("b")
    heard = listened(cache)
    index.clear()
    index.clear()  # an empty one changes nothing
    assert [drops for _, drops in heard[-2:]] == [[seqs], []]
    assert (len(index), cache.pages_in_use, index.pinned_pages()) == (0, 0, 0)


def test_a_forked_entry_outlives_its_eviction() -> None:
    cache = tiny_cache()
    index, (a, _) = full_index(cache)
    (child,) = cache.fork([a])
    index.pin("b")  # so that nothing else is left to evict
    index.put("c", filled(cache, 1)[0])
    assert [key in index for key in "abc"] == [False, True, True]
    assert cache.lengths([child]) == [2]


def test_append_evicts_the_fewest_entries_that_make_room() -> None:
    cache = tiny_cache(6)
    index, _ = full_index(cache, entries=4)
    cache.set_reclaimer(index)
    (other,) = cache.new()
    index.get("a")
    grow(cache, [other], 8)  # four pages: two are free
    assert sorted(map(str, index)) == ["a", "d"]
    assert index.stats.evictions == 2


def test_pages_shared_with_living_sequences_do_not_count_as_freed() -> None:
    cache = tiny_cache(4)
    index, (a, _b) = full_index(cache)
    (child,) = cache.fork([a])
    before = state(index)
    assert not index.reclaim(2)
    assert state(index) == before
    cache.release([child])
    assert index.reclaim(2)
    assert len(index) == 0


@pytest.mark.parametrize("need", range(34))
def test_the_shortest_run_of_many_entries_is_found(need: int) -> None:
    cache = tiny_cache(32)
    index = CacheIndex(cache, "fifo")
    for key, seq in enumerate(filled(cache, *[2] * 32)):
        index.put(key, seq)
    assert index.reclaim(need) == (need <= 32)
    assert list(index) == list(range(need if need <= 32 else 0, 32))


def test_both_capacities_bind_at_once() -> None:
    cache = tiny_cache(8)
    index = CacheIndex(cache, "fifo", max_entries=2, max_bytes=4 * cache.page_bytes)
    filled(cache, 6)  # the index is light, the cache is not: no reason to evict
    for key, seq in enumerate(filled(cache, 1, 1, 1)):
        index.put(key, seq)
    assert list(index) == [1, 2]
    index.put(3, filled(cache, 4)[0])
    assert list(index) == [2, 3]


def test_busy_entries_stay() -> None:
    """A step from an entry needs a page, and may not evict what it starts from."""
    cache = tiny_cache(2)
    index, (a, _) = full_index(cache)
    cache.set_reclaimer(index)
    assert cache.lengths(step(cache, [a], 1)) == [3]
    assert list(index) == ["a"]


def test_a_failed_reclaim_and_out_of_pages_change_nothing() -> None:
    cache = tiny_cache(4)
    index, (a, _) = full_index(cache)
    cache.set_reclaimer(index)
    index.pin("b")
    (other,) = cache.new()
    before = state(index)
    with pytest.raises(OutOfPages) as caught:
        grow(cache, [other], 8)
    assert (caught.value.requested, caught.value.free, caught.value.pinned) == (4, 2, 1)
    assert state(index) == before
    assert cache.lengths([a, other]) == [2, 0]


def test_bytes_count_shared_pages_once() -> None:
    cache = tiny_cache(8)
    index = CacheIndex(cache, "fifo", max_bytes=3 * cache.page_bytes)
    (root,) = filled(cache, 4)
    *children, longer = cache.fork([root] * 5)
    grow(cache, [longer], 2)
    for key, child in enumerate(children):
        index.put(key, child)
    index.put("longer", longer)
    index.put("root", root)
    assert (len(index), index.bytes_in_use) == (6, 3 * cache.page_bytes)
    index.put("new", filled(cache, 1)[0])  # a fourth page: all that hold the third have to go
    assert index.bytes_in_use == 3 * cache.page_bytes
    assert list(index) == ["root", "new"]


class Watched:
    """A key that counts how often it is hashed and compared."""

    looks = 0

    def __init__(self, number: int) -> None:
        self.number = number

    def __hash__(self) -> int:
        Watched.looks += 1
        return hash(self.number)

    def __eq__(self, other: object) -> bool:
        Watched.looks += 1
        return isinstance(other, Watched) and other.number == self.number


def test_a_lookup_costs_the_same_among_many_entries() -> None:
    costs = []
    for entries in (8, 4000):
        cache = tiny_cache()
        index = CacheIndex(cache)
        index.put_batch([Watched(number) for number in range(entries)], cache.new(entries))
        Watched.looks = 0
        for number in range(8):
            assert index.get(Watched(number)) is not None
        costs.append(Watched.looks)
    assert costs[0] == costs[1] <= 8 * 8


# -- errors: each one by name, with its data, and without a trace


def refuses(
    index: CacheIndex, error: type[Exception], words: str, call: Callable[[], Any]
) -> Exception:
    before = state(index)
    with pytest.raises(error, match=words) as caught:
        call()
    assert state(index) == before
    return caught.value


NO_KEYS: dict[str, tuple[Any, str]] = {
    "list": (["no", "key"], r"\['no', 'key'\] is no key: it cannot be hashed"),
    "in a tuple": (("a", {}), r"\{\} is no key: it cannot be hashed"),
    "nan": (float("nan"), "nan is no key: NaN equals nothing"),
    "nan in a tuple": (frozenset([1, float("nan")]), "NaN equals nothing"),
}


@pytest.mark.parametrize("name", NO_KEYS)
def test_a_key_that_would_not_be_found_again_changes_nothing(name: str) -> None:
    key, words = NO_KEYS[name]
    cache = tiny_cache()
    index, _ = full_index(cache)
    (seq,) = cache.new()
    calls: list[Callable[[Any], Any]] = [
        index.get,
        index.pin,
        index.unpin,
        index.remove,
        index.pinned,
        index.__contains__,
        lambda key: index.put(key, seq),
    ]
    for call in calls:
        error = refuses(index, BadKey, words, lambda call=call: call(key))
        assert isinstance(error, BadKey)
        assert error.why in str(error)


def test_tensors_are_no_keys() -> None:
    index, _ = full_index(tiny_cache())
    words = (
        r"is no key: a tensor is found under itself only: use its bytes, x\.numpy\(\)\.tobytes\(\)"
    )
    for key in (torch.zeros(2), np.zeros(2), (1, torch.zeros(1))):
        refuses(index, BadKey, words, lambda key=key: index.get(key))


def test_what_the_hash_of_a_key_raises_passes_through() -> None:
    class Odd:
        def __hash__(self) -> int:
            raise OSError("no hash today")

    index, _ = full_index(tiny_cache())
    refuses(index, OSError, "no hash today", lambda: index.get(Odd()))


def test_unknown_key() -> None:
    index, _ = full_index(tiny_cache())
    for call in (index.pin, index.unpin, index.remove):
        words = r"no entry with key 'x' among 2 entries"
        refuses(index, UnknownKey, words, lambda call=call: call("x"))


def test_not_pinned() -> None:
    index, _ = full_index(tiny_cache())
    refuses(index, NotPinned, r"the entry with key 'a' is not pinned", lambda: index.unpin("a"))


def test_pinned_entry() -> None:
    index, _ = full_index(tiny_cache())
    index.pin("a")
    index.pin("a")
    words = r"the entry with key 'a' is pinned 2 times"
    error = refuses(index, PinnedEntry, words, lambda: index.remove("a"))
    assert isinstance(error, PinnedEntry)
    assert (error.key, error.pins) == ("a", 2)


def test_handle_in_use() -> None:
    cache = tiny_cache()
    index, (a, _) = full_index(cache)
    words = r"already stored under key 'a': fork it"
    error = refuses(index, HandleInUse, words, lambda: index.put("x", a))
    assert isinstance(error, HandleInUse)
    assert (error.handle, error.key) == (a, "a")
    other = CacheIndex(cache)  # of the same cache
    refuses(index, HandleInUse, words, lambda: other.put("a", a))


def test_capacity_in_entries_all_pinned() -> None:
    cache = tiny_cache()
    index, _ = full_index(cache)
    index.pin("a")
    index.pin("b")
    (seq,) = filled(cache, 1)
    words = (
        r"the new entry and the 2 pinned ones need 3 entries, allowed is 2: .* raise max_entries"
    )
    error = refuses(index, CapacityExceeded, words, lambda: index.put("x", seq))
    assert isinstance(error, CapacityExceeded)
    assert (error.unit, error.needed, error.limit, error.pinned) == ("entries", 3, 2, 2)
    assert cache.lengths([seq]) == [1]  # still the caller's


def test_capacity_in_bytes() -> None:
    cache = tiny_cache()
    size = cache.page_bytes
    index = CacheIndex(cache, max_bytes=2 * size)
    a, b, large, fits = filled(cache, 2, 1, 3, 2)
    index.put("a", a)
    index.put("b", b)
    index.pin("b")
    words = (
        rf"the new entry and the 1 pinned ones need {3 * size} bytes, allowed is {2 * size}: "
        r".* raise max_bytes"
    )
    refuses(index, CapacityExceeded, words, lambda: index.put("x", large))
    index.put("x", fits)
    assert list(index) == ["b", "x"]


@pytest.mark.parametrize(
    "policy", ["newest", 3, LRU(), object(), object, lambda: LRU, lambda: None]
)
def test_unknown_policy(policy: object) -> None:
    words = (
        r"is not usable, allowed is 'fifo', 'lru', 'priority', or what makes a fresh object with "
        r"on_add, on_hit, on_priority, on_remove, victims"
    )
    with pytest.raises(UnknownPolicy, match=words) as caught:
        CacheIndex(tiny_cache(), policy)  # type: ignore[arg-type]
    assert caught.value.allowed in str(caught.value)
    assert caught.value.policy is policy


def test_a_policy_serves_one_index() -> None:
    policy = LRU()
    cache = tiny_cache()

    def maker() -> LRU:
        return policy

    with pytest.raises(UnknownPolicy, match="what makes a fresh object") as caught:
        CacheIndex(cache, maker)
    assert caught.value.policy is maker


def test_whatever_makes_an_object_with_the_hooks_is_a_policy() -> None:
    class Newest(FIFO):
        def victims(self):  # type: ignore[no-untyped-def]
            return reversed(self._order)

    for maker in (Newest, lambda: Newest()):
        cache = tiny_cache()
        index = CacheIndex(cache, maker, max_entries=2)
        for key, seq in zip("abc", cache.new(3)):
            index.put(key, seq)
        assert list(index) == ["a", "c"]
        assert isinstance(index.policy, Newest)


@pytest.mark.parametrize("priority", [float("nan"), "high", [1], True, "1.5", 1j])
def test_bad_priority(priority: object) -> None:
    cache = tiny_cache()
    index, _ = full_index(cache)
    (seq,) = cache.new()
    words = r"priority is .*, allowed is any real number except NaN, or None"
    refuses(index, BadPriority, words, lambda: index.put("x", seq, priority))


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3"])
def test_bad_capacities(value: object) -> None:
    cache = tiny_cache()
    with pytest.raises(BadCount, match=r"max_entries is .*, allowed is None or an integer >= 1"):
        CacheIndex(cache, max_entries=value)  # type: ignore[arg-type]
    words = rf"max_bytes is .*, allowed is None or an integer >= {cache.page_bytes}"
    with pytest.raises(BadCount, match=words):
        CacheIndex(cache, max_bytes=value)  # type: ignore[arg-type]


def test_less_than_a_page_of_bytes() -> None:
    cache = tiny_cache()
    with pytest.raises(BadCount, match="one page"):
        CacheIndex(cache, max_bytes=cache.page_bytes - 1)


@pytest.mark.parametrize(
    "cache", [None, "cache", 3, CacheIndex(tiny_cache()), SimpleNamespace(page_bytes=8)]
)
def test_an_index_needs_a_cache(cache: object) -> None:
    with pytest.raises(BadArgument, match=r"cache is .*, allowed is a PagedKVCache") as caught:
        CacheIndex(cache)  # type: ignore[arg-type]
    assert caught.value.value is cache


def test_stale_and_foreign_sequences() -> None:
    cache = tiny_cache()
    index, _ = full_index(cache)
    (gone,) = cache.new()
    cache.release([gone])
    refuses(index, StaleHandle, "was released", lambda: index.put("x", gone))
    refuses(index, StaleHandle, "was released", lambda: index.put("a", gone))
    foreign = "is not a sequence of this cache"
    refuses(index, ForeignHandle, foreign, lambda: index.put("x", "seq"))  # type: ignore[arg-type]
    refuses(index, ForeignHandle, foreign, lambda: index.put("x", tiny_cache().new()[0]))


DAMAGES: dict[str, tuple[Callable[[CacheIndex], Any], str]] = {
    "a key less": (
        lambda index: index.policy.on_remove(index.entries.by_key["a"]),
        r"the policy holds \['b'\], the index \['a', 'b'\]",
    ),
    "another of the same key": (
        lambda index: (
            index.policy.on_remove(index.entries.by_key["a"]),
            index.policy.on_add(copy.copy(index.entries.by_key["a"])),
        ),
        "the policy holds",
    ),
    "a key more": (
        lambda index: index.policy.on_add(copy.copy(index.entries.by_key["a"])),
        "the policy holds",
    ),
    "pins": (lambda index: setattr(index.entries.by_key["a"], "pins", -1), "with -1 pins"),
    "key": (
        lambda index: setattr(index.entries.by_key["a"], "key", "x"),
        "key 'a' holds an entry of 'x'",
    ),
    "another's entry": (
        lambda index: setattr(index.entries.by_key["a"], "home", Home(index.entries.books.tree)),
        "key 'a' holds an entry of 'a'",
    ),
    "owner": (lambda index: index.turns.books.owned.clear(), "the policy holds"),
    "capacity": (
        lambda index: setattr(index.entries, "max_entries", 1),
        "2 entries, allowed are 1",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_check_names_what_is_broken(name: str) -> None:
    damage, words = DAMAGES[name]
    index, _ = full_index(tiny_cache())
    index.check()
    damage(index)
    with pytest.raises(CorruptCache, match=words):
        index.check()
