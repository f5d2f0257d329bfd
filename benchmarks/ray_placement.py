"""Where trees would live on 1 to 1,000 workers: how even it is, and what moves.

python benchmarks/ray_placement.py --json benchmarks/results/ray_placement.json \
    --svg benchmarks/results/ray_placement.svg

For each number of workers a million trees are opened, as a pool opens them. Then one worker is
lost; then half of the trees end at random, and as many others are opened. Beside it stands the hash
without a bound.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from machine import processor

from paged_kv.integrations.ray.placement import BOUND, Placement

WORKERS = (1, 3, 10, 30, 100, 300, 1000)
COLOURS = ["var(--other)", "var(--paged)", "var(--reserved)", "var(--muted)"]
ALONE = 1e9  # a bound that never matters


def filled(workers: int, trees: int, bound: float) -> Placement:
    """Trees on workers."""
    placement = Placement(range(workers), bound)
    for tree in range(trees):
        placement.open(tree)
    return placement


def imbalance(placement: Placement) -> float:
    """The largest load over the mean."""
    loads = placement.loads().values()
    return max(loads) * len(loads) / sum(loads)


def homes(placement: Placement, trees: int) -> list[int]:
    """Where each tree lives."""
    return [placement.worker(tree) for tree in range(trees)]


def measured(workers: int, trees: int) -> dict[str, Any]:
    """What happens on so many workers."""
    begun = time.process_time()
    placement = filled(workers, trees, BOUND)
    seconds = time.process_time() - begun
    hashed = filled(workers, trees, ALONE)
    row = {
        "workers": workers,
        "bounded": round(imbalance(placement), 4),
        "hash_alone": round(imbalance(hashed), 4),
        "not_first_choice": sum(
            placement.worker(tree) != hashed.worker(tree) for tree in range(trees)
        ),
        "open_us": round(seconds / trees * 1e6, 1),
    }
    if workers > 1:
        row |= lost(placement, trees, workers // 2)
        churn(placement, trees)
        row["bounded_after_churn"] = round(imbalance(placement), 4)
    return row


def lost(placement: Placement, trees: int, worker: int) -> dict[str, Any]:
    """A worker is lost: which trees move, and how even it is then."""
    before = homes(placement, trees)
    moved = placement.lose(worker)
    after = homes(placement, trees)
    own = before.count(worker)
    others = sum(old != new for old, new in zip(before, after, strict=True) if old != worker)
    return {
        "trees_of_the_lost": own,
        "moved_of_the_lost": len(moved),
        "moved_of_others": others,
        "bounded_after_loss": round(imbalance(placement), 4),
    }


def churn(placement: Placement, trees: int) -> None:
    """Half of the trees end, whichever, and as many others begin."""
    gone = random.Random(0).sample(range(trees), trees // 2)
    for tree in gone:
        placement.close(tree)
    for tree in range(trees, trees + len(gone)):
        placement.open(tree)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The picture: largest load over mean, against workers."""
    import altair as alt

    from paged_kv.tools.html.picture import svg

    names = {
        "hash_alone": "hash alone",
        "bounded": "with the bound",
        "bounded_after_loss": "with it, after a worker was lost",
        "bounded_after_churn": "with it, after half of the trees were others",
    }
    points = [
        {"workers": row["workers"], "load": row[field], "what": name}
        for row in rows
        for field, name in names.items()
        if field in row
    ]
    hues = alt.Scale(domain=list(names.values()), range=COLOURS)
    legend = alt.Legend(title=None, columns=2, labelLimit=400)
    chart = (
        alt.Chart(alt.Data(values=points), width=520, height=260)
        .mark_line(point=True)
        .encode(
            x=alt.X("workers:Q", scale=alt.Scale(type="log"), title="workers"),
            y=alt.Y("load:Q", scale=alt.Scale(zero=False), title="largest load over the mean"),
            color=alt.Color("what:N", scale=hues, legend=legend),
        )
    )
    path.write_text(svg(chart, "Trees per worker: largest over mean"))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trees", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    rows = []
    for workers in options.workers:
        rows.append(measured(workers, options.trees))
        print(rows[-1], flush=True)
    if options.json:
        result = {
            "trees": options.trees,
            "bound": BOUND,
            "processor": processor(),
            "command": " ".join(["python", *sys.argv]),
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.svg:
        draw(rows, options.svg)


if __name__ == "__main__":
    main()
