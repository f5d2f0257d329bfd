"""The links of the tree, in every forest of five sequences of which any may have ended, against
plain recursion.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain, combinations, count, islice, product

import pytest

from paged_kv.pages.records import NO_PARENT, Record
from paged_kv.pages.tree import MANY, SPARSE, STALE, Tree

SEQS = range(1, 6)
Parents = dict[int, int]


def forests() -> Iterator[Parents]:
    """All of them: each has no parent, or one that is older."""
    for parents in product(*[range(seq) for seq in SEQS]):
        yield dict(zip(SEQS, parents))


def subsets() -> Iterator[tuple[int, ...]]:
    """Of all sequences."""
    return chain.from_iterable(combinations(SEQS, count) for count in range(len(SEQS) + 1))


def born(parents: Parents) -> tuple[Tree, dict[int, Record]]:
    """A tree of these, which came one after the other, and their records."""
    live: dict[int, Record] = {}
    tree = Tree(live)
    for seq, parent in parents.items():
        live[seq] = ((), 0, 0, parent, 0)
        tree.begin({seq: live[seq]})
    return tree, live


def ended(tree: Tree, live: dict[int, Record], gone: tuple[int, ...], held: Parents) -> None:
    """Some end, and those stay as joints that the tree names."""
    joints = tree.joints_of(gone, held)
    for seq in gone:
        del live[seq]
    tree.joints.update(joints)
    tree.end(gone)


def nearest(parents: Parents, seq: int, gone: Iterable[int]) -> list[int]:
    """What lives below, looking through what is gone."""
    found = []
    for child, parent in parents.items():
        if parent == seq:
            found += nearest(parents, child, gone) if child in gone else [child]
    return found


def hangs(tree: Tree, seq: int) -> bool:
    """Whether a joint hangs on it, which may hold nothing any more until it is looked for."""
    return seq in tree.joints.values()


def line(parents: Parents, seq: int) -> list[int]:
    """All above, the nearest first."""
    above = parents[seq]
    return [above, *line(parents, above)] if above else []


def agrees(tree: Tree, parents: Parents, gone: tuple[int, ...]) -> None:
    """Every question is answered as plain recursion does."""
    living = [seq for seq in SEQS if seq not in gone]
    lines = {seq: line(parents, seq) for seq in SEQS}
    for seq in living:
        above = next((each for each in lines[seq] if each in living), None)
        top = above or [seq, *lines[seq]][-1]
        below = {other for other in living if seq in lines[other]}
        assert tree.parent(seq) == above
        assert sorted(tree.children(seq)) == sorted(nearest(parents, seq, gone))
        assert sorted(tree.below([seq])) == sorted({seq, *below})
        rivals = {other for other in living if top in lines[other]} - below - {seq}
        assert sorted(tree.rivals(seq)) == sorted(rivals)
        assert set(tree.living_below(seq, ())) == set(nearest(parents, seq, gone))
        for child in below:
            through = {*gone, child}
            assert set(tree.living_below(seq, {child})) == set(nearest(parents, seq, through))
        assert (seq in tree.parents()) >= bool(below)


def tidy(tree: Tree, live: dict[int, Record]) -> None:
    """Take out joints until none can go."""
    while splices := tree.splices(list(tree.joints), {}):
        taken = {splice.joint for splice in splices}
        assert taken.isdisjoint(splice.parent for splice in splices), "none is next to another one"
        for joint, parent, children in splices:
            del tree.joints[joint]
            for child in children:
                if child in live:
                    live[child] = (*live[child][:3], parent, 0)
                else:
                    tree.joints[child] = parent
        tree.take_out(splices)
        assert taken.isdisjoint(tree.parents())


Goes = Callable[[tuple[int, ...]], Iterable[tuple[int, ...]]]
WAYS: dict[str, Goes] = {  # what ends, verb by verb
    "at once": lambda gone: [gone],
    "at once, all linked": lambda gone: [gone],
    "turned": lambda gone: [gone[::-1]],
    "parents first": lambda gone: [(seq,) for seq in gone],
    "children first": lambda gone: [(seq,) for seq in gone[::-1]],
    "by halves": lambda gone: [gone[::2], gone[1::2]],
}


@pytest.mark.parametrize("way", WAYS)
def test_whatever_has_ended_is_looked_through(way: str) -> None:
    for parents in forests():
        for gone in subsets():
            tree, live = born(parents)
            if way.endswith("all linked"):
                tree.below([])
            before: set[int] = set()
            for some in WAYS[way](gone):
                before.update(some)
                ended(tree, live, some, {})
                held = {seq for seq in some if nearest(parents, seq, before) or hangs(tree, seq)}
                assert set(tree.joints).intersection(some) == held
            assert all(parents[joint] == above for joint, above in tree.joints.items())
            agrees(tree, parents, gone)
            tidy(tree, live)
            agrees(tree, parents, gone)
            branches = [len(tree.children(joint)) for joint in tree.joints]
            assert all(count > 1 for count in branches)


def test_a_joint_of_one_sequence_below_what_stays_need_not_become_any() -> None:
    for parents in forests():
        for gone in subsets():
            tree, _ = born(parents)
            joints = tree.joints_of(gone, {})
            found = {splice.joint: splice for splice in tree.passed_over(joints, gone)}
            for joint in joints:
                branches = [
                    child
                    for child, parent in parents.items()
                    if parent == joint and (child in joints or child not in gone)
                ]
                single = len(branches) == 1 and branches[0] not in gone
                assert (joint in found) == (single and parents[joint] not in gone)
                if joint in found:
                    assert found[joint] == (joint, parents[joint], branches)


def test_links_that_are_made_anew_are_the_same() -> None:
    for parents in forests():
        for gone in subsets():
            tree, live = born(parents)
            ended(tree, live, gone, {})
            tree.rebuild()
            agrees(tree, parents, gone)
            hung = {record[3] for record in live.values()} | set(tree.joints.values())
            assert set(tree.parents()) == hung - {NO_PARENT}
            above = next(iter(live), None)
            if above is not None:
                tree.rebuild()
                live[6] = ((), 0, 0, above, 0)
                tree.begin({6: live[6]})
                assert above in tree.parents()
                assert 6 in tree.children(above)


def test_rows_of_open_steps_hold_a_joint() -> None:
    for parents in forests():
        for gone, seq in product(subsets(), SEQS):
            tree, _ = born(parents)
            joints = tree.joints_of(gone, {seq: 1})
            held = {*gone}.intersection([seq, *line(parents, seq)]) if seq in gone else set()
            held = {each for each in held if between(parents, seq, each) <= {*gone}}
            assert set(joints) == {each for each in gone if nearest(parents, each, gone)} | held


def between(parents: Parents, seq: int, above: int) -> set[int]:
    """The way up."""
    way = [seq, *line(parents, seq)]
    return set(way[: way.index(above)])


def test_who_waits_for_an_end_is_told_once() -> None:
    tree, live = born({1: 0, 2: 1, 3: 1, 4: 1})
    woken: list[int] = []
    tree.watch(2, 1, woken)
    tree.watch(2, 1, woken)
    tree.watch(3, 1, woken)
    ended(tree, live, (4, 2), {})
    assert woken == [1]
    assert set(tree.watches) == {3}
    tree.rebuild()
    assert (woken, tree.watches) == ([1, 1], {})


@pytest.mark.parametrize("kept", [0, 1, 5])
@pytest.mark.parametrize("more", [0, 1])
def test_of_many_children_those_that_ended_are_forgotten(kept: int, more: int) -> None:
    """That is once they are more than SPARSE, and than as many as live."""
    last = 1 + 2 * kept + SPARSE + more
    tree, live = born({1: 0, **dict.fromkeys(range(2, last + 1), 1)})
    assert len(tree.children(1)) == last - 1
    ended(tree, live, tuple(range(2 + kept, last + 1)), {})
    for _ in range(2):
        assert tree.children(1) == list(range(2, 2 + kept))
        assert list(tree.living_below(1, ())) == list(range(2, 2 + kept))[::-1]
        assert len(family(tree, 1)) == (kept if more else last - 1)


def family(tree: Tree, seq: int) -> Collection[int]:
    """What is linked below a sequence, whether it lives or not."""
    links = tree._links.get(seq, ())
    return [links] if isinstance(links, int) else links


def test_an_only_child_is_a_number() -> None:
    """So a long line holds no dict."""
    tree, _ = born({1: 0, 2: 1, 3: 2, 4: 2})
    tree.begin({})
    assert tree.below([1]) == [1, 2, 3, 4]
    assert tree._links[1] == 2
    assert family(tree, 2) == {3: None, 4: None}


def test_all_is_linked_anew_once_many_have_ended() -> None:
    """That is as many as STALE, and twice those that live."""
    living = MANY
    tree, live = born({1: 0, **dict.fromkeys(range(2, living + 1), 1)})
    seqs = count(living + 1)
    anew = []
    linked = 0
    often = (STALE + 2 * living) // MANY + 1
    for turn in range(1, 3 * often):
        batch = dict.fromkeys(islice(seqs, MANY), ((), 0, 0, 1, 0))
        live.update(batch)
        tree.begin(batch)
        ended(tree, live, tuple(batch), {})
        if len(family(tree, 1)) <= linked:
            anew.append(turn)
        linked = len(family(tree, 1))
    assert anew == [often, 2 * often]


def test_of_subtrees_that_ended_nothing_is_kept() -> None:
    tree, live = born({1: 0})
    for seq in range(2, 1000, 4):
        made = {seq: ((), 0, 0, 1, 0), **dict.fromkeys(range(seq + 1, seq + 4), ((), 0, 0, seq, 0))}
        live.update(made)
        tree.begin(made)
        assert tree.below([1]) == [1, *made]
        ended(tree, live, tuple(made), {})
        assert not tree.joints
        assert set(tree.parents()) <= {NO_PARENT, 1}
        assert set(tree._links) == {1}


@pytest.mark.parametrize("siblings", [0, 1])
def test_of_a_long_line_only_its_end_is_kept(siblings: int) -> None:
    """Whatever ends above it: links, parents and joints."""
    tree, live = born({1: 0})
    above = 1
    for seq in range(2, 1000, 1 + siblings):
        made = dict.fromkeys(range(seq, seq + 1 + siblings), ((), 0, 0, above, 0))
        live.update(made)
        tree.begin(made)
        assert tree.children(above) == list(made)
        ended(tree, live, (above,), {})
        if siblings:
            ended(tree, live, (seq + 1,), {})
        tidy(tree, live)
        above = seq
        assert not tree.joints
        assert len(tree.parents()) <= 2
        assert len(tree._links) <= 2
