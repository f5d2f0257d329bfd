"""From nodes to a transformers cache for `generate`, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from paged_kv.checks import amount
from paged_kv.errors import BadArgument, BadShape
from paged_kv.integrations.huggingface.cache import PagedCache
from paged_kv.integrations.huggingface.nodes import Node
from paged_kv.integrations.huggingface.paths import Paths
from paged_kv.integrations.huggingface.token_tree import Tokens


class Generating:
    """Caches that were made of nodes, and which nodes they go on from."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self._begun: WeakKeyDictionary[PagedCache, list[Node]] = WeakKeyDictionary()

    def cache(self, nodes: Sequence[Node], expand_size: int) -> PagedCache:
        """A cache that holds all but the last token of each node, `expand_size` rows a node."""
        paths = self.paths
        times = amount("expand_size", expand_size, 1)
        short = [node for node in nodes if paths.length(node.tokens) < len(node.tokens) - 1]
        if short:
            paths.hidden(short)
        pages = paths.residents.pages
        with pages.scope() as scope:
            rows = [node.tokens for node in nodes]
            seqs = paths.bases(rows, [len(tokens) - 1 for tokens in rows])
            cache = PagedCache(pages, paths.model, seqs, expand_size=times)
            scope.keep(cache.rows.state.seqs)
        self._begun[cache] = [node for node in nodes for _ in range(times)]
        return cache

    def nodes(self, cache: PagedCache, sequences: Any, attention_mask: Any) -> list[Node]:
        """Nodes of what `generate` returned: see `PagedLM.nodes`."""
        begun = self._begun.get(cache)
        if begun is None:
            raise BadArgument("cache", cache, "one that cache() of this lm made")
        tokens = getattr(sequences, "sequences", sequences)
        if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2:
            raise BadArgument("sequences", sequences, "a tensor [B, n], as generate() returns it")
        rows = [self._path(row) for row in _unpadded(tokens, attention_mask)]
        parents = [_parent(row, begun) for row in rows]
        aligned = not cache.mixed and cache.batch_size == len(rows)
        lengths = cache.lengths if aligned else []
        made = [
            self.paths.child(parent, row[len(parent.tokens) :])
            for parent, row in zip(parents, rows)
        ]
        if aligned:
            self._keep(made, cache.rows.state.seqs, lengths)
        return made

    def _keep(self, nodes: Sequence[Node], seqs: Sequence[int], lengths: Sequence[int]) -> None:
        """Let nodes have what was fed for them, which is all but the last token or two."""
        residents = self.paths.residents
        kept = [min(length, len(node.tokens)) for length, node in zip(lengths, nodes)]
        with residents.pages.scope():
            forks = residents.pages.fork(seqs, at=kept)
            for node, fork, length in zip(nodes, forks, kept):
                residents.put(node.place.number, fork, node.tokens[:length], None)
        residents.fit()

    def _path(self, tokens: list[int]) -> Tokens:
        """The tokens of a row without what stands behind its end."""
        config = self.paths.model.generation_config
        ends = config.eos_token_id
        stops = ends if isinstance(ends, list) else [ends]
        pad = stops[0] if config.pad_token_id is None else config.pad_token_id
        while len(tokens) > 1 and tokens[-1] == pad and tokens[-2] in (pad, *stops):
            tokens.pop()
        return self.paths.check_tokens(tokens)


def _unpadded(tokens: torch.Tensor, attention_mask: Any) -> list[list[int]]:
    """Rows without the padding that a mask of their first columns shows."""
    rows: list[list[int]] = tokens.tolist()
    if attention_mask is None:
        return rows
    mask = torch.as_tensor(attention_mask)
    if mask.dim() != 2 or mask.shape[1] > tokens.shape[1] or len(rows) % max(1, len(mask)):
        raise BadShape("attention_mask", tuple(mask.shape), tuple(tokens.shape))
    mask = mask.bool().repeat_interleave(len(rows) // len(mask), 0)
    return [
        [token for token, seen in zip(row, kept) if seen] + row[len(kept) :]
        for row, kept in zip(rows, mask.tolist())
    ]


def _parent(path: Tokens, begun: Sequence[Node]) -> Node:
    """Which node a path goes on from. Raises BadArgument where it is none of them."""
    found = [node for node in begun if path[: len(node.tokens)] == node.tokens]
    if not found:
        raise BadArgument("sequences", path, "paths that go on from the nodes of the cache")
    return max(found, key=lambda node: len(node.tokens))
