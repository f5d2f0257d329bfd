"""Sequences leave a cache and come into another one: all of them, and nothing else."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_caches import books, filled, grow, tiny_cache

from paged_kv import CacheIndex, KVCacheManager, PagedKVCache
from paged_kv.bundles.bundle import Bundle
from paged_kv.errors import (
    BadArgument,
    BadBundle,
    CapacityExceeded,
    DuplicateSequence,
    OtherFingerprint,
    OutOfPages,
    StaleHandle,
)

SECRET = 12345.0


def fill(cache: PagedKVCache, seqs: list[int], count: int, value: float) -> None:
    kv = torch.full((1, len(seqs), 1, count, 2), value, device=cache.device)
    cache.append(seqs, kv, kv)


def cache_of(**options: Any) -> PagedKVCache:
    sizes: dict[str, Any] = {"layers": 1, "heads": 1, "head_size": 2, "page_size": 4}
    return PagedKVCache(**{**sizes, **options})


def moved(bundle: Bundle, **options: Any) -> tuple[PagedKVCache, list[int]]:
    """Another cache that has adopted a bundle."""
    cache = cache_of(**options)
    return cache, cache.adopt(bundle)


# -- what comes along


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value_head_size", [3, 5])
def test_contents_are_the_same_to_the_last_bit(
    device: str, dtype: torch.dtype, value_head_size: int
) -> None:
    shape: dict[str, Any] = {"layers": 3, "heads": 2, "head_size": 3, "page_size": 2}
    shape |= {"value_head_size": value_head_size, "dtype": dtype, "device": device}
    cache = PagedKVCache(**shape)
    seqs = cache.new(3)
    keys = torch.randn(3, 3, 2, 5, 3).to(device, dtype)
    values = torch.randn(3, 3, 2, 5, value_head_size).to(device, dtype)
    cache.append(seqs, keys, values, torch.arange(15).reshape(3, 5) * 7)
    cache.slide(seqs, [0, 1, 3])
    with torch.inference_mode():
        bundle = cache.export(seqs)
        other = PagedKVCache(**shape, num_pages=1)
        found = other.gather(other.adopt(pickle.loads(pickle.dumps(bundle))))
    for ours, theirs in zip(cache.gather(seqs), found):
        assert torch.equal(ours, theirs)


def test_nothing_of_anyone_else_travels() -> None:
    cache = cache_of()
    (root,) = cache.new()
    fill(cache, [root], 2, 1.0)
    (child,) = cache.fork([root])
    fill(cache, [child], 2, SECRET)
    cache.slide([child], 1)
    (stranger,) = cache.new()
    fill(cache, [stranger], 3, SECRET)
    bundle = cache.export([root])
    words = bundle.records.view(np.float32)
    assert SECRET not in words
    assert (words != 0).sum() == 2 * 2 * 2
    cache.release([stranger])
    (reused,) = cache.new()
    fill(cache, [reused], 1, 1.0)
    assert SECRET not in cache.export([reused]).records.view(np.float32)
    assert bundle.records.nbytes == cache.page_bytes


def test_each_page_travels_once_and_stays_shared() -> None:
    cache = cache_of()
    (root,) = cache.new()
    fill(cache, [root], 10, 1.0)
    children = cache.fork([root] * 50)
    fill(cache, children, 2, 2.0)
    cache.release([root])
    bundle = cache.export(children)
    assert len(bundle.records) == cache.pages_in_use == 3 + 49
    assert len(bundle) == 50
    other, seqs = moved(bundle)
    assert other.pages_in_use == 52
    assert other.stored_tokens == cache.stored_tokens
    other.release(seqs)
    assert other.pages_in_use == 0


def test_a_parent_is_the_nearest_one_that_comes_along() -> None:
    cache = cache_of()
    (top,) = cache.new()
    (middle,) = cache.fork([top])
    left, right = cache.fork([middle, middle])
    (leaf,) = cache.fork([left])
    (rooted,) = cache.fork([leaf], root=True)
    other, (low, high, side, own) = moved(cache.export([leaf, top, right, rooted]))
    assert [other.parent(seq) for seq in (low, high, side, own)] == [high, None, high, None]
    assert sorted(other.descendants(high)) == sorted([low, side])
    assert other.promote(low) == 1
    assert other.live() == [low, high, own]


def test_what_was_adopted_goes_on_as_it_would_have() -> None:
    cache = cache_of()
    (root,) = cache.new(start=1)
    fill(cache, [root], 1, 1.0)
    child, other_child = cache.fork([root, root])
    bundle = cache.export([root, child, other_child])
    other, (_, *theirs) = moved(bundle)
    for place, seqs in ((cache, [child, other_child]), (other, theirs)):
        before = place.stats.copied_pages
        fill(place, seqs[:1], 2, 2.0)
        fill(place, seqs[1:], 2, 3.0)
        assert place.stats.copied_pages - before == 1, "the first to write on copies nothing"
        place.check()
    assert torch.equal(cache.gather([child, other_child]).keys, other.gather(theirs).keys)


def test_an_empty_bundle_is_a_bundle() -> None:
    bundle = cache_of().export([])
    assert (len(bundle), bundle.nbytes > 0, moved(bundle)[1]) == (0, True, [])
    cache = cache_of()
    (seq,) = cache.new(start=3)
    other, found = moved(cache.export([seq]))
    fill(other, found, 1, 1.0)
    assert other.block_tables(found)[2].tolist() == [3]


def test_a_bundle_is_its_own() -> None:
    cache = cache_of()
    (seq,) = cache.new()
    fill(cache, [seq], 3, 1.0)
    data = {"list": [1]}
    bundle = cache.export([seq], data=data)
    data["list"].append(2)
    cache.release([seq])
    (again,) = cache.new()
    fill(cache, [again], 4, 2.0)
    other, found = moved(bundle)
    bundle.records[:] = 0
    assert bundle.data() == {"list": [1]}
    assert torch.equal(other.gather(found).keys, torch.ones(1, 1, 1, 3, 2))


# -- indexes


def test_an_index_comes_with_keys_pins_scores_counts_and_ages() -> None:
    cache = tiny_cache(12)
    index = CacheIndex(cache, "lru")
    index.put_batch([("a", 1), b"b", "c"], filled(cache, 1, 2, 3))
    index.put("d", cache.fork([index.get("c")])[0], priority=float("-inf"))
    index.pin(b"b")
    index.get(("a", 1))
    index.get("nothing")
    bundle = cache.export([], indexes=[index])
    other = tiny_cache(12)
    twin = CacheIndex(other, "lru")
    assert other.adopt(bundle, indexes=[twin]) == []
    assert list(twin) == list(index)
    assert twin.stats == index.stats
    assert twin.victims() == index.victims()
    assert twin.pinned(b"b")
    assert [twin.entries.by_key[key].priority for key in twin] == [None, None, None, -np.inf]
    for each in (index, twin):
        each.get(b"b")
    assert twin.victims() == index.victims()
    twin.check()
    other.check()
    with pytest.raises(Exception, match="belongs to an index"):
        other.release(twin.handles())


def test_sequences_and_entries_are_one_where_they_were() -> None:
    cache = tiny_cache(12)
    index = CacheIndex(cache)
    root, node = filled(cache, 3, 2)
    index.put("node", node)
    bundle = cache.export([node, root], indexes=[index])
    other = tiny_cache(12)
    twin = CacheIndex(other)
    found = other.adopt(bundle, indexes=[twin])
    assert twin.get("node") == found[0]
    assert other.live_sequences == 2


def test_a_manager_comes_with_all_its_pools() -> None:
    cache = tiny_cache(12)
    manager = KVCacheManager(cache, 2)
    seqs = filled(cache, 1, 2, 3, 1)
    manager.set_init_caches([0, 1], ["root"] * 2, seqs[:2], pin=True)
    manager.set_recur_cache("node", seqs[2])
    manager.set_wm_cache("world", seqs[3])
    manager.retrieve_cache_hierarchical(0, "node")
    bundle = cache.export([], indexes=[manager])
    other = tiny_cache(12)
    twin = KVCacheManager(other, 2)
    other.adopt(bundle, indexes=[twin])
    assert twin.stats == manager.stats
    assert other.lengths([twin.get_init_cache(1, "root")]) == [2]
    assert other.lengths([twin.get_wm_cache("world")]) == [1]
    twin.check()
    with pytest.raises(BadBundle, match="it holds 4 indexes, 5 were given"):
        fresh = tiny_cache(12)
        fresh.adopt(bundle, indexes=[KVCacheManager(fresh, 3)])


def test_an_index_must_be_empty_and_of_this_cache_and_large_enough() -> None:
    cache = tiny_cache(12)
    index = CacheIndex(cache)
    index.put_batch(["a", "b"], filled(cache, 2, 4))
    bundle = cache.export([], indexes=[index])
    before = books(cache.books)
    other = CacheIndex(tiny_cache())
    refused: list[tuple[type[Exception], list[Any]]] = [
        (BadArgument, [index]),
        (BadArgument, [other]),
        (BadArgument, [3]),
        (BadArgument, [CacheIndex(cache)] * 2),
        (BadBundle, []),
        (BadBundle, [CacheIndex(cache), CacheIndex(cache)]),
        (CapacityExceeded, [CacheIndex(cache, max_entries=1)]),
        (CapacityExceeded, [CacheIndex(cache, max_bytes=2 * cache.page_bytes)]),
    ]
    for kind, indexes in refused:
        with pytest.raises(kind):
            cache.adopt(bundle, indexes=indexes)
        assert books(cache.books) == before
    exact = CacheIndex(cache, max_entries=2, max_bytes=3 * cache.page_bytes)
    cache.adopt(bundle, indexes=[exact])
    exact.check()
    with pytest.raises(BadArgument, match="each once"):
        cache.export([], indexes=[index, index])


# -- what is refused


def test_mistakes_are_named() -> None:
    cache = cache_of()
    one, gone = cache.new(2)
    cache.release([gone])
    for kind, seqs in ((DuplicateSequence, [one, one]), (StaleHandle, [one, gone])):
        with pytest.raises(kind):
            cache.export(seqs)
    for identity in ({"weights": [1]}, {1: "a"}, "weights"):
        with pytest.raises(BadArgument, match="identity"):
            cache.export([one], identity=identity)  # type: ignore[arg-type]
    with pytest.raises(BadArgument, match="a codec takes all else"):
        cache.export([one], data={1, 2})


def test_what_differs_is_named() -> None:
    cache = cache_of()
    bundle = cache.export(cache.new(), identity={"weights": "abc", "positions": "rotary"})
    with pytest.raises(OtherFingerprint) as caught:
        cache_of(page_size=2, dtype=torch.float16).adopt(
            bundle, identity={"weights": "abd", "model": "m"}
        )
    assert caught.value.differences == {
        "page_size": (4, 2),
        "page_bytes": (64, 16),
        "dtype": ("float32", "float16"),
        "identity['weights']": ("abc", "abd"),
        "identity['model']": (None, "m"),
        "identity['positions']": ("rotary", None),
    }
    assert "identity['weights'] is 'abc', expected 'abd'" in str(caught.value)
    assert cache.adopt(bundle, identity={"positions": "rotary", "weights": "abc"})


def test_too_few_pages_change_nothing() -> None:
    cache = cache_of()
    (seq,) = cache.new()
    fill(cache, [seq], 9, 1.0)
    bundle = cache.export([seq])
    small = cache_of(num_pages=4, max_pages=4)
    held = small.new()
    fill(small, held, 8, 1.0)
    before = books(small.books)
    with pytest.raises(OutOfPages):
        small.adopt(bundle)
    assert books(small.books) == before
    index = CacheIndex(small)
    index.put("a", held[0])
    small.set_reclaimer(index)
    assert small.lengths(small.adopt(bundle)) == [9]
    assert len(index) == 0


def hostile(change: Callable[[dict[str, Any]], None]) -> Bundle:
    """A bundle of three sequences with other tables than it should have."""
    cache = cache_of()
    (root,) = cache.new()
    fill(cache, [root], 6, 1.0)
    children = cache.fork([root, root])
    fill(cache, children, 3, 2.0)
    bundle = cache.export([root, *children])
    tables = bundle.contents.tables
    fields = {name: field.copy() for name, field in tables._asdict().items()}
    fields["pages_count"] = bundle.contents.pages
    fields["named"] = bundle.contents.named
    fields["extra"] = bundle.contents.extra
    fields["records"] = bundle.records
    fields["positions"] = bundle.positions
    change(fields)
    contents = replace(
        bundle.contents,
        tables=tables._make(fields[name] for name in tables._fields),
        pages=fields["pages_count"],
        named=fields["named"],
        extra=fields["extra"],
    )
    return Bundle(contents, fields["records"], fields["positions"])


def put(name: str, row: int, value: int) -> Callable[[dict[str, Any]], None]:
    def change(fields: dict[str, Any]) -> None:
        fields[name][row] = value

    return change


def swap(name: str, make: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def change(fields: dict[str, Any]) -> None:
        fields[name] = make(fields[name])

    return change


HOSTILE: dict[str, Callable[[dict[str, Any]], None]] = {
    "a page out of range": put("pages", 1, 99),
    "a page below zero": put("pages", 1, -1),
    "a page twice": put("pages", 1, 0),
    "a page too few": swap("pages", lambda pages: pages[:-1]),
    "a page that nobody names": swap("pages_count", lambda count: count + 1),
    "more pages than there are": swap("pages_count", lambda count: 10**15),
    "an offset beyond the page": put("starts", 0, 4),
    "an offset below zero": put("starts", 0, -1),
    "a length below zero": put("lengths", 0, -2),
    "a length without pages": put("lengths", 0, 10**18),
    "a length that overflows": put("lengths", 0, 2**63 - 1),
    "a parent out of range": put("parents", 0, 3),
    "a parent below none": put("parents", 0, -2),
    "its own parent": put("parents", 0, 0),
    "parents in a circle": put("parents", 0, 2),
    "a place that overflows": put("places", 0, 2**63 - 1),
    "rows that differ": swap("places", lambda places: places[:-1]),
    "a row of no record": put("rows", 0, 3),
    "a row below zero": put("rows", 0, -1),
    "a record of no row": put("rows", 0, 1),
    "rows of another kind": swap("rows", lambda rows: rows.astype(np.int32)),
    "names of more than there is": swap("named", lambda named: named + 1),
    "names below zero": swap("named", lambda named: -1),
    "another kind of numbers": swap("starts", lambda starts: starts.astype(np.int32)),
    "no array": swap("starts", list),
    "two dimensions": swap("starts", lambda starts: starts[:, None]),
    "records too short": swap("records", lambda records: records[:, :-1]),
    "records too few": swap("records", lambda records: records[:-1]),
    "records of another kind": swap("records", lambda records: records.astype(np.int8)),
    "positions too few": swap("positions", lambda positions: positions[:, :-1]),
    "a position that overflows": swap("positions", lambda positions: positions + 2**62),
    "no JSON": swap("extra", lambda extra: "{"),
    "no pair": swap("extra", lambda extra: "[1]"),
    "no indexes": swap("extra", lambda extra: '["tuple",[null,3]]'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_contradicts_itself_is_refused(name: str) -> None:
    cache = cache_of(max_pages=64)
    (seq,) = cache.new()
    fill(cache, [seq], 3, 7.0)
    cache.adopt(hostile(lambda fields: None))
    before = books(cache.books)
    with pytest.raises(BadBundle):
        cache.adopt(hostile(HOSTILE[name]))
    assert books(cache.books) == before
    assert (cache.gather([seq]).keys == 7.0).all()
    cache.check()


BOOK: dict[str, Any] = {
    "rows": [0, 1],
    "keys": ["a", "b"],
    "priorities": [None, 1.0],
    "added": [0, 1],
    "used": [0, 2],
    "pins": [0, 1],
    "clock": 3,
    "counted": (1, 1, 0, 0, 2),
}
BAD_BOOKS: dict[str, dict[str, Any]] = {
    "a row out of range": {"rows": [0, 3]},
    "a row below zero": {"rows": [0, -1]},
    "a row twice": {"rows": [1, 1]},
    "a row that is true": {"rows": [0, True]},
    "a key twice": {"keys": ["a", "a"]},
    "a key that is a list": {"keys": ["a", ["b"]]},
    "a key that is not equal to itself": {"keys": ["a", float("nan")]},
    "a priority that is text": {"priorities": [None, "high"]},
    "a priority without a place": {"priorities": [None, float("nan")]},
    "one moment twice": {"added": [1, 1], "used": [1, 1]},
    "used before it came": {"added": [0, 2], "used": [0, 1]},
    "a moment that was not yet": {"clock": 2},
    "pins below zero": {"pins": [0, -1]},
    "lists of two lengths": {"pins": [0]},
    "no list": {"pins": 0},
    "no counts": {"counted": (1, 2)},
    "counts below zero": {"counted": (1, 1, 0, 0, -2)},
    "another field": {"more": 1},
}


@pytest.mark.parametrize("name", BAD_BOOKS)
def test_an_index_that_contradicts_itself_is_refused(name: str) -> None:
    from paged_kv.bundles.codec import to_json

    def change(book: dict[str, Any]) -> Bundle:
        text = to_json((None, [{**BOOK, **book}]))
        return hostile(lambda fields: fields.update(extra=text))

    cache = cache_of()
    index = CacheIndex(cache, "priority")
    before = books(cache.books)
    with pytest.raises(BadBundle):
        cache.adopt(change(BAD_BOOKS[name]), indexes=[index])
    assert books(cache.books) == before
    assert len(index) == 0
    cache.adopt(change({}), indexes=[index])
    index.check()
    assert index.victims() == ["a"]


def test_two_indexes_cannot_own_one_sequence() -> None:
    from paged_kv.bundles.codec import to_json

    text = to_json((None, [BOOK, {**BOOK, "rows": [2, 1]}]))
    cache = cache_of()
    with pytest.raises(BadBundle, match="two entries hold one sequence"):
        cache.adopt(
            hostile(lambda fields: fields.update(extra=text)),
            indexes=[CacheIndex(cache), CacheIndex(cache)],
        )
    assert cache.live_sequences == 0


def test_what_is_no_bundle_is_refused() -> None:
    for value in (None, 3, "bundle", [], object()):
        with pytest.raises(BadArgument, match="what export"):
            cache_of().adopt(value)  # type: ignore[arg-type]


def test_a_source_is_read_while_no_verb_may_run() -> None:
    cache = tiny_cache()
    (seq,) = filled(cache, 3)

    def use(source: Any) -> int:
        with pytest.raises(Exception, match="called inside of"):
            grow(cache, [seq], 1)
        return source.contents.tables.sequences

    assert cache.export_to(use, [seq]) == 1


# -- many sequences


def test_children_that_are_alike_travel_as_one_record() -> None:
    cache = cache_of()
    (root,) = cache.new()
    fill(cache, [root], 5, 1.0)
    children = cache.fork([root] * 50)
    (leaf,) = cache.fork(children[7:8])
    fill(cache, [leaf], 2, 2.0)
    bundle = cache.export([leaf, *children, root])
    assert len(bundle.contents.tables.starts) == 3
    assert bundle.contents.tables.tokens.tolist() == [7, *[5] * 51]
    other, (its_leaf, *its_children, its_root) = moved(bundle)
    other.check()
    assert other.children(its_root) == its_children
    assert other.descendants(its_children[7]) == [its_leaf]
    assert other.books.pages.refs[1:4] == [52, 52, 0]


def test_what_hangs_below_what_was_adopted_is_known_whenever_it_is_asked_for() -> None:
    cache = cache_of()
    (root,) = cache.new()
    left, right = cache.fork([root, root])
    (leaf,) = cache.fork([left])
    bundle = cache.export([root, left, right, leaf])
    for ends in range(4):
        other, seqs = moved(bundle)
        (child,) = other.fork(seqs[ends : ends + 1])
        other.release(seqs[ends : ends + 1])
        kept = [seq for seq in (*seqs, child) if seq != seqs[ends]]
        above = {seq: other.parent(seq) for seq in kept}
        for seq in kept:
            assert sorted(other.children(seq)) == sorted(one for one in kept if above[one] == seq)
        other.books.tree.rebuild()
        assert {seq: other.parent(seq) for seq in kept} == above
        other.check()
