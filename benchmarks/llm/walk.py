"""Random trees: nodes made in every way that `PagedLM` has, some of them evicted meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import torch

from paged_kv.integrations.huggingface import Node, PagedLM, shape_of

MOST_ROWS = 6  # of a verb
KEPT = 80  # nodes that others go on from


class Sizes(NamedTuple):
    """Tokens of prompts and of what nodes add, and of the longest path."""

    prompt: int
    step: int
    longest: int


class Checked(NamedTuple):
    """A node whose logits were asked for."""

    tokens: tuple[int, ...]
    logits: torch.Tensor
    verb: str  # that made the node


class Walk:
    """Grows trees at random, and asks for the logits of every node that it makes.

    Roots begin alike now and then, nodes are dropped, forgotten all together, and evicted where
    `max_bytes` says so.
    """

    def __init__(self, lm: PagedLM, sizes: Sizes, seed: int) -> None:
        self.lm = lm
        self.sizes = sizes
        self.draws = random.Random(seed)
        self.vocabulary = shape_of(lm.model).vocabulary
        self.nodes: list[Node] = []
        self.verbs: dict[str, Callable[[], list[Node]]] = {
            "prefill": self._prefill,
            "extend": self._extend,
            "fork": self._fork,
            "crop": self._crop,
            "sample": self._sample,
        }

    def take(self, count: int) -> list[Checked]:
        """So many nodes, with what the lm says of them."""
        found: list[Checked] = []
        while len(found) < count:
            verb = "prefill"
            if len(self.nodes) > 2:
                verb = self.draws.choice(list(self.verbs))
            made = self.verbs[verb]()
            logits = self.lm.logits(made) if made else []
            found += [Checked(node.tokens, row, verb) for node, row in zip(made, logits)]
            self._keep(made)
        return found[:count]

    def _keep(self, made: list[Node]) -> None:
        self.nodes += made
        self.draws.shuffle(self.nodes)
        del self.nodes[KEPT:]
        if self.draws.random() < 0.02:
            self.lm.clear()

    def _tokens(self, most: int) -> list[int]:
        count = self.draws.randint(1, most)
        return [self.draws.randrange(1, self.vocabulary) for _ in range(count)]

    def _parents(self) -> list[Node]:
        """Some nodes with room below them, one of them several times now and then."""
        most = self.sizes.longest - self.sizes.step
        short = [node for node in self.nodes if len(node.tokens) <= most]
        count = self.draws.randint(1, MOST_ROWS)
        return [self.draws.choice(short) for _ in range(count)] if short else []

    def _prefill(self) -> list[Node]:
        row = self._tokens(self.sizes.prompt)
        rows = [row + self._tokens(3), self._tokens(self.sizes.prompt)]
        return self.lm.prefill(rows, seed=self.draws.randrange(1000))

    def _extend(self) -> list[Node]:
        parents = self._parents()
        return self.lm.extend(parents, [self._tokens(self.sizes.step) for _ in parents]).nodes

    def _fork(self) -> list[Node]:
        parents = self._parents()
        return self.lm.fork(parents, [self._tokens(self.sizes.step) for _ in parents])

    def _crop(self) -> list[Node]:
        parents = self._parents()
        return self.lm.crop(parents, [self.draws.randint(1, len(p.tokens)) for p in parents])

    def _sample(self) -> list[Node]:
        count = self.draws.randint(1, self.sizes.step)
        return self.lm.sample(self._parents(), max_new_tokens=count)
