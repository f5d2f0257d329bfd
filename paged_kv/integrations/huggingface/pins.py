"""Nodes are kept from eviction: all that were asked for, or none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from paged_kv.errors import NotPinned
from paged_kv.integrations.huggingface.nodes import Node
from paged_kv.integrations.huggingface.paths import Paths


def pin(paths: Paths, nodes: Sequence[Node]) -> None:
    """Pin nodes, and feed what is pending. Raises OutOfPages."""
    residents = paths.residents
    before = {node.place.number: residents.pins(node.place.number) for node in nodes}
    try:
        for node in nodes:  # one by one, and pinned first: others go for it
            residents.pin(node.place.number)
            paths.hold(node)
    except BaseException:
        for number, pins in before.items():
            while residents.pins(number) > pins:
                residents.unpin(number)
        raise


def unpin(paths: Paths, nodes: Sequence[Node]) -> None:
    """Undo one `pin` of each. Raises NotPinned."""
    residents = paths.residents
    numbers = [node.place.number for node in nodes]
    for number, times in Counter(numbers).items():
        if times > residents.pins(number):
            raise NotPinned(number)
    for number in numbers:
        residents.unpin(number)
