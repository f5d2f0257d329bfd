"""What a recording costs: the same LightZero search with and without one, root step by root step.

    python benchmarks/recording_cost.py --json benchmarks/results/recording_cost.json

Three sides play the same environments with the same seeds on pages: `plain`, `control` (plain, too: how far two equal
sides lie apart is the noise of the machine) and `recorded`. Every root step is played by all of them in turn, the order
changes from step to step, and the recording's clock stands still while the others play. Ratios are medians over pairs
of the same root step; CPU time of the process beside wall-clock time, since other work on the machine touches it less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from paged_kv.profile import client
from paged_kv.profile.presets import PRESETS
from paged_kv.profile.side import Setting
from paged_kv.profile.ties import fixed_ties
from paged_kv.recording import Recorder, read_recording, record

SIDES = ("plain", "control", "recorded")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def measure(preset: str, roots: int, interval: float, path: Path) -> dict[str, Any]:
    """Seconds of each root step by side and clock, and what the recording says of itself."""
    chosen = PRESETS[preset]
    setting = Setting(chosen.envs, chosen.simulations, 0, torch.device("cpu"), 2, "read")
    sides = {name: client.LightZeroSide("paged", chosen, setting) for name in SIDES}
    seconds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in SIDES} for clock in CLOCKS}
    for step in range(chosen.warmup):
        for side in sides.values():
            side.step(chosen.simulations if step + 1 == chosen.warmup else 2, step)
    with record(sides["recorded"].wm, path, title=f"{preset}, paged", interval=interval) as recorder:
        stopped = time.perf_counter()
        for step in range(roots):
            decided = []
            for name in SIDES[step % 3 :] + SIDES[: step % 3]:
                if name == "recorded":
                    go_on(recorder, stopped)
                before = {clock: read() for clock, read in CLOCKS.items()}
                decided.append(sides[name].step(chosen.simulations, chosen.warmup + step).visits)
                for clock, read in CLOCKS.items():
                    seconds[clock][name].append(read() - before[clock])
                if name == "recorded":
                    stopped = time.perf_counter()
            assert decided[0] == decided[1] == decided[2], "the sides searched different trees"
        go_on(recorder, stopped)
    recording = read_recording(path)
    return {
        "preset": preset, "roots": roots, "simulations": chosen.simulations, "interval_s": interval,
        **{clock: figures(by_side, chosen.simulations) for clock, by_side in seconds.items()},
        "recording": {"seconds": recording.seconds, "samples": len(recording.samples), "events": len(recording.events),
                      "trees": len(recording.trees), "bytes": path.stat().st_size},
    }


def go_on(recorder: Recorder, stopped: float) -> None:
    """Have the time since `stopped` not count for the recording."""
    recorder._start += time.perf_counter() - stopped


def figures(seconds: dict[str, list[float]], simulations: int) -> dict[str, Any]:
    """Medians by side, and of the paired ratios to the plain side."""
    ratios = {name: [a / b for a, b in zip(seconds[name], seconds["plain"])] for name in SIDES[1:]}
    return {
        "us_per_simulation": {n: statistics.median(s) / simulations * 1e6 for n, s in seconds.items()},
        "ratio": {name: statistics.median(found) for name, found in ratios.items()},
        "ratio_of_sums": {name: sum(seconds[name]) / sum(seconds["plain"]) for name in SIDES[1:]},
    }


def show(found: dict[str, Any]) -> None:
    """The figures, for people."""
    about = found["recording"]
    print(f"{found['preset']}: {found['roots']} root steps, a sample every {found['interval_s'] * 1000:g} ms at most; "
          f"{about['samples']} samples, {about['events']} events, {about['trees']} trees, {about['bytes']:,} bytes")
    for clock in CLOCKS:
        row = found[clock]
        print(f"{clock:>5}: " + ", ".join(f"{n} {us:,.0f} us" for n, us in row["us_per_simulation"].items())
              + " a simulation; " + ", ".join(f"{n} / plain {r:.4f}" for n, r in row["ratio"].items()))


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="cartpole")
    parser.add_argument("--roots", type=int, default=300)
    parser.add_argument("--interval", type=float, default=0.05, help="seconds between two samples at the least")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with client.quiet():
        tree = client.tree_file()
    with fixed_ties(tree), tempfile.TemporaryDirectory() as folder:
        found = measure(options.preset, options.roots, options.interval, Path(folder) / "recording.jsonl")
    show(found)
    if options.json:
        machine = {"system": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version(),
                   "torch": torch.__version__}
        options.json.write_text(json.dumps({"schema": 1, "machine": machine, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
