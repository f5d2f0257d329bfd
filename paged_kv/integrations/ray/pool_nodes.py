"""Nodes as the driver holds them: paths of tokens that live in a worker."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol
from weakref import ref

from paged_kv.errors import NotCopyable
from paged_kv.integrations.ray.calls import Name
from paged_kv.integrations.ray.held_trees import Made

Tokens = tuple[int, ...]


class Pool(Protocol):
    """What a node asks its pool."""

    def text(self, tokens: Tokens) -> str: ...

    def worker(self, tree: int) -> int: ...


class PoolNode:
    """A path of tokens, made by a `SearchPool`: it lives in a worker, with its whole tree.

    A node that is dropped is dropped there, too, with the next call. It can be neither copied, but
    as itself, nor pickled.

    Attributes: `tree`, the number of its tree; `tokens`, `logprobs`, `finish_reason` and `data` as
    those of a `Node`.
    """

    __slots__ = (
        "__weakref__",
        "_kept",
        "data",
        "finish_reason",
        "logprobs",
        "number",
        "pool",
        "tokens",
        "tree",
    )

    def __init__(self, pool: Pool, tree: int, tokens: Tokens, made: Made) -> None:
        self.pool = pool
        self.tree = tree
        self.number = made.number
        self.tokens = tokens
        self._kept = made.kept
        self.logprobs = made.logprobs
        self.finish_reason = made.finish_reason
        self.data: Any = None

    def __repr__(self) -> str:
        return f"<PoolNode {self.number} of tree {self.tree}: {len(self.tokens)} tokens>"

    def __copy__(self) -> PoolNode:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> PoolNode:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotCopyable("PoolNode")

    @property
    def name(self) -> Name:
        """Its tree, and its number there."""
        return self.tree, self.number

    @property
    def new_tokens(self) -> Tokens:
        """Those behind its parent's; of a root all."""
        return self.tokens[self._kept :]

    @property
    def text(self) -> str:
        """`new_tokens` as text. Raises BadArgument where the pool has no tokenizer."""
        return self.pool.text(self.new_tokens)

    @property
    def worker(self) -> int:
        """Where it lives now."""
        return self.pool.worker(self.tree)


class Watch(ref[PoolNode]):
    """A node that may be dropped. Whoever is told of that gets the watch."""

    name: Name = (0, 0)  # until it is said


class Grove:
    """All nodes that exist, by tree; those that were dropped wait to be taken."""

    def __init__(self) -> None:
        self._watched: dict[int, dict[int, Watch]] = {}
        self._gone: deque[Watch] = deque()  # finalizers add to it
        self._empty: list[int] = []  # trees that lost their last node
        self._pins: dict[Name, int] = {}

    def add(self, node: PoolNode) -> None:
        """One more node."""
        watch = Watch(node, self._gone.append)
        watch.name = node.name
        self._watched.setdefault(node.tree, {})[node.number] = watch

    def __contains__(self, name: Name) -> bool:
        tree, number = name
        return number in self._watched.get(tree, {})

    def count(self, tree: int) -> int:
        """Nodes of a tree."""
        return len(self._watched.get(tree, {}))

    def trees(self) -> list[int]:
        """Trees that have nodes."""
        return list(self._watched)

    def held(self, tree: int) -> dict[int, int]:
        """The nodes of a tree by number, and how often each is pinned."""
        return {number: self.pins((tree, number)) for number in self._watched.get(tree, {})}

    def pins(self, name: Name) -> int:
        """How often a node may be unpinned."""
        return self._pins.get(name, 0)

    def pin(self, names: Iterable[Name], times: int) -> None:
        """Note that nodes were pinned, or unpinned where `times` is below 0: all at once."""
        pins = dict(self._pins)
        for name in names:
            pins[name] = pins.get(name, 0) + times
        self._pins = {name: count for name, count in pins.items() if count}

    def remove(self, names: Iterable[Name]) -> None:
        """Know no more of nodes that were released."""
        for tree, number in names:
            watched = self._watched.get(tree, {})
            watched.pop(number, None)
            self._pins.pop((tree, number), None)
            if not watched and self._watched.pop(tree, None) is not None:
                self._empty.append(tree)

    def emptied(self) -> list[int]:
        """Trees that have lost their last node since the last time."""
        found = self._empty
        self._empty = []
        return found

    def sweep(self) -> None:
        """Know no more of nodes that were dropped, told or not."""
        self._gone.clear()
        self.remove(
            [
                watch.name
                for watched in self._watched.values()
                for watch in watched.values()
                if watch() is None
            ]
        )

    def taken(self) -> list[Name]:
        """Nodes that were dropped since the last time, and not released before."""
        found = []
        while self._gone:
            name = self._gone.popleft().name
            if name in self:
                found.append(name)
        self.remove(found)
        return found
