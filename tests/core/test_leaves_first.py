"""What goes first where entries hang on each other, what a policy sees of them, and how many pages
it takes to make room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small_caches import filled, grow, state, step, tiny_cache

from paged_kv import CacheIndex, KVCacheManager, PagedKVCache
from paged_kv.errors import BadCount, BadPriority, OutOfPages, UnknownKey
from paged_kv.eviction import FIFO, LRU, POLICIES, EntryView, Priority
from paged_kv.pages.tree import Tree


def line(policy: Any = "fifo", **limits: Any) -> tuple[PagedKVCache, CacheIndex, list[int]]:
    """Entries "a" to "d", each below the one before, and "x", which is unrelated: in this order."""
    cache = tiny_cache(12)
    index = CacheIndex(cache, policy, **limits)
    seqs = filled(cache, 2)
    for _ in range(3):
        seqs += step(cache, seqs[-1:], 2)
    seqs += filled(cache, 2)
    index.put_batch(list("abcdx"), seqs)
    return cache, index, seqs


@pytest.mark.parametrize("policy", POLICIES)
def test_an_entry_goes_behind_those_below_it_and_before_those_that_come_later(policy: str) -> None:
    _, index, _ = line(policy)
    assert index.victims() == ["d", "c", "b", "a", "x"]


def test_one_that_is_free_to_go_does_not_wait() -> None:
    cache, index, (_, b, *_) = line()
    (branch,) = step(cache, [b], 2)
    index.put("y", branch)
    assert index.victims() == ["d", "c", "x", "y", "b", "a"]


def test_put_evicts_a_leaf() -> None:
    _, index, _ = line(max_entries=5)
    for key, left in (("y", "abcxy"), ("z", "abxyz")):
        index.put(key, index.cache.new(1)[0])  # type: ignore[attr-defined]
        assert list(index) == list(left)


@pytest.mark.parametrize("how", ["unowned", "pinned", "busy", "of another index"])
def test_what_others_hang_on_goes_last_and_then_in_order(how: str) -> None:
    cache, index, seqs = line()
    other = CacheIndex(cache)
    keep = []
    if how == "busy":
        keep = [seqs[3]]
    elif how == "pinned":
        index.pin("d")
    else:
        (below,) = cache.fork([seqs[3]])
        if how == "of another index":
            other.put("other", below)
    held = ["a", "b", "c"] if how in ("pinned", "busy") else ["a", "b", "c", "d"]
    assert index.victims(keep) == ["x", *held]
    if how == "unowned":
        cache.release([below])
        assert index.victims(keep) == ["d", "c", "b", "a", "x"]


def test_capacity_is_kept_where_every_entry_is_an_inner_one() -> None:
    cache = tiny_cache(12)
    index = CacheIndex(cache, "lru", max_entries=1)
    (seq,) = filled(cache, 2)
    for number in range(4):
        index.put(number, seq)
        assert list(index) == [number]
        (seq,) = step(cache, [seq], 2)
    assert cache.live_sequences == 2


def test_what_a_batch_has_ended_holds_nothing_back() -> None:
    _, index, _ = line(max_entries=5)
    cache = index.cache
    assert isinstance(cache, PagedKVCache)
    index.put_batch(["y", "d", "z"], cache.new(3))
    assert index.victims() == ["a", "x", "y", "d", "z"]


def test_a_joint_between_entries_is_looked_through() -> None:
    cache = tiny_cache(12)
    index = CacheIndex(cache, "fifo")
    (root,) = filled(cache, 2)
    (joint,) = step(cache, [root], 2)
    leaves = step(cache, [joint, joint], 2)
    index.put_batch(["root", "left", "right"], [root, *leaves])
    cache.release([joint])
    assert index.victims() == ["left", "right", "root"]
    assert index.victims(leaves[:1]) == ["right", "root"]


def test_roots_wait_for_the_search_nodes_below_them_and_nodes_for_roots() -> None:
    cache = tiny_cache(16)
    manager = KVCacheManager(cache, 2)
    (root,) = filled(cache, 2)
    node, other = step(cache, [root, root], 2)
    (late,) = step(cache, [node], 2)
    manager.set_init_cache(0, "root", root)
    manager.set_init_cache(1, "late", late)
    manager.set_recur_caches(["node", "other"], [node, other])
    gone = []
    for _ in range(4):
        before = [key for pool in manager.pools for key in pool]
        assert manager.reclaim(1)
        left = [key for pool in manager.pools for key in pool]
        gone += [key for key in before if key not in left]
    assert gone == ["other", "late", "node", "root"]
    assert cache.live() == []


class Counted(FIFO):
    """Says how many entries were looked at."""

    looks = 0

    def victims(self) -> Iterator[EntryView]:
        for entry in super().victims():
            Counted.looks += 1
            yield entry


def test_to_evict_costs_as_many_looks_as_go() -> None:
    cache = tiny_cache(256)
    index = CacheIndex(cache, Counted)
    index.put_batch(range(200), filled(cache, *[2] * 200))
    Counted.looks = 0
    assert index.reclaim(16)
    assert 16 <= Counted.looks <= 32
    Counted.looks = 0
    bounded = CacheIndex(cache, Counted, max_entries=50)
    bounded.put_batch(range(250), cache.new(250))
    assert Counted.looks == 200


@pytest.mark.parametrize("shape", ["line", "fan", "tree"])
def test_to_pass_over_inner_entries_costs_once(shape: str) -> None:
    """Each entry is passed over a few times in all, and not at each eviction."""
    cache = tiny_cache()
    index = CacheIndex(cache, Counted, max_entries=100)
    (seq,) = cache.new(1)
    seqs = [seq]
    index.put(0, seq)
    Counted.looks = 0
    for number in range(1, 1000):
        place = {"line": -1, "fan": 0, "tree": -1 - number * 7919 % min(number, 60)}[shape]
        above = seqs[place] if seqs[place] in cache.books else index.handles()[-1]
        (seq,) = cache.fork([above])
        index.put(number, seq)
        seqs.append(seq)
    assert len(index) == 100
    assert Counted.looks <= 4 * 1000


def test_an_entry_is_a_leaf_again_however_what_hung_on_it_ended() -> None:
    ends: dict[str, Callable[[PagedKVCache, int], Any]] = {
        "release": lambda cache, seq: cache.release([seq]),
        "release_subtree": lambda cache, seq: cache.release_subtree(seq),
        "scope": lambda cache, seq: None,
    }
    for how, end in ends.items():
        cache = tiny_cache(12)
        index = CacheIndex(cache, "fifo", max_entries=2)
        root, other, *more = filled(cache, 2, 2, 2, 2)
        index.put_batch(["root", "other"], [root, other])
        with cache.scope() as scope:
            (child,) = step(cache, [root], 2)
            index.put("more", more[0])
            assert list(index) == ["root", "more"], how
            end(cache, child)
            scope.keep([])
        index.put("last", more[1])
        assert list(index) == ["more", "last"], how
        index.check()


def test_an_entry_that_ended_with_a_subtree_leaves_its_place_to_another() -> None:
    cache = tiny_cache(12)
    index = CacheIndex(cache, "fifo", max_entries=2)
    first, second, third, fourth = filled(cache, 2, 2, 2, 2)
    index.put_batch(["first", "second"], [first, second])
    cache.release_subtree(second)
    assert "second" not in index
    assert not index.pinned("second")
    assert len(index) == 1
    index.put("third", third)
    assert list(index) == ["first", "third"]
    index.put("fourth", fourth)
    assert list(index) == ["third", "fourth"]


class Hoarder(FIFO):
    """Shows what was removed as well."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[EntryView] = []

    def on_add(self, entry: EntryView) -> None:
        super().on_add(entry)
        self.all.append(entry)

    def victims(self) -> Iterator[EntryView]:
        return iter(self.all)


def test_what_was_removed_is_passed_over_though_a_policy_still_shows_it() -> None:
    """Its sequence may be that of another entry by now."""
    cache = tiny_cache(12)
    index = CacheIndex(cache, Hoarder, max_entries=2)
    first, second, third, fourth = filled(cache, 2, 2, 2, 2)
    index.put("a", first)
    index.put("b", second)
    index.put("a", first)
    index.put("c", third)
    assert list(index) == ["a", "c"]
    index.put("d", fourth)
    assert list(index) == ["c", "d"]


# -- what a policy sees


class Largest(LRU):
    """Evicts the longest first."""

    def victims(self) -> Iterator[EntryView]:
        return iter(sorted(super().victims(), key=lambda entry: -entry.tokens))


def test_a_policy_may_decide_by_what_it_sees() -> None:
    cache = tiny_cache(16)
    index = CacheIndex(cache, Largest)
    index.put_batch(list("abc"), filled(cache, 3, 9, 5))
    assert index.victims() == ["b", "c", "a"]


class Watching(Priority):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def on_add(self, entry: EntryView) -> None:
        super().on_add(entry)
        self.seen.append(("add", *shown(entry)))

    def on_hit(self, entry: EntryView) -> None:
        self.seen.append(("hit", *shown(entry)))

    def on_remove(self, entry: EntryView) -> None:
        super().on_remove(entry)
        self.seen.append(("remove", *shown(entry)))


def shown(entry: EntryView) -> tuple[Any, ...]:
    """All that is seen of an entry, but for its numbers."""
    return (
        entry.key,
        entry.handle,
        entry.priority,
        entry.parent,
        len(entry.pages),
        entry.tokens,
        entry.used - entry.added,
    )


def test_a_policy_sees_the_tree_and_the_pages() -> None:
    cache = tiny_cache(16)
    index = CacheIndex(cache, Watching)
    (root,) = filled(cache, 3)
    middle, other = step(cache, [root, root], 2)
    (leaf,) = step(cache, [middle], 2)
    cache.release([middle])
    index.put("leaf", leaf, 2.5)
    index.get("leaf")
    index.get("leaf")
    index.put("root", root)
    cache.release_subtree(leaf)
    index.get("root")
    index.remove("root")
    assert isinstance(index.policy, Watching)
    assert index.policy.seen == [
        ("add", "leaf", leaf, 2.5, root, 4, 7, 0),
        ("hit", "leaf", leaf, 2.5, root, 4, 7, 0),
        ("hit", "leaf", leaf, 2.5, root, 4, 7, 1),
        ("add", "root", root, None, None, 2, 3, 0),
        ("remove", "leaf", leaf, 2.5, None, 0, 0, 2),
        ("hit", "root", root, None, None, 2, 3, 0),
        ("remove", "root", root, None, None, 2, 3, 1),
    ]
    cache.release([other])


def test_priorities_change_all_or_none_and_ages_stay() -> None:
    cache = tiny_cache(16)
    index = CacheIndex(cache, "priority")
    for key, seq, priority in zip("abc", cache.new(3), (1, 2, 3)):
        index.put(key, seq, priority)
    index.set_priorities(["c", "a", "a"], [2, 9, 2])
    assert index.victims() == ["a", "b", "c"]
    before = state(index)
    refused: list[tuple[type[Exception], Any, Any]] = [
        (UnknownKey, ["a", "x"], [5, 5]),
        (BadPriority, ["a", "b"], [5, float("nan")]),
        (BadCount, ["a", "b"], [5]),
    ]
    for error, keys, priorities in refused:
        with pytest.raises(error):
            index.set_priorities(keys, priorities)
        assert state(index) == before
    index.set_priorities(["b"], [None])
    assert index.victims() == ["b", "a", "c"]
    index.check()


def test_an_inner_entry_takes_its_priority_along() -> None:
    cache, index, seqs = line("priority", max_entries=5)
    (child,) = cache.fork(seqs[:1])
    index.put("y", cache.new(1)[0])  # by now the inner ones were passed over
    assert list(index) == list("abcxy")
    index.set_priorities(["c", "a"], [1, -1])
    cache.release([child])
    assert index.victims() == ["x", "y", "c", "b", "a"]
    for left in ("abcy1", "abc12", "abc23"):
        index.put(int(left[-1]), cache.new(1)[0], 0)
        assert "".join(map(str, index)) == left


# -- pages that need no copy once an entry has gone


def shared_tail(entries: int = 1) -> tuple[PagedKVCache, CacheIndex, int, list[int]]:
    """A full pool, and a sequence whose partly filled last page entries hold, too: they have
    written on in it.
    """
    cache = tiny_cache(2, page_size=4)
    index = CacheIndex(cache, "fifo")
    cache.set_reclaimer(index)
    (seq,) = filled(cache, 2)
    forks = cache.fork([seq] * entries)
    grow(cache, forks[:1], 1)
    index.put_batch(range(entries), forks)
    filled(cache, 1)
    assert cache.pages_free == 0
    return cache, index, seq, forks


@pytest.mark.parametrize("entries", [1, 3])
def test_an_append_writes_on_in_place_once_the_others_of_its_page_are_evicted(entries: int) -> None:
    cache, index, seq, _ = shared_tail(entries)
    assert cache.pages_needed([seq], 1) == 1
    grow(cache, [seq], 1)
    assert (len(index), cache.stats.copied_pages) == (0, 0)
    cache.check()


def test_a_step_writes_on_in_the_page_of_its_parent_once_the_others_are_evicted() -> None:
    cache, index, seq, _ = shared_tail()
    (child,) = step(cache, [seq], 1)
    assert (len(index), cache.stats.copied_pages, cache.lengths([child])) == (0, 0, [3])
    cache.check()


def test_a_copy_that_is_needed_all_the_same_evicts_nothing() -> None:
    cache, index, seq, forks = shared_tail()
    (other,) = cache.fork([seq])
    index.pin(0)
    with pytest.raises(OutOfPages):
        grow(cache, [seq], 1)
    index.unpin(0)
    with pytest.raises(OutOfPages):  # the other one holds the page, too
        grow(cache, [seq], 1)
    assert index.handles() == forks
    cache.release([other])
    grow(cache, [seq], 1)


def test_two_children_of_one_parent_spare_one_copy_only() -> None:
    cache, index, seq, forks = shared_tail()
    with pytest.raises(OutOfPages):
        cache.open([seq, seq], 1)
    assert index.handles() == forks


# -- the tree


def test_what_lives_below_is_found_one_at_a_time_and_through_what_is_gone() -> None:
    records = {seq: ((), 0, 0, parent, 0) for seq, parent in ((1, 0), (2, 1), (3, 1), (4, 2))}
    tree = Tree(records)
    tree.begin(records)
    gone: set[int] = set()
    below = tree.living_below(1, gone)
    assert next(below) == 3
    gone.update((2, 3))
    assert list(below) == [4]
    assert list(tree.living_below(1, gone)) == [4]
    assert list(tree.living_below(4, gone)) == []
    assert 4 not in tree.parents()


def test_children_that_ended_are_passed_over() -> None:
    cache = tiny_cache(4)
    (root,) = filled(cache, 1)
    children = cache.fork([root] * 100)
    cache.children(root)
    cache.release(children[:99])
    tree = cache.books.tree
    assert list(tree.living_below(root, ())) == children[99:]
    cache.release(children[99:])
    for _ in range(2):  # the ended ones are forgotten meanwhile
        assert list(tree.living_below(root, ())) == []
    assert torch.equal(cache.gather([root]).keys, torch.zeros(1, 1, 1, 1, 2))
