"""Each eviction policy against a list that is sorted again for every question."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from flaky_policies import Boom, Flaky, Trap
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from naive_index import ORDERS, Entry
from small_caches import tiny_cache

from paged_kv.errors import UnknownPolicy
from paged_kv.eviction import ALLOWED, FIFO, LRU, POLICIES, Policy, Priority, make_policy
from paged_kv.index import CacheIndex
from paged_kv.pages import change as paged
from paged_kv.pages.tree import Tree

KEYS = st.integers(0, 5)
PRIORITIES = st.none() | st.sampled_from([-1.0, 0.0, 0.5, 2.0, float("inf"), float("-inf")])


def made(key: Any, priority: float | None, number: int) -> paged.Entry:
    """An entry of no index."""
    return paged.Entry(key, number, priority, number, 0, paged.Home(Tree({})))


def keys(policy: Policy) -> list[Any]:
    """Keys, the first to evict first."""
    return [entry.key for entry in policy.victims()]


class PolicyMachine(RuleBasedStateMachine):
    name = ""

    def __init__(self) -> None:
        super().__init__()
        self.policy: Policy = POLICIES[self.name]()
        self.entries: dict[int, Entry] = {}
        self.told: dict[int, paged.Entry] = {}
        self.clock = 0

    @rule(key=KEYS, priority=PRIORITIES)
    def add(self, key: int, priority: float | None) -> None:
        if key in self.entries:
            self.policy.on_remove(self.told[key])
        self.clock += 1
        self.told[key] = made(key, priority, self.clock)
        self.policy.on_add(self.told[key])
        self.entries[key] = Entry(key, 0, priority or 0.0, self.clock, self.clock)

    @rule(key=KEYS)
    def hit(self, key: int) -> None:
        if key in self.entries:
            self.policy.on_hit(self.told[key])
            self.clock += 1
            self.entries[key].used = self.clock
            self.told[key].used = self.clock

    @rule(key=KEYS, priority=PRIORITIES)
    def prioritize(self, key: int, priority: float | None) -> None:
        if key in self.entries:
            self.policy.on_priority(self.told[key], priority)
            self.told[key].priority = priority
            self.entries[key].priority = priority or 0.0

    @rule(key=KEYS)
    def again(self, key: int) -> None:
        """As one that was taken out for a while."""
        if key in self.entries:
            self.policy.on_remove(self.told[key])
            self.policy.on_add(self.told[key])

    @rule(key=KEYS)
    def remove(self, key: int) -> None:
        if self.entries.pop(key, None) is not None:
            self.policy.on_remove(self.told[key])

    @rule()
    def evict(self) -> None:
        victim = next(self.policy.victims(), None)
        if victim is not None:
            self.policy.on_remove(victim)
            assert isinstance(victim.key, int)
            del self.entries[victim.key]

    @invariant()
    def same_order(self) -> None:
        expected = sorted(self.entries.values(), key=ORDERS[self.name])
        assert keys(self.policy) == [entry.key for entry in expected]


class FIFOMachine(PolicyMachine):
    name = "fifo"


class LRUMachine(PolicyMachine):
    name = "lru"


class PriorityMachine(PolicyMachine):
    name = "priority"


TestFIFO = FIFOMachine.TestCase
TestLRU = LRUMachine.TestCase
TestPriority = PriorityMachine.TestCase
TestFIFO.settings = TestLRU.settings = TestPriority.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)


def test_fifo_ignores_hits() -> None:
    policy = FIFO()
    entries = [made(key, None, number) for number, key in enumerate("ab")]
    for entry in entries:
        policy.on_add(entry)
    policy.on_hit(entries[0])
    assert keys(policy) == ["a", "b"]


def test_lru_moves_hits_to_the_end() -> None:
    policy = LRU()
    entries = [made(key, None, number) for number, key in enumerate("abc")]
    for entry in entries:
        policy.on_add(entry)
    policy.on_hit(entries[0])
    assert keys(policy) == ["b", "c", "a"]


def test_priority_ties_go_by_age_and_keys_are_never_compared() -> None:
    policy = Priority()
    odd = [("x", 1), 3, None, frozenset()]  # no two of them can be compared
    for number, key in enumerate(odd):
        policy.on_add(made(key, 1.0, number))
    policy.on_add(made("low", 0.5, 4))
    policy.on_add(made("none", None, 5))
    assert keys(policy) == ["none", "low", *odd]


def test_another_priority_gives_an_entry_another_place() -> None:
    policy = Priority()
    entries = [made(key, float(number), number) for number, key in enumerate("abc")]
    for entry in entries:
        policy.on_add(entry)
    policy.on_priority(entries[0], 1.5)
    assert keys(policy) == ["b", "a", "c"]
    policy.on_priority(entries[2], None)
    assert keys(policy) == ["c", "b", "a"]
    policy.on_remove(entries[0])
    assert keys(policy) == ["c", "b"]


@pytest.mark.parametrize("name", POLICIES)
def test_finding_the_first_victim_does_not_walk_over_removed_keys(name: str) -> None:
    policy = POLICIES[name]()
    entries = [made(key, None, key) for key in range(20_000)]
    for entry in entries:
        policy.on_add(entry)
    # quadratic, and minutes long, where each victim is searched from the start
    for entry in entries:
        assert next(policy.victims()) is entry
        policy.on_remove(entry)
    assert list(policy.victims()) == []


@pytest.mark.parametrize(
    "module",
    [
        "pages.handles",
        "pages.change",
        "checks",
        "pages.block_tables",
        "turns",
        "scope",
        "eviction",
        "entries",
        "draft",
        "index",
        "manager",
    ],
)
def test_no_tensors_in_here(module: str) -> None:
    code = (
        "import sys, types\n"
        "package = types.ModuleType('paged_kv')\n"
        f"package.__path__ = {__import__('paged_kv').__path__!r}\n"
        "sys.modules['paged_kv'] = package  # the package without its exports\n"
        f"import paged_kv.{module}\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_priorities_of_nothing_leave_an_order_to_be_made_that_was_broken() -> None:
    """A hook failed while entries were put, so the policy holds what the index does not."""
    trap = Trap()
    cache = tiny_cache(8)
    index = CacheIndex(cache, lambda: Flaky("lru", trap))
    index.put_batch(["a", "b"], cache.new(2))
    trap.left = [1]
    with pytest.raises(Boom):
        index.put_batch(["c", "d"], cache.new(2))
    index.set_priorities([], [])
    index.check()
    assert index.victims() == ["a", "b"]


class Needy(FIFO):
    """Cannot be made without an argument."""

    def __init__(self, size: int) -> None:
        super().__init__()


def in_use() -> Policy:
    """A policy that holds an entry already."""
    policy = FIFO()
    policy.on_add(made("a", None, 1))
    return policy


@pytest.mark.parametrize("maker", [Needy, in_use, lambda: FIFO, object])
def test_what_makes_no_fresh_policy_is_named(maker: Any) -> None:
    with pytest.raises(UnknownPolicy) as told:
        make_policy(maker)
    assert told.value.policy is maker
    assert told.value.allowed == ALLOWED


def test_an_error_inside_of_a_policy_is_its_own() -> None:
    def maker() -> Policy:
        return Needy()  # type: ignore[call-arg]

    with pytest.raises(TypeError, match="size"):
        make_policy(maker)
