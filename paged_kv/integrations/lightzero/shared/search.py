"""Which node of which tree: LightZero's search knows, and tells the world model here.

The search finds its leaves with `batch_traverse`, which names every leaf by (simulation that made
it, row of the batch). LightZero drops these names and looks the context up again by a hash of the
latent state. Here the tree module of the search passes the names on, so that no context is hashed,
lost or taken for another one's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from functools import wraps
from typing import Any

from lzero.mcts.tree_search.mcts_ctree import UniZeroMCTSCtree
from lzero.mcts.tree_search.mcts_ctree_sampled import SampledUniZeroMCTSCtree

from paged_kv.errors import UnannouncedNode
from paged_kv.integrations.lightzero.shared.evictable import EvictableNodes
from paged_kv.integrations.lightzero.shared.hooks import put_around
from paged_kv.integrations.lightzero.shared.lean.transforms import one_transform
from paged_kv.integrations.lightzero.shared.wrappers import lean_of, packed_linears, state_by_node

TREES = {UniZeroMCTSCtree: "tree_muzero", SampledUniZeroMCTSCtree: "tree_sampled_muzero"}


class SearchNodes:
    """The contexts of one search by (simulation, row); simulation 0 are the roots, which belong to
    somebody else.

    A context that was released during the search leaves None in its place, and a step that was
    released as a whole an empty one, so that the names of the others stay theirs.
    """

    def __init__(self) -> None:
        self._nodes: list[Sequence[int | None]] = [[]]
        self._chosen: tuple[Sequence[int], Sequence[int]] | None = None

    def __len__(self) -> int:
        return sum(map(len, self._nodes[1:]))

    def begin(self, roots: Sequence[int | None]) -> None:
        """A new search below these contexts; None where one is missing."""
        self._nodes = [roots]
        self._chosen = None

    def choose(
        self, simulations: Sequence[int], rows: Sequence[int], actions: Sequence[Any] = ()
    ) -> None:
        """The leaves that the next step starts from, and what it tries there."""
        self._chosen = simulations, rows

    def take(self, rows: int) -> list[int | None]:
        """The contexts of the chosen leaves, once; None for those released meanwhile. Raises
        UnannouncedNode.
        """
        chosen = self._chosen
        nodes = self._nodes
        self._chosen = None
        if chosen is None or len(chosen[0]) != rows:
            raise UnannouncedNode(rows, None if chosen is None else len(chosen[0]))
        try:
            return [nodes[simulation][row] for simulation, row in zip(*chosen)]
        except IndexError:  # some are of a step that was released as a whole
            steps = [nodes[simulation] for simulation in chosen[0]]
            return [step[row] if step else None for step, row in zip(steps, chosen[1])]

    def add(self, children: list[int]) -> None:
        """The contexts of the nodes that a step made."""
        self._nodes.append(children)

    def learn(
        self, rewards: Sequence[float], values: Sequence[float], policies: Sequence[Any]
    ) -> None:
        """What the model said of these nodes: nothing here depends on it."""

    def lose_roots(self, roots: Collection[int]) -> None:
        """Forget these roots, which somebody is about to release."""
        self._nodes[0] = [None if root in roots else root for root in self._nodes[0]]

    def made(self) -> list[int]:
        """The contexts that the search made: all but the roots."""
        return [node for step in self._nodes[1:] for node in step if node is not None]

    def end(self) -> None:
        """Forget the nodes, which are released."""
        self._nodes[1:] = [()] * (len(self._nodes) - 1)


# The nodes of the search that runs: they are told what its tree finds.
_RUNNING: ContextVar[SearchNodes | EvictableNodes | None] = ContextVar("running", default=None)


def announce_searches() -> None:
    """Have LightZero's UniZero searches tell models with node keys which leaves they chose, and
    when they end.
    """
    for search, name in TREES.items():
        names = vars(sys.modules[search.__module__])
        if not isinstance(names[name], _Announcer):
            names[name] = _Announcer(names[name])
        put_around(search, "search", _announcing)


class _Announcer:
    """LightZero's tree module, telling the nodes of the search that runs what `batch_traverse`
    finds.
    """

    def __init__(self, tree: Any) -> None:
        self._tree = tree

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tree, name)

    def batch_traverse(self, *arguments: Any, **options: Any) -> Any:
        found = self._tree.batch_traverse(*arguments, **options)
        nodes = _RUNNING.get()
        if nodes is not None:
            nodes.choose(found[0], found[1], found[2])
        return found

    def batch_backpropagate(
        self,
        simulation: int,
        discount: float,
        rewards: Sequence[float],
        values: Sequence[float],
        policies: Sequence[Any],
        *arguments: Any,
        **options: Any,
    ) -> None:
        self._tree.batch_backpropagate(
            simulation, discount, rewards, values, policies, *arguments, **options
        )
        nodes = _RUNNING.get()
        if nodes is not None:
            nodes.learn(rewards, values, policies)


def _announcing(search: Callable[..., Any]) -> Callable[..., Any]:
    """`search`, which announces its leaves to models with node keys, and to no others."""

    @wraps(search)
    def announced(mcts: Any, roots: Any, model: Any, *arguments: Any, **options: Any) -> Any:
        paged = state_by_node(model)
        before = _RUNNING.set(None if paged is None else paged.nodes)
        lean = lean_of(model)
        transform = nullcontext() if lean is None else one_transform(mcts, lean.scalars)
        try:
            with packed_linears(model), transform:
                return search(mcts, roots, model, *arguments, **options)
        finally:
            _RUNNING.reset(before)
            if paged is not None:
                paged.end_search()

    return announced
