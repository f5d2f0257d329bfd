"""What every peer is asked to do: tree searches, drawn once from a seed and the same for all.

Nodes are numbered by the script; a peer keeps its own handle for each number. A search starts from
one context an environment. Each simulation draws a node of every environment's tree, at random
among those with room in the window, and adds one child to it. Afterwards the root's first child is
the context that the next search starts from; every other node is released, in batches and in an
order that is the same for all. A context that outgrew the lengths of a prefix is released as well,
and a new one takes its place.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True)
class Workload:
    """Sizes of a model, of its contexts and of its searches. Lengths count tokens."""

    name: str
    layers: int
    heads: int
    head_size: int
    dtype: torch.dtype
    page_size: int
    prefixes: tuple[int, int]  # the shortest and the longest context that is begun
    longest_root: int  # a longer one is not searched from again
    new: int  # tokens of one step
    window: int  # the longest context
    simulations: int
    searches: int
    envs: int = 8
    # for peers that copy contexts, where all simulations would not fit
    dense_simulations: int | None = None

    @property
    def token_bytes(self) -> int:
        """K and V of one token, all layers."""
        return 2 * self.layers * self.heads * self.head_size * self.dtype.itemsize

    @property
    def nodes(self) -> int:
        """The most nodes that live at once."""
        return self.envs * (self.simulations + 2)

    @property
    def unique_tokens(self) -> int:
        """A bound on the different tokens that live at once."""
        return self.envs * (2 * self.window + self.simulations * self.new)

    def for_copies(self) -> Workload:
        """The same, as short as peers need it that copy whole contexts."""
        if self.dense_simulations is None:
            return self
        return replace(self, simulations=self.dense_simulations)


SMALL = Workload("small", 2, 8, 96, torch.float32, 2, (4, 14), 14, 2, 20, 50, 20)
LONG = Workload(
    "long", 8, 8, 64, torch.bfloat16, 16, (512, 512), 544, 16, 1024, 200, 3, dense_simulations=12
)
TINY = Workload("tiny", 2, 2, 4, torch.float32, 2, (2, 6), 6, 2, 12, 12, 3, envs=3)
TINY_LONG = Workload("tiny long", 1, 2, 4, torch.bfloat16, 4, (5, 7), 9, 3, 24, 8, 2, envs=3)
WORKLOADS = {work.name: work for work in (SMALL, LONG, TINY, TINY_LONG)}


@dataclass
class Search:
    """One search: contexts that begin anew, then steps, then what is released; all by
    node number.
    """

    begun: list[int] = field(default_factory=list)
    # parents and children, one an environment
    steps: list[tuple[list[int], list[int]]] = field(default_factory=list)
    released: list[list[int]] = field(default_factory=list)  # batches


@dataclass
class Script:
    """All searches of a workload, the length of each node and the node that it was forked from (0:
    none).
    """

    searches: list[Search] = field(default_factory=list)
    lengths: dict[int, int] = field(default_factory=dict)
    parents: dict[int, int] = field(default_factory=dict)

    def node(self, parent: int, length: int) -> int:
        """The number of a new node."""
        number = len(self.lengths) + 1
        self.lengths[number] = length
        self.parents[number] = parent
        return number


def script(work: Workload, seed: int = 0) -> Script:
    """Draw all searches of a workload."""
    draw = random.Random(seed)
    made = Script()
    roots = [0] * work.envs
    for _ in range(work.searches):
        search = Search()
        for env in range(work.envs):
            if not roots[env]:
                roots[env] = made.node(0, draw.randint(*work.prefixes))
                search.begun.append(roots[env])
        trees = [[root] for root in roots]
        for _ in range(work.simulations):
            parents = [
                draw.choice([node for node in tree if made.lengths[node] + work.new <= work.window])
                for tree in trees
            ]
            children = [made.node(parent, made.lengths[parent] + work.new) for parent in parents]
            search.steps.append((parents, children))
            for tree, child in zip(trees, children):
                tree.append(child)
        doomed = []
        for env, tree in enumerate(trees):
            kept = tree[1] if made.lengths[tree[1]] <= work.longest_root else 0
            doomed += [node for node in tree if node != kept]
            roots[env] = kept
        draw.shuffle(doomed)
        search.released = [
            doomed[first : first + work.envs] for first in range(0, len(doomed), work.envs)
        ]
        made.searches.append(search)
    return made
