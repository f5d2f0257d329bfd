"""What a hostile or unlucky program does to a cache, and what must come of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from paged_kv import CacheIndex, KVCacheManager, PagedKVCache, StagingBatch
from paged_kv.errors import BadCount, ClosedBatch, ParentChanged


def made(**options: Any) -> PagedKVCache:
    return PagedKVCache(**{"layers": 1, "heads": 1, "head_size": 2, "page_size": 2, **options})


def grow(cache: PagedKVCache, seq: int, *numbers: float) -> None:
    """Append one token a number to a sequence."""
    kv = (
        torch.tensor(numbers, dtype=torch.float32)
        .reshape(1, 1, 1, -1, 1)
        .expand(cache.layers, 1, 1, -1, 2)
    )
    cache.append([seq], kv, kv)


def write(batch: StagingBatch, number: float) -> None:
    kv = torch.full((len(batch.parents), 1, 1, 2), float(number))
    for layer in range(len(batch.layers)):
        batch.update(layer, kv, kv)


def read(cache: PagedKVCache, seq: int) -> list[float]:
    numbers: list[float] = cache.gather([seq]).keys[0, 0, 0, :, 0].tolist()
    return numbers


def test_a_parent_that_was_cut_and_refilled_is_another_one() -> None:
    """Its record is equal to the one that was opened, down to the pages."""
    cache = made()
    (parent,) = cache.new()
    grow(cache, parent, 1, 1, 1)
    batch = cache.open([parent], 1)
    cache.truncate([parent], 1)
    grow(cache, parent, 99)
    write(batch, 5)
    with pytest.raises(ParentChanged):
        batch.commit()
    with pytest.raises(ParentChanged):
        _ = batch.then


def test_a_batch_that_is_taken_over_no_longer_reaches_the_next_one() -> None:
    cache = made()
    (seq,) = cache.new()
    grow(cache, seq, 1, 1)
    first = cache.open([seq], 1)
    planes = first.planes
    slot = first.layers[0]
    second = cache.open([seq], 1)
    write(second, 22)
    planes[0].fill_(11)  # what a call of `update` does that was interrupted by the second open
    (child,) = second.commit()
    assert read(cache, child) == [1, 1, 22]
    with pytest.raises(ClosedBatch):
        slot.update(*[torch.ones(1, 1, 1, 2)] * 2)


def test_commit_of_the_cache_asks_for_every_layer_too() -> None:
    cache = made(layers=2)
    (seq,) = cache.new()
    batch = cache.open([seq], 1)
    batch.update(0, *[torch.ones(1, 1, 1, 2)] * 2)
    with pytest.raises(BadCount, match="the same number in every layer"):
        cache.commit(batch)
    assert cache.live() == [seq]


def test_a_batch_that_grows_between_two_tries_of_its_commit_keeps_its_tokens() -> None:
    """The reclaimer writes another token into the batch that asked for room."""
    cache = made(page_size=1, num_pages=4, grow=False)
    parent, other = cache.new(2)
    grow(cache, parent, 1)
    grow(cache, other, 2, 2, 2)
    batch = cache.open([parent], 2)
    write(batch, 7)

    class Meddler:
        def reclaim(self, need: int, busy: object) -> bool:
            cache.release([other])
            write(batch, 8)
            return True

        def pinned_pages(self) -> int:
            return 0

    cache.set_reclaimer(Meddler())
    (child,) = batch.commit(positions=torch.tensor([[40]]))
    assert read(cache, child) == [1, 7]
    assert cache.gather([child]).positions.tolist() == [[0, 40]]


def test_a_listener_may_release_what_is_gone() -> None:
    cache = made()
    first, second = cache.new(2)
    calls: list[object] = []

    def listener(*told: object) -> None:
        calls.append(told)
        cache.release([first], missing_ok=True)

    cache.listen(listener)
    grow(cache, second, 1)
    assert cache.live() == [second]
    assert len(calls) == 2  # the append, and the release that it led to


def test_what_a_listener_is_handed_cannot_be_changed() -> None:
    told: list[tuple[object, ...]] = []
    cache = made()
    cache.listen(lambda change, taken, freed: told.append((taken, freed)))
    cache.release(cache.new(1))
    assert told == [((), ()), ((), [])] or told == [((), ()), ((), ())]
    for taken, _ in told:
        assert type(taken) is tuple


class Changing:
    """A key whose hash is another one from some time on."""

    def __init__(self) -> None:
        self.number = 1

    def __hash__(self) -> int:
        return self.number


@pytest.mark.parametrize("end", ["clear", "promote", "evict"])
def test_a_key_whose_hash_changes_wedges_nothing(end: str) -> None:
    cache = made(num_pages=4, grow=False)
    index = CacheIndex(cache)
    cache.set_reclaimer(index)
    (root,) = cache.new()
    lost, kept = cache.fork([root] * 2)
    grow(cache, lost, 1)
    grow(cache, kept, 2)
    key = Changing()
    index.put(key, lost)
    index.put("kept", kept)
    key.number = 2
    if end == "promote":
        cache.promote(kept)
        assert index.get("kept") == kept
        assert list(index) == ["kept"]
    elif end == "evict":
        grow(cache, root, *[3] * 6)
        assert len(index) == 1
    index.clear()
    index.check()
    assert (len(index), index.handles()) == (0, [])
    assert cache.live() == [root]
    cache.check()


def test_a_manager_goes_on_beside_a_key_whose_hash_changed() -> None:
    cache = made(num_pages=4, grow=False)
    manager = KVCacheManager(cache, 1)
    key = Changing()
    for name in (key, "other"):
        (seq,) = cache.new()
        grow(cache, seq, 1)
        manager.set_recur_cache(name, seq)
    key.number = 2
    (seq,) = cache.new()
    grow(cache, seq, *[2] * 6)
    manager.clear_all()
    manager.check()
    assert cache.live() == [seq]


class Slow:
    """Holds a cache inside a reader on another thread until it is told to go on."""

    def __init__(self, cache: PagedKVCache) -> None:
        self.inside = threading.Event()
        self.go_on = threading.Event()
        self.thread = threading.Thread(target=cache.look, args=(self.wait,))
        self.thread.start()
        self.inside.wait()

    def wait(self, tables: object) -> None:
        self.inside.set()
        self.go_on.wait()

    def end(self) -> None:
        self.go_on.set()
        self.thread.join()


def test_a_scope_ends_while_another_thread_is_inside() -> None:
    cache = made()
    with pytest.raises(KeyError, match="mine"), cache.scope():
        cache.new(3)
        slow = Slow(cache)
        raise KeyError("mine")
    slow.end()
    assert cache.new(0) == []  # put off until here at the latest
    assert cache.live() == []


def running(cache: PagedKVCache) -> Iterator[Callable[[], object]]:
    yield lambda: cache.pages_in_use
    yield lambda: cache.stats


def test_figures_are_read_at_any_time() -> None:
    cache = made()
    cache.new(2)
    slow = Slow(cache)
    for figure in running(cache):
        figure()
    slow.end()
