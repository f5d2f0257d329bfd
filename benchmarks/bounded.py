"""What a search costs in less memory than it wants, and whether it still finds the same.

    python benchmarks/bounded.py --json benchmarks/results/bounded.json

For each preset LightZero's search is played on pages without a limit, and then with room for the
roots and a part of what the search adds to them, under each eviction order. All play the same
environments with the same seeds and decide ties alike. `same` counts root steps, out of all, whose
visits are those of the search without a limit. `computed again` counts nodes whose context was
evicted and made once more, for each node that the search made. Times are those of the whole search,
relative to no limit; medians of the root steps after the warm-up, one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import processor

from paged_kv.integrations.lightzero import attach
from paged_kv.integrations.ties import fixed_ties
from paged_kv.tools.profile import client
from paged_kv.tools.profile.presets import PRESETS, Preset
from paged_kv.tools.profile.side import Outcome, Setting

ORDERS = ("search", "lru", "fifo")
ROOTS = {"cartpole": 16, "atari": 4, "atari-8l": 3, "long": 4, "memory": 4}


class Played(NamedTuple):
    """What came of playing a few root steps."""

    outcomes: list[Outcome]
    seconds: float  # of a root step
    peak: int  # pages
    held: int  # pages of the roots, after the last search
    again: int  # nodes computed again


def play(preset: Preset, roots: int, **options: Any) -> Played:
    """Play the warm-up and so many root steps, on a pool with these options."""
    setting = Setting(preset.envs, preset.simulations, 0, torch.device("cpu"), 2, "read")
    side = client.LightZeroSide("paged", preset, setting)
    attach(side.wm, **options)
    outcomes = []
    times = []
    for step in range(preset.warmup + roots):
        warm = step < preset.warmup
        begin = time.perf_counter()
        outcomes.append(side.step(2 if warm else preset.simulations, step))
        if not warm:
            times.append(time.perf_counter() - begin)
    cache = side.wm.paged.cache
    return Played(
        outcomes,
        statistics.median(times),
        cache.stats.peak_pages,
        cache.pages_in_use,
        getattr(side.wm.paged.nodes, "recomputed", 0),
    )


def compare(name: str, roots: int, part: float) -> list[dict[str, Any]]:
    """A row for each order."""
    preset = PRESETS[name]
    ample = play(preset, roots)
    pages = ample.held + int((ample.peak - ample.held) * part)
    made = preset.envs * (2 * preset.warmup + preset.simulations * roots)
    rows = []
    for order in ORDERS:
        tight = play(preset, roots, num_pages=min(64, pages), max_pages=pages, eviction=order)
        pairs = zip(ample.outcomes, tight.outcomes)
        rows.append(
            {
                "preset": name,
                "part": part,
                "order": order,
                "pages_without_limit": ample.peak,
                "pages_of_roots": ample.held,
                "pages": pages,
                "root_steps": len(ample.outcomes),
                "same": sum(one.visits == other.visits for one, other in pairs),
                "computed_again": tight.again / made,
                "time": tight.seconds / ample.seconds,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows, for people."""
    lines = [
        f"{'':10}{'part':>6}{'pages':>14}{'order':>9}{'same':>9}{'computed again':>16}{'time':>7}"
    ]
    for row in rows:
        pages = f"{row['pages']} of {row['pages_without_limit']}"
        same = f"{row['same']}/{row['root_steps']}"
        lines.append(
            f"{row['preset']:10}{row['part']:6.2f}{pages:>14}{row['order']:>9}{same:>9}"
            f"{row['computed_again']:16.2f}{row['time']:7.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table; write the figures to a file where one is named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--roots", type=int, help="root steps after the warm-up")
    parser.add_argument("--part", type=float, default=0.25, help="of what a search adds, in pages")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with client.quiet():
        tree = client.tree_file()
    rows: list[dict[str, Any]] = []
    with fixed_ties(tree):
        for name in options.only:
            rows += compare(name, options.roots or ROOTS[name], options.part)
    print(table(rows))
    if options.json:
        machine = {
            "processor": processor(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        found = {"schema": 1, "machine": machine, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
