"""Searches as they were, to be played again: what was expanded from what, and the model's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from paged_kv.integrations.lightzero.shared.evictable import Name
from paged_kv.integrations.ties import fixed_ties
from paged_kv.search_order import Constants
from paged_kv.tools.profile import client
from paged_kv.tools.profile.presets import PRESETS, Preset
from paged_kv.tools.profile.side import Setting
from paged_kv.tools.reference.contexts import ROOT, PagedContexts
from paged_kv.tools.reference.search import DISCOUNT, EXPLORATION, search
from paged_kv.tools.reference.world_model import Batch, Prediction, ReferenceWorldModel

REFERENCE = "reference"  # the client without LightZero; all other workloads are presets of it
WORKLOADS = (*PRESETS, REFERENCE)
SMALL = Preset(
    REFERENCE,
    layers=2,
    embed=64,
    heads=2,
    context=64,
    rotary=True,
    actions=4,
    simulations=50,
    observation="vector",
    warmup=0,
    roots=0,
    metered=0,
    counted=0,
)
INPUTS = 4  # numbers of an observation of the reference model


class Simulation(NamedTuple):
    """What one simulation made: a node a row, from a parent by an action; and what the model said
    of it.
    """

    parents: list[Name]
    actions: list[int]
    rewards: list[float]
    values: list[float]
    logits: list[list[float]]  # of the policy


class Trace(NamedTuple):
    """One search of a batch of trees."""

    rows: int
    simulations: list[Simulation]
    constants: Constants = Constants()  # of the search that made it

    @property
    def nodes(self) -> int:
        """All that were made."""
        return self.rows * len(self.simulations)


def traces(workload: str, searches: int, seed: int = 0) -> list[Trace]:
    """The searches of a workload, root step by root step. The same numbers for the same seed."""
    if workload == REFERENCE:
        return _reference_traces(searches, seed)
    return _lightzero_traces(PRESETS[workload], searches, seed)


# -- LightZero's


class HeardNodes:
    """The nodes of a search on pages, with a note of all that the tree tells them."""

    def __init__(self, nodes: Any, simulations: list[Simulation]) -> None:
        self._nodes = nodes
        self._simulations = simulations
        self._parents: list[Name] = []
        self._actions: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._nodes, name)

    def __len__(self) -> int:
        return len(self._nodes)

    def choose(
        self, simulations: Sequence[int], rows: Sequence[int], actions: Sequence[Any]
    ) -> None:
        """The leaves that the next step starts from, and what it tries there."""
        self._parents = list(zip(simulations, rows))
        self._actions = [int(np.ravel(action)[0]) for action in actions]
        self._nodes.choose(simulations, rows, actions)

    def learn(
        self, rewards: Sequence[float], values: Sequence[float], policies: Sequence[Any]
    ) -> None:
        """What the model said of the nodes that the last step made."""
        logits = [[float(number) for number in row] for row in policies]
        self._simulations.append(
            Simulation(self._parents, self._actions, _floats(rewards), _floats(values), logits)
        )
        self._nodes.learn(rewards, values, policies)


def _floats(numbers: Sequence[Any]) -> list[float]:
    return [float(np.ravel(number)[0]) for number in numbers]


def _lightzero_traces(preset: Preset, searches: int, seed: int) -> list[Trace]:
    setting = Setting(preset.envs, preset.simulations, seed, torch.device("cpu"), 2, "read")
    found = []
    with client.quiet():
        tree = client.tree_file()
    with fixed_ties(tree):
        side = client.LightZeroSide("paged", preset, setting)
        for step in range(preset.warmup):
            side.step(2, step)
        paged = side.wm.paged
        nodes = paged.nodes
        for step in range(searches):
            made: list[Simulation] = []
            paged.nodes = HeardNodes(nodes, made)
            side.step(preset.simulations, preset.warmup + step)
            found.append(Trace(preset.envs, made))
    return found


# -- the reference client's


class HeardContexts:
    """Contexts of the reference client, with a note of the parents that are opened."""

    def __init__(self, contexts: PagedContexts) -> None:
        self.parents: list[Name] = []
        self._contexts = contexts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._contexts, name)

    def open(self, keys: Sequence[int]) -> Batch:
        """The contexts of a batch; its nodes are numbered from 0, and ROOT is -1."""
        self.parents = [(key + 1, row) for row, key in enumerate(keys)]
        return self._contexts.open(keys)


class HeardModel:
    """The reference model, with a note of what it says of new nodes."""

    def __init__(self, model: ReferenceWorldModel, contexts: HeardContexts) -> None:
        self.simulations: list[Simulation] = []
        self._model = model
        self._contexts = contexts

    def act(self, batch: Batch, actions: Sequence[int], positions: torch.Tensor) -> Prediction:
        """Append an action and the observation that the model expects of it."""
        said = self._model.act(batch, actions, positions)
        self.simulations.append(
            Simulation(
                self._contexts.parents,
                list(actions),
                said.reward.tolist(),
                said.value.tolist(),
                said.policy.tolist(),
            )
        )
        return said


def _reference_traces(searches: int, seed: int) -> list[Trace]:
    """Searches from roots of one random observation each."""
    constants = Constants(base=1e12, init=EXPLORATION, discount=DISCOUNT, scaled=False)
    preset = SMALL
    rows = preset.envs
    random = torch.Generator().manual_seed(seed)
    model = ReferenceWorldModel(
        layers=preset.layers,
        embed=preset.embed,
        heads=preset.heads,
        actions=preset.actions,
        observation=INPUTS,
        seed=seed,
    )
    found = []
    for _ in range(searches):
        size = preset.embed // preset.heads
        contexts = PagedContexts(preset.layers, preset.heads, size, preset.context, rows)
        observations = torch.randn(rows, INPUTS, generator=random)
        batch = contexts.open([ROOT] * rows)
        root = model.observe(batch, model.encode(observations), torch.zeros(rows, dtype=torch.long))
        contexts.store(ROOT)
        heard = HeardContexts(contexts)
        told = HeardModel(model, heard)
        search(told, heard, root, [0] * rows, preset.simulations)  # type: ignore[arg-type]
        found.append(Trace(rows, told.simulations, constants))
    return found
