"""Nodes of a search tree with the sums of their visits, as objects and as plain rows. No tensors in
here.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from paged_kv.checks import key as check_key
from paged_kv.errors import BadBundle, BadKey

NO_PARENT = -1


class SearchNode:
    """A node of a search tree, with the sums of its visits."""

    __slots__ = ("children", "key", "parent", "priors", "reward", "total", "tree", "visits")

    def __init__(
        self,
        key: Hashable,
        tree: Span,
        parent: SearchNode | None,
        reward: float,
        priors: Sequence[float] | None,
    ) -> None:
        self.key = key
        self.tree = tree
        self.parent = parent
        self.reward = reward
        self.priors = priors
        self.children: dict[Hashable, SearchNode] = {}  # by action
        self.visits = 0
        self.total = 0.0  # of the values that were backed up


class Span:
    """The lowest and the highest value of an action that one search has met."""

    def __init__(self, low: float = math.inf, high: float = -math.inf) -> None:
        self.low = low
        self.high = high

    def meet(self, value: float) -> None:
        """Take a value in."""
        self.low = min(self.low, value)
        self.high = max(self.high, value)

    def scaled(self, value: float) -> float:
        """A value that was met, or one between such, from 0 to 1; as it is where all are alike."""
        span = self.high - self.low
        return (value - self.low) / span if span > 0 else value


class Row(NamedTuple):
    """A node as plain values."""

    key: Hashable
    parent: int  # the number of its row, which comes before; NO_PARENT of a root
    action: Hashable  # by which it hangs below its parent
    reward: float
    priors: list[float] | None
    visits: int
    total: float
    low: float  # of its search: roots alone say it
    high: float


def rows_of(nodes: Iterable[SearchNode]) -> list[tuple[Any, ...]]:
    """Nodes, parents before their children, as rows."""
    found = list(nodes)
    numbers = {id(node): number for number, node in enumerate(found)}
    actions = {id(child): action for node in found for action, child in node.children.items()}
    rows = []
    for node in found:
        above = NO_PARENT if node.parent is None else numbers[id(node.parent)]
        span = node.tree if node.parent is None else Span()
        priors = None if node.priors is None else [float(prior) for prior in node.priors]
        row = Row(
            node.key,
            above,
            actions.get(id(node)),
            float(node.reward),
            priors,
            node.visits,
            float(node.total),
            float(span.low),
            float(span.high),
        )
        rows.append(tuple(row))
    return rows


def nodes_of(rows: object) -> dict[Hashable, SearchNode]:
    """The nodes of rows, which are not trusted, by their keys. Raises BadBundle."""
    if type(rows) is not list:
        raise BadBundle("the nodes of a search are no list")
    found: dict[Hashable, SearchNode] = {}
    nodes: list[SearchNode] = []
    for told in rows:
        if type(told) is not tuple or len(told) != len(Row._fields):
            raise BadBundle("a node of a search is no row of one")
        row = Row(*told)
        node = _node(row, nodes, found)
        found[row.key] = node
        nodes.append(node)
    return found


def _node(
    row: Row, before: Sequence[SearchNode], known: Mapping[Hashable, SearchNode]
) -> SearchNode:
    """The node of a row, hung below its parent."""
    numbers = [row.reward, row.total, row.low, row.high, *_priors(row.priors)]
    if any(type(number) is not float or math.isnan(number) for number in numbers):
        raise BadBundle("a node of a search holds what is no number")
    if type(row.visits) is not int or row.visits < 0 or type(row.parent) is not int:
        raise BadBundle("a node of a search has no count of visits, or no parent")
    try:
        check_key(row.key)
        check_key(row.action)
    except BadKey as error:
        raise BadBundle(f"a node of a search cannot be: {error}") from error
    if row.key in known or not NO_PARENT <= row.parent < len(before):
        raise BadBundle("a node of a search is there twice, or has no parent")
    above = None if row.parent == NO_PARENT else before[row.parent]
    tree = Span(row.low, row.high) if above is None else above.tree
    node = SearchNode(row.key, tree, above, row.reward, row.priors)
    node.visits = row.visits
    node.total = row.total
    if above is not None:
        _hang(node, above, row)
    return node


def _hang(node: SearchNode, above: SearchNode, row: Row) -> None:
    actions = None if above.priors is None else range(len(above.priors))
    if row.action in above.children or (actions is not None and row.action not in actions):
        raise BadBundle("two nodes of a search have one place, or one has none")
    if not row.visits:
        raise BadBundle("a node of a search was expanded, and never visited")
    above.children[row.action] = node


def _priors(priors: object) -> list[Any]:
    if priors is None:
        return []
    if type(priors) is not list or not priors:
        raise BadBundle("the priors of a node are no list of numbers")
    return priors
