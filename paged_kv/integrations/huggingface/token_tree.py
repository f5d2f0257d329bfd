"""Paths of tokens by their beginnings: who holds the longest one that another path begins with.

Tokens are compared, not hashes of them. No tensors in here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

Tokens = tuple[int, ...]


class Match(NamedTuple):
    """A holder of a path, and how many tokens its beginning shares with the one asked for."""

    name: int
    length: int


class Edge:
    """Tokens that all paths below have in common, up to the next fork or end of a path."""

    __slots__ = ("above", "children", "names", "tokens")

    def __init__(self, tokens: Tokens, above: Edge | None) -> None:
        self.tokens = tokens
        self.above = above
        self.children: dict[int, Edge] = {}  # by their first token
        self.names: dict[int, None] = {}  # whose path ends here, the oldest first


class TokenTree:
    """Names of paths, which several may share.

    Cost of each call: O(tokens of the path), at the speed of comparing tuples.

    >>> tree = TokenTree()
    >>> tree.add((1, 2, 3, 4), 7)
    >>> tree.add((1, 2, 9), 8)
    >>> tree.longest((1, 2, 3, 5, 6)), tree.longest((4,)), tree.ending((1, 2, 9))
    (Match(name=7, length=3), None, [8])
    >>> tree.remove((1, 2, 3, 4), 7)
    >>> tree.longest((1, 2, 3, 5, 6))
    Match(name=8, length=2)
    """

    def __init__(self) -> None:
        self._root = Edge((), None)

    def add(self, tokens: Tokens, name: int) -> None:
        """Let `name` be found by this path."""
        edge = self._root
        place = 0
        while place < len(tokens):
            below = edge.children.get(tokens[place])
            if below is None:
                below = Edge(tokens[place:], edge)
                edge.children[tokens[place]] = below
                edge = below
                break
            shared = common(below.tokens, tokens[place : place + len(below.tokens)])
            if shared < len(below.tokens):
                below = _split(below, shared)
            place += shared
            edge = below
        edge.names[name] = None

    def remove(self, tokens: Tokens, name: int) -> None:
        """Let it be found no more; nothing where it was not."""
        edge = self._at(tokens)
        if edge is None:
            return
        edge.names.pop(name, None)
        while edge.above is not None and not edge.names and len(edge.children) < 2:
            above = edge.above
            if edge.children:
                _join(edge)
                return
            del above.children[edge.tokens[0]]
            edge = above

    def longest(self, tokens: Tokens) -> Match | None:
        """Who shares the longest beginning with this path, those that end with it first; None where
        nobody shares a token.
        """
        edge = self._root
        place = 0
        while place < len(tokens):
            below = edge.children.get(tokens[place])
            if below is None:
                break
            shared = common(below.tokens, tokens[place : place + len(below.tokens)])
            place += shared
            edge = below
            if shared < len(below.tokens):
                break
        if not place:
            return None
        while not edge.names:
            edge = next(iter(edge.children.values()))
        return Match(next(iter(edge.names)), place)

    def ending(self, tokens: Tokens) -> list[int]:
        """Whose path is just this one, the oldest first."""
        edge = self._at(tokens)
        return [] if edge is None else list(edge.names)

    def _at(self, tokens: Tokens) -> Edge | None:
        """The edge that ends with this path."""
        edge = self._root
        place = 0
        while place < len(tokens):
            below = edge.children.get(tokens[place])
            if below is None or tokens[place : place + len(below.tokens)] != below.tokens:
                return None
            place += len(below.tokens)
            edge = below
        return edge

    def edges(self) -> Iterator[Edge]:
        """All of them, for a look at the whole: each above what is below it."""
        waiting = [self._root]
        while waiting:
            edge = waiting.pop()
            yield edge
            waiting += edge.children.values()


def common(first: Tokens, second: Tokens) -> int:
    """How many tokens two paths begin with in common."""
    low = 0
    high = min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    while high - low > 1:  # up to `low` they agree, up to `high` they do not
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _split(edge: Edge, at: int) -> Edge:
    """Part an edge in two; returns the upper one."""
    above = edge.above
    assert above is not None
    upper = Edge(edge.tokens[:at], above)
    above.children[edge.tokens[0]] = upper
    edge.tokens = edge.tokens[at:]
    edge.above = upper
    upper.children[edge.tokens[0]] = edge
    return upper


def _join(edge: Edge) -> None:
    """Let the only edge below take the place of one where no path ends."""
    above = edge.above
    assert above is not None
    (below,) = edge.children.values()
    below.tokens = edge.tokens + below.tokens
    below.above = above
    above.children[below.tokens[0]] = below
