"""A batched Monte Carlo tree search over the reference world model: PUCT, one new node a simulation
and environment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from paged_kv.tools.reference.contexts import ROOT, Contexts
from paged_kv.tools.reference.world_model import Prediction, ReferenceWorldModel

DISCOUNT = 0.997
EXPLORATION = 1.25


class Node:
    """A node of one environment's tree. `number` is the simulation that expanded it, or ROOT."""

    __slots__ = ("children", "number", "prior", "reward", "total", "visits")

    def __init__(self, prior: float) -> None:
        self.prior = prior
        self.number = ROOT
        self.reward = 0.0
        self.visits = 0
        self.total = 0.0
        self.children: list[Node] = []

    @property
    def value(self) -> float:
        """Mean of the values backed up through this node."""
        return self.total / self.visits if self.visits else 0.0

    def expand(self, number: int, policy: Sequence[float], reward: float) -> None:
        """Give the node its children."""
        self.number = number
        self.reward = reward
        self.children = [Node(prior) for prior in policy]

    def best(self) -> int:
        """The action with the highest PUCT score, the first among equals."""
        spread = math.sqrt(self.visits) * EXPLORATION
        scores = [
            c.reward + DISCOUNT * c.value + spread * c.prior / (1 + c.visits) for c in self.children
        ]
        return scores.index(max(scores))


def search(
    model: ReferenceWorldModel,
    contexts: Contexts,
    root: Prediction,
    steps: Sequence[int],
    simulations: int,
    on_simulation: Callable[[], None] | None = None,
) -> list[Node]:
    """Search from a batch of roots whose contexts are stored under ROOT; returns the root nodes.

    `steps` [B]: the timestep of each environment, from which rotary positions are counted (two
    tokens a step).
    """
    trees = [Node(1.0) for _ in steps]
    _expand(trees, ROOT, root)
    for tree, value in zip(trees, root.value.tolist(), strict=True):
        tree.visits = 1
        tree.total = value
    for number in range(simulations):
        paths, actions = zip(*(_select(tree) for tree in trees), strict=True)
        batch = contexts.open([path[-2].number for path in paths])
        depths = torch.tensor(
            [2 * (step + len(path) - 2) + 1 for step, path in zip(steps, paths, strict=True)]
        )
        found = model.act(batch, actions, depths)
        contexts.store(number)
        _expand([path[-1] for path in paths], number, found)
        for path, value in zip(paths, found.value.tolist(), strict=True):
            _back_up(path, value)
        if on_simulation is not None:
            on_simulation()
    return trees


def _select(tree: Node) -> tuple[list[Node], int]:
    """The path to a leaf, and the last action on it."""
    path = [tree]
    action = 0
    while path[-1].children:
        action = path[-1].best()
        path.append(path[-1].children[action])
    return path, action


def _expand(leaves: Sequence[Node], number: int, found: Prediction) -> None:
    priors = found.policy.softmax(-1).tolist()
    rewards = found.reward.tolist()
    for leaf, policy, reward in zip(leaves, priors, rewards, strict=True):
        leaf.expand(number, policy, reward)


def _back_up(path: Sequence[Node], value: float) -> None:
    for node in reversed(path):
        node.visits += 1
        node.total += value
        value = node.reward + DISCOUNT * value
