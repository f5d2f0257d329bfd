"""The index against a naive model, in pools so small that eviction and exhaustion happen all the time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Hashable, Iterable
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from naive_index import FullError, NaiveIndex

from paged_kv import PagedKVCache
from paged_kv.errors import (
    BadCount,
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
from paged_kv.stats import IndexStats

KEYS = st.integers(0, 4)
PICK = st.integers(0, 100)
PRIORITIES = st.none() | st.integers(-1, 2)


def tiny_cache(pages: int = 6, page_size: int = 2) -> PagedKVCache:
    return PagedKVCache(layers=1, heads=1, head_size=2, page_size=page_size, num_pages=pages, grow=False)


def grow(cache: PagedKVCache, seqs: list[int], count: int) -> None:
    kv = torch.zeros(1, len(seqs), 1, count, 2)
    cache.append(seqs, kv, kv)


def filled(cache: PagedKVCache, *counts: int) -> list[int]:
    """New sequences of that many tokens each."""
    seqs = cache.new(len(counts))
    for seq, count in zip(seqs, counts):
        grow(cache, [seq], count)
    return seqs


def pages(cache: PagedKVCache, seqs: Iterable[int]) -> list[set[int]]:
    return [set(table) - {0} for table in cache.block_tables(list(seqs))[0].tolist()]


def held(cache: PagedKVCache, seqs: Iterable[int]) -> int:
    return len(set().union(*pages(cache, seqs)))


class IndexMachine(RuleBasedStateMachine):
    """Sequences lie in the index or outside of it; `live` knows them all, so that freed pages can be foretold."""

    policy = ""

    @initialize(entries=st.integers(1, 4) | st.none(), limit=st.none() | st.integers(1, 5), page_size=st.integers(1, 3))
    def start(self, entries: int | None, limit: int | None, page_size: int) -> None:
        self.cache = tiny_cache(6, page_size)
        size = None if limit is None else limit * self.cache.page_bytes + 1  # the odd byte holds no page
        self.index = CacheIndex(self.cache, self.policy, entries, size)
        self.cache.set_reclaimer(self.index)
        weigh = lambda handles: held(self.cache, handles) * self.cache.page_bytes  # noqa: E731
        self.model = NaiveIndex(self.policy, entries, size, weigh)
        self.outside = filled(self.cache, 1, 2, 1)
        for key in range(3):
            self.put(key, 0, None)

    def pick(self, seqs: list[int], number: int) -> int | None:
        return seqs[number % len(seqs)] if seqs else None

    def freed_by(self, seqs: list[int]) -> int:
        """Pages that nobody but `seqs` holds, counted without the cache's own dry run."""
        holders = Counter(page for table in pages(self.cache, self.outside + self.model.handles()) for page in table)
        holders.subtract(page for table in pages(self.cache, seqs) for page in table)
        return sum(count == 0 for count in holders.values())

    def fewest(self, need: int, busy: Collection[int]) -> list[int] | None:
        """Handles of the shortest run of victims that frees `need` pages."""
        victims = [entry.handle for entry in self.model.victims(busy)]
        for size in range(len(victims) + 1):
            if self.freed_by(victims[:size]) >= need:
                return victims[:size]
        return None

    def expect_gone(self, doomed: list[int]) -> None:
        self.model.evict([entry for entry in self.model.entries if entry.handle in doomed])

    # -- sequences -----------------------------------------------------------------------------------------

    @rule(number=PICK)
    def new(self, number: int) -> None:
        if len(self.outside) < 4:
            self.outside += self.cache.new(1)

    @rule(number=PICK)
    def fork(self, number: int) -> None:
        parent = self.pick(self.outside + self.model.handles(), number)
        if parent is not None and len(self.outside) < 4:
            self.outside += self.cache.fork([parent])

    @rule(first=PICK, second=PICK, count=st.integers(1, 5))
    def append(self, first: int, second: int, count: int) -> None:
        """Append to sequences in and out of the index: evicts, where pages are short, the fewest entries."""
        every = self.outside + self.model.handles()
        seqs = [seq for seq in dict.fromkeys([self.pick(every, first), self.pick(every, second)]) if seq is not None]
        if not seqs:
            return
        need, free = self.cache.pages_needed(seqs, count), self.cache.pages_free
        doomed = self.fewest(need - free, seqs) if need > free else []
        pinned = [entry.handle for entry in self.model.entries if entry.pins]
        if doomed is None:
            lengths = self.cache.lengths(every)
            with pytest.raises(OutOfPages) as caught:
                grow(self.cache, seqs, count)
            error = caught.value
            assert (error.requested, error.free, error.pinned) == (need, free, held(self.cache, pinned))
            assert self.cache.lengths(every) == lengths
        else:
            grow(self.cache, seqs, count)
            self.expect_gone(doomed)

    @rule(number=PICK)
    def slide(self, number: int) -> None:
        seq = self.pick(self.outside + self.model.handles(), number)
        if seq is not None and self.cache.lengths([seq])[0]:
            self.cache.slide([seq], 1)

    @rule(number=PICK)
    def release(self, number: int) -> None:
        seq = self.pick(self.outside, number)
        if seq is not None:
            self.outside.remove(seq)
            self.cache.release([seq])

    # -- the index -----------------------------------------------------------------------------------------

    @rule(key=KEYS, number=PICK, priority=PRIORITIES)
    def put(self, key: int, number: int, priority: float | None) -> None:
        if len(self.outside) <= number % 4:
            self.outside += self.cache.fork(self.model.handles()[:1]) or self.cache.new(1)
        seq = self.outside[number % len(self.outside)]
        try:
            released = self.model.put(key, seq, priority)
        except FullError:
            with pytest.raises(CapacityExceeded):
                self.index.put(key, seq, priority)
            return
        before = self.cache.live_sequences
        self.index.put(key, seq, priority)
        self.outside.remove(seq)
        assert self.cache.live_sequences == before - len(released)

    @rule(key=KEYS, priority=PRIORITIES)
    def renew(self, key: int, priority: float | None) -> None:
        entry = self.model.find(key)
        if entry is not None:
            try:
                self.model.put(key, entry.handle, priority)
            except FullError:  # pinned entries outgrew the limit
                with pytest.raises(CapacityExceeded):
                    self.index.put(key, entry.handle, priority)
            else:
                self.index.put(key, entry.handle, priority)

    @rule(key=KEYS)
    def get(self, key: int) -> None:
        assert self.index.get(key) == self.model.get(key)

    @rule(key=KEYS)
    def pin(self, key: int) -> None:
        entry = self.model.find(key)
        if entry is None:
            with pytest.raises(UnknownKey):
                self.index.pin(key)
        else:
            self.index.pin(key)
            entry.pins += 1

    @rule(key=KEYS)
    def unpin(self, key: int) -> None:
        entry = self.model.find(key)
        if entry is None or not entry.pins:
            with pytest.raises(UnknownKey if entry is None else NotPinned):
                self.index.unpin(key)
        else:
            self.index.unpin(key)
            entry.pins -= 1

    @rule(key=KEYS)
    def remove(self, key: int) -> None:
        entry = self.model.find(key)
        if entry is None or entry.pins:
            with pytest.raises(UnknownKey if entry is None else PinnedEntry):
                self.index.remove(key)
        else:
            self.index.remove(key)
            self.model.drop([entry])

    @rule(number=PICK)
    def clear(self, number: int) -> None:
        if number < 10:
            self.index.clear()
            self.model.drop(self.model.entries)

    @rule(need=st.integers(0, 5), number=PICK)
    def reclaim(self, need: int, number: int) -> None:
        seq = self.pick(self.model.handles(), number)
        busy = [] if seq is None or number % 2 else [seq]
        doomed, free = self.fewest(need, busy), self.cache.pages_free
        assert self.index.reclaim(need, busy) == (doomed is not None)
        self.expect_gone(doomed or [])
        assert self.cache.pages_free >= free + (need if doomed is not None else 0)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check()
        self.index.check()
        assert asdict(self.index.stats) == self.model.stats
        assert {key: self.index._entries[key] for key in self.index} == {
            entry.key: entry.handle for entry in self.model.entries
        }
        assert len(self.index) == len(self.model.entries)
        assert list(self.index.victims()) == [entry.key for entry in self.model.victims()]
        assert self.index.bytes_in_use == held(self.cache, self.model.handles()) * self.cache.page_bytes
        pinned = [entry.handle for entry in self.model.entries if entry.pins]
        assert self.index.pinned_pages() == held(self.cache, pinned)
        assert self.cache.live_sequences == len(self.outside) + len(self.model.entries)

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.release(self.outside)
            self.index.clear()
            assert (self.cache.pages_in_use, self.cache.live_sequences, len(self.index)) == (0, 0, 0)
            self.cache.check()


class FIFOMachine(IndexMachine):
    policy = "fifo"


class LRUMachine(IndexMachine):
    policy = "lru"


class PriorityMachine(IndexMachine):
    policy = "priority"


TestFIFO = FIFOMachine.TestCase
TestLRU = LRUMachine.TestCase
TestPriority = PriorityMachine.TestCase
TestFIFO.settings = TestLRU.settings = TestPriority.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None
)


# -- what a user sees --------------------------------------------------------------------------------------


def full_index(cache: PagedKVCache, *, entries: int = 2) -> tuple[CacheIndex, list[int]]:
    """An index at capacity with keys "a", "b", ... of two tokens each, and its handles."""
    index = CacheIndex(cache, max_entries=entries)
    seqs = filled(cache, *[2] * entries)
    for key, seq in zip("abcdef", seqs):
        index.put(key, seq)
    return index, seqs


def state(index: CacheIndex) -> object:
    cache = index.cache
    assert isinstance(cache, PagedKVCache)
    return (
        list(index.policy.victims()), dict(index._entries), dict(index._pins), dict(index._owners), index.stats,
        cache.pages_in_use, cache.live_sequences,
    )  # fmt: skip


def test_a_replaced_sequence_is_released_and_the_pin_stays() -> None:
    cache = tiny_cache()
    index, (a, _) = full_index(cache)
    index.pin("a")
    (fresh,) = filled(cache, 1)
    index.put("a", fresh)
    with pytest.raises(StaleHandle):
        cache.lengths([a])
    assert index.stats == IndexStats(insertions=3)
    assert list(index.victims()) == ["b"]


def test_pins_nest_and_keep_their_place_in_the_order() -> None:
    index, _ = full_index(tiny_cache())
    index.pin("a")
    index.pin("a")
    index.unpin("a")
    assert list(index.victims()) == ["b"]
    index.unpin("a")
    assert list(index.victims()) == ["a", "b"]


def test_clear_releases_all_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tiny_cache()
    index, seqs = full_index(cache, entries=3)
    index.pin("b")
    calls: list[list[int]] = []
    release = cache.release
    monkeypatch.setattr(cache, "release", lambda batch: (calls.append(list(batch)), release(batch)))
    index.clear()
    index.clear()  # an empty one calls nobody
    assert calls == [seqs]
    assert (len(index), cache.pages_in_use, index.pinned_pages()) == (0, 0, 0)


def test_a_forked_entry_outlives_its_eviction() -> None:
    cache = tiny_cache()
    index, (a, _) = full_index(cache)
    (child,) = cache.fork([a])
    index.put("c", filled(cache, 1)[0])
    assert "a" not in index
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
    filled(cache, 6)  # the index is light, the cache is not: bytes are counted, and no reason to evict
    for key, seq in enumerate(filled(cache, 1, 1, 1)):
        index.put(key, seq)
    assert list(index) == [1, 2]
    index.put(3, filled(cache, 4)[0])
    assert list(index) == [2, 3]


def test_busy_entries_stay() -> None:
    cache = tiny_cache(2)
    index, (a, _) = full_index(cache)
    cache.set_reclaimer(index)
    grow(cache, [a], 1)  # needs a page, and may not evict the sequence it appends to
    assert "a" in index
    assert "b" not in index


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
    children = cache.fork([root] * 5)
    for key, child in enumerate(children):  # six entries, two pages
        index.put(key, child)
    index.put("root", root)
    assert (len(index), index.bytes_in_use) == (6, 2 * cache.page_bytes)
    grow(cache, [children[4]], 2)
    index.put("new", filled(cache, 1)[0])  # a fourth page: all that hold the third have to go
    assert index.bytes_in_use == 3 * cache.page_bytes
    assert list(index) == ["root", "new"]


def test_any_object_with_the_hooks_is_a_policy() -> None:
    class Newest(FIFO):
        def victims(self):  # type: ignore[no-untyped-def]
            return reversed(self._order)

    cache = tiny_cache()
    index = CacheIndex(cache, Newest(), max_entries=2)
    for key, seq in zip("abc", cache.new(3)):
        index.put(key, seq)
    assert list(index) == ["a", "c"]


def test_an_unhashable_key_changes_nothing() -> None:
    cache = tiny_cache()
    index, _ = full_index(cache)
    before = state(index)
    key: Hashable = ["no", "key"]  # type: ignore[assignment]
    for call in (index.get, index.pin, index.unpin, index.remove, lambda k: index.put(k, cache.new()[0])):
        with pytest.raises(TypeError, match="unhashable"):
            call(key)
    assert state(index)[:5] == before[:5]  # type: ignore[index]


def test_eight_lookups_take_microseconds() -> None:
    cache = tiny_cache(64)
    index = CacheIndex(cache)
    for key, seq in enumerate(cache.new(1000)):
        index.put(key, seq)
    best = min(_seconds(lambda: [index.get(key) for key in range(8)]) for _ in range(200))
    assert best < 100e-6  # some 3 us; the rest is for slow machines


def _seconds(call) -> float:  # type: ignore[no-untyped-def]
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# -- errors: each one by name, with its data, and without a trace -------------------------------------------


def refuses(index: CacheIndex, error: type[Exception], words: str, call) -> Exception:  # type: ignore[no-untyped-def]
    before = state(index)
    with pytest.raises(error, match=words) as caught:
        call()
    assert state(index) == before
    return caught.value


def test_unknown_key() -> None:
    index, _ = full_index(tiny_cache())
    for call in (index.pin, index.unpin, index.remove):
        refuses(index, UnknownKey, r"no entry with key 'x' among 2 entries", lambda call=call: call("x"))


def test_not_pinned() -> None:
    index, _ = full_index(tiny_cache())
    refuses(index, NotPinned, r"the entry with key 'a' is not pinned", lambda: index.unpin("a"))


def test_pinned_entry() -> None:
    index, _ = full_index(tiny_cache())
    index.pin("a")
    index.pin("a")
    refuses(index, PinnedEntry, r"the entry with key 'a' is pinned 2 times", lambda: index.remove("a"))


def test_handle_in_use() -> None:
    index, (a, _) = full_index(tiny_cache())
    error = refuses(index, HandleInUse, r"already stored under key 'a': fork it", lambda: index.put("x", a))
    assert isinstance(error, HandleInUse)
    assert (error.handle, error.key) == (a, "a")


def test_capacity_in_entries_all_pinned() -> None:
    cache = tiny_cache()
    index, _ = full_index(cache)
    index.pin("a")
    index.pin("b")
    (seq,) = filled(cache, 1)
    words = r"the new entry and the 2 pinned ones need 3 entries, allowed is 2: .* raise max_entries"
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
    words = rf"the new entry and the 1 pinned ones need {3 * size} bytes, allowed is {2 * size}: .* raise max_bytes"
    refuses(index, CapacityExceeded, words, lambda: index.put("x", large))
    index.put("x", fits)
    assert list(index) == ["b", "x"]


@pytest.mark.parametrize("policy", ["newest", 3, LRU, object()])
def test_unknown_policy(policy: object) -> None:
    with pytest.raises(UnknownPolicy, match=r"is not usable, allowed is 'fifo', 'lru', 'priority' or a fresh object"):
        CacheIndex(tiny_cache(), policy)  # type: ignore[arg-type]


def test_a_policy_serves_one_index() -> None:
    policy = LRU()
    cache = tiny_cache()
    CacheIndex(cache, policy).put("a", cache.new()[0])
    with pytest.raises(UnknownPolicy, match="a fresh object with on_add, on_hit, on_remove, victims"):
        CacheIndex(cache, policy)


@pytest.mark.parametrize("priority", [float("nan"), "high", [1]])
def test_bad_priority(priority: object) -> None:
    cache = tiny_cache()
    index, _ = full_index(cache)
    (seq,) = cache.new()
    refuses(
        index, BadPriority, r"priority is .*, allowed is any real number except NaN, or None",
        lambda: index.put("x", seq, priority),
    )  # fmt: skip


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3"])
def test_bad_capacities(value: object) -> None:
    cache = tiny_cache()
    with pytest.raises(BadCount, match=r"max_entries is .*, allowed is None or an integer >= 1"):
        CacheIndex(cache, max_entries=value)  # type: ignore[arg-type]
    with pytest.raises(BadCount, match=rf"max_bytes is .*, allowed is None or an integer >= {cache.page_bytes}"):
        CacheIndex(cache, max_bytes=value)  # type: ignore[arg-type]


def test_less_than_a_page_of_bytes() -> None:
    cache = tiny_cache()
    with pytest.raises(BadCount, match="one page"):
        CacheIndex(cache, max_bytes=cache.page_bytes - 1)


def test_stale_and_foreign_sequences() -> None:
    cache = tiny_cache()
    index, _ = full_index(cache)
    (gone,) = cache.new()
    cache.release([gone])
    refuses(index, StaleHandle, "was released", lambda: index.put("x", gone))
    refuses(index, StaleHandle, "was released", lambda: index.put("a", gone))
    refuses(index, ForeignHandle, "is not a sequence of this cache", lambda: index.put("x", "seq"))
    refuses(index, ForeignHandle, "is not a sequence", lambda: index.put("x", tiny_cache().new()[0]))


def test_an_entry_released_behind_the_index_is_named() -> None:
    cache = tiny_cache()
    index, (a, _) = full_index(cache)
    cache.release([a])
    (seq,) = cache.new()
    with pytest.raises(StaleHandle):
        index.check()
    refuses(index, StaleHandle, "was released", lambda: index.put("c", seq))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda index: index.policy.on_remove("a"), "the policy holds"),
        (lambda index: index.policy.on_add("x", None), "the policy holds"),
        (lambda index: index._pins.update(x=1), "pins"),
        (lambda index: index._pins.update(a=0), "pins"),
        (lambda index: index._owners.clear(), "owners"),
        (lambda index: setattr(index, "max_entries", 1), "2 entries, allowed are 1"),
    ],
)
def test_check_names_what_is_broken(damage, words: str) -> None:  # type: ignore[no-untyped-def]
    index, _ = full_index(tiny_cache())
    index.check()
    damage(index)
    with pytest.raises(CorruptCache, match=words):
        index.check()


# -- batches ---------------------------------------------------------------------------------------------


@given(keys=st.lists(st.sampled_from("abc"), max_size=6), capacity=st.none() | st.integers(1, 3))
def test_a_batch_is_the_same_as_one_by_one(keys: list[str], capacity: int | None) -> None:
    """Keys may repeat in a batch, and stand in the index already."""
    outcomes = []
    for batched in (False, True):
        cache = tiny_cache()
        index = CacheIndex(cache, "lru", capacity)
        index.put("a", cache.new()[0])
        seqs = cache.new(len(keys))
        if batched:
            index.put_batch(keys, seqs)
        else:
            for key, seq in zip(keys, seqs):
                index.put(key, seq)
        index.check()
        order = [(key, seqs.index(index.get(key)) if index.get(key) in seqs else None) for key in index]
        outcomes.append((order, list(index.victims()), index.stats, cache.live_sequences))
    assert outcomes[0] == outcomes[1]


def test_a_refused_batch_changes_nothing() -> None:
    cache = tiny_cache()
    index = CacheIndex(cache)
    first, second = cache.new(2)
    index.put("a", first)
    for seqs in ([second, second], [second, first], [second, 7]):
        with pytest.raises((HandleInUse, ForeignHandle)):
            index.put_batch(["b", "c"], seqs)
        assert list(index) == ["a"]
        index.check()
