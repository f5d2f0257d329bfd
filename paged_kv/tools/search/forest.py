"""Many searches side by side, each a tree of its own: all their batches are one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from paged_kv.integrations.huggingface.draws import seed_below
from paged_kv.tools.search.methods import FUNCTIONS, Plan
from paged_kv.tools.search.nodes import Node
from paged_kv.tools.search.presets import Preset
from paged_kv.tools.search.side import Rule
from paged_kv.tools.search.task import Task


class Growth(NamedTuple):
    """What became of all searches."""

    roots: list[Node]
    nodes: int  # without the roots
    tokens: int  # drawn
    seconds: float
    solved: int  # searches


class Growing(NamedTuple):
    """One search that goes on."""

    task: Task
    plan: Plan
    nodes: list[Node]
    parents: list[Node]  # of the batch that it asks for


class Forest:
    """Searches on a `PagedLM` or a `SearchPool`, one for each task."""

    def __init__(self, grower: Any, tasks: Sequence[Task], preset: Preset, rule: Rule) -> None:
        self._grower = grower
        self._tasks = tasks
        self._preset = preset
        self._rule = rule
        self._handles: dict[Node, Any] = {}

    def grow(self, method: str, seed: int, on_round: Callable[[], object] = lambda: None) -> Growth:
        """Search to the end; `on_round` is called after each simulation of all searches."""
        preset = self._preset
        begun = time.perf_counter()
        prompts = [task.prompt(preset.prompt_tokens) for task in self._tasks]
        roots = [Node(0, None, seed_below(seed, place)) for place in range(len(prompts))]
        self._handles = dict(zip(roots, self._grower.prefill(prompts, seed=seed)))
        going = []
        for task, root in zip(self._tasks, roots):
            plan = FUNCTIONS[method](root, preset.simulations, preset.width)
            going.append(Growing(task, plan, [root], next(plan)))
        everything = list(going)
        while going:
            going = self._round(going)
            on_round()
        grown = [node for each in everything for node in each.nodes[1:]]
        return Growth(
            roots,
            len(grown),
            sum(len(node.tokens) for node in grown),
            time.perf_counter() - begun,
            sum(any(node.solved for node in each.nodes) for each in everything),
        )

    def _round(self, going: Sequence[Growing]) -> list[Growing]:
        """A batch of each search, in one call; the searches that go on."""
        parents = [parent for each in going for parent in each.parents]
        drawn = self._grower.sample(
            [self._handles[parent] for parent in parents],
            max_new_tokens=self._rule.tokens,
            temperature=self._rule.temperature,
        )
        left = iter(drawn)
        left_over = []
        for each in going:
            children = [self._child(each, parent, next(left)) for parent in each.parents]
            try:
                left_over.append(each._replace(parents=each.plan.send(children)))
            except StopIteration:
                continue
        return left_over

    def _child(self, growing: Growing, parent: Node, handle: Any) -> Node:
        child = parent.child(len(growing.nodes))
        child.tokens = handle.new_tokens
        child.logprob = parent.logprob + sum(handle.logprobs or [])
        growing.task.judge(child)
        growing.nodes.append(child)
        self._handles[child] = handle
        return child
