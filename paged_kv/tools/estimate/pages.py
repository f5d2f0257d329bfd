"""How many pages a search tree takes: whole numbers, counted as the block tables do.

An environment's tree is its root, a window of some tokens, and one node a simulation, which appends
the tokens of a step to the window of any node before it. Nothing matters but where in a page a
window ends: a parent that ends at offset `end` (0: on the edge) has a partial last page. Its first
child writes on there, every other one copies the page before it appends.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from paged_kv.tools.estimate.workload import LONGEST_PAGE, Workload, check


class Span(NamedTuple):
    """A count that may depend on the shape of the tree. `least` and `most` are reached by some
    tree.
    """

    least: int
    likely: int
    most: int


class Nodes(NamedTuple):
    """Pages of the nodes of one tree: the fewest, an average over its shapes, the most."""

    fewest: int
    average: Fraction
    most: int


@dataclass(frozen=True)
class Pages:
    """Pages of `size` slots under one workload. Raises BadCount where a page is longer than a
    window.
    """

    load: Workload
    size: int

    def __post_init__(self) -> None:
        high = min(self.load.context, LONGEST_PAGE)
        check("page_size", self.size, 1, high, "context" if high == self.load.context else "")

    def held(self) -> Span:
        """Pages in use at the end of a search, of all environments: roots and nodes, each page
        counted once.
        """
        envs = self.load.envs
        sims = self.load.simulations
        ends = self.ends()
        roots = [self.root_pages(end) for end in ends]
        below = [self._nodes(end, sims) for end in ends]
        least = min(root + nodes.fewest for root, nodes in zip(roots, below))
        most = max(root + nodes.most for root, nodes in zip(roots, below))
        total = sum((root + nodes.average for root, nodes in zip(roots, below)), Fraction())
        return Span(envs * least, round(envs * total / len(ends)), envs * most)

    def transient(self) -> int:
        """Pages that the last step of a search holds beside those until its windows have slid."""
        passing = max(self._taken(end) - self._own(end) for end in self._cycle(0))
        return self.load.envs * passing

    def older_roots(self, roots: int) -> int:
        """Pages of the `roots` roots before the present one, where they are kept, beyond those it
        shares with them.

        Every root took pages of its own; those that a window still holds because it has not slid
        yet are shared.
        """
        load = self.load
        grown = 0
        if roots and load.root_steps is not None and load.root_tokens is None:
            oldest = Pages(dataclasses.replace(load, root_steps=load.root_steps - roots), self.size)
            grown = self.root_pages(self.ends()[0]) - oldest.root_pages(oldest.ends()[0])
        return load.envs * max(0, round(roots * self._average()) - grown)

    def working_tokens(self) -> int:
        """Tokens of the buffer that a batch of the longest windows is gathered into, with room for
        a step.
        """
        longest = self._longest()
        starts = {
            (end - longest) % self.size for root in self.ends()[:1] for end in self._cycle(root)
        }
        wanted = longest + self.load.tokens_per_step
        return self.load.envs * max(_up(start + wanted, self.size) * self.size for start in starts)

    # -- one environment

    @property
    def _window(self) -> int:
        return self.load.window(self.load.root_steps)

    def _longest(self) -> int:
        """Tokens of the window of the deepest parent there can be."""
        grown = max(0, self.load.context - 2 - self._window) // self.load.tokens_per_step
        return self._window + self.load.tokens_per_step * min(grown, self.load.simulations - 1)

    def ends(self) -> list[int]:
        """Where in a page the root may end: its first tokens end on an edge, and every root step
        adds to them.
        """
        steps = self.load.root_steps
        step = self.load.tokens_per_step
        if self.load.root_tokens is not None:
            return [0]
        return list(self._cycle(0)) if steps is None else [(steps - 1) * step % self.size]

    def _cycle(self, end: int) -> Iterator[int]:
        """The ends of a chain of descendants of a context that ends at `end`, until they repeat."""
        step = self.load.tokens_per_step
        return (
            (end + depth * step) % self.size
            for depth in range(self.size // math.gcd(step, self.size))
        )

    def root_pages(self, end: int) -> int:
        """Pages of a root's window that ends at `end`."""
        return _up((end - self._window) % self.size + self._window, self.size)

    def _taken(self, end: int) -> int:
        """Pages a child takes whose parent ends at `end`: the copy of a partial last page, and
        fresh ones.
        """
        return _up(end + self.load.tokens_per_step, self.size)

    def _own(self, end: int) -> int:
        """Those that are left once its window has slid, which may be shorter than a step."""
        step = self.load.tokens_per_step
        window = self._window
        slides = window + step >= self.load.context - 1
        gone = max(0, step - window) if slides else 0
        return self._taken(end) - (end + gone) // self.size

    def _average(self) -> Fraction:
        owns = [self._own(end) for end in self._cycle(0)]
        return Fraction(sum(owns), len(owns))

    def _first(self, end: int) -> int:
        """Those of a first child, which shares its parent's partial last page."""
        own = self._own(end)
        return own - 1 if end and own else own

    def _nodes(self, end: int, simulations: int) -> Nodes:
        """Pages of the nodes below a root that ends at `end`.

        A chain takes the fewest, for all of its nodes are first children; a chain down to where a
        child is dearest, and siblings there, the most. On average about half of the nodes are
        parents, as in a tree whose nodes are equally likely to get the next one.
        """
        chain = 0
        totals = []
        cycle = list(self._cycle(end))
        for depth, parent in enumerate(cycle[:simulations]):
            first = self._first(parent)
            totals.append(chain + first + (simulations - depth - 1) * self._own(parent))
            chain += first
        rounds, rest = divmod(simulations, len(cycle))
        firsts = [self._first(parent) for parent in cycle]
        low = rounds * sum(firsts) + sum(firsts[:rest])
        high = max(totals)
        spared = Fraction(sum(self._own(parent) for parent in cycle) - sum(firsts), len(cycle))
        average = simulations * self._average() - Fraction(simulations + 1, 2) * spared
        return Nodes(low, min(max(Fraction(low), average), Fraction(high)), high)


def _up(count: int, size: int) -> int:
    return -(-count // size)
