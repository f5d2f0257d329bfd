"""Each eviction policy against a list that is sorted again for every question."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from naive_index import ORDERS, Entry

from paged_kv.eviction import FIFO, LRU, POLICIES, Policy, Priority

KEYS = st.integers(0, 5)
PRIORITIES = st.none() | st.sampled_from([-1.0, 0.0, 0.5, 2.0, float("inf"), float("-inf")])


class PolicyMachine(RuleBasedStateMachine):
    name = ""

    def __init__(self) -> None:
        super().__init__()
        self.policy: Policy = POLICIES[self.name]()
        self.entries: dict[int, Entry] = {}
        self.clock = 0

    @rule(key=KEYS, priority=PRIORITIES)
    def add(self, key: int, priority: float | None) -> None:
        if key in self.entries:
            self.policy.on_remove(key)
        self.policy.on_add(key, priority)
        self.clock += 1
        self.entries[key] = Entry(key, 0, priority or 0.0, self.clock, self.clock)

    @rule(key=KEYS)
    def hit(self, key: int) -> None:
        if key in self.entries:
            self.policy.on_hit(key)
            self.clock += 1
            self.entries[key].used = self.clock

    @rule(key=KEYS)
    def remove(self, key: int) -> None:
        if self.entries.pop(key, None) is not None:
            self.policy.on_remove(key)

    @rule()
    def evict(self) -> None:
        victim = next(self.policy.victims(), None)
        if victim is not None:
            self.policy.on_remove(victim)
            assert isinstance(victim, int)
            del self.entries[victim]

    @invariant()
    def same_order(self) -> None:
        expected = sorted(self.entries.values(), key=ORDERS[self.name])
        assert list(self.policy.victims()) == [entry.key for entry in expected]


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


def filled(policy: Policy, priorities: dict[str, float | None]) -> Policy:
    for key, priority in priorities.items():
        policy.on_add(key, priority)
    return policy


def test_fifo_ignores_hits() -> None:
    policy = filled(FIFO(), {"a": None, "b": None})
    policy.on_hit("a")
    assert list(policy.victims()) == ["a", "b"]


def test_lru_moves_hits_to_the_end() -> None:
    policy = filled(LRU(), {"a": None, "b": None, "c": None})
    policy.on_hit("a")
    assert list(policy.victims()) == ["b", "c", "a"]


def test_priority_ties_go_by_age_and_keys_are_never_compared() -> None:
    policy = Priority()
    keys = [("x", 1), 3, None, frozenset()]  # no two of them can be compared
    for key in keys:
        policy.on_add(key, 1.0)
    policy.on_add("low", 0.5)
    policy.on_add("none", None)
    assert list(policy.victims()) == ["none", "low", *keys]


@pytest.mark.parametrize("name", POLICIES)
def test_finding_the_first_victim_does_not_walk_over_removed_keys(name: str) -> None:
    policy = POLICIES[name]()
    for key in range(20_000):
        policy.on_add(key, None)
    # quadratic, and minutes long, where each victim is searched from the start
    for key in range(20_000):
        assert next(policy.victims()) == key
        policy.on_remove(key)
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
