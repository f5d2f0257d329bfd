"""Sequences in an index are the index's own: who may end them, who may not, and what then is left
of their entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from small_caches import books, filled, grow, state, step, tiny_cache

from paged_kv import KVCacheManager, PagedKVCache
from paged_kv.errors import HandleInUse, OwnedSequence, PinnedEntry, StaleHandle, UnknownKey
from paged_kv.index import CacheIndex
from paged_kv.stats import IndexStats

VERBS: dict[str, Callable[[PagedKVCache, list[int]], Any]] = {
    "append": lambda cache, seqs: grow(cache, seqs, 1),
    "append nothing": lambda cache, seqs: grow(cache, seqs, 0),
    "slide": lambda cache, seqs: cache.slide(seqs, 1),
    "truncate": lambda cache, seqs: cache.truncate(seqs, [1] * len(seqs)),
    "release": lambda cache, seqs: cache.release(seqs),
    "release, missing or not": lambda cache, seqs: cache.release(seqs, missing_ok=True),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_nobody_changes_or_ends_a_sequence_of_an_index(verb: str, place: int) -> None:
    cache = tiny_cache()
    index = CacheIndex(cache)
    (owned,) = filled(cache, 3)
    index.put(("a", 1), owned)
    seqs = filled(cache, 2, 2)
    seqs.insert(place, owned)
    before = state(index)
    words = (
        rf"sequence {owned:#x} belongs to an index, under key \('a', 1\): "
        r"fork\(\) it to change it, remove\(\) the key to end it"
    )
    with pytest.raises(OwnedSequence, match=words) as caught:
        VERBS[verb](cache, seqs)
    assert (caught.value.handle, caught.value.key) == (owned, ("a", 1))
    assert state(index) == before
    seqs.remove(owned)
    VERBS[verb](cache, seqs)  # the others are anybody's
    cache.check()


def test_an_owned_sequence_is_read_and_forked_like_any_other() -> None:
    cache = tiny_cache(12)
    index = CacheIndex(cache)
    (owned,) = filled(cache, 3)
    index.put("a", owned)
    (child,) = cache.fork([owned])
    grow(cache, [child], 2)
    (other,) = step(cache, [owned], 1)
    assert cache.lengths([owned, child, other]) == [3, 5, 4]
    assert cache.pages_freed_by([owned]) == 0, "the child writes on in its tail page"
    cache.release([child])
    assert cache.pages_freed_by([owned]) == 1, "the other one has a copy; in front all is shared"
    cache.release([other])


def test_with_its_entry_a_sequence_ends() -> None:
    cache = tiny_cache()
    index = CacheIndex(cache, max_entries=2)
    first, *seqs = cache.new(4)
    index.put("first", first)
    for key, seq in zip("abc", seqs):
        index.put(key, seq)
    with pytest.raises(StaleHandle):  # evicted
        cache.release([first])
    index.remove("b")
    with pytest.raises(StaleHandle):
        cache.lengths([seqs[1]])
    index.clear()
    assert cache.live() == []
    assert cache.books.owned == {}


def test_a_refused_sequence_stays_the_callers() -> None:
    cache = tiny_cache()
    index = CacheIndex(cache)
    a, b = cache.new(2)
    index.put("a", a)
    with pytest.raises(HandleInUse):
        index.put_batch(["b", "c"], [b, a])
    grow(cache, [b], 1)
    cache.release([b])


class Family:
    """A root in nobody's hand, two children under keys "left" and "right", a grandchild of each
    under "l" and "r".
    """

    def __init__(self, pages: int = 12) -> None:
        self.cache = tiny_cache(pages)
        self.index = CacheIndex(self.cache, "lru")
        (self.root,) = filled(self.cache, 2)
        self.left, self.right = self.cache.fork([self.root] * 2)
        self.l, self.r = step(self.cache, [self.left, self.right], 2)
        self.index.put_batch(["left", "right", "l", "r"], [self.left, self.right, self.l, self.r])


ENDS: dict[str, Callable[[Family], int]] = {
    "promote": lambda family: family.cache.promote(family.left),
    "release_subtree": lambda family: family.cache.release_subtree(family.right),
}


@pytest.mark.parametrize("how", ENDS)
def test_entries_of_a_subtree_that_ended_are_gone_at_the_next_look(how: str) -> None:
    looks: dict[str, tuple[Callable[[Family], Any], Any]] = {
        "len": (lambda f: len(f.index), 2),
        "iter": (lambda f: list(f.index), ["left", "l"]),
        "in": (lambda f: ("right" in f.index, "l" in f.index), (False, True)),
        "handles": (lambda f: f.index.handles(), None),
        "get": (lambda f: (f.index.get("r"), f.index.stats.misses), (None, 1)),
        "victims": (lambda f: f.index.victims(), ["l", "left"]),
        "pinned": (lambda f: f.index.pinned("r"), False),
        "pinned pages": (lambda f: f.index.pinned_pages(), 0),
        "bytes": (lambda f: f.index.bytes_in_use, None),
        "check": (lambda f: f.index.check(), None),
        "stats": (lambda f: f.index.stats, IndexStats(insertions=4)),
    }
    for name, (look, wanted) in looks.items():
        family = Family()
        assert ENDS[how](family) == 2
        found = look(family)
        assert wanted is None or found == wanted, name
        assert family.index.handles() == [family.left, family.l]
        assert family.index.bytes_in_use == 2 * family.cache.page_bytes
        family.cache.check()
        family.index.check()


@pytest.mark.parametrize("how", ENDS)
def test_the_keys_of_a_subtree_that_ended_are_free_again(how: str) -> None:
    calls: dict[str, Callable[[Family, int], Any]] = {
        "put": lambda f, seq: f.index.put("right", seq),
        "put_batch": lambda f, seq: f.index.put_batch(["right"], [seq]),
    }
    for call in calls.values():
        family = Family()
        ENDS[how](family)
        (seq,) = family.cache.new()
        call(family, seq)
        assert family.index.victims() == ["l", "left", "right"]
        assert not family.index.pinned("right")
        assert family.index.stats == IndexStats(insertions=5), "nothing was evicted"
        family.index.check()
    for verb in ("remove", "pin", "unpin"):
        family = Family()
        ENDS[how](family)
        with pytest.raises(UnknownKey, match="no entry with key 'r' among 2 entries"):
            getattr(family.index, verb)("r")


def test_an_index_makes_no_room_in_what_ended() -> None:
    """Full as it was, with two entries less it takes two more."""
    family = Family()
    family.index.entries.max_entries = 4
    ENDS["promote"](family)
    family.index.put_batch(["x", "y"], family.cache.new(2))
    assert list(family.index) == ["left", "l", "x", "y"]
    assert family.index.stats.evictions == 0


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("key", ["right", "r"])
def test_a_pinned_entry_keeps_its_subtree(how: str, key: str) -> None:
    family = Family()
    family.index.pin(key)
    family.index.pin(key)
    before = state(family.index)
    with pytest.raises(
        PinnedEntry, match=f"the entry with key '{key}' is pinned 2 times"
    ) as caught:
        ENDS[how](family)
    assert (caught.value.key, caught.value.pins) == (key, 2)
    assert state(family.index) == before
    family.index.unpin(key)
    family.index.unpin(key)
    assert ENDS[how](family) == 2


def test_a_subtree_may_lie_in_several_indexes() -> None:
    cache = tiny_cache()
    manager = KVCacheManager(cache, 2)
    (root,) = filled(cache, 1)
    seqs = cache.fork([root] * 4)
    manager.set_recur_cache("r", seqs[0])
    manager.set_wm_cache("w", seqs[1])
    manager.set_init_cache(0, "i", seqs[2])
    manager.init_pools[0].pin("i")
    before = books(cache.books)
    with pytest.raises(PinnedEntry):
        cache.release_subtree(root)
    assert books(cache.books) == before
    manager.init_pools[0].unpin("i")
    assert cache.release_subtree(root) == 5
    assert cache.books.owned == {}
    assert manager.retrieve_cache_hierarchical(0, "r") is None
    assert manager.stats.combined.evictions == 0
    assert [list(pool) for pool in manager.pools] == [[], [], [], []]
    manager.check()


def test_a_sequence_that_ended_with_a_subtree_cannot_be_put() -> None:
    family = Family()
    ENDS["promote"](family)
    with pytest.raises(StaleHandle):
        family.index.put("right", family.right)
    with pytest.raises(StaleHandle):
        family.index.put("x", family.r)
    assert family.index.handles() == [family.left, family.l]
