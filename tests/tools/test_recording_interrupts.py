"""Ctrl-C anywhere while a cache is recorded: the cache is before or after, the recording right."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache, partial
from inspect import CO_GENERATOR
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from interrupts import NEVER, Place, Places, interrupted
from recording_tools import (
    Memory,
    agrees,
    complete,
    filled,
    in_memory,
    made,
    opened,
    references,
    tokens,
    totals,
    unheard,
)

from paged_kv import CacheIndex, PagedKVCache, Step
from paged_kv.errors import PagedKVError
from paged_kv.events import Event
from paged_kv.pages.allocator import PageAllocator
from paged_kv.recording import Recorder, read_recording, record
from paged_kv.recording.mirror import Mirror

pytestmark = pytest.mark.once
# Every so many bytecodes: of those that were met in no scene before, and of those that were.
FRESH = 8
STRIDE = 331

# -- half-way


def half_done(counted: Callable[..., Any]) -> Callable[..., Any]:
    """Of the pages that it is given it counts one; then comes Ctrl-C."""

    def interrupted(pages: PageAllocator, changed: Iterable[int]) -> None:
        counted(pages, list(changed)[:1])
        raise KeyboardInterrupt

    return interrupted


CUT: dict[str, tuple[str, Callable[[PagedKVCache, list[int]], object]]] = {
    "fork": ("hold", lambda cache, seqs: cache.fork(seqs)),
    "append": ("hold", lambda cache, seqs: cache.append(seqs, *tokens(3, 3))),
    "open": ("hold", lambda cache, seqs: cache.open(seqs, 3)),
    "commit": ("drop", lambda cache, seqs: opened(cache, seqs, 4, 1).commit(slide=2)),
    "close": ("drop", lambda cache, seqs: cache.open(seqs, 3).close()),
    "slide": ("drop", lambda cache, seqs: cache.slide(seqs, 2)),
    "release": ("drop", lambda cache, seqs: cache.release(seqs[1:])),
    "all are released": ("drop", lambda cache, seqs: cache.release(seqs)),
    "put": (
        "drop",
        lambda cache, seqs: CacheIndex(cache, max_entries=1).put_batch(["a", "b", "c"], seqs),
    ),
}


@pytest.mark.parametrize("cut", CUT)
def test_a_verb_that_is_interrupted_half_way(
    cut: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    counting, call = CUT[cut]
    cache = made()
    file = Memory()
    with in_memory(cache, file) as recorder:
        seqs = filled(cache, 3)
        with monkeypatch.context() as patched:
            patched.setattr(PageAllocator, counting, half_done(getattr(PageAllocator, counting)))
            with pytest.raises(KeyboardInterrupt):
                call(cache, seqs)
        agrees(cache, recorder, file)
        filled(cache, 2)
        cache.release(cache.live()[-1:])
        agrees(cache, recorder, file)
    (tmp_path / "run.jsonl").write_bytes(file.data)
    found = read_recording(tmp_path / "run.jsonl")
    assert totals(found.events, "count")["recover"] == 1
    complete(cache, found)
    cache.check()


def test_a_trim_that_is_interrupted_half_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Pages that moved live on."""

    def interrupted(pages: PageAllocator, *args: object) -> None:
        raise KeyboardInterrupt

    cache = made()
    file = Memory()
    with in_memory(cache, file) as recorder:
        first, second = filled(cache, 2)
        step = cache.open([second], 3)
        cache.release([first])
        with monkeypatch.context() as patched:
            patched.setattr(PageAllocator, "rebuild", interrupted)
            with pytest.raises(KeyboardInterrupt):
                cache.trim()
        agrees(cache, recorder, file)
        assert cache.pages_reserved == cache.pages_in_use == 4
        step.close()
    (tmp_path / "run.jsonl").write_bytes(file.data)
    found = read_recording(tmp_path / "run.jsonl")
    complete(cache, found)
    assert sum(found.lives[-1]["counts"]) == cache.stats.freed_pages == 4


def test_an_interrupt_right_before_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = made()
    with pytest.raises(KeyboardInterrupt), record(cache, tmp_path / "run.jsonl", interval=1000.0):
        seqs = filled(cache, 3)
        monkeypatch.setattr(PageAllocator, "hold", half_done(PageAllocator.hold))
        cache.append(seqs, *tokens(3, 3))
    found = read_recording(tmp_path / "run.jsonl")
    assert found.reason == "KeyboardInterrupt"
    assert found.samples[-1]["bytes_in_use"] == cache.bytes_in_use == 12 * cache.page_bytes
    assert unheard(cache)
    complete(cache, found)


def test_an_interrupt_between_a_change_and_the_word_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    cache = made()
    file = Memory()
    with in_memory(cache, file) as recorder:
        (seq,) = filled(cache)
        with monkeypatch.context() as patched:
            patched.setattr(Mirror, "note", interrupted)
            with pytest.raises(KeyboardInterrupt):
                cache.truncate([seq], 1)  # no page comes or goes
        agrees(cache, recorder, file)
        cache.slide([seq], 2)
        agrees(cache, recorder, file)
    assert totals(file.lines("event"), "count")["recover"] == 1


def test_a_step_that_came_and_went_unheard(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many pages are in use as before, and nothing else changed: only pages were taken."""

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    cache = made()
    file = Memory()
    with in_memory(cache, file) as recorder:
        (seq,) = filled(cache)
        with monkeypatch.context() as patched:
            patched.setattr(Mirror, "note", interrupted)
            with pytest.raises(KeyboardInterrupt):
                cache.open([seq], 4)
            with suppress(KeyboardInterrupt):
                cache.settle()  # the step was dropped
        assert cache.open_steps == 0
        agrees(cache, recorder, file)
    assert totals(file.lines("event"), "count")["recover"] == 1


# -- before any bytecode of a recorded call


class World:
    """A cache with a tree, an open step and an index, all of it recorded."""

    def __init__(self) -> None:
        self.cache = made(num_pages=16, max_pages=24)
        self.file = Memory()
        self.recording = in_memory(self.cache, self.file)
        self.recorder: Recorder = self.recording.__enter__()
        self.index = CacheIndex(self.cache, max_entries=2)
        self.cache.set_reclaimer(self.index)
        self.root, gone, *stored = filled(self.cache, 4, 5)
        self.index.put_batch(["a", "b"], stored)
        self.left, self.right = self.cache.fork([self.root] * 2, at=[4, 5])
        self.step = opened(self.cache, [self.left, self.right], 3, 1)
        self.cache.release([gone])

    def end(self) -> None:
        """Stop recording."""
        self.recording.__exit__(None, None, None)

    def shape(self) -> list[Any]:
        """All that a call changes, but for growth. Handles are never given twice."""
        books = self.cache.books
        records = [record[:3] for _, record in books.items()]
        steps = [[record[:3] for record in step.records] for step in books.pending.values()]
        return [records, steps, list(self.index), references(self.cache)]


def put_off(world: World) -> None:
    """A release by a listener, which waits for the verb to end."""

    def release(event: Event) -> None:
        if event.verb == "slide" and not event.failed:
            world.cache.release([world.left], missing_ok=True)

    world.cache.listen(release)
    world.cache.slide([world.root], 1)


SCENES: dict[str, Callable[[World], object]] = {
    "new": lambda w: w.cache.new(2),
    "fork": lambda w: w.cache.fork([w.root, w.left]),
    "append": lambda w: w.cache.append([w.root, w.left], *tokens(2, 2)),
    "append, grow": lambda w: w.cache.append([w.root], *tokens(1, 20)),
    "append, evict": lambda w: w.cache.append([w.root], *tokens(1, 27)),
    "slide": lambda w: w.cache.slide([w.root, w.left], 3),
    "truncate": lambda w: w.cache.truncate([w.root, w.left], 3),
    "gather": lambda w: w.cache.gather([w.root, w.left]),
    "release": lambda w: w.cache.release([w.root]),
    "release most": lambda w: w.cache.release([w.root, w.left, w.right]),
    "release subtree": lambda w: w.cache.release_subtree(w.root),
    "promote": lambda w: w.cache.promote(w.left),
    "open": lambda w: w.cache.open([w.root, w.left], 3).commit(),
    "commit": lambda w: w.step.commit(slide=2),
    "close": lambda w: w.step.close(),
    "drop": lambda w: setattr(w, "step", None),
    "trim": lambda w: w.cache.trim(),
    "put": lambda w: w.index.put("c", w.right),
    "clear": lambda w: w.index.clear(),
    "get": lambda w: w.index.get("a"),
    "put off": put_off,
    "snapshot": lambda w: w.recorder.snapshot("now"),
}


def allowed(call: Callable[[World], object]) -> list[list[Any]]:
    """What may be there: before, after each verb, and after all that a call does."""
    world = World()
    found = [world.shape()]
    world.cache.listen(lambda event: found.append(world.shape()))
    call(world)
    found.append(world.shape())
    world.end()
    return found


@cache
def places() -> dict[str, list[int]]:
    """Bytecodes of each scene, by number."""
    seen: set[Place] = set()
    found = {}
    for number, (name, call) in enumerate(SCENES.items(), 1):
        trace = Places()
        world = World()
        trace.run(partial(call, world))
        world.end()
        fresh = sorted(trace.first[place] for place in trace.first.keys() - seen)
        found[name] = sorted({*fresh[::FRESH], *range(number, trace.steps + 1, STRIDE)})
        seen |= trace.first.keys()
    return found


@pytest.mark.parametrize("name", SCENES)
def test_an_interrupt_anywhere(name: str) -> None:
    call = SCENES[name]
    may_be = allowed(call)
    for at in places()[name]:
        world = World()
        shot = interrupted(partial(call, world), at)  # not all calls have as many bytecodes
        shot.forget()
        world.cache.new(0)  # the next verb finishes what was left
        assert world.shape() in may_be, shot
        world.cache.check()
        agrees(world.cache, world.recorder, world.file)
        filled(world.cache)
        agrees(world.cache, world.recorder, world.file)
        world.end()
        assert all(map(json.loads, world.file.data.splitlines()))


# -- before any call, in a long run


class Interrupt:
    """Ctrl-C as the `after`-th function of this package begins, counted from here."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *error: object) -> None:
        sys.settrace(self.before)

    def _trace(self, frame: FrameType, event: str, value: object) -> None:
        if event != "call" or frame.f_code.co_flags & CO_GENERATOR:
            return  # a generator is called to be closed, too
        if str(frame.f_globals.get("__name__")).startswith("paged_kv"):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt


class Walk:
    """A run of any verbs, on any sequences."""

    def __init__(self, seed: int, **options: Any) -> None:
        self.chance = random.Random(seed)
        self.cache = made(**options)
        self.index = CacheIndex(self.cache, max_entries=3)
        self.cache.set_reclaimer(self.index)
        self.steps: list[Step] = []

    def some(self, most: int = 3) -> list[int]:
        """Some sequences."""
        live = self.cache.live()
        return self.chance.sample(live, min(len(live), self.chance.randint(1, most)))

    def verbs(self) -> list[Callable[[], object]]:
        """All that may be called."""
        cache = self.cache
        index = self.index
        number = self.chance.randint
        key = self.chance.choice("abcd")
        some = self.some()
        return [
            lambda: filled(cache, number(1, 2), number(1, 5)),
            lambda: cache.fork(some, root=number(0, 3) == 0),
            lambda: cache.append(some, *tokens(len(some), number(1, 3))),
            lambda: self.steps.append(opened(cache, some, 3, number(0, 3))),
            lambda: self.steps.pop().commit(slide=number(0, 1)),
            lambda: self.steps.pop(0).commit(),
            lambda: self.steps.pop(0).close(),
            lambda: self.steps.pop(),
            lambda: cache.slide(some, 1),
            lambda: cache.truncate(some, 1),
            lambda: cache.gather(some),
            lambda: cache.release(some),
            lambda: cache.release_subtree(some[0]),
            lambda: cache.promote(some[0]),
            lambda: cache.trim(),
            lambda: index.put(key, some[0]),
            lambda: index.get(key),
            lambda: index.remove(key),
            lambda: index.clear(),
        ]

    def go(self) -> None:
        """One of them."""
        with suppress(PagedKVError, IndexError):
            self.chance.choice(self.verbs())()


@pytest.mark.parametrize("seed", range(30))
def test_interrupts_in_a_long_run(seed: int) -> None:
    """In the cache, in the index or in the recorder: what is recorded next is right again."""
    walk = Walk(seed, num_pages=16, max_pages=32)
    file = Memory()
    with in_memory(walk.cache, file) as recorder:
        for _ in range(60):
            with suppress(KeyboardInterrupt), Interrupt(walk.chance.randint(1, 80)):
                walk.go()
            agrees(walk.cache, recorder, file)
    assert unheard(walk.cache)
    assert all(map(json.loads, file.data.splitlines()))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("interval", [0.0, 1000.0])
def test_a_long_run_is_told_whole(seed: int, interval: float, tmp_path: Path) -> None:
    """Nothing is repaired, every page and every call is counted, peaks are those of the cache."""
    walk = Walk(seed, num_pages=4, max_pages=32)
    path = tmp_path / "run.jsonl"
    heard: list[Event] = []
    walk.cache.listen(heard.append)
    with record(walk.cache, path, interval=interval, budget=None):
        for _ in range(150):
            walk.go()
    found = read_recording(path)
    complete(walk.cache, found)
    done = [event for event in heard if not event.failed]
    calls = totals(found.events, "count")
    for name in ("new", "fork", "append", "slide", "truncate", "gather", "open", "commit", "trim"):
        assert calls[name] == sum(event.verb == name for event in done), name
    assert calls["close"] == sum(event.verb == "close" for event in done)
    ends = ("release", "release_subtree", "promote")
    assert calls["release"] == sum(event.verb in ends for event in done)
    assert calls["recover"] == 0
    sequences = totals(found.events, "sequences")
    born = sequences["new"] + sequences["fork"] + sequences["commit"]
    assert born - sequences["release"] == walk.cache.live_sequences
    stats = walk.cache.stats
    assert (sequences["fork"] + sequences["commit"], calls["grow"]) == (stats.forks, stats.growths)
    assert max(sample["bytes_peak"] for sample in found.samples) == (
        stats.peak_pages * walk.cache.page_bytes
    )


# -- as it begins and as it ends


def test_an_interrupt_as_it_begins_or_ends() -> None:
    """Nobody listens after the next verb, and the cache can be recorded again."""
    cache = made()
    filled(cache, 2)

    def whole() -> None:
        with in_memory(cache, Memory()):
            pass

    steps = interrupted(whole, NEVER).steps
    for at in range(1, steps + 1, 3):
        interrupted(whole, at).forget()
        cache.new(0)
        assert unheard(cache), at
    whole()
