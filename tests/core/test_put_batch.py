"""Batches of entries: all or none, as one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_caches import filled, state, tiny_cache

from paged_kv.errors import (
    BadArgument,
    BadCount,
    BadKey,
    CapacityExceeded,
    ForeignHandle,
    HandleInUse,
    PagedKVError,
    StaleHandle,
)
from paged_kv.index import CacheIndex
from paged_kv.stats import IndexStats


@given(
    keys=st.lists(st.sampled_from("abc"), max_size=6),
    capacity=st.none() | st.integers(1, 3),
    limit=st.none() | st.integers(1, 3),
    policy=st.sampled_from(["fifo", "lru", "priority"]),
)
def test_a_batch_is_the_same_as_one_by_one(
    keys: list[str], capacity: int | None, limit: int | None, policy: str
) -> None:
    """Keys may repeat in a batch, and stand in the index already."""
    outcomes = []
    for batched in (False, True):
        cache = tiny_cache(12)
        size = None if limit is None else limit * cache.page_bytes
        index = CacheIndex(cache, policy, capacity, size)
        index.put("a", filled(cache, 1)[0])
        index.get("a")
        seqs = filled(cache, *[1] * len(keys))
        if batched:
            index.put_batch(keys, seqs)
        else:
            for key, seq in zip(keys, seqs):
                index.put(key, seq)
        index.check()
        cache.check()
        places = {key: cache.live().index(seq) for key, seq in zip(index, index.handles())}
        outcomes.append((places, index.victims(), index.stats, cache.live_sequences))
    assert outcomes[0] == outcomes[1]


def test_what_a_batch_evicts_may_be_its_own() -> None:
    cache = tiny_cache()
    index = CacheIndex(cache, max_entries=2)
    seqs = cache.new(5)
    index.put_batch([], [])
    index.put_batch(list("abcde"), seqs)
    assert cache.live() == seqs[3:]
    assert dict(zip(index, index.handles())) == {"d": seqs[3], "e": seqs[4]}
    assert index.stats == IndexStats(insertions=5, evictions=3)


def test_an_entry_may_be_put_again_within_a_batch() -> None:
    cache = tiny_cache()
    index = CacheIndex(cache, "fifo")
    a, b, c = cache.new(3)
    index.put_batch(["a", "b"], [a, b])
    index.pin("a")
    index.put_batch(["a", "c", "a"], [a, c, a])
    assert cache.live() == [a, b, c]
    assert [entry.key for entry in index.policy.victims()] == ["b", "c", "a"]
    assert index.pinned("a")
    index.check()


def test_arrays_of_sequences_and_any_iterable_of_keys() -> None:
    cache = tiny_cache()
    index = CacheIndex(cache)
    a, b, c, d = cache.new(4)
    index.put_batch(range(2), np.array([a, b]))  # type: ignore[arg-type]
    index.put_batch((key for key in (2, 3)), torch.tensor([c, d]))  # type: ignore[arg-type]
    assert index.handles() == [a, b, c, d]
    assert all(type(handle) is int for handle in index.handles())


Refusal = tuple[type[PagedKVError], str, Callable[[CacheIndex, list[int]], Any]]

# An index of two entries at most holds "a", pinned, and "b"; `s` are three more sequences, then a,
# b, a released one.
REFUSALS: dict[str, Refusal] = {
    "an owned sequence": (
        HandleInUse,
        "already stored under key 'a'",
        lambda index, s: index.put_batch(["x", "y", "z"], [s[0], s[3], s[1]]),
    ),
    "a sequence under two keys": (
        HandleInUse,
        "already stored under key 'x'",
        lambda index, s: index.put_batch(["x", "y", "z"], [s[0], s[1], s[0]]),
    ),
    "an unhashable key": (
        BadKey,
        "it cannot be hashed",
        lambda index, s: index.put_batch(["x", [], "z"], s[:3]),  # type: ignore[list-item]
    ),
    "a foreign sequence": (
        ForeignHandle,
        "7 is not a sequence",
        lambda index, s: index.put_batch(["x", "y", "z"], [s[0], 7, s[1]]),
    ),
    "no sequence": (
        ForeignHandle,
        "'y' is not a sequence",
        lambda index, s: index.put_batch(["x", "y"], [s[0], "y"]),  # type: ignore[list-item]
    ),
    "a released sequence": (
        StaleHandle,
        "was released",
        lambda index, s: index.put_batch(["x", "y", "z"], [s[0], s[5], s[1]]),
    ),
    "a sequence that the batch evicted": (
        StaleHandle,
        "was released",
        lambda index, s: index.put_batch(["x", "b"], [s[0], s[4]]),
    ),
    "a sequence that the batch replaced": (
        StaleHandle,
        "was released",
        lambda index, s: index.put_batch(["b", "b"], [s[0], s[4]]),
    ),
    "too few keys": (
        BadCount,
        r"keys (one a sequence) is 1, allowed is 2 keys",
        lambda index, s: index.put_batch(["x"], s[:2]),
    ),
    "too few sequences": (
        BadCount,
        r"keys (one a sequence) is 2, allowed is 1 keys",
        lambda index, s: index.put_batch(["x", "y"], s[:1]),
    ),
    "text for keys": (
        BadArgument,
        "keys is 'xy', allowed is a list of keys",
        lambda index, s: index.put_batch("xy", s[:2]),
    ),
    "no keys": (
        BadArgument,
        "keys is None, allowed is a list of keys",
        lambda index, s: index.put_batch(None, s[:2]),  # type: ignore[arg-type]
    ),
    "one sequence": (
        BadArgument,
        "allowed is a list of sequences",
        lambda index, s: index.put_batch(["x"], s[0]),  # type: ignore[arg-type]
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_batch_changes_nothing(name: str) -> None:
    kind, words, call = REFUSALS[name]
    cache = tiny_cache(12)
    index = CacheIndex(cache, max_entries=2)
    a, b, gone, *seqs = filled(cache, 1, 1, 1, 1, 2, 1)
    index.put_batch(["a", "b"], [a, b])
    index.pin("a")
    cache.release([gone])
    before = state(index)
    with pytest.raises(kind) as caught:
        call(index, [*seqs, a, b, gone])
    assert words in str(caught.value)
    assert state(index) == before
    index.check()
    cache.check()
    index.put_batch(["x", "y", "a"], seqs)  # and the order is as it was
    assert sorted(index) == ["a", "y"]


def test_a_batch_whose_second_entry_meets_pinned_ones_only_changes_nothing() -> None:
    cache = tiny_cache()
    index = CacheIndex(cache, max_entries=2)
    a, b, c, d = cache.new(4)
    index.put_batch(["a", "b"], [a, b])
    index.pin("a")
    index.pin("b")
    before = state(index)
    with pytest.raises(CapacityExceeded, match="need 3 entries, allowed is 2"):
        index.put_batch(["b", "c"], [c, d])  # the first replaces an entry, and keeps its pin
    assert state(index) == before
    assert cache.live() == [a, b, c, d]


def test_a_batch_whose_second_entry_is_too_heavy_changes_nothing() -> None:
    cache = tiny_cache(12)
    index = CacheIndex(cache, max_bytes=3 * cache.page_bytes)
    a, b, small, large = filled(cache, 1, 4, 1, 5)
    index.put_batch(["a", "b"], [a, b])
    index.pin("a")
    before = state(index)
    with pytest.raises(CapacityExceeded, match=f"need {4 * cache.page_bytes} bytes"):
        index.put_batch(["c", "d"], [small, large])  # the first evicts an entry, and fits
    assert state(index) == before
    assert cache.live() == [a, b, small, large]


class Watched:
    """A key that counts how often any is hashed and compared."""

    looks = 0

    def __init__(self, number: int) -> None:
        self.number = number

    def __hash__(self) -> int:
        Watched.looks += 1
        return hash(self.number)

    def __eq__(self, other: object) -> bool:
        Watched.looks += 1
        return isinstance(other, Watched) and other.number == self.number


@pytest.mark.parametrize("capacity", [None, 50])
def test_the_cost_of_an_entry_does_not_grow_with_the_batch(capacity: int | None) -> None:
    costs = []
    for size in (100, 1000):
        cache = tiny_cache()
        index = CacheIndex(cache, "lru", capacity)
        index.put_batch([Watched(number) for number in range(size)], cache.new(size))
        Watched.looks = 0
        index.put_batch([Watched(number) for number in range(size)], cache.new(size))
        costs.append(Watched.looks / size)
    assert costs[1] <= 1.5 * costs[0]
