"""One call at a time: what is let in while one is running, what waits, and what is refused."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_caches import filled, grow, state, step, tiny_cache
from turn_scenes import AMID, Elsewhere, Scene

import paged_kv.turns
from paged_kv import PagedKVCache, Step, errors
from paged_kv.index import CacheIndex
from paged_kv.pages.allocator import PageAllocator

# -- from inside a call


VERBS = list(Scene().verbs())
READERS = list(Scene().readers())


@pytest.mark.parametrize("name", VERBS)
@pytest.mark.parametrize("verb", AMID)
def test_a_verb_inside_of_a_verb_is_refused_by_name(verb: str, name: str) -> None:
    scene = Scene()
    before = state(scene.index)
    with scene.amid(verb, scene.verbs()[name]) as run, pytest.raises(errors.NestedCall) as caught:
        run()
    assert (caught.value.what, caught.value.running) == (name, verb)
    assert str(caught.value).startswith(
        f"{name}() was called inside of {verb}(), by a finalizer, a signal handler or a call"
    )
    assert state(scene.index) == before
    scene.cache.check()
    scene.index.check()
    run()


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("verb", AMID)
def test_a_reader_inside_of_a_verb_is_let_in(verb: str, name: str) -> None:
    """It finds what was there before the verb."""
    scene = Scene()
    read = scene.readers()[name]
    wanted = read()
    found: list[Any] = []
    with scene.amid(verb, lambda: found.append(read())) as run:
        run()
    assert found == [wanted]
    scene.cache.check()
    scene.index.check()


@pytest.mark.parametrize("verb", AMID)
def test_figures_are_read_at_any_time(verb: str) -> None:
    scene = Scene()
    wanted = scene.figures()
    found: list[Any] = []
    with scene.amid(verb, lambda: found.append(scene.figures())) as run:
        run()
    assert found == [wanted]


@pytest.mark.parametrize("name", READERS)
def test_a_reader_amid_a_change_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The books are half written: a finalizer may come at any bytecode of it."""
    scene = Scene()
    read = scene.readers()[name]
    caught: list[errors.NestedCall] = []
    real = PageAllocator.drop

    def drop(pages: PageAllocator, dropped: Any) -> Any:
        with pytest.raises(errors.NestedCall) as refused:
            read()
        caught.append(refused.value)
        return real(pages, dropped)

    monkeypatch.setattr(PageAllocator, "drop", drop)
    scene.cache.release([scene.two])
    (error,) = caught
    assert (error.what, error.running) == (name.removeprefix("index "), "release")
    scene.cache.check()


def test_a_client_may_call_any_verb_from_rebase() -> None:
    """It is called between two verbs."""
    cache = tiny_cache()
    (seq,) = filled(cache, 3)
    made: list[int] = []

    def rebase(step: Any) -> None:
        made.extend(cache.fork(step.parents))
        grow(cache, made, 1)

    cache.open([seq], 1, rebase=rebase)
    assert cache.lengths(made) == [4]


def test_a_client_may_open_another_step_from_rebase() -> None:
    cache = tiny_cache(12)
    (seq,) = filled(cache, 3)
    made: list[int] = []

    def rebase(outer: Any) -> None:
        made.extend(step(cache, outer.parents, 1))
        assert cache.open_steps == 1

    opened = cache.open([seq], 1, rebase=rebase)
    made += opened.commit()
    assert cache.lengths(made) == [4, 3]
    assert cache.open_steps == 0
    cache.check()


# -- from other threads


@pytest.mark.parametrize("name", [*VERBS, *READERS])
@pytest.mark.parametrize("verb", AMID)
def test_a_second_thread_is_refused_by_name(verb: str, name: str) -> None:
    scene = Scene()
    call = {**scene.verbs(), **scene.readers()}[name]
    before = state(scene.index)
    ended: list[Elsewhere] = []

    def amid() -> None:
        ended.append(Elsewhere(call).end())
        raise RuntimeError("far enough")

    with scene.amid(verb, amid) as run, pytest.raises(RuntimeError, match="far enough"):
        run()
    error = ended[0].error
    assert isinstance(error, errors.ConcurrentCall)
    assert error.what == name.removeprefix("index ")
    assert str(error) == (
        f"{error.what}() was called from a second thread while a call is running: "
        "use one thread, or a lock"
    )
    assert state(scene.index) == before
    scene.cache.check()
    assert Elsewhere(scene.cache.check).end().error is None, "one after the other is fine"


REFUSALS = """
import gc
import sys
import time

sys.path.append(sys.argv[1])
from turn_scenes import Elsewhere, Scene

class Slow:
    def __init__(self):
        self.me = self

    def __del__(self):
        time.sleep(0.0001)  # amid a collection the other thread goes on

def refused():
    scene = Scene()
    ended = []

    def amid():
        ended.append(Elsewhere(scene.cache.new).end())
        raise RuntimeError

    with scene.amid("gather", amid) as run:
        try:
            run()
        except RuntimeError as error:
            scene.error = error  # a cycle with frames in it, for the collector
    return type(ended[0].error).__name__

found = set()
for number in range(300):
    gc.set_threshold(50 + number % 97)
    Slow()
    found.add(refused())
print(found)
"""


def test_the_frames_of_a_thread_are_looked_at_while_the_collector_waits() -> None:
    """In a process of its own: CPython 3.11 may crash where frames are made amid a collection."""
    support = str(Path(__file__).parents[1] / "support")
    command = [sys.executable, "-c", REFUSALS, support]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (out.stdout, out.returncode) == ("{'ConcurrentCall'}\n", 0), out.stderr


def test_a_refusal_leaves_the_collector_as_it_was() -> None:
    for collecting in (True, False):
        scene = Scene()
        try:
            if not collecting:
                gc.disable()
            with scene.amid("gather", scene.cache.new) as run, pytest.raises(errors.NestedCall):
                run()
            assert gc.isenabled() == collecting
        finally:
            gc.enable()


class Held:
    """A release of another thread that is held inside until it may go on."""

    def __init__(self, cache: PagedKVCache, seq: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inside = threading.Event()
        self.go_on = threading.Event()
        self.waiting = threading.Event()  # somebody met it, and waits
        real = cache._pool.tables.release
        sleep = paged_kv.turns.time.sleep

        def release(*args: Any, **options: Any) -> None:
            self.inside.set()
            self.go_on.wait()
            real(*args, **options)

        def pause(seconds: float) -> None:
            self.waiting.set()
            sleep(seconds)

        monkeypatch.setattr(cache._pool.tables, "release", release)
        monkeypatch.setattr(paged_kv.turns, "time", SimpleNamespace(sleep=pause))
        self.release = Elsewhere(lambda: cache.release([seq]))
        self.inside.wait()


@pytest.mark.parametrize(
    "name", ["new", "append", "gather", "get", "clear_all", "lengths", "check"]
)
def test_a_call_that_meets_the_release_of_another_thread_waits_for_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene()
    held = Held(scene.cache, scene.two, monkeypatch)
    call = Elsewhere({**scene.verbs(), **scene.readers()}[name], then=held.waiting.set)
    held.waiting.wait()
    assert (call.ended, call.error) == (False, None)
    assert scene.two in scene.cache.books
    held.go_on.set()
    assert call.end().error is None
    assert held.release.end().error is None
    monkeypatch.undo()
    assert scene.two not in scene.cache.live()
    scene.cache.check()


def test_a_release_that_meets_a_release_is_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    held = Held(scene.cache, scene.two, monkeypatch)
    held.go_on.set()
    scene.cache.release([scene.spare])
    held.release.end()
    monkeypatch.undo()
    assert not {scene.two, scene.spare} & set(scene.cache.live())
    scene.cache.check()


def test_threads_that_release_disturb_nobody() -> None:
    """Nodes are finalized elsewhere while a search runs: no call of either fails, and nothing is
    lost.
    """
    cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2, num_pages=8)
    (root,) = filled(cache, 2)
    index = CacheIndex(cache, max_entries=3)
    dead: list[int] = []
    given_up: list[Step] = []
    done = threading.Event()

    def clean() -> None:
        while not done.is_set() or dead:
            doomed = [dead.pop() for _ in range(len(dead))]
            cache.release(doomed)
            while given_up:
                given_up.pop()

    cleaners = [Elsewhere(clean) for _ in range(2)]
    for number in range(100):
        children = step(cache, [root, root, root], 1)
        assert cache.lengths(children) == [3, 3, 3]
        given_up.append(cache.open(children, 2))
        index.put(number % 5, children[0])
        index.get(0)
        dead += children[1:]
    done.set()
    for cleaner in cleaners:
        assert cleaner.end().error is None
    given_up.clear()
    cache.check()
    index.check()
    assert sorted(cache.live()) == sorted([root, *index.handles()])
    assert cache.open_steps == 0


# -- locks that are left behind


def test_a_lock_that_nobody_holds_is_replaced() -> None:
    """As an interrupt leaves it, between the lock and the first step of a verb."""
    scene = Scene()
    cache = scene.cache
    cache.turns.lock.acquire()
    assert cache.lengths([scene.one]) == [3]
    cache.turns.lock.acquire()
    assert scene.index.get("a") == scene.entry
    cache.turns.lock.acquire()
    cache.release([scene.two])
    assert scene.two not in cache.live()
    cache.turns.lock.acquire()
    assert Elsewhere(cache.new).end().error is None
    cache.check()


def test_two_caches_never_wait_for_each_other() -> None:
    scene = Scene()
    other = Scene()
    with scene.amid("gather", lambda: grow(other.cache, [other.one], 1)) as run:
        run()
    assert other.cache.lengths([other.one]) == [4]
    ended: list[Elsewhere] = []
    with scene.amid("put", lambda: ended.append(Elsewhere(other.cache.new).end())) as run:
        run()
    assert ended[0].error is None
