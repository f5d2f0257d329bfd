"""Search nodes in a bounded pool: they may be evicted, and are made again when the search comes
back to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from paged_kv.errors import UnannouncedNode
from paged_kv.index import CacheIndex
from paged_kv.search_order import SearchOrder

Name = tuple[int, int]  # of a node: the simulation that made it, its row; roots are of simulation 0


class Expansion(NamedTuple):
    """What made the nodes of one simulation, a row each."""

    parents: list[Name]
    actions: torch.Tensor
    depths: Sequence[int]  # of the nodes in their trees
    begins: Any  # steps of the episodes that the roots are at: a number, or one a row


# Runs a step of the model for some rows: rows, their actions, depths and begins.
Run = Callable[[list[int], torch.Tensor, list[int], Any], object]


class EvictableNodes:
    """The contexts of one search, under their names in a pool of the manager.

    A node that was evicted is made again by the model, from the nearest node above it that is still
    stored: the same steps with the same actions, so the same context, up to the rounding of another
    batch. `recomputed` counts such steps, one a node.
    """

    def __init__(self, pool: CacheIndex, order: SearchOrder | None) -> None:
        self.recomputed = 0
        self._pool = pool
        self._order = order
        self._roots: list[int | None] = []
        self._expansions: list[Expansion] = []  # that of simulation s is number s - 1
        self._chosen: list[Name] | None = None
        self._actions: Sequence[Any] = ()  # of the chosen leaves, as the tree names them
        self._again: list[Name] | None = None  # what the running step makes, where not new nodes
        self._prepared = False  # whether the step makes nodes of this search
        self._pinned: dict[int, Name] = {}  # by row: what the coming step starts from

    def __len__(self) -> int:
        return len(self._pool)

    # -- a search begins and ends

    def begin(self, roots: Sequence[int | None]) -> None:
        """A new search below these contexts; None where one is missing."""
        self._roots = list(roots)
        self._expansions = []
        self._chosen = None
        self._again = None
        self._pinned = {}

    def lose_roots(self, roots: Sequence[int]) -> None:
        """Forget these roots, which somebody is about to release."""
        self._roots = [None if root in roots else root for root in self._roots]

    def made(self) -> list[int]:
        """Contexts that are nobody else's: none, for the pool owns them."""
        return []

    def end(self) -> None:
        """Release the nodes, pinned ones too."""
        self._pool.clear()
        self._pinned = {}

    # -- a simulation

    def choose(
        self, simulations: Sequence[int], rows: Sequence[int], actions: Sequence[Any] = ()
    ) -> None:
        """The leaves that the next step starts from, and what it tries there."""
        self._chosen = list(zip(simulations, rows))
        self._actions = actions
        self._again = None
        self._prepared = False

    def prepare(self, actions: torch.Tensor, depths: Sequence[int], begins: Any, run: Run) -> None:
        """Make the chosen leaves that were evicted again, and note what the coming step does.

        All of them stay pinned until it is done.
        """
        chosen = self._chosen
        if chosen is None:
            return
        self._unpin(list(self._pinned))
        chains = [self._chain(name) for name in chosen]
        while any(chains):
            rows = [row for row, chain in enumerate(chains) if chain]
            self._make([chains[row].pop() for row in rows], rows, run)
        self._chosen = chosen
        self._expansions.append(Expansion(chosen, actions, depths, begins))
        self._prepared = True

    def _chain(self, name: Name) -> list[Name]:
        """What has to be made again to have a node, the topmost last; pins what it hangs on.

        Nothing where the root is gone as well: then the node begins anew.
        """
        missing = []
        while name[0] and name not in self._pool:
            missing.append(name)
            name = self._expansion(name).parents[name[1]]
        if name[0]:
            self._pin(name)
        elif self._roots[name[1]] is None:
            return []
        return missing

    def _make(self, names: list[Name], rows: list[int], run: Run) -> None:
        """Run the steps that made these nodes once more, in one batch."""
        made = [self._expansion(name) for name in names]
        places = [name[1] for name in names]
        self._chosen = [each.parents[place] for each, place in zip(made, places)]
        self._again = names
        actions = torch.stack([each.actions[place] for each, place in zip(made, places)])
        depths = [each.depths[place] for each, place in zip(made, places)]
        begins = made[0].begins
        if not isinstance(begins, (int, float)):
            begins = [each.begins[place] for each, place in zip(made, places)]
        self.recomputed += len(names)
        run(rows, actions, depths, begins)

    def _expansion(self, name: Name) -> Expansion:
        return self._expansions[name[0] - 1]

    def take(self, rows: int) -> list[int | None]:
        """The contexts of the chosen leaves, once; None for those that began anew. Raises
        UnannouncedNode.
        """
        chosen = self._chosen
        self._chosen = None
        if chosen is None or len(chosen) != rows:
            raise UnannouncedNode(rows, None if chosen is None else len(chosen))
        return [self._pool.get(name) if name[0] else self._roots[name[1]] for name in chosen]

    def add(self, children: Sequence[int]) -> None:
        """The contexts of the nodes that a step made, or made again: these are pinned in place of
        those above them.
        """
        names = self._again
        if names is None:
            made = len(self._expansions)
            self._unpin(list(self._pinned))
            self._pool.put_batch([(made, row) for row in range(len(children))], children)
            return
        self._again = None
        self._pool.put_batch(names, children)
        for name in names:
            self._pin(name)

    def learn(
        self, rewards: Sequence[float], values: Sequence[float], policies: Sequence[Any]
    ) -> None:
        """What the model said of the nodes that the last step made."""
        order = self._order
        if order is None or not self._prepared:
            return
        made = len(self._expansions)
        expansion = self._expansions[-1]
        actions = [tuple(np.ravel(action).tolist()) for action in self._actions]
        priors = _priors(policies) if len(actions[0]) == 1 else None
        if made == 1:
            roots = [(0, row) for row in range(len(self._roots))]
            order.begin(roots, None if priors is None else [1 / len(priors[0])] * len(priors[0]))
        for row, parent in enumerate(expansion.parents):
            order.expand(
                (made, row),
                parent,
                actions[row] if priors is None else int(actions[row][0]),
                reward=rewards[row],
                value=values[row],
                priors=None if priors is None else priors[row],
            )

    # -- pins

    def _pin(self, name: Name) -> None:
        self._pool.pin(name)
        self._unpin([name[1]])
        self._pinned[name[1]] = name

    def _unpin(self, rows: Sequence[int]) -> None:
        for row in rows:
            name = self._pinned.pop(row, None)
            if name is not None and self._pool.pinned(name):
                self._pool.unpin(name)


def _priors(logits: Sequence[Sequence[float]]) -> list[list[float]]:
    """The probability of each action, a row each."""
    numbers = np.asarray(logits, dtype=float)
    weights = np.exp(numbers - numbers.max(axis=1, keepdims=True))
    return (weights / weights.sum(axis=1, keepdims=True)).tolist()  # type: ignore[no-any-return]
