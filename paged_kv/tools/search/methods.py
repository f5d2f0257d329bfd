"""Searches over texts: which nodes get children next.

Each is a generator: it yields the parents of a batch, one for each child, and is sent the children,
whose values are known by then. So one search may be run alone, or many in the same batches. A batch
always has `width` children of equally deep parents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence

from paged_kv.tools.search.nodes import Node
from paged_kv.tools.search.presets import METHODS

EXPLORATION = 0.3
Plan = Generator[list[Node], list[Node], None]
Method = Callable[[Node, int, int], Plan]


def mcts(root: Node, simulations: int, width: int) -> Plan:
    """Monte Carlo tree search: each simulation gives one node `width` children.

    It goes down by upper confidence bounds, to a node without children that is not done. A node
    whose children are all done gets more of them.
    """
    for _ in range(simulations):
        chosen = _promising(root)
        children = yield [chosen] * width
        for child in children:
            _back_up(child)


def beam(root: Node, simulations: int, width: int) -> Plan:
    """Beam search: the best `width // 2` nodes of a level share the children of the next one.

    Once all that is left is done, the next beam begins at the root.
    """
    level = [root]
    for _ in range(simulations):
        grown = yield _shared_out(level, width)
        going = sorted((node for node in grown if not node.done), key=_by_value)
        level = going[: max(1, width // 2)] or [root]


def best_of_n(root: Node, simulations: int, width: int) -> Plan:
    """Samples side by side, each to its end; then more of them, from the root."""
    level = [root]
    for _ in range(simulations):
        grown = yield _shared_out(level, width)
        level = [node for node in grown if not node.done] or [root]


FUNCTIONS: dict[str, Method] = dict(zip(METHODS, (mcts, beam, best_of_n)))


def _promising(root: Node) -> Node:
    node = root
    while True:
        going = [child for child in node.children if not child.done]
        if not going:
            return node
        parent = node
        node = max(going, key=lambda child: _bound(child, parent))


def _bound(child: Node, parent: Node) -> float:
    """The mean value of what was seen, and more where little was."""
    known = child.total / child.visits
    return known + EXPLORATION * math.sqrt(math.log(parent.visits) / child.visits)


def _back_up(leaf: Node) -> None:
    node: Node | None = leaf
    while node is not None:
        node.visits += 1
        node.total += leaf.value
        node = node.parent


def _by_value(node: Node) -> tuple[float, float]:
    return -node.value, -node.logprob


def _shared_out(parents: Sequence[Node], width: int) -> list[Node]:
    """These parents `width` times in all, the better ones more often, side by side."""
    count, more = divmod(width, len(parents))
    shares = [count + (place < more) for place in range(len(parents))]
    return [parent for parent, share in zip(parents, shares) for _ in range(share)]
