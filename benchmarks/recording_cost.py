"""What a recording costs: the same LightZero search with and without one, root step by root step.

    python benchmarks/recording_cost.py --json benchmarks/results/recording_cost.json

Two sides play the same environments with the same seeds on pages. In every root step one of them is
recorded: each in turn, going first and second equally often, so that neither what differs between
two equal sides nor the order counts. A recording's clock stands still while its side is not
recorded. The ratio is the geometric mean of two medians, of the root steps in which the one side
was recorded and of those in which the other was; `apart` is how much slower the first side is than
the second, which cancels out, and says how much such figures vary on this machine. CPU time of the
process stands beside wall-clock time, since other work on the machine touches it less; on a busy
machine it overstates the samples, which keep to a share of the time on the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from paged_kv.integrations.ties import fixed_ties
from paged_kv.recording import Recorder, read_recording, record
from paged_kv.tools.profile import client
from paged_kv.tools.profile.presets import PRESETS
from paged_kv.tools.profile.side import Setting

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Step(NamedTuple):
    """One root step: the seconds of each clock, and the visits of each environment's root."""

    seconds: dict[str, float]
    visits: list[list[int]]


class Side:
    """LightZero's policy on pages, with a recording that can be switched on for a root step."""

    def __init__(
        self,
        preset: str,
        path: Path,
        interval: float,
        accesses: bool,
        stack: contextlib.ExitStack,
    ) -> None:
        chosen = PRESETS[preset]
        setting = Setting(chosen.envs, chosen.simulations, 0, torch.device("cpu"), 2, "read")
        self._player = client.LightZeroSide("paged", chosen, setting)
        self.path = path
        for step in range(chosen.warmup):
            self._player.step(chosen.simulations if step + 1 == chosen.warmup else 2, step)
        made = record(
            self._player.wm, path, title=f"{preset}, paged", interval=interval, accesses=accesses
        )
        self._recorder: Recorder = stack.enter_context(made)
        self._recorder._verbs.end()
        self._stopped = time.perf_counter()

    def step(self, simulations: int, seed: int, recorded: bool) -> Step:
        """One root step."""
        with self._recording() if recorded else contextlib.nullcontext():
            before = {clock: read() for clock, read in CLOCKS.items()}
            outcome = self._player.step(simulations, seed)
            spent = {clock: read() - before[clock] for clock, read in CLOCKS.items()}
        return Step(spent, outcome.visits)

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        verbs = self._recorder._verbs
        paused = time.perf_counter() - self._stopped
        self._recorder._start += paused
        verbs.due += paused
        verbs.begin(lambda tables: None)
        yield
        verbs.end()
        self._stopped = time.perf_counter()


def measure(
    preset: str, roots: int, interval: float, accesses: bool, folder: Path
) -> dict[str, Any]:
    """The figures of one preset."""
    chosen = PRESETS[preset]
    ratios: dict[str, tuple[list[float], list[float]]] = {clock: ([], []) for clock in CLOCKS}
    plain: dict[str, list[float]] = {clock: [] for clock in CLOCKS}
    with contextlib.ExitStack() as stack:
        paths = [folder / f"{number}.jsonl" for number in range(2)]
        sides = [Side(preset, path, interval, accesses, stack) for path in paths]
        for step in range(roots):
            recorded = step % 2
            first = step // 2 % 2
            found = {
                side: sides[side].step(chosen.simulations, chosen.warmup + step, side == recorded)
                for side in (first, 1 - first)
            }
            assert found[0].visits == found[1].visits, "the sides searched different trees"
            for clock in CLOCKS:
                with_it = found[recorded].seconds[clock]
                without = found[1 - recorded].seconds[clock]
                ratios[clock][recorded].append(with_it / without)
                plain[clock].append(without / chosen.simulations * 1e6)
    recording = read_recording(sides[0].path)
    return {
        "preset": preset,
        "roots": roots,
        "simulations": chosen.simulations,
        "interval_s": interval,
        "accesses": accesses,
        **{clock: figures(*ratios[clock], plain[clock]) for clock in CLOCKS},
        "recording": {
            "seconds": recording.seconds,
            "samples": len(recording.samples),
            "events": len(recording.events),
            "trees": len(recording.trees),
            "bytes": sides[0].path.stat().st_size,
        },
    }


def figures(first: list[float], second: list[float], plain: list[float]) -> dict[str, float]:
    """Recorded / plain, how far the sides are apart, and the plain time of a simulation."""
    one = statistics.median(first)
    two = statistics.median(second)
    return {
        "ratio": math.sqrt(one * two),
        "apart": math.sqrt(one / two),
        "plain_us_per_simulation": statistics.median(plain),
    }


def show(found: dict[str, Any]) -> None:
    """The figures, for people."""
    about = found["recording"]
    written = ", ".join(
        f"{about[name]:,} {name}" for name in ("samples", "events", "trees", "bytes")
    )
    print(f"{found['preset']}: {found['roots']} root steps")
    print(f"one of two recordings: {about['seconds']:.1f} s, {written}")
    for clock in CLOCKS:
        row = found[clock]
        plain = f"{row['plain_us_per_simulation']:,.0f} us a simulation"
        print(f"{clock:>5}: recorded / plain {row['ratio']:.4f}; plain {plain}", end="; ")
        print(f"the sides {row['apart']:.4f} apart")


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=list(PRESETS), default="cartpole")
    parser.add_argument("--roots", type=int, default=400, help="root steps, a multiple of 4")
    parser.add_argument(
        "--interval", type=float, default=0.05, help="seconds between two samples at the least"
    )
    parser.add_argument("--accesses", action="store_true", help="keep what is read when, too")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with client.quiet():
        tree = client.tree_file()
    with fixed_ties(tree), tempfile.TemporaryDirectory() as folder:
        found = measure(
            options.preset, options.roots, options.interval, options.accesses, Path(folder)
        )
    show(found)
    if options.json:
        machine = {
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        options.json.write_text(
            json.dumps({"schema": 1, "machine": machine, "results": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
