"""Release, at any time: amid another call it is put off, and done afterwards."""

from __future__ import annotations

import gc
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from small_caches import filled, tiny_cache
from turn_scenes import AMID, Call, Scene

from paged_kv import PagedKVCache, Step, errors


class Node:
    """Gives its sequence back when it goes."""

    def __init__(self, cache: PagedKVCache, seq: int) -> None:
        self.cache = cache
        self.seq = seq
        self.me: Node | None = None

    def __del__(self) -> None:
        self.cache.release([self.seq])


def by_hand(cache: PagedKVCache, seq: int) -> Call:
    return lambda: cache.release([seq])


def by_del(cache: PagedKVCache, seq: int) -> Call:
    nodes = [Node(cache, seq)]
    return nodes.clear


def by_the_collector(cache: PagedKVCache, seq: int) -> Call:
    node = Node(cache, seq)
    node.me = node
    del node
    return lambda: gc.collect()


def by_weakref(cache: PagedKVCache, seq: int) -> Call:
    nodes = [threading.Event()]
    weakref.finalize(nodes[0], cache.release, [seq])
    return nodes.clear


def by_signal(cache: PagedKVCache, seq: int) -> Call:
    def interrupted() -> None:
        before = signal.signal(signal.SIGINT, lambda number, frame: cache.release([seq]))
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.signal(signal.SIGINT, before)

    return interrupted


def by_thread(cache: PagedKVCache, seq: int) -> Call:
    def elsewhere() -> None:
        thread = threading.Thread(target=cache.release, args=([seq],))
        thread.start()
        thread.join()

    return elsewhere


WAYS: dict[str, Callable[[PagedKVCache, int], Call]] = {
    "by hand": by_hand,
    "by __del__": by_del,
    "by the collector": by_the_collector,
    "by weakref": by_weakref,
    "by a signal handler": by_signal,
    "by another thread": by_thread,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("verb", AMID)
def test_a_release_amid_a_verb_is_put_off_and_done_afterwards(verb: str, way: str) -> None:
    scene = Scene()
    cache = scene.cache
    (doomed,) = filled(cache, 2)
    seen: list[bool] = []
    gc.disable()  # it is to come within the verb
    release = WAYS[way](cache, doomed)

    def amid() -> None:
        release()
        seen.append(doomed in cache.books)
        assert cache.live_sequences == len(cache.books.live()), "figures are read at any time"

    with scene.amid(verb, amid) as run:
        run()
    assert seen == [True], "it was put off"
    assert doomed not in cache.books
    assert not cache.turns.tickets
    with pytest.raises(errors.StaleHandle):
        cache.lengths([doomed])
    cache.check()
    scene.index.check()


def by_close(steps: list[Step]) -> None:
    steps[0].close()


def by_drop(steps: list[Step]) -> None:
    steps.clear()


def by_block(steps: list[Step]) -> None:
    with steps.pop():
        pass


def by_cycle(steps: list[Step]) -> None:
    step: Any = steps.pop()
    step.itself = step
    del step
    gc.collect()


def by_other_thread(steps: list[Step]) -> None:
    thread = threading.Thread(target=steps.clear)
    thread.start()
    thread.join()


@pytest.mark.parametrize("end", [by_close, by_drop, by_block, by_cycle, by_other_thread])
@pytest.mark.parametrize("verb", AMID)
def test_a_step_that_is_given_up_amid_a_verb_ends_afterwards(
    verb: str, end: Callable[[list[Step]], None]
) -> None:
    scene = Scene()
    cache = scene.cache
    gc.disable()  # it is to come within the verb
    used = cache.pages_in_use
    steps = [cache.open([scene.one, scene.two], 3)]
    held = cache.pages_in_use - used
    before = cache.open_steps
    seen: list[bool] = []

    def amid() -> None:
        end(steps)
        seen.append(cache.open_steps == before)

    with scene.amid(verb, amid) as run:
        kept = run()
    assert seen == [True], "it was put off"
    steps.clear()
    made = isinstance(kept, Step)
    assert cache.open_steps == before - 1 + made - (verb == "commit")
    assert not cache.turns.tickets
    assert held > 0
    cache.check()
    scene.index.check()


def test_a_release_amid_a_release_is_done_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tiny_cache()
    first, second, third = filled(cache, 1, 1, 1)
    real = cache._pool.tables.release
    left = [[second], [third]]

    def nested(seqs: list[int], **options: Any) -> None:
        if left:
            cache.release(left.pop(0))
        real(seqs, **options)

    monkeypatch.setattr(cache._pool.tables, "release", nested)
    cache.release([first])
    assert cache.live() == []
    assert cache.pages_in_use == 0


def test_a_release_is_done_although_the_verb_around_it_fails() -> None:
    scene = Scene()
    cache = scene.cache

    def amid() -> None:
        cache.release([scene.two])
        raise RuntimeError("no memory today")

    with scene.amid("gather", amid) as run, pytest.raises(RuntimeError, match="no memory"):
        run()
    assert scene.two not in cache.live(), "the next call does it first, whatever it is"
    cache.check()


def test_what_is_wrong_with_a_release_that_was_put_off_goes_to_the_hook(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each by itself: those before and after it are done."""
    scene = Scene()
    cache = scene.cache
    heard: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: heard.append(told.exc_value))
    (gone,) = cache.new()
    cache.release([gone])
    good = cache.new(4)
    (foreign,) = tiny_cache().new()

    def amid() -> None:
        cache.release(good[:1])
        cache.release([gone])
        cache.release([good[1], foreign])
        cache.release([good[1], good[1]])
        cache.release([scene.entry])
        cache.release([gone, *good[:3]], missing_ok=True)
        cache.release(good[3:])
        assert heard == []

    with scene.amid("put", amid) as run:
        run()
    assert [type(error) for error in heard] == [
        errors.StaleHandle,
        errors.ForeignHandle,
        errors.DuplicateSequence,
        errors.OwnedSequence,
    ]
    assert not set(good) & set(cache.live())
    assert not cache.turns.tickets
    cache.check()
    scene.index.check()


def test_what_is_no_list_is_refused_at_once() -> None:
    """Also amid a verb: the caller is there to hear it."""
    scene = Scene()
    release = lambda: scene.cache.release("ab")  # type: ignore[arg-type]  # noqa: E731
    words = "seqs is 'ab', allowed is a list of sequences"
    with scene.amid("gather", release) as run, pytest.raises(errors.BadArgument, match=words):
        run()
    assert not scene.cache.turns.tickets
