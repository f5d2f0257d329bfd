"""Every sequence of verbs, up to a length, on three pages and three sequences.

    python benchmarks/exhaustive.py --json benchmarks/results/exhaustive.json

Each state that such sequences reach is checked, breadth first, and equal states are one; see
`tests/support/exhaustive.py`. The first sequence after which anything is wrong is shown, and makes
the command fail.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from exhaustive import Broken, Level, search
from machine import processor
from small_world import ENTRIES, PAGE_SIZE, PAGES, ROWS, STEPS

HEAD = f"{'verbs':>6} {'new states':>11} {'transitions':>12} {'refusals':>9} {'seconds':>9}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=6, help="verbs of the longest sequence")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(HEAD)
    try:
        levels = search(options.depth, show)
    except Broken as error:
        print(f"broken: {error}")
        return 1
    if options.json is not None:
        options.json.write_text(json.dumps(figures(levels), indent=2) + "\n")
    return 0


def show(level: Level) -> None:
    """A line of the table, as soon as it is known."""
    print(
        f"{level.depth:6} {level.states:11,} {level.transitions:12,} {level.refusals:9,} "
        f"{level.seconds:9,.1f}",
        flush=True,
    )


def figures(levels: list[Level]) -> dict[str, object]:
    """What is kept of a run."""
    return {
        "command": shlex.join(["python", "benchmarks/exhaustive.py", *sys.argv[1:]]),
        "machine": {"processor": processor(), "python": platform.python_version()},
        "torch": torch.__version__,
        "scope": {
            "pages": PAGES,
            "page_size": PAGE_SIZE,
            "sequences_and_rows_of_steps": ROWS,
            "open_steps": STEPS,
            "entries": ENTRIES,
        },
        "states": 1 + sum(level.states for level in levels),
        "transitions": sum(level.transitions for level in levels),
        "levels": [level._asdict() for level in levels],
    }


if __name__ == "__main__":
    sys.exit(main())
