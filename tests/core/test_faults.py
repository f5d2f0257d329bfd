"""A verb that fails changes nothing: not where any operation on tensors fails, not where a key of a
caller does.

And random verbs on tiny pools, any of them broken off or meddled with, beside a dense model: see
`random_walk`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch
from every_verb import BY_NAME, tree
from garden import collecting, heard
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from interrupts import Fault, Shot, Trial, faulted
from random_walk import (
    RULES,
    Draw,
    Perform,
    Walk,
    collecting_at,
    failing,
    interrupting,
    plainly,
)

from paged_kv import CacheIndex, Gathered

BYTECODES = 1500  # of the longest verbs, about


@pytest.fixture(autouse=True, scope="module")
def calm() -> Iterator[None]:
    """The collector runs where a test lets it; errors in finalizers that are broken off are not
    shown.
    """
    faulted(lambda: torch.zeros(1), 1)  # loads what torch needs for it
    with heard([]), collecting(0):
        yield


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", BY_NAME)
def test_a_fault_of_any_operation_on_tensors_changes_nothing(name: str, after: bool) -> None:
    trial = Trial(BY_NAME[name])
    assert not all(trial.fault(at, after) for at in range(1, 200))


@pytest.mark.once
@pytest.mark.parametrize("name", BY_NAME)
def test_a_stack_that_is_full_leaves_before_or_after(name: str) -> None:
    trial = Trial(BY_NAME[name])
    room = range(1 + list(BY_NAME).index(name) % 3, 200, 3)
    assert not all(trial.cramp(frames) for frames in room)


def test_an_operation_fails_where_it_was_asked_for() -> None:
    def gather_until(at: int) -> Shot:
        world = tree()
        return faulted(lambda: world.cache.gather(world.of("a")), at)

    done = gather_until(1000)
    assert done.steps > 3
    assert not done.fired
    assert isinstance(done.outcome, Gathered)
    for at in (1, done.steps):
        shot = gather_until(at)
        assert (shot.fired, shot.steps, shot.outcome) == (True, at, None)


# -- keys


class Moody:
    """A key that raises when it is hashed or compared for the n-th time. All have one hash, so they
    are compared.
    """

    calls = count()
    bad = -1

    def __init__(self, name: str) -> None:
        self.name = name

    def __hash__(self) -> int:
        self.mind()
        return 1

    def __eq__(self, other: object) -> bool:
        self.mind()
        return isinstance(other, Moody) and other.name == self.name

    def __str__(self) -> str:
        return self.name

    @classmethod
    def mind(cls) -> None:
        """Raise, if it is time to."""
        if next(cls.calls) == cls.bad:
            raise Fault("a key")

    @classmethod
    def begin(cls, bad: int) -> None:
        """Count from here."""
        cls.calls = count()
        cls.bad = bad


def moody_index() -> tuple[CacheIndex, list[Moody], list[int]]:
    """An index with three entries under such keys, two more keys, and sequences for them."""
    Moody.begin(-1)
    world = tree()
    keys = [Moody(name) for name in "pqrst"]
    index = CacheIndex(world.cache, "lru", 3)
    index.put_batch(keys[:3], world.of("a", "b", "z"))
    return index, keys, world.cache.new(2)


def held(index: CacheIndex) -> list[tuple[str, int]]:
    """What an index holds, the first to evict first, and how many tokens."""
    Moody.begin(-1)
    index.check()
    cache: Any = index.cache
    cache.check()
    tokens = dict(zip(map(str, index), cache.lengths(index.handles())))
    return [(str(key), tokens[str(key)]) for key in index.victims()]


CALLS: dict[str, Any] = {
    "put": lambda index, keys, seqs: index.put(keys[3], seqs[0]),
    "put in place": lambda index, keys, seqs: index.put(keys[1], seqs[0]),
    "put all": lambda index, keys, seqs: index.put_batch(keys[3:], seqs),
    "get": lambda index, keys, seqs: index.get(keys[0]),
    "remove": lambda index, keys, seqs: index.remove(keys[1]),
    "clear": lambda index, keys, seqs: index.clear(),
    "reclaim": lambda index, keys, seqs: index.reclaim(1),
}


ASKED = 30  # more than any of the calls asks its keys


@pytest.mark.parametrize("name", CALLS)
def test_an_error_of_a_key_leaves_before_or_after(name: str) -> None:
    index, keys, seqs = moody_index()
    before = held(index)
    CALLS[name](index, keys, seqs)
    after = held(index)
    failed = 0
    for bad in range(ASKED):
        index, keys, seqs = moody_index()
        Moody.begin(bad)
        try:
            CALLS[name](index, keys, seqs)
        except Fault:
            failed += 1
            assert held(index) in (before, after)
        else:
            assert held(index) == after
    # Clearing asks no key; a policy that fails while it is walked is made anew.
    assert failed or name in ("clear", "reclaim")


# -- random verbs


def draw_injection(draw: Draw) -> Perform:
    """What happens within a call: mostly an interrupt, at times nothing."""
    kind = draw(0, 9)
    if kind < 5:
        return interrupting(draw(1, BYTECODES))
    if kind == 5:
        return failing(draw(1, 12), bool(draw(0, 1)))
    if kind < 8:
        return collecting_at(draw(1, BYTECODES), in_thread=kind == 7)
    return plainly


class WalkMachine(RuleBasedStateMachine):
    """A walk whose steps hypothesis chooses."""

    walk: Walk

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.walk = Walk(lambda low, high: data.draw(st.integers(low, high)))

    @rule(data=st.data(), name=st.sampled_from(RULES))
    def act(self, data: st.DataObject, name: str) -> None:
        def draw(low: int, high: int) -> int:
            return data.draw(st.integers(low, high))

        self.walk.grow(draw)
        self.walk.perform = draw_injection(draw)
        getattr(self.walk, name)(draw)

    def teardown(self) -> None:
        if hasattr(self, "walk"):
            self.walk.finish()
            del self.walk
        gc.collect()


@pytest.mark.once
def test_random_verbs_that_are_broken_off_leave_before_or_after() -> None:
    run_state_machine_as_test(
        WalkMachine, settings=settings(max_examples=60, stateful_step_count=40)
    )
