"""Many searches side by side: the same on one lm and on workers."""

from __future__ import annotations

import argparse

import pytest
from pool_models import a_lm, a_pool
from tiny_models import VOCABULARY

from paged_kv.tools.commands import search
from paged_kv.tools.commands.search_workers import preset_of, unusable
from paged_kv.tools.search.forest import Forest, Growth
from paged_kv.tools.search.nodes import Node
from paged_kv.tools.search.presets import METHODS, Preset
from paged_kv.tools.search.side import Rule
from paged_kv.tools.search.task import Likely

SMALL = Preset("small", prompt_tokens=12, simulations=3, width=4, tokens=3)


def everything(growth: Growth) -> list[tuple[tuple[int, ...], float, int]]:
    """All nodes of all trees, in order."""
    found = []
    waiting: list[Node] = list(growth.roots)
    while waiting:
        node = waiting.pop(0)
        found.append((node.drawn, round(node.value, 3), node.visits))
        waiting += node.children
    return found


@pytest.mark.parametrize("method", METHODS)
def test_workers_grow_the_trees_that_one_lm_grows(method: str) -> None:
    grown = []
    rounds = []
    for grower in (a_lm(), a_pool(1)[0], a_pool(3)[0]):
        tasks = [Likely(VOCABULARY, seed) for seed in range(5)]
        forest = Forest(grower, tasks, SMALL, Rule(SMALL.tokens, 0.8))
        growth = forest.grow(method, 7, lambda: rounds.append(1))
        assert growth.nodes == 5 * 12
        assert growth.tokens == 5 * 12 * 3
        assert growth.solved == 0
        grown.append(everything(growth))
    assert grown[0] == grown[1] == grown[2]
    assert len(rounds) == 3 * 3


def parsed(*arguments: str) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser()
    search.add(parser.add_subparsers())
    return parser.parse_args(["search", *arguments])


def test_what_cannot_be_asked_for_together() -> None:
    def told(*arguments: str) -> str | None:
        return unusable(parsed(*arguments))

    assert told() is None
    assert told("--workers", "2", "--searches", "5") is None
    assert told("--searches", "5") == "--searches needs --workers"
    assert "--html" in (told("--workers", "2", "--html", "x.html") or "")
    assert "one preset" in (told("--workers", "2", "--preset", "all") or "")
    options = parsed("--workers", "2", "--width", "3")
    assert preset_of(options).width == 3
    assert preset_of(options).tokens == 16
