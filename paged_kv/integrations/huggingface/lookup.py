"""Paths that a `PagedLM` keeps for itself, of which callers hold no handles."""

from __future__ import annotations

from collections.abc import Sequence

from paged_kv.integrations.huggingface.nodes import Node
from paged_kv.integrations.huggingface.paths import Paths
from paged_kv.integrations.huggingface.token_tree import Tokens


class Lookup:
    """Nodes by their paths. They go as they are evicted."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._nodes: dict[Tokens, Node] = {}

    def nodes(self, rows: Sequence[Tokens]) -> list[Node]:
        """A node for each of these paths, one for equal ones: `keep` them once they were fed."""
        index = self._paths.residents.index
        for path in [path for path, node in self._nodes.items() if node.place.number not in index]:
            del self._nodes[path]
        made = {
            row: self._nodes.get(row) or self._paths.root(row, 0) for row in dict.fromkeys(rows)
        }
        return [made[row] for row in rows]

    def keep(self, nodes: Sequence[Node]) -> None:
        """Hold these nodes."""
        self._nodes.update((node.tokens, node) for node in nodes)

    def holds(self, node: Node) -> bool:
        """Whether a node is held here."""
        return self._nodes.get(node.tokens) is node

    def clear(self) -> None:
        """Let go of all."""
        self._nodes.clear()
