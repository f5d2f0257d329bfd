"""Nodes that live as long as a block of code."""

from __future__ import annotations

from collections.abc import Iterable

from paged_kv.integrations.huggingface.nodes import Node
from paged_kv.integrations.huggingface.paths import Paths


class NodeScope:
    """At its end, releases every node that was made since it began and is not kept. Made by
    `PagedLM.scope`, to be used as a context manager.
    """

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._mark = paths.residents.number()
        self._kept: set[int] = set()

    def keep(self, nodes: Iterable[Node]) -> list[Node]:
        """Let these nodes outlive the block; returns them. Raises BadArgument, ForeignNode,
        ReleasedNode.
        """
        found = self._paths.check(nodes)
        self._kept.update(node.place.number for node in found)
        return found

    def __enter__(self) -> NodeScope:
        return self

    def __exit__(self, *error: object) -> None:
        self._paths.settle()
        residents = self._paths.residents
        made = residents.since(self._mark)
        for number in self._kept.intersection(made):
            node = residents.node(number)
            if isinstance(node, Node):
                self._paths.take_over(node)
        residents.release([number for number in made if number not in self._kept])
