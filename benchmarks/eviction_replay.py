"""Searches played again in a bounded pool: what has to be computed again under which order.

The pool is the real one, with a real index and pages of a tiny cache, driven by what the LightZero
integration drives it with: room is made before a step, the nodes it starts from are pinned, and
those that were evicted are made again level by level.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from heapq import heappop, heappush
from math import inf
from typing import Any

import torch
from eviction_traces import Simulation, Trace

from paged_kv import CacheIndex, PagedKVCache
from paged_kv.eviction import EntryView, Policy
from paged_kv.integrations.lightzero.shared.evictable import EvictableNodes, Name
from paged_kv.search_order import VISITS, SearchOrder

TOKENS = 2  # of a node: an action and an observation, which fill a page
FIFO = "fifo"
LRU = "lru"
SEARCH = "search"
OFFLINE = "offline"
ORDERS = (FIFO, LRU, SEARCH, OFFLINE)


class Replay:
    """One search in a pool of so many pages for its nodes; the roots have their own.

    `recomputed` counts the nodes that were made again.
    """

    def __init__(self, trace: Trace, pages: int, order: str, weight: float | None = None) -> None:
        self._trace = trace
        self._now = 0  # the running simulation
        limit = trace.rows + pages
        self._cache = PagedKVCache(
            layers=1, heads=1, head_size=1, page_size=TOKENS, num_pages=limit, max_pages=limit
        )
        known = None
        if order == SEARCH:
            known = SearchOrder(trace.constants, VISITS if weight is None else weight)
        index = CacheIndex(self._cache, self._policy(order, known))
        self._cache.set_reclaimer(index)
        self._nodes = EvictableNodes(index, known)
        self._roots = self._cache.new(trace.rows)
        kv = torch.ones(1, trace.rows, 1, TOKENS, 1)
        self._cache.append(self._roots, kv, kv)

    @property
    def recomputed(self) -> int:
        """Nodes that were made again so far."""
        return self._nodes.recomputed

    def run(self) -> int:
        """Play all of it; returns `recomputed`."""
        self._nodes.begin(self._roots)
        for simulation in self._trace.simulations:
            self._now += 1
            self._play(simulation)
        self._nodes.end()
        return self.recomputed

    def _policy(self, order: str, known: SearchOrder | None) -> str | Callable[[], Policy]:
        if known is not None:
            return known.policy
        if order == OFFLINE:
            needs = future(self._trace)
            return lambda: Farthest(needs, lambda: self._now)
        return order

    def _play(self, simulation: Simulation) -> None:
        rows = self._trace.rows
        levels, places = zip(*simulation.parents)
        self._nodes.choose(levels, places, simulation.actions)
        # what a step of a model depends on beside its contexts, which is nothing here
        self._nodes.prepare(torch.tensor(simulation.actions), [0] * rows, 0, self._step)
        self._step(list(range(rows)))
        self._nodes.learn(simulation.rewards, simulation.values, simulation.logits)

    def _step(self, rows: list[int], *_: Any) -> None:
        contexts = [seq for seq in self._nodes.take(len(rows)) if seq is not None]
        kv = torch.ones(len(rows), 1, TOKENS, 1)
        with self._cache.open(contexts, TOKENS) as step:
            step.update(0, kv, kv)
            self._nodes.add(step.commit())


def paths(trace: Trace) -> dict[Name, list[Name]]:
    """Of each node: those on the way from the root to it, itself the last."""
    found: dict[Name, list[Name]] = {(0, row): [] for row in range(trace.rows)}
    for number, simulation in enumerate(trace.simulations, 1):
        for row, parent in enumerate(simulation.parents):
            found[number, row] = [*found[parent], (number, row)]
    return found


# -- what knows the future


def future(trace: Trace) -> Mapping[Name, list[int]]:
    """The simulations that need a node, or what lies below it, in order."""
    above = paths(trace)
    needs: defaultdict[Name, list[int]] = defaultdict(list)
    for number, simulation in enumerate(trace.simulations, 1):
        for parent in simulation.parents:
            for name in above[parent]:
                needs[name].append(number)
    return needs


class Farthest:
    """A policy that knows the future: what is needed last, or never again, goes first."""

    def __init__(self, needs: Mapping[Name, list[int]], now: Callable[[], int]) -> None:
        self._needs = needs
        self._now = now
        self._entries: dict[EntryView, None] = {}

    def on_add(self, entry: EntryView) -> None:
        """Hold it."""
        self._entries[entry] = None

    def on_hit(self, entry: EntryView) -> None:
        """Nothing: the past does not count."""

    def on_priority(self, entry: EntryView, priority: float | None) -> None:
        """Nothing either."""

    def on_remove(self, entry: EntryView) -> None:
        """Forget it."""
        del self._entries[entry]

    def victims(self) -> Iterator[EntryView]:
        """Cost: O(n log n)."""
        return iter(sorted(self._entries, key=self._next_need, reverse=True))

    def _next_need(self, entry: EntryView) -> float:
        needs = self._needs.get(entry.key, [])  # type: ignore[call-overload]
        place = bisect_right(needs, self._now())
        return needs[place] if place < len(needs) else inf


def fewest(trace: Trace, pages: int) -> int:
    """A number of nodes that no order can go below, each of which takes one page.

    A step needs the pages of all nodes on the paths to those it starts from. Asked for one after
    the other they are a sequence of pages, for which to evict the one that is asked for last is
    best (Belady 1966), without heed for leaves, pins, or steps that need several at once.
    """
    asked = _requests(trace)
    following: list[float] = [inf] * len(asked)
    later: dict[Name, int] = {}
    for place in range(len(asked) - 1, -1, -1):
        following[place] = later.get(asked[place], inf)
        later[asked[place]] = place
    held: dict[Name, float] = {}  # with the place that asks for it next
    farthest: list[tuple[float, Name]] = []
    loads = 0
    for place, name in enumerate(asked):
        if name not in held:
            loads += 1
            while len(held) >= pages:
                until, other = heappop(farthest)
                if held.get(other) == -until:
                    del held[other]
        held[name] = following[place]
        heappush(farthest, (-following[place], name))
    return loads - trace.nodes  # each is made once in any case


def _requests(trace: Trace) -> list[Name]:
    """The pages that are asked for, step by step; new ones last."""
    above = paths(trace)
    found = []
    for number, simulation in enumerate(trace.simulations, 1):
        for parent in simulation.parents:
            found += above[parent]
        found += [(number, row) for row in range(trace.rows)]
    return found


def most_at_once(trace: Trace) -> int:
    """Pages that the step of the most pages needs: with fewer a search cannot run."""
    above = paths(trace)
    return trace.rows + max(
        sum(len(above[parent]) for parent in simulation.parents) for simulation in trace.simulations
    )
