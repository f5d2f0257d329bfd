"""What has to be computed again in a bounded pool, by eviction order, over recorded searches.

    python benchmarks/eviction.py --json benchmarks/results/eviction.json

The searches of the profile's presets are LightZero's own, and there are some of the reference
client; they are recorded first, without bounds. Then each is played again in pools of a part of the
pages that its nodes take, beside those of the roots, under several orders, with the real index and
pages: see `eviction_replay.py`. Counted are the tokens of nodes that the search came back to after
they had been evicted. All orders evict leaves first.

The weight of visits in the search's order (`paged_kv.search_order.VISITS`) was chosen on the
searches of even number, at a quarter of the pages; with `--tune` the table of that is made, too.
The results are of the searches of odd number.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from eviction_replay import LRU, OFFLINE, ORDERS, SEARCH, TOKENS, Replay, fewest, most_at_once
from eviction_traces import WORKLOADS, Trace, traces
from machine import processor

from paged_kv.search_order import VISITS

SHARES = (Fraction(1, 2), Fraction(1, 3), Fraction(1, 4), Fraction(1, 8))
QUARTER = Fraction(1, 4)
WEIGHTS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
BOUND = "bound"


class Row(NamedTuple):
    """One workload in pools of one size: tokens, over all its searches that fit."""

    workload: str
    share: Fraction  # of the pages that the nodes take
    searches: int
    too_large: int  # searches of which one step needs more pages than there are
    tokens: int  # of all nodes
    recomputed: Mapping[str, int]  # by order; BOUND: what no order can go below

    @property
    def gain(self) -> float:
        """How many times fewer than leaf-first LRU."""
        return self.recomputed[LRU] / max(1, self.recomputed[SEARCH])

    @property
    def of_the_way(self) -> float:
        """How much of the way from LRU to the order that knows the future; 1 where both agree."""
        whole = self.recomputed[LRU] - self.recomputed[OFFLINE]
        return (self.recomputed[LRU] - self.recomputed[SEARCH]) / whole if whole else 1.0


def measure(workload: str, found: Sequence[Trace], share: Fraction) -> Row:
    """Play searches again in pools of a share of the pages of their nodes."""
    recomputed = dict.fromkeys((*ORDERS, BOUND), 0)
    fitting = [trace for trace in found if most_at_once(trace) <= pages_of(trace, share)]
    for trace in fitting:
        pages = pages_of(trace, share)
        for order in ORDERS:
            recomputed[order] += TOKENS * Replay(trace, pages, order).run()
        recomputed[BOUND] += TOKENS * fewest(trace, pages)
    tokens = TOKENS * sum(trace.nodes for trace in fitting)
    return Row(workload, share, len(fitting), len(found) - len(fitting), tokens, recomputed)


def pages_of(trace: Trace, share: Fraction) -> int:
    """Pages for the nodes."""
    return int(trace.nodes * share)


# -- tuning


class Tuned(NamedTuple):
    """A weight of visits, and how many times fewer tokens than with LRU that gives."""

    weight: float
    gains: Mapping[str, float]  # by workload

    @property
    def mean(self) -> float:
        """Geometric."""
        return math.exp(sum(map(math.log, self.gains.values())) / len(self.gains))


def tune(found: Mapping[str, Sequence[Trace]]) -> list[Tuned]:
    """Try all weights at a quarter of the pages."""
    fitting = {
        name: [trace for trace in some if most_at_once(trace) <= pages_of(trace, QUARTER)]
        for name, some in found.items()
    }
    before = {name: _again(some, LRU) for name, some in fitting.items() if some}
    return [
        Tuned(
            weight,
            {
                name: old / max(1, _again(fitting[name], SEARCH, weight))
                for name, old in before.items()
            },
        )
        for weight in WEIGHTS
    ]


def _again(found: Sequence[Trace], order: str, weight: float | None = None) -> int:
    return sum(Replay(trace, pages_of(trace, QUARTER), order, weight).run() for trace in found)


# -- what is written


def table(rows: Sequence[Row]) -> str:
    """The results, for people."""
    lines = [
        "| workload | pages | tokens | LRU | search | offline | no order below | LRU / search | "
        "of the way to offline |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        head = f"| {row.workload} | {row.share} "
        if not row.searches:
            lines.append(head + "| one step needs more | | | | | | |")
            continue
        counts = [row.tokens, *(row.recomputed[name] for name in (LRU, SEARCH, OFFLINE, BOUND))]
        numbers = " | ".join(f"{count:,}" for count in counts)
        gain = f"{row.gain:.2f}x" if row.recomputed[SEARCH] else "none left"
        lines.append(f"{head}| {numbers} | {gain} | {row.of_the_way:.0%} |")
    return "\n".join(lines)


def tuning_table(tuned: Sequence[Tuned]) -> str:
    """How the weight was chosen, for people."""
    names = list(tuned[0].gains)
    lines = [f"| weight | {' | '.join(names)} | mean |", "|---:" * (len(names) + 2) + "|"]
    for each in tuned:
        gains = " | ".join(f"{each.gains[name]:.2f}x" for name in names)
        lines.append(f"| {each.weight:g} | {gains} | {each.mean:.3f}x |")
    return "\n".join(lines)


def written(rows: Sequence[Row], tuned: Sequence[Tuned], searches: int) -> dict[str, Any]:
    """All of it, for machines."""
    return {
        "schema": 1,
        "command": " ".join(["python", *sys.argv]),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "searches": searches,
        "weight": VISITS,
        "tuned": [
            {"weight": each.weight, "gains": each.gains, "mean": each.mean} for each in tuned
        ],
        "results": [{**row._asdict(), "share": str(row.share)} for row in rows],
    }


def main() -> None:
    """Record, play again, print, and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--searches", type=int, default=16, help="a workload, of which half count")
    parser.add_argument("--tune", action="store_true", help="try other weights of visits, too")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for workload in options.workloads:
        print(f"recording {options.searches} searches of {workload}", file=sys.stderr)
        found[workload] = traces(workload, options.searches)
    tuned = []
    if options.tune:
        tuned = tune({workload: some[::2] for workload, some in found.items()})
        print(tuning_table(tuned), end="\n\n")
    rows = [
        measure(workload, some[1::2], share) for workload, some in found.items() for share in SHARES
    ]
    print(table(rows))
    if options.json:
        text = json.dumps(written(rows, tuned, options.searches), indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
