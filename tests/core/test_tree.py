"""Who hangs below whom, against a tree that never forgets; and what it costs to keep."""

from __future__ import annotations

import copy
import gc
import sys
import tracemalloc
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from interrupts import traced
from small_caches import grow

from paged_kv import PagedKVCache, Step
from paged_kv.errors import ForeignHandle, StaleHandle

PICK = st.integers(0, 1000)
PICKS = st.lists(PICK, min_size=1, max_size=4)
MOST = 24  # live sequences


def made(page_size: int = 2) -> PagedKVCache:
    return PagedKVCache(layers=1, heads=1, head_size=2, page_size=page_size, num_pages=8)


def fill(cache: PagedKVCache, step: Step, count: int) -> list[int]:
    """Commit a step with `count` tokens."""
    kv = torch.zeros(len(step.parents), 1, count, 2, device=cache.device)
    step.update(0, kv, kv)
    return step.commit()


class Family:
    """All sequences that ever were, with the parents they were born with; those that are gone are
    looked through.
    """

    def __init__(self) -> None:
        self.born: dict[int, int | None] = {}
        self.live: list[int] = []

    def make(self, seqs: list[int], parents: list[int | None]) -> None:
        self.born.update(zip(seqs, parents, strict=True))
        self.live += seqs

    def end(self, seqs: list[int]) -> None:
        self.live = [seq for seq in self.live if seq not in seqs]

    def line(self, seq: int) -> list[int]:
        """All above, the nearest first."""
        found = []
        above = self.born[seq]
        while above is not None:
            found.append(above)
            above = self.born[above]
        return found

    def parent(self, seq: int) -> int | None:
        return next((above for above in self.line(seq) if above in self.live), None)

    def children(self, seq: int) -> list[int]:
        return [other for other in self.live if self.parent(other) == seq]

    def below(self, seq: int) -> list[int]:
        return [other for other in self.live if seq in self.line(other)]

    def rivals(self, seq: int) -> list[int]:
        """What `promote` ends."""
        top = self.parent(seq)
        if top is None:
            top = [seq, *self.line(seq)][-1]
        return [other for other in self.below(top) if other != seq and seq not in self.line(other)]

    def leaves(self) -> int:
        return sum(not self.below(seq) for seq in self.live)

    def forks(self) -> set[int]:
        """Those that are gone and still hold two living branches together."""
        branches: dict[int, set[int]] = {}
        for seq in self.live:
            way = [seq, *self.line(seq)]
            for below, above in pairwise(way):
                branches.setdefault(above, set()).add(below)
        return {seq for seq, its in branches.items() if len(its) > 1 and seq not in self.live}


class TreeMachine(RuleBasedStateMachine):
    """The tree of a cache beside a `Family`."""

    @initialize(page_size=st.integers(1, 3))
    def start(self, page_size: int) -> None:
        self.cache = made(page_size)
        self.family = Family()
        self.steps: list[Step] = []
        self.gone: list[int] = []

    def pick(self, numbers: list[int]) -> list[int]:
        """Live sequences, some more than once."""
        live = self.family.live
        return [live[number % len(live)] for number in numbers] if live else []

    def distinct(self, numbers: list[int]) -> list[int]:
        return list(dict.fromkeys(self.pick(numbers)))

    def roomy(self) -> bool:
        return len(self.family.live) < MOST

    def end(self, seqs: list[int]) -> None:
        self.family.end(seqs)
        self.gone += seqs

    @rule(count=st.integers(1, 2))
    @precondition(roomy)
    def new(self, count: int) -> None:
        self.family.make(self.cache.new(count), [None] * count)

    @rule(numbers=PICKS, root=st.booleans())
    @precondition(roomy)
    def fork(self, numbers: list[int], root: bool) -> None:
        parents = self.pick(numbers)
        children = self.cache.fork(parents, root=root)
        self.family.make(children, [None if root else seq for seq in parents])

    @rule(numbers=PICKS)
    @precondition(roomy)
    def fan(self, numbers: list[int]) -> None:
        """Many children of one parent, among them grandchildren."""
        for seq in self.distinct(numbers)[:1]:
            children = self.cache.fork([seq] * 3)
            self.family.make(children, [seq] * 3)
            self.family.make(self.cache.fork(children[:2]), list(children[:2]))

    @rule(numbers=PICKS, count=st.integers(0, 3))
    def append(self, numbers: list[int], count: int) -> None:
        grow(self.cache, self.distinct(numbers), count)

    @rule(numbers=PICKS)
    @precondition(roomy)
    def step(self, numbers: list[int]) -> None:
        parents = self.pick(numbers)
        if parents:
            step = self.cache.open(parents, 1)
            self.family.make(fill(self.cache, step, 1), list(parents))

    @rule(numbers=PICKS)
    @precondition(lambda self: len(self.steps) < 2)
    def open(self, numbers: list[int]) -> None:
        parents = self.pick(numbers)
        if parents:
            self.steps.append(self.cache.open(parents, 1))

    @rule(number=PICK, keep=st.booleans())
    @precondition(lambda self: self.steps)
    def close(self, number: int, keep: bool) -> None:
        step = self.steps.pop(number % len(self.steps))
        if keep:
            self.family.make(fill(self.cache, step, 1), list(step.parents))
        else:
            step.close()

    @rule(numbers=st.lists(PICK, min_size=1, max_size=12))
    def release(self, numbers: list[int]) -> None:
        seqs = self.distinct(numbers)
        self.cache.release(seqs)
        self.end(seqs)

    @rule(number=PICK)
    @precondition(lambda self: self.family.live)
    def release_inner(self, number: int) -> None:
        """One that something hangs on, if there is any: so joints come to be."""
        inner = [seq for seq in self.family.live if self.family.below(seq)]
        if inner:
            seq = inner[number % len(inner)]
            self.cache.release([seq])
            self.end([seq])

    @rule(number=PICK)
    @precondition(lambda self: self.family.live)
    def release_subtree(self, number: int) -> None:
        (seq,) = self.pick([number])
        doomed = [seq, *self.family.below(seq)]
        assert self.cache.release_subtree(seq) == len(doomed)
        self.end(doomed)

    @rule(number=PICK)
    @precondition(lambda self: self.family.live)
    def promote(self, number: int) -> None:
        (seq,) = self.pick([number])
        doomed = self.family.rivals(seq)
        assert self.cache.promote(seq) == len(doomed)
        self.end(doomed)

    @rule(number=PICK)
    @precondition(lambda self: self.gone)
    def ask_of_the_dead(self, number: int) -> None:
        seq = self.gone[number % len(self.gone)]
        cache = self.cache
        for ask in (cache.parent, cache.children, cache.descendants, cache.promote):
            with pytest.raises(StaleHandle):
                ask(seq)
            with pytest.raises(ForeignHandle):
                ask(seq ^ 1 << 45)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "cache"):
            return
        cache = self.cache
        family = self.family
        cache.check()
        assert cache.live() == sorted(family.live, key=cache.live().index)
        for seq in family.live:
            assert cache.parent(seq) == family.parent(seq)
            assert sorted(cache.children(seq)) == sorted(family.children(seq))
            below = cache.descendants(seq)
            assert sorted(below) == sorted(family.below(seq))
            for place, each in enumerate(below):
                assert cache.parent(each) in [seq, *below[:place]], "not above what hangs on it"
        self.forgets_what_holds_nothing_together()

    def forgets_what_holds_nothing_together(self) -> None:
        """Joints are what is gone and has two branches or more; rows of open steps count."""
        family = copy.deepcopy(self.family)
        pending = 0
        for step in self.steps:
            for parent in step.parents:
                pending += 1
                family.make([-pending], [parent])
        joints = self.cache.books.tree.joints
        assert len(joints) < max(1, family.leaves())
        assert joints.keys() <= family.forks()

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.steps.clear()
            self.cache.release(self.family.live)
            assert self.cache.books.tree.joints == {}
            assert self.cache.pages_in_use == 0
            self.cache.check()


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


# -- single cases


def test_a_parent_that_is_gone_is_looked_through() -> None:
    cache = made()
    (root,) = cache.new()
    middle, beside = cache.fork([root] * 2)
    left, right = cache.fork([middle] * 2)
    cache.release([middle])
    assert cache.books.tree.joints == {middle: root}
    assert [cache.parent(seq) for seq in (root, left, right, beside)] == [None, root, root, root]
    assert cache.children(root) == [left, right, beside]
    cache.release([left])
    assert cache.books.tree.joints == {}, "one branch needs no joint"
    assert sorted(cache.children(root)) == [beside, right]
    cache.release([root])
    assert cache.parent(right) is None
    assert cache.promote(right) == 1, "the rest of its tree"
    assert cache.live() == [right]


def test_a_tree_ends_where_a_fork_begins_one_of_its_own() -> None:
    cache = made()
    (prompt,) = cache.new()
    first, second = cache.fork([prompt] * 2, root=True)
    assert (cache.parent(first), cache.children(prompt)) == (None, [])
    leaf, other = cache.fork([first] * 2)
    assert cache.promote(leaf) == 1
    assert cache.promote(first) == 0
    assert cache.release_subtree(prompt) == 1
    assert cache.live() == [first, second, leaf]
    assert other not in cache.live()


def test_children_of_one_step_are_in_one_tree_when_their_parent_ended_meanwhile() -> None:
    """An open step is a fork that nobody sees yet."""
    cache = made()
    (root,) = cache.new()
    step = cache.open([root] * 3, 1)
    cache.release([root])
    first, *others = fill(cache, step, 1)
    assert cache.promote(first) == 2
    assert others
    assert cache.live() == [first]


def test_a_step_keeps_the_place_of_its_parent() -> None:
    """Also where all else that hangs there ends: before it is committed, and after."""
    for early in (False, True):
        cache = made()
        (root,) = cache.new()
        pair = cache.fork([root] * 2)
        step = cache.open([root] * 2, 1)
        cache.release([root])
        if early:
            cache.release(pair)
        children = fill(cache, step, 1)
        cache.check()
        if not early:
            cache.release(pair)
        cache.check()
        assert [cache.parent(child) for child in children] == [None, None]
        assert cache.promote(children[0]) == 1
        assert cache.books.tree.joints == {}


def test_a_step_that_is_given_up_holds_no_joint() -> None:
    cache = made()
    (root,) = cache.new()
    (child,) = cache.fork([root])
    (leaf,) = cache.fork([child])
    step = cache.open([child], 1)
    cache.release([child])
    assert (cache.books.tree.joints, cache.parent(leaf)) == ({child: root}, root)
    step.close()
    assert (cache.books.tree.joints, cache.parent(leaf)) == ({}, root)
    cache.check()


def test_joints_that_interrupts_left_behind_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """They came between the end of the last branch and the joint's: harmless, but not for ever."""
    cache = made()

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    for _ in range(100):
        (root,) = cache.new()
        pair = cache.fork([root] * 2)
        cache.release([root])
        with monkeypatch.context() as patch:
            patch.setattr(cache._pool.tables, "splice", interrupted)
            with pytest.raises(KeyboardInterrupt):
                cache.release(pair)
        assert cache.live() == []
        cache.check()
        (other,) = cache.new()
        cache.release([other])
        assert len(cache.books.tree.joints) < 20
    cache.check()


# -- cost


def plain(cache: PagedKVCache, seq: int) -> int:
    (child,) = cache.fork([seq])
    cache.release([seq])
    return child


def stepped(cache: PagedKVCache, seq: int) -> int:
    (child,) = fill(cache, cache.open([seq], 1), 1)
    cache.slide([child], 1)
    cache.release([seq])
    return child


def promoted(cache: PagedKVCache, seq: int) -> int:
    """Three children, of which one is kept, beneath a parent that is gone."""
    children = cache.fork([seq] * 3)
    cache.release([seq])
    assert len(cache.books.tree.joints) == 1
    assert cache.promote(children[1]) == 2
    return children[1]


WALKS: dict[str, Callable[[PagedKVCache, int], int]] = {
    "fork": plain,
    "step": stepped,
    "promote": promoted,
}


@pytest.mark.once
@pytest.mark.parametrize("name", WALKS)
@traced(None)  # coverage would count too, and takes longer than the walk
def test_a_long_walk_leaves_memory_flat(name: str) -> None:
    """10 ** 4 times a child, and its parent is released."""
    cache = made()
    (seq,) = cache.new()
    grow(cache, [seq], 3)
    walk = WALKS[name]
    tree = cache.books.tree
    held = [0, 0]
    links = [0, 0]
    tracemalloc.start()
    try:
        for turn in range(10_000):
            seq = walk(cache, seq)
            if turn % 50 == 0:
                half = turn // 5_000
                assert not tree.joints
                cache.gather([seq])  # writes down the positions that were noted until now
                held[half] = max(held[half], tracemalloc.get_traced_memory()[0])
                count = len(tree._links) + len(tree._unlinked) + len(tree._parents)
                links[half] = max(links[half], count)
    finally:
        tracemalloc.stop()
    assert cache.live() == [seq]
    assert links[1] <= links[0]
    assert held[1] < held[0] + 4_000, "bytes a walk of 5000 steps leaves behind"
    cache.check()


def bytecodes(call: Callable[[], Any]) -> int:
    """How many instructions of Python a call executes."""
    done = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal done
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        done += event == "opcode"
        return trace

    before = sys.gettrace()
    gc.collect()
    gc.disable()  # finalizers of whatever was left would be counted
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
        gc.enable()
    return done


def cost_of_promote(idle: int) -> list[int]:
    """Of one child among 16, with its parent and without, beside `idle` other sequences."""
    cache = made()
    (root,) = cache.new()
    beside = cache.new(idle // 2)
    cache.fork(beside[:1] * (idle - idle // 2))
    found = []
    for gone in (False, False, True):
        children = cache.fork([root] * 16)
        if gone:
            cache.release([root])
        found.append(bytecodes(partial(cache.promote, children[3])))
        assert cache.live_sequences == idle + 1 + (not gone)
        cache.release([children[3]])
    return found


def test_promote_costs_what_it_ends() -> None:
    few = cost_of_promote(1_000)
    many = cost_of_promote(100_000)
    assert few == many
    assert min(few) > 100, "nothing was counted"


def test_children_that_ended_long_ago_cost_nothing() -> None:
    """A root that lives on, while all that it ever begot is gone but one."""
    cache = made()
    (root,) = cache.new()
    cache.new(20_000)
    costs = []
    for turn in range(1_500):
        children = cache.fork([root] * 16)
        promote = partial(cache.promote, children[3])
        if turn % 100 == 1:
            costs.append(bytecodes(promote))
        else:
            promote()
        cache.release([children[3]])
    assert max(costs) < 3 * min(costs)
