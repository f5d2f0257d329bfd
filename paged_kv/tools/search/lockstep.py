"""One tree, grown on several caches at once: each batch is run on all sides before the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

from paged_kv.integrations.huggingface.draws import seed_below
from paged_kv.tools.search.measuring import Held, Stopwatch
from paged_kv.tools.search.methods import Plan
from paged_kv.tools.search.nodes import Node
from paged_kv.tools.search.side import Drawn, Side

T = TypeVar("T")
Judge = Callable[[Node], None]  # sets text, value, solved, done of a node whose tokens are known


class Lap(NamedTuple):
    """What one batch took on one side, or the prompt."""

    seconds: float
    cpu_seconds: float  # of this process: what other programs do meanwhile is not in it
    model_seconds: float
    draw_seconds: float
    peak: Held
    tokens_fed: int


class Watches(NamedTuple):
    """Run while the model computes, and while tokens are drawn, whatever side asks."""

    model: Stopwatch
    draws: Stopwatch


class Batch(NamedTuple):
    """One batch on all sides: laps and children by side, and what the tree held behind it."""

    laps: dict[str, Lap]
    drawn: dict[str, list[Drawn]]
    unique_tokens: int  # with K/V, each counted once


class Lockstep:
    """Grows a tree. The first side's tokens decide what is expanded next; the others are to draw
    the same.

    `batches` has what was done so far, whole batches only: an interrupt loses the one that it
    meets.
    """

    def __init__(
        self,
        sides: Sequence[Side],
        prompt: Sequence[int],
        judge: Judge,
        watches: Watches,
        *,
        seed: int,
    ) -> None:
        self.sides = sides
        self.prompt = prompt
        self.judge = judge
        self.root = Node(0, None, seed_below(seed, 0))
        self.nodes = [self.root]
        self.roots: dict[str, Lap] = {}  # the prompts
        self.batches: list[Batch] = []
        self._watches = watches
        self._seed = seed
        self.on_batch: Callable[[], None] = lambda: None
        self._expanded = {self.root}

    def begin(self) -> None:
        """Give the prompt to all sides."""
        laps = {}
        for side in self.sides:
            _, lap = self._lap(side, partial(side.begin, self.prompt, self._seed))
            laps[side.name] = lap
        self.roots = laps

    def follow(self, plan: Plan) -> None:
        """Expand what a search asks for, to its end."""
        try:
            parents = next(plan)
            while True:
                parents = plan.send(self.expand(parents))
        except StopIteration:
            return

    def expand(self, parents: Sequence[Node]) -> list[Node]:
        """A new child of each of these nodes, which are equally deep; one batch on every side."""
        first = len(self.nodes)
        children = [parent.child(first + place) for place, parent in enumerate(parents)]
        numbers = [parent.number for parent in parents]
        seeds = [child.seed for child in children]
        laps: dict[str, Lap] = {}
        drawn: dict[str, list[Drawn]] = {}
        for side in self.sides:
            found, lap = self._lap(side, partial(side.expand, numbers, seeds))
            laps[side.name] = lap
            drawn[side.name] = found
        for parent, child, given in zip(parents, children, drawn[self.sides[0].name]):
            child.tokens = given.tokens
            child.logprob = parent.logprob + sum(given.logprobs)
            self.judge(child)
        self.nodes += children
        self._expanded.update(parents)
        self.batches.append(Batch(laps, drawn, self._unique_tokens()))
        self.on_batch()
        return children

    def _unique_tokens(self) -> int:
        """Last tokens of nodes without children have no K/V."""
        waiting = len(self.nodes) - len(self._expanded)
        return len(self.prompt) + sum(len(node.tokens) for node in self.nodes) - waiting

    def _lap(self, side: Side, run: Callable[[], T]) -> tuple[T, Lap]:
        """Run something on one side; what it returned, and what it took."""
        model = self._watches.model.seconds
        draws = self._watches.draws.seconds
        fed = side.tokens_fed()
        worked = time.process_time()
        begun = time.perf_counter()
        found = run()
        lap = Lap(
            seconds=time.perf_counter() - begun,
            cpu_seconds=time.process_time() - worked,
            model_seconds=self._watches.model.seconds - model,
            draw_seconds=self._watches.draws.seconds - draws,
            peak=side.peak(),
            tokens_fed=side.tokens_fed() - fed,
        )
        return found, lap
