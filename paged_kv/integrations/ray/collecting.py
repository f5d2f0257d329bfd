"""LightZero's collector on pages, whose every call follows from weights and seeds.

Importing this imports no LightZero; making a `SeededCollector` does.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from paged_kv.integrations.ray.weights import Weight, load
from paged_kv.integrations.ties import fixed_ties
from paged_kv.recording.target import find


class CollectorFigures(NamedTuple):
    """What a collector holds and did."""

    env_steps: int = 0
    queries: int = 0  # of contexts
    hits: int = 0
    old_used: int = 0  # contexts of other weights than those of the step that went on from them
    evicted: int = 0
    pages: int = 0  # in use
    bytes_in_use: int = 0
    pages_allocated: int = 0
    pages_copied: int = 0
    pages_freed: int = 0
    calls: int = 0
    busy_seconds: float = 0.0


class SeededCollector:
    """A UniZero policy, put on pages, and LightZero's own collector on it.

    - `make`: makes both; the collector is a `MuZeroCollector` or `MuZeroSegmentCollector`. All
      seeds are 0 there, so that wherever it is called the weights are the same.
    - `options`: of `integrations.lightzero.attach`. `weights`: what becomes of contexts whose
      weights changed, also as for `attach`.

    The environments have to draw from what their `seed` sets, and from `random` and numpy.
    """

    def __init__(
        self,
        make: Callable[[], tuple[Any, Any]],
        options: Mapping[str, Any] | None = None,
        weights: str = "drop",
    ) -> None:
        # First: a policy that was made before has no hooks where it hands on its methods.
        from paged_kv.integrations.lightzero import attach  # isort: skip
        from lzero.mcts.ctree.ctree_muzero import mz_tree

        seed_all(0)
        policy, self.collector = make()
        attach(policy, weights=weights, **dict(options or {}))
        self._mode = policy.collect_mode
        self.model = self._mode.get_attribute("collect_model")
        self._tree = str(mz_tree.__file__)
        self._steps = 0

    @property
    def world_model(self) -> Any:
        """The world model that searches."""
        return self.model.world_model

    def load(self, weights: Mapping[str, Weight]) -> None:
        """Search with these weights from now on. Raises BadArgument for those of another model."""
        load(self.model, weights)
        if not self.world_model.paged.rotary:
            self.world_model.precompute_pos_emb_diff_kv()

    def collect(self, seed: int, fresh: bool = True, **arguments: Any) -> Any:
        """What the collector's `collect(**arguments)` returns.

        With `fresh`, environments and policy begin anew, and the result depends on the weights,
        `seed` and `arguments` alone; else episodes go on where the call before left them. Sets the
        seeds of `random`, numpy and torch. Equal scores in the tree are decided always the same
        way, on 64-bit Linux.
        """
        if fresh:
            self._begin_anew(seed)
        seed_all(seed)
        before = self.collector.envstep
        with fixed_ties(self._tree):
            data = self.collector.collect(**arguments)
        self._steps += self.collector.envstep - before
        return data

    def figures(self) -> CollectorFigures:
        """What is held, and was done. Cost: O(1)."""
        paged = self.world_model.paged
        pages = paged.cache
        lookups = find(self.model).lookups()
        return CollectorFigures(
            env_steps=self._steps,
            queries=lookups.queries if lookups else 0,
            hits=lookups.hits if lookups else 0,
            old_used=paged.old.used,
            evicted=lookups.evictions if lookups else 0,
            pages=pages.pages_in_use,
            bytes_in_use=pages.bytes_in_use,
            pages_allocated=pages.stats.allocated_pages,
            pages_copied=pages.stats.copied_pages,
            pages_freed=pages.stats.freed_pages,
        )

    def _begin_anew(self, seed: int) -> None:
        envs = self.collector._env
        envs.seed(spread(seed, envs.env_num))
        self.collector.reset_env()
        self.collector.reset()
        self._mode.reset()
        self.world_model.clear_caches()


def seed_all(seed: int) -> None:
    """Set the seeds of all generators of this process that LightZero draws from."""
    random.seed(seed)
    np.random.seed(spread(seed, 1)[0])
    torch.manual_seed(seed)


def spread(seed: int, count: int) -> list[int]:
    """So many seeds that follow from one, each below 2**31.

    >>> spread(7, 2) == spread(7, 3)[:2]
    True
    """
    return [int(word) >> 1 for word in np.random.SeedSequence(seed).generate_state(count)]
