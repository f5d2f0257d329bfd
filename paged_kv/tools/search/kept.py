"""What programs keep for the nodes of a search: nothing, the root's cache, or a cache a node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from transformers import DynamicCache

from paged_kv.tools.search.dense_cache import joined, nbytes, repeated, row

Feed = Callable[[DynamicCache, Sequence[Sequence[int]]], torch.Tensor]


class Opened(NamedTuple):
    """A batch of paths, fed to their ends: a cache, and logits [rows, vocabulary].

    `kept`: the cache is one that others will be made of, and must stay as it is.
    """

    cache: DynamicCache
    logits: torch.Tensor
    kept: bool


class Kept(Protocol):
    """What is kept of nodes. `feed` runs tokens behind a cache, and returns logits."""

    def begin(self, prompt: Sequence[int], feed: Feed) -> None:
        """Take the root's prompt."""
        ...

    def open(self, nodes: Sequence[int], paths: Sequence[Sequence[int]], feed: Feed) -> Opened:
        """A row for each of these nodes, whose paths are given without the prompt."""
        ...

    def keep(self, first: int, batch: DynamicCache) -> None:
        """Take what was drawn for new nodes, counted from `first`: a row each, all but the last
        token.
        """
        ...

    def nbytes(self) -> int:
        """Bytes of what is kept."""
        ...


class Nothing:
    """Every path is fed again, the prompt included."""

    def __init__(self) -> None:
        self._prompt: list[int] = []

    def begin(self, prompt: Sequence[int], feed: Feed) -> None:
        """Take the root's prompt."""
        self._prompt = list(prompt)

    def open(self, nodes: Sequence[int], paths: Sequence[Sequence[int]], feed: Feed) -> Opened:
        """Feed whole paths."""
        cache = DynamicCache()
        return Opened(cache, feed(cache, [[*self._prompt, *path] for path in paths]), False)

    def keep(self, first: int, batch: DynamicCache) -> None:
        """Let it go."""

    def nbytes(self) -> int:
        """None."""
        return 0


class RootOnly:
    """The root's cache is kept, and repeated for each batch; what follows the prompt is fed
    again.
    """

    def __init__(self) -> None:
        self._root = DynamicCache()
        self._logits = torch.empty(0)

    def begin(self, prompt: Sequence[int], feed: Feed) -> None:
        """Feed the prompt."""
        self._root = DynamicCache()
        self._logits = feed(self._root, [prompt])

    def open(self, nodes: Sequence[int], paths: Sequence[Sequence[int]], feed: Feed) -> Opened:
        """Feed what was drawn."""
        if not paths[0]:
            return Opened(self._root, self._logits, True)
        cache = repeated(self._root, [0] * len(paths))
        return Opened(cache, feed(cache, paths), False)

    def keep(self, first: int, batch: DynamicCache) -> None:
        """Let it go."""

    def nbytes(self) -> int:
        """Of the root's cache."""
        return nbytes(self._root)


class Copies:
    """Every node has a cache of its own, a copy of all that leads to it.

    Its last token was not fed. One that is opened alone is fed to its end, and what follows is kept
    for the next time.
    """

    def __init__(self) -> None:
        self._prompt = 0
        self._caches: dict[int, DynamicCache] = {}
        self._logits: dict[int, torch.Tensor] = {}  # [1, vocabulary] each, of those fed to the end

    def begin(self, prompt: Sequence[int], feed: Feed) -> None:
        """Feed the prompt."""
        self._prompt = len(prompt)
        self._caches = {0: DynamicCache()}
        self._logits = {0: feed(self._caches[0], [prompt])}

    def open(self, nodes: Sequence[int], paths: Sequence[Sequence[int]], feed: Feed) -> Opened:
        """Feed last tokens."""
        if len(nodes) > 1:
            before = self._prompt + len(paths[0]) - 1
            batch = joined([self._caches[node] for node in nodes], before)
            return Opened(batch, feed(batch, [path[-1:] for path in paths]), False)
        (node,) = nodes
        if node not in self._logits:
            self._logits[node] = feed(self._caches[node], [paths[0][-1:]])
        return Opened(self._caches[node], self._logits[node], True)

    def keep(self, first: int, batch: DynamicCache) -> None:
        """Copy every row."""
        rows = batch.layers[0].keys.shape[0]
        for place in range(rows):
            self._caches[first + place] = row(batch, place)

    def nbytes(self) -> int:
        """Of all nodes' caches."""
        return sum(map(nbytes, self._caches.values()))
