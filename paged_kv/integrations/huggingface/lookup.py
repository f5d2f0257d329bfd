"""Paths that a `PagedLM` keeps for itself, of which callers hold no handles."""

from __future__ import annotations

from collections.abc import Sequence

from paged_kv.integrations.huggingface.nodes import Node
from paged_kv.integrations.huggingface.paths import Paths
from paged_kv.integrations.huggingface.token_tree import Tokens


class Lookup:
    """Nodes by their paths. They go once their K/V were evicted."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._nodes: dict[Tokens, Node] = {}
        self._evicted = 0  # paths, when it was last seen to

    def nodes(self, rows: Sequence[Tokens]) -> list[Node]:
        """A node for each of these paths, one for equal ones: `keep` them once they were fed."""
        self._let_go()
        made: dict[Tokens, Node] = {}
        for row in rows:
            if row not in made:
                known = self._nodes.get(row)
                if known is None or not self._paths.has(known.place.number):
                    known = self._paths.root(row, 0)
                made[row] = known
        return [made[row] for row in rows]

    def _let_go(self) -> None:
        """Drop nodes whose K/V are gone. Cost: O(nodes) where something was evicted."""
        residents = self._paths.residents
        if residents.evicted == self._evicted:
            return
        self._evicted = residents.evicted
        for path, node in list(self._nodes.items()):
            if node.place.number not in residents.index:
                del self._nodes[path]

    def keep(self, nodes: Sequence[Node]) -> None:
        """Hold these nodes."""
        self._nodes.update((node.tokens, node) for node in nodes)

    def holds(self, node: Node) -> bool:
        """Whether a node is held here."""
        return self._nodes.get(node.tokens) is node

    def clear(self) -> None:
        """Let go of all."""
        self._nodes.clear()
