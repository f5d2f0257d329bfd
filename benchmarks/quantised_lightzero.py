"""What LightZero's searches decide on pages of codes, root step by root step, against exact pages.

Both sides see the same observations: the environments of the second one are led by the actions of
the first, which are its own last actions, too. So each root step compares one search, with windows
that went on from equal tokens. Ties of the tree are broken alike. The presets are those of
`paged-kv profile`: the weights of cartpole are trained, all others random, which leaves a search
less sure than any trained model does.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import numpy as np
import torch

from paged_kv.integrations.ties import fixed_ties
from paged_kv.tools.profile.client import LightZeroSide, quiet, tree_file
from paged_kv.tools.profile.presets import PRESETS, Preset
from paged_kv.tools.profile.side import Outcome, Setting

SEED = 0
SHORT = 2  # simulations of a root step that only fills windows


class LedSide(LightZeroSide):
    """A side that may be led: it acts as it is told, whatever it decided."""

    def __init__(self, preset: Preset, setting: Setting) -> None:
        super().__init__("paged", preset, setting)
        self._told: list[int] | None = None
        decide = self._world.step
        self._world.step = lambda actions: decide(self._told or actions)

    def follow(self, simulations: int, seed: int, actions: list[int] | None) -> Outcome:
        """One root step, after which `actions` are taken; its own by default."""
        self._told = actions
        outcome = self.step(simulations, seed)
        if actions is not None:
            self._policy.last_batch_action = list(actions)
        return outcome


def compared(preset: Preset, roots: int) -> dict[str, Any]:
    """Shares of root steps and environments in which both decide alike."""
    device = torch.device("cpu")
    setting = Setting(preset.envs, preset.simulations, SEED, device, 2, "read")
    exact = LedSide(preset, setting)
    small = LedSide(preset, dataclasses.replace(setting, storage="int8"))
    pairs = []
    for number in range(-preset.warmup, roots):
        simulations = preset.simulations if number >= 0 else SHORT
        one = exact.follow(simulations, number + preset.warmup, None)
        other = small.follow(simulations, number + preset.warmup, one.actions)
        if number >= 0:
            pairs.append((one, other))
    return {"preset": preset.name, "decisions": roots * preset.envs, **figures(pairs)}


def figures(pairs: list[tuple[Outcome, Outcome]]) -> dict[str, float]:
    """How root steps differ."""
    actions = [np.array(one.actions) == other.actions for one, other in pairs]
    visits = [np.array([one.visits, other.visits], dtype=float) for one, other in pairs]
    shares = [each / each.sum(-1, keepdims=True) for each in visits]
    moved = [np.abs(one - other).sum(-1) / 2 for one, other in shares]
    best = [one.argmax(-1) == other.argmax(-1) for one, other in visits]
    values = [np.abs(np.subtract(one.values, other.values)) for one, other in pairs]
    sizes = [np.abs(one.values) for one, _ in pairs]
    return {
        "same_action": float(np.mean(actions)),
        "same_most_visited": float(np.mean(best)),
        "same_visits": float(np.mean(np.concatenate(moved) == 0)),
        "visits_moved_mean": float(np.mean(moved)),
        "visits_moved_most": float(np.max(moved)),
        "values_differ_mean": float(np.mean(values)),
        "values_mean": float(np.mean(sizes)),
    }


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All presets."""
    with quiet():
        tree = tree_file()
    found = []
    with fixed_ties(tree):
        for preset in PRESETS.values():
            found.append(compared(preset, options.roots or preset.roots))
    return found


def told(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'preset':10}{'decisions':>10}{'action':>9}{'most visited':>14}{'visits':>9}"
        f"{'moved':>9}{'at most':>9}{'values':>10}{'of':>9}"
    ]
    lines += [
        f"{row['preset']:10}{row['decisions']:10}{row['same_action']:9.1%}"
        f"{row['same_most_visited']:14.1%}{row['same_visits']:9.1%}{row['visits_moved_mean']:9.2%}"
        f"{row['visits_moved_most']:9.1%}{row['values_differ_mean']:10.5f}{row['values_mean']:9.4f}"
        for row in rows
    ]
    return "\n".join(lines)
