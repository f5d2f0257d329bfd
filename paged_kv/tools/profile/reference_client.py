"""The same comparison on the reference world model, where LightZero is missing."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch

from paged_kv.cache import PagedKVCache
from paged_kv.step import Step
from paged_kv.tools.profile.counters import (
    CACHE,
    HEADS,
    LAYER,
    MODEL,
    REST,
    TREE,
    Probe,
    storage_bytes,
)
from paged_kv.tools.profile.presets import Preset
from paged_kv.tools.profile.side import TITLES, Held, Lookups, Outcome, Setting
from paged_kv.tools.profile.worlds import VECTOR_SHAPE, make_world
from paged_kv.tools.reference.contexts import ROOT, DenseBatch, DenseContexts, PagedContexts
from paged_kv.tools.reference.search import Node, search
from paged_kv.tools.reference.world_model import ReferenceWorldModel


class ReferenceSide:
    """The reference world model with one kind of contexts, and its own environments."""

    def __init__(self, kind: str, preset: Preset, setting: Setting) -> None:
        self.kind = kind
        self.title = TITLES["reference"][kind]
        self.envs = setting.envs
        self.on_simulation: Callable[[], None] | None = None
        self.token_bytes = preset.layers * 2 * preset.embed * 4
        self._model = ReferenceWorldModel(
            layers=preset.layers,
            embed=preset.embed,
            heads=preset.heads,
            actions=preset.actions,
            observation=VECTOR_SHAPE[0],
            seed=setting.seed,
        )
        shape = (
            preset.layers,
            preset.heads,
            preset.embed // preset.heads,
            preset.context,
            setting.envs,
        )
        self.contexts: DenseContexts | PagedContexts = (
            PagedContexts(*shape, page_size=setting.page_size)
            if kind == "paged"
            else DenseContexts(*shape)
        )
        self._world = make_world(preset, setting.envs, setting.seed)
        self._last: list[int] | None = None

    def step(self, simulations: int, seed: int) -> Outcome:
        """One root step: append what was done and seen to the roots, search, then act."""
        positions = torch.tensor(self._world.timesteps) * 2
        self.contexts.forget_nodes()
        batch = self.contexts.open([ROOT] * self.envs)
        if self._last is not None:
            self._model.tokens(batch, self._model.embed_actions(self._last), positions - 1)
        seen = self._model.observe(
            batch, self._model.encode(torch.from_numpy(self._world.observations)), positions
        )
        self.contexts.store(ROOT)
        trees = search(
            self._model, self.contexts, seen, self._world.timesteps, simulations, self._simulated
        )
        self._last = _choose(trees, seed)
        self._world.step(self._last)
        return Outcome(
            self._last, [[c.visits for c in t.children] for t in trees], [t.value for t in trees]
        )

    def probes(self) -> list[Probe]:
        """The methods that are cache work. The model is never called from inside one."""
        batch = Step if self.kind == "paged" else DenseBatch
        names = ("open", "store", "forget_nodes")
        return [
            *(Probe(self.contexts, name, CACHE) for name in names),
            Probe(batch, "update", LAYER),
            Probe(batch, "get", LAYER),
        ]

    def parts(self) -> list[Probe]:
        """The methods that are work of the model, its heads or the tree."""
        model = self._model
        heads = (model.latent_head, model.policy_head, model.scalar_heads)
        return [
            Probe(sys.modules[__name__], "search", TREE),
            Probe(model, "act", REST),
            Probe(model, "encode", MODEL),
            Probe(model, "tokens", MODEL),
            *(Probe(head, "forward", HEADS) for head in heads),
        ]

    def held(self) -> Held:
        """What the stores and the working buffers take now."""
        if isinstance(self.contexts, DenseContexts):
            return Held(
                storage_bytes(self.contexts.tensors()), storage_bytes(self.contexts.working())
            )
        cache = self.contexts.cache
        sharing = cache.logical_tokens / max(1, cache.stored_tokens)
        return Held(cache.bytes_in_use, cache.working_bytes, cache.bytes_reserved, sharing)

    def root_tokens(self) -> int:
        """Tokens in the root windows of all environments."""
        return self.contexts.root_tokens()

    def lookups(self) -> Lookups:
        """Lookups since the side was made."""
        return Lookups(self.contexts.lookups, self.contexts.hits)

    def pages(self) -> PagedKVCache | None:
        """The paged cache, where this side has one."""
        return None if isinstance(self.contexts, DenseContexts) else self.contexts.cache

    def totals(self) -> dict[str, int]:
        """Pages copied and entries evicted, for the paged contexts."""
        if isinstance(self.contexts, DenseContexts):
            return {}
        combined = self.contexts.manager.stats.combined
        return {
            "copied_pages": self.contexts.cache.stats.copied_pages,
            "evictions": combined.evictions,
        }

    def _simulated(self) -> None:
        if self.on_simulation is not None:
            self.on_simulation()


def _choose(trees: list[Node], seed: int) -> list[int]:
    """An action per tree, drawn in proportion to the visits."""
    random = np.random.default_rng(seed)
    visits = [
        np.array([child.visits for child in tree.children], dtype=np.float64) for tree in trees
    ]
    return [int(random.choice(len(v), p=v / v.sum())) for v in visits]
