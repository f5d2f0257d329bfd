"""What a hostile or unlucky program does to a cache, and what must come of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from paged_kv import CacheIndex, KVCacheManager, PagedKVCache, Step
from paged_kv.errors import BadCount, ClosedStep
from paged_kv.events import Event


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


def write(step: Step, number: float) -> None:
    kv = torch.full((len(step.parents), 1, 1, 2), float(number))
    for layer in range(len(step.layers)):
        step.update(layer, kv, kv)


def read(cache: PagedKVCache, seq: int) -> list[float]:
    numbers: list[float] = cache.gather([seq]).keys[0, 0, 0, :, 0].tolist()
    return numbers


def test_a_parent_that_was_cut_and_refilled_is_not_what_was_opened() -> None:
    """Its record is equal to the one that was opened, but for the pages."""
    cache = made()
    (parent,) = cache.new()
    grow(cache, parent, 1, 2, 3)
    step = cache.open([parent], 1)
    cache.truncate([parent], 1)
    grow(cache, parent, 99)
    write(step, 5)
    assert step.then.tolist() == [[0, 1, 2]]
    (child,) = step.commit()
    assert read(cache, child) == [1, 2, 3, 5]
    assert read(cache, parent) == [1, 2, 99]
    cache.check()


def test_a_page_that_is_cut_back_while_a_step_reads_it_is_not_written_to() -> None:
    """The only holder of a page writes on in it; a step is a holder."""
    cache = made(page_size=4)
    (parent,) = cache.new()
    grow(cache, parent, 1, 2, 3)
    with cache.open([parent], 0) as step:
        cache.truncate([parent], 2)
        grow(cache, parent, 9, 9)
        (child,) = step.commit()
    assert read(cache, child) == [1, 2, 3]
    assert read(cache, parent) == [1, 9, 9]
    cache.check()


def test_the_buffer_of_one_step_is_not_that_of_another() -> None:
    cache = made()
    (seq,) = cache.new()
    grow(cache, seq, 1, 1)
    first = cache.open([seq], 1)
    planes = first.planes
    second = cache.open([seq], 1)
    write(second, 22)
    planes[0].fill_(11)
    (child,) = second.commit()
    assert read(cache, child) == [1, 1, 22]
    first.close()
    with pytest.raises(ClosedStep):
        first.layers[0].update(*[torch.ones(1, 1, 1, 2)] * 2)


def test_layers_outlive_their_step_but_hold_it_not() -> None:
    """A layer keeps the room: it can still be written to."""
    cache = made()
    (seq,) = cache.new()
    grow(cache, seq, 1)
    step = cache.open([seq], 2)
    layers = step.layers
    del step
    assert cache.open_steps == 1
    layers[0].update(*[torch.ones(1, 1, 1, 2)] * 2)
    del layers
    assert cache.open_steps == 0
    assert cache.pages_in_use == 1


def test_commit_asks_for_every_layer() -> None:
    cache = made(layers=2)
    (seq,) = cache.new()
    step = cache.open([seq], 1)
    step.update(0, *[torch.ones(1, 1, 1, 2)] * 2)
    with pytest.raises(BadCount, match="the same number in every layer"):
        step.commit()
    assert cache.live() == [seq]
    assert not step.closed


def test_a_reclaimer_may_open_commit_and_close_steps() -> None:
    """It is called between the two tries of an open."""
    cache = made(page_size=1, num_pages=6, grow=False)
    parent, other = cache.new(2)
    grow(cache, parent, 1)
    grow(cache, other, 2)
    steps = [cache.open([other], 2), cache.open([other], 2)]
    write(steps[0], 8)
    made_then: list[int] = []

    class Meddler:
        def reclaim(self, need: int, busy: object) -> bool:
            assert need == 2
            made_then.extend(steps.pop(0).commit())
            steps.pop().close()
            with cache.open([parent], 1):
                return True

        def pinned_pages(self) -> int:
            return 0

    cache.set_reclaimer(Meddler())
    step = cache.open([parent], 2)
    write(step, 7)
    (child,) = step.commit(positions=torch.tensor([[40]]))
    assert read(cache, child) == [1, 7]
    assert cache.gather([child]).positions.tolist() == [[0, 40]]
    assert read(cache, made_then[0]) == [2, 8]
    assert cache.open_steps == 0
    cache.check()


def test_a_step_that_is_given_up_within_a_verb_ends_after_it() -> None:
    cache = made()
    (seq,) = cache.new()
    grow(cache, seq, 1)
    steps = [cache.open([seq], 2), cache.open([seq], 2), cache.open([seq], 2)]

    def read_on(tables: object) -> int:
        steps.pop()
        steps.pop().close()
        return cache.open_steps

    assert cache.look(read_on) == 3, "nothing changes within a verb"
    assert cache.open_steps == 1
    assert not steps[0].closed
    cache.check()


def test_a_step_of_a_cache_that_is_gone_can_be_used() -> None:
    cache = made()
    (seq,) = cache.new()
    step = cache.open([seq], 1)
    del cache
    write(step, 5)
    assert len(step.commit()) == 1


def test_a_listener_may_release_what_is_gone() -> None:
    cache = made()
    first, second = cache.new(2)
    calls: list[str] = []

    def listener(event: Event) -> None:
        calls.append(event.verb)
        cache.release([first], missing_ok=True)

    cache.listen(listener)
    calls.clear()
    grow(cache, second, 1)
    assert cache.live() == [second]
    assert set(calls) == {"append", "release"}  # and what that led to


def test_what_a_listener_does_to_what_it_is_handed_changes_nothing() -> None:
    cache = made()

    def spoil(event: Event) -> None:
        for told in event.told:
            if told is not None:
                for pages in (told.taken, told.freed):
                    if isinstance(pages, list):
                        pages.clear()

    cache.listen(spoil)
    (seq,) = cache.new(1)
    grow(cache, seq, 1, 2, 3)
    step = cache.open([seq], 2)
    write(step, 4)
    (child,) = step.commit()
    assert read(cache, child) == [1, 2, 3, 4]
    cache.check()
    cache.release([seq, child])
    assert cache.pages_in_use == 0
    cache.check()


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
