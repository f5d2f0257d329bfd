"""Search trees whose nodes are of unequal lengths: on pages, and as a deep copy for every node."""

from __future__ import annotations

import copy
import random
from typing import Any, NamedTuple

import torch

from llm.models import dynamic_cache, held_bytes, random_rows
from paged_kv.integrations.huggingface import Node, PagedLM, shape_of
from paged_kv.integrations.huggingface.token_tree import TokenTree

SHORTEST = 4  # new tokens of a child
LONGEST = 28
CHILDREN = 8


class Tree(NamedTuple):
    """A search: in each expansion a node, an old one as likely as a new one, gets its children."""

    root: int  # tokens
    expansions: int

    @property
    def nodes(self) -> int:
        """All of them."""
        return 1 + CHILDREN * self.expansions


class Expansion(NamedTuple):
    """Which node is expanded, and how many tokens each child has."""

    node: int
    lengths: list[int]


def expansions(tree: Tree, seed: int = 0) -> list[Expansion]:
    """A search, drawn."""
    draws = random.Random(seed)
    return [
        Expansion(
            draws.randrange(1 + CHILDREN * number),
            [draws.randint(SHORTEST, LONGEST) for _ in range(CHILDREN)],
        )
        for number in range(tree.expansions)
    ]


class AtLengths:
    """A stopping criterion: each row ends with so many columns."""

    def __init__(self, columns: list[int]) -> None:
        self.columns = torch.tensor(columns)

    def __call__(self, ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        return self.columns <= ids.shape[1]


class Held(NamedTuple):
    """Bytes at the peak of a search."""

    unique: int  # K/V of all tokens that were fed, each beginning of a path once
    in_use: int  # pages
    reserved: int  # the pool
    working: int  # beside the pool
    hidden: int  # last hidden states of nodes


def on_pages(model: Any, tree: Tree, page_size: int) -> Held:
    """Play a search with `PagedLM.sample`."""
    lm = PagedLM(model, page_size=page_size, progress=False)
    nodes = lm.prefill(random_rows(model, 1, tree.root, seed=0), seed=0)
    working = 0
    for node, lengths in expansions(tree):
        parent = nodes[node]
        columns = len(parent.tokens)
        nodes += lm.sample(
            [parent] * CHILDREN,
            max_new_tokens=LONGEST,
            stopping_criteria=AtLengths([columns + length for length in lengths]),
        )
        working = max(working, lm.pages.working_bytes)
    pages = lm.pages
    return Held(
        _fed(nodes) * pages.token_bytes,
        pages.stats.peak_pages * pages.page_bytes,
        pages.bytes_reserved,
        working,
        lm.stats().hidden_bytes,
    )


def _fed(nodes: list[Node]) -> int:
    """Tokens with K/V that the nodes need: of each path the beginnings that no other path has."""
    tree = TokenTree()
    for number, node in enumerate(nodes):
        tree.add(node.tokens[: node.length], number)
    return sum(len(edge.tokens) for edge in tree.edges())


def deep_copies(model: Any, tree: Tree) -> tuple[int, int]:
    """Bytes of the same search where every node has a `DynamicCache` of its own, and of its unique
    tokens.
    """
    shape = shape_of(model)

    def tokens(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        made = torch.zeros(1, shape.heads, count, shape.head_size)
        return [(made, made)] * shape.layers

    caches = [dynamic_cache(tokens(tree.root))]
    unique = tree.root
    for node, lengths in expansions(tree):
        parent = caches[node]
        for length in lengths:
            child = copy.deepcopy(parent)
            for layer, (keys, values) in enumerate(tokens(length)):
                child.update(keys, values, layer)
            caches.append(child)
            unique += length
    per_token = 2 * shape.layers * shape.heads * shape.head_size * shape.dtype.itemsize
    return sum(map(held_bytes, caches)), unique * per_token
