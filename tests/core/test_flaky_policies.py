"""A policy that fails at any of its hooks leaves an index as before or as after, and in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any

import pytest
from flaky_policies import Boom, Flaky, Stop, Trap
from small_caches import filled, tiny_cache

from paged_kv import CacheIndex
from paged_kv.eviction import FIFO, EntryView

HOOKS = 60  # more than any of these calls has
LAST = float("inf")  # the priority of who goes last


class Scene:
    """A full index whose first entries have sequences below them: "a" one, "b" two; "e" had one
    until now. They were passed over already: "x" went for "e".
    """

    def __init__(self, policy: str) -> None:
        self.trap = Trap()
        self.others = count()
        self.cache = tiny_cache(32)
        self.made = 0
        self.index = CacheIndex(self.cache, partial(self.make, policy), max_entries=5)
        seqs = filled(self.cache, *[2] * 7)
        for key, seq, priority in zip("abcxd", seqs, (1, 2, 3, 0, 4)):
            self.index.put(key, seq, priority)
        self.below = self.cache.fork([seqs[0], seqs[1], seqs[1], seqs[2]])
        self.index.put("e", seqs[5], 5)
        self.cache.release(self.below[3:])
        self.fresh = filled(self.cache, 2, 2)

    def make(self, policy: str) -> Flaky:
        self.made += 1
        return Flaky(policy, self.trap)

    def held(self) -> dict[Any, int]:
        """The entries, with the places of their sequences among those that live."""
        places = {seq: place for place, seq in enumerate(self.cache.live())}
        return {key: places[seq] for key, seq in zip(self.index, self.index.handles())}

    def look(self) -> tuple[Any, ...]:
        """All that can be seen; at last each entry goes, so that the order comes to light."""
        self.trap.left = []
        self.index.check()
        self.cache.check()
        stats = self.index.stats
        held = self.held()
        victims = self.index.victims()
        first = self.going(2)
        self.cache.release(self.below, missing_ok=True)
        last = self.going(10)
        assert not self.trap.misuse
        return stats, held, victims, first, last

    def going(self, count: int) -> list[Any]:
        """The letters that go in turn for so many others."""
        gone = []
        for _ in range(count):
            keys = [key for key in self.index if isinstance(key, str)]
            self.index.put(next(self.others), self.cache.new(1)[0], LAST)
            self.index.check()
            gone += [key for key in keys if key not in self.index]
        return gone


# The last of each is the call.
CALLS: dict[str, Sequence[Callable[[Scene], object]]] = {
    "get": [lambda s: s.index.get("c")],
    "get an inner one": [lambda s: s.index.get("a")],
    "put": [lambda s: s.index.put("f", s.fresh[0], 3.5)],
    "put in place": [lambda s: s.index.put("c", s.fresh[0])],
    "put in place of an inner one": [lambda s: s.index.put("a", s.fresh[0])],
    "put two": [lambda s: s.index.put_batch(["f", "g"], s.fresh)],
    "put two under one key": [lambda s: s.index.put_batch(["f", "f"], s.fresh)],
    "remove": [lambda s: s.index.remove("c")],
    "remove an inner one": [lambda s: s.index.remove("a")],
    "priorities": [lambda s: s.index.set_priorities(["c", "a", "d"], [5, 9, -1])],
    "clear": [lambda s: s.index.clear()],
    "reclaim": [lambda s: s.index.reclaim(2)],
    "reclaim inner ones": [lambda s: s.index.pin("d"), lambda s: s.index.reclaim(2)],
    "put where all leaves are pinned": [
        lambda s: [s.index.pin(key) for key in "cde"],
        lambda s: s.index.put("f", s.fresh[0]),
    ],
    "after a subtree": [
        lambda s: s.cache.release_subtree(s.index.handles()[1]),
        lambda s: s.index.get("c"),
    ],
    "put after a subtree": [
        lambda s: s.cache.release_subtree(s.index.handles()[1]),
        lambda s: s.index.put("f", s.fresh[0]),
    ],
    "wake two": [lambda s: s.cache.release(s.below[:2]), lambda s: s.index.reclaim(1)],
}


def prepared(name: str, policy: str) -> Scene:
    """A scene right before the call."""
    scene = Scene(policy)
    for act in CALLS[name][:-1]:
        act(scene)
    return scene


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("policy", ["lru", "priority"])
@pytest.mark.parametrize("name", CALLS)
def test_a_failing_hook_leaves_before_or_after(name: str, policy: str, late: bool) -> None:
    before = prepared(name, policy).look()
    whole = prepared(name, policy)
    CALLS[name][-1](whole)
    after = whole.look()
    for at in range(HOOKS):
        scene = prepared(name, policy)
        scene.trap.left = [at]
        scene.trap.late = late
        scene.trap.kind = kind = (Boom, Stop)[(at + late) % 2]
        try:
            CALLS[name][-1](scene)
        except kind:
            again = scene.trap
            again.left = [at % 3]  # the order is made anew, and that fails as well
            with suppress(kind):
                scene.index.victims()
            assert scene.look() in (before, after), at
        else:
            fired = not scene.trap.left
            assert scene.look() == after, at
            if not fired:
                break
    assert 0 < at < HOOKS - 1 or name == "clear"


@pytest.mark.parametrize("name", CALLS)
def test_the_order_is_made_anew_before_it_is_told_of_more(name: str) -> None:
    whole = prepared(name, "lru")
    CALLS[name][-1](whole)
    scene = prepared(name, "lru")
    scene.trap.left = [0]
    scene.trap.kind = Stop
    with pytest.raises(Stop):
        scene.index.get("c")
    CALLS[name][-1](scene)
    assert scene.look() == whole.look()


@pytest.mark.parametrize("name", CALLS)
def test_an_order_that_was_told_of_all_is_not_made_anew(name: str) -> None:
    """Two policies are made, one of them for inner entries; and two when all are gone."""
    scene = prepared(name, "lru")
    CALLS[name][-1](scene)
    scene.going(2)
    assert scene.made == (4 if name == "clear" else 2)


def test_the_order_is_made_anew_once() -> None:
    scene = Scene("lru")
    index = scene.index
    scene.trap.left = [0]
    with pytest.raises(Boom):
        index.get("c")
    failed = index.policy
    index.victims()
    policy = index.policy
    assert policy is not failed
    index.get("a")
    index.set_priorities(["a", "c"], [1, 2])
    index.put("f", scene.fresh[0])  # passes over "b"
    for key in list(index):
        index.pin(key)
    scene.cache.release(scene.below[1:3])
    assert not index.reclaim(1)  # and looks at it again
    index.victims()
    for key in list(index):
        index.unpin(key)
    scene.cache.release(scene.below[:1])
    index.put("g", scene.fresh[1])
    scene.cache.release_subtree(index.handles()[0])
    index.get("g")
    assert index.policy is policy


class Telling(FIFO):
    """Keeps what it is told, and fails at a hit of "c"."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def on_add(self, entry: EntryView) -> None:
        super().on_add(entry)
        self.told.append(f"add {entry.key}")

    def on_hit(self, entry: EntryView) -> None:
        if entry.key == "c":
            raise Boom
        self.told.append(f"hit {entry.key}")


def test_a_policy_that_is_made_anew_is_told_of_additions_and_last_hits_as_they_came() -> None:
    cache = tiny_cache()
    index = CacheIndex(cache, Telling)
    index.put_batch(["a", "b"], cache.new(2))
    for key in "bba":
        index.get(key)
    index.put("c", cache.new(1)[0])
    index.get("b")
    first = index.policy
    with pytest.raises(Boom):
        index.get("c")
    index.get("b")
    second = index.policy
    assert isinstance(first, Telling)
    assert isinstance(second, Telling)
    assert first.told == ["add a", "add b", "hit b", "hit b", "hit a", "add c", "hit b"]
    assert second.told == ["add a", "add b", "hit a", "add c", "hit b", "hit b"]


# -- entries that were passed over


def test_a_hit_counts_for_an_entry_that_was_passed_over() -> None:
    scene = Scene("lru")
    scene.index.get("a")
    scene.cache.release(scene.below[:3])
    assert scene.going(10) == ["b", "c", "d", "e", "a"]


def test_priorities_are_told_to_whichever_policy_has_the_entry() -> None:
    scene = Scene("priority")
    scene.index.set_priorities(["c", "a"], [LAST, 4.5])
    scene.cache.release(scene.below[:3])
    assert scene.going(10) == ["b", "d", "a", "e", "c"]


def test_whoever_waits_is_woken_though_another_one_went_meanwhile() -> None:
    scene = Scene("fifo")
    scene.index.remove("a")
    scene.cache.release(scene.below[:1])
    scene.cache.release(scene.below[1:3])
    assert scene.going(10) == ["b", "c", "d", "e"]


def test_whoever_waits_for_two_is_passed_over_until_both_have_ended() -> None:
    scene = Scene("fifo")
    scene.cache.release(scene.below[2:3])
    scene.cache.release(scene.below[:1])
    assert scene.going(2) == ["a", "c"]
    scene.cache.release(scene.below[1:2])
    assert scene.going(10) == ["b", "d", "e"]
