"""Paths by their beginnings, against a dictionary of paths."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from paged_kv.integrations.huggingface.token_tree import Tokens, TokenTree, common

TOKENS = st.lists(st.integers(0, 2), max_size=6).map(tuple)
NAMES = st.integers(0, 7)


class TreeMachine(RuleBasedStateMachine):
    """Few tokens and names, so that paths share edges, end in them and come twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = TokenTree()
        self.paths: dict[tuple[Tokens, int], None] = {}  # the oldest first

    @rule(path=TOKENS, name=NAMES)
    def add(self, path: Tokens, name: int) -> None:
        self.tree.add(path, name)
        self.paths.setdefault((path, name))

    @rule(path=TOKENS, name=NAMES)
    def remove(self, path: Tokens, name: int) -> None:
        self.tree.remove(path, name)
        self.paths.pop((path, name), None)

    @rule(data=st.data())
    def remove_one_that_is_there(self, data: st.DataObject) -> None:
        if self.paths:
            self.remove(*data.draw(st.sampled_from(list(self.paths))))

    @rule(path=TOKENS)
    def look(self, path: Tokens) -> None:
        assert self.tree.ending(path) == [name for other, name in self.paths if other == path]
        shared = {(other, name): shared_by(other, path) for other, name in self.paths}
        longest = max(shared.values(), default=0)
        match = self.tree.longest(path)
        if not longest:
            assert match is None
            return
        assert match is not None
        assert match.length == longest
        sharing = [key for key in self.paths if shared[key] == longest]
        assert match.name in [name for _, name in sharing]
        ends = [name for other, name in sharing if len(other) == longest]
        if ends:
            assert match.name == ends[0]

    @invariant()
    def is_whole(self) -> None:
        found = []
        for edge in self.tree.edges():
            root = edge.above is None
            assert root or edge.tokens
            assert root or edge.names or len(edge.children) > 1
            for token, below in edge.children.items():
                assert below.above is edge
                assert below.tokens[0] == token
            path: Tokens = ()
            place = edge
            while place.above is not None:
                path = place.tokens + path
                place = place.above
            found += [(path, name) for name in edge.names]
        assert sorted(found) == sorted(self.paths)


TestTree = TreeMachine.TestCase


def shared_by(first: Tokens, second: Tokens) -> int:
    """How many tokens two paths begin with in common, counted one by one."""
    count = 0
    for one, other in zip(first, second):
        if one != other:
            break
        count += 1
    return count


@given(TOKENS, TOKENS, st.integers(0, 40))
def test_common_counts_up_to_the_first_difference(
    first: Tokens, second: Tokens, repeats: int
) -> None:
    front = (1, 2) * repeats
    assert common(front + first, front + second) == len(front) + shared_by(first, second)


@pytest.mark.parametrize("length", [1, 1000, 100_000])
def test_long_paths_are_no_deep_trees(length: int) -> None:
    tree = TokenTree()
    path = tuple(range(length))
    tree.add(path, 1)
    tree.add((*path[:-1], -1), 2)
    assert tree.longest((*path, 5)) == (1, length)
    tree.remove(path, 1)
    assert [edge.tokens for edge in tree.edges()] == [(), (*path[:-1], -1)]
