"""Whether short steps decide what LightZero's own steps decide.

    OMP_NUM_THREADS=1 python benchmarks/lean_fidelity.py --actions 2000 \
        --json benchmarks/results/lean_fidelity.json

Two policies of LightZero 0.2.0 play the presets of `paged-kv profile`, both on pages with the same
weights, random numbers and observations: one with step="lightzero", the others in the `--ways`
asked for, of which "lean" is short steps as they are. Ties of the C++ tree are broken alike. After
every root step the actions, the visit counts of all actions and the values (searched and
predicted) are compared; a value is apart by |a - b| / max(1, |a|). `--minutes` ends a preset early:
what was compared until then is what the result states. Times are of whole root steps, taken in
turn, and meant for orientation: `paged-kv profile` measures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from machine import processor

from paged_kv.integrations.lightzero import attach
from paged_kv.integrations.ties import fixed_ties
from paged_kv.tools.profile import client
from paged_kv.tools.profile.presets import PRESETS, Preset
from paged_kv.tools.profile.side import Outcome, Setting

OWN = "lightzero"
WAYS: dict[str, dict[str, Any]] = {
    OWN: {"step": "lightzero"},
    "lean": {"step": "lean"},
    "compiled": {"step": "lean", "compile": True},
    "pages": {"step": "lean", "attention": "pages"},
    "pages, packed": {"step": "lean", "attention": "pages", "linears": "packed"},
}
FEW = 2  # simulations of a warm-up step


class Agreement:
    """How far one way to take steps agrees with LightZero's own."""

    def __init__(self) -> None:
        self.actions = 0
        self.visits = 0
        self.apart = 0.0

    def add(self, own: Outcome, other: Outcome) -> None:
        """One root step."""
        self.actions += sum(a != b for a, b in zip(own.actions, other.actions))
        self.visits += sum(a != b for a, b in zip(own.visits, other.visits))
        values = (abs(a - b) / max(1.0, abs(a)) for a, b in zip(own.values, other.values))
        self.apart = max(self.apart, *values)

    def as_dict(self) -> dict[str, float]:
        """The counts and the largest difference."""
        return {
            "actions_different": self.actions,
            "visit_counts_different": self.visits,
            "values_apart": self.apart,
        }


def sides(preset: Preset, ways: list[str], seed: int) -> dict[str, client.LightZeroSide]:
    """A policy for each way to take steps."""
    setting = Setting(preset.envs, preset.simulations, seed, torch.device("cpu"), 2, "read")
    made = {}
    for way in ways:
        side = client.LightZeroSide("paged", preset, setting)
        with client.quiet():
            attach(side.wm, at=setting.at, padding=setting.padding, **WAYS[way])
        made[way] = side
    return made


def root_steps(preset: Preset, actions: int, seed: int) -> Iterator[tuple[int, int]]:
    """Simulations and seed of each root step: windows are filled with few of them first."""
    for index in range(-preset.warmup, -(-actions // preset.envs)):
        yield preset.simulations if index >= -1 else FEW, seed * 1_000_003 + index + preset.warmup


def compare(preset: Preset, ways: list[str], actions: int, minutes: float, seed: int) -> Any:
    """Play one preset in all ways."""
    players = sides(preset, ways, seed)
    agreed = {way: Agreement() for way in ways[1:]}
    times: dict[str, list[float]] = {way: [] for way in ways}
    compared = 0
    end = time.monotonic() + 60 * minutes
    for number, (simulations, step_seed) in enumerate(root_steps(preset, actions, seed)):
        outcomes = {}
        for way in ways if number % 2 else ways[::-1]:
            start = time.perf_counter()
            outcomes[way] = players[way].step(simulations, step_seed)
            times[way].append((time.perf_counter() - start) / simulations * 1e6)
        for way, agreement in agreed.items():
            agreement.add(outcomes[OWN], outcomes[way])
        compared += preset.envs
        if time.monotonic() > end:
            break
    return {
        "actions_compared": compared,
        "simulations": preset.simulations,
        "agreement": {way: agreement.as_dict() for way, agreement in agreed.items()},
        "search_us_per_simulation": {
            way: round(statistics.median(taken[preset.warmup :] or taken))
            for way, taken in times.items()
        },
    }


def main() -> None:
    """Compare, print, and save what is done after every preset."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=list(PRESETS))
    parser.add_argument("--actions", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=60, help="at most, for each preset")
    parser.add_argument("--ways", nargs="+", default=["lean"], choices=list(WAYS)[1:])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ways = [OWN, *options.ways]
    with client.quiet():
        tree = client.tree_file()
    result: dict[str, Any] = {
        "processor": processor(),
        "torch": torch.__version__,
        "presets": {},
    }
    if options.json and options.json.exists():
        result["presets"] = json.loads(options.json.read_text())["presets"]
    with fixed_ties(tree):
        for name in options.presets:
            found = compare(PRESETS[name], ways, options.actions, options.minutes, options.seed)
            result["presets"][name] = found
            print(name, json.dumps(found))
            if options.json:
                options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
