"""Trees are placed evenly, found again, and moved only where their own worker goes."""

from __future__ import annotations

from collections import Counter
from math import ceil, floor

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paged_kv.errors import BadArgument, BadCount
from paged_kv.integrations.ray.placement import Placement


class PlacementMachine(RuleBasedStateMachine):
    """A directory beside a dictionary of where every tree was said to live."""

    @initialize(workers=st.integers(1, 6), bound=st.sampled_from([1, 1.1, 1.5]))
    def begin(self, workers: int, bound: float) -> None:
        self.placement = Placement(range(workers), bound)
        self.bound = bound
        self.workers = set(range(workers))
        self.homes: dict[int, int] = {}
        self.next = 0
        self.only_opened = True  # nothing was closed or moved, so the bound holds of all

    @rule(count=st.integers(1, 8))
    def open(self, count: int) -> None:
        for _ in range(count):
            self.homes[self.next] = self.placement.open(self.next)
            self.next += 1

    @precondition(lambda self: self.homes)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        tree = data.draw(st.sampled_from(sorted(self.homes)))
        self.placement.close(tree)
        del self.homes[tree]
        self.only_opened = False
        with pytest.raises(BadArgument):
            self.placement.worker(tree)

    @precondition(lambda self: self.homes)
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        tree = data.draw(st.sampled_from(sorted(self.homes)))
        worker = data.draw(st.sampled_from(sorted(self.workers)))
        self.placement.move(tree, worker)
        self.homes[tree] = worker
        self.only_opened = False

    @precondition(lambda self: len(self.workers) > 1)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.workers)))
        own = {tree for tree, home in self.homes.items() if home == worker}
        self.workers.remove(worker)
        moved = self.placement.lose(worker)
        assert moved.keys() == own
        self.homes.update(moved)
        with pytest.raises(BadArgument):
            self.placement.lose(worker)

    @invariant()
    def is_as_told(self) -> None:
        if not hasattr(self, "placement"):
            return
        loads = Counter(self.homes.values())
        assert self.placement.loads() == {worker: loads[worker] for worker in self.workers}
        assert len(self.placement) == len(self.homes)
        for tree, home in self.homes.items():
            assert self.placement.worker(tree) == home
        if self.only_opened and self.homes:
            mean = len(self.homes) / len(self.workers)
            assert max(loads.values()) <= max(floor(self.bound * mean), ceil(mean))


TestPlacement = PlacementMachine.TestCase


@pytest.mark.parametrize("workers", [1, 2, 7, 50, 200])
def test_trees_spread_evenly_and_only_orphans_move(workers: int) -> None:
    trees = 5_000
    placement = Placement(range(workers))
    homes = {tree: placement.open(tree) for tree in range(trees)}
    assert max(placement.loads().values()) <= 1.1 * trees / workers
    again = Placement(range(workers))
    assert {tree: again.open(tree) for tree in range(trees)} == homes
    if workers == 1:
        return
    moved = placement.lose(workers // 2)
    assert moved.keys() == {tree for tree, home in homes.items() if home == workers // 2}
    assert max(placement.loads().values()) <= 1.1 * trees / (workers - 1)


def test_without_need_for_the_bound_a_hash_decides_alone() -> None:
    """A worker more takes its share from all others, and trees move to it alone."""
    few = Placement(range(4), bound=100)
    more = Placement(range(5), bound=100)
    pairs = [(few.open(tree), more.open(tree)) for tree in range(2000)]
    moved = [new for old, new in pairs if old != new]
    assert set(moved) == {4}
    assert 300 < len(moved) < 500


def test_mistakes_are_named() -> None:
    with pytest.raises(BadCount, match="at least 1"):
        Placement([])
    for bound in (0.9, "x", float("nan"), float("inf")):
        with pytest.raises(BadArgument, match="bound"):
            Placement([0], bound)  # type: ignore[arg-type]
    placement = Placement([0])
    placement.open(3)
    with pytest.raises(BadArgument, match="not open"):
        placement.open(3)
    with pytest.raises(BadArgument, match="one of several"):
        placement.lose(0)
    with pytest.raises(BadArgument, match="one of"):
        placement.move(3, 9)
    with pytest.raises(BadCount):
        placement.open(-1)
