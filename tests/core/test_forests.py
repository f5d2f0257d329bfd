"""The links of the tree, in every forest of five sequences of which any may have ended, against
plain recursion.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, combinations, product

import pytest

from paged_kv.pages.records import NO_PARENT, Record
from paged_kv.pages.tree import Tree

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


@pytest.mark.parametrize("turned", [False, True])
def test_whatever_has_ended_is_looked_through(turned: bool) -> None:
    for parents in forests():
        for gone in subsets():
            tree, live = born(parents)
            ended(tree, live, gone[::-1] if turned else gone, {})
            assert set(tree.joints) == {seq for seq in gone if nearest(parents, seq, gone)}
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


def test_of_many_children_that_ended_nothing_is_left() -> None:
    tree, live = born({1: 0, **dict.fromkeys(range(2, 40), 1)})
    for seq in range(2, 40):
        ended(tree, live, (seq,), {})
    for _ in range(2):
        assert tree.children(1) == []
        assert list(tree.living_below(1, ())) == []
