"""Every sequence of verbs, up to a length, on three pages, or on one, and three sequences.

    python benchmarks/exhaustive.py --json benchmarks/results/exhaustive.json
    python benchmarks/exhaustive.py --pages 1 --json benchmarks/results/exhaustive_one_page.json

Each state that such sequences reach is checked, breadth first, and equal states are one; see
`tests/support/exhaustive.py`. The first sequence after which anything is wrong is shown, and makes
the command fail. On one page it does not take many verbs until entries go to make room.
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
    parser.add_argument("--pages", type=int, default=PAGES, help="of the pool")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(HEAD)
    try:
        levels = search(options.depth, show, pages=options.pages)
    except Broken as error:
        print(f"broken: {error}")
        return 1
    if options.json is not None:
        options.json.write_text(json.dumps(figures(levels, options.pages), indent=2) + "\n")
    return 0


def show(level: Level) -> None:
    """A line of the table, as soon as it is known."""
    print(
        f"{level.depth:6} {level.states:11,} {level.transitions:12,} {level.refusals:9,} "
        f"{level.seconds:9,.1f}",
        flush=True,
    )


def figures(levels: list[Level], pages: int) -> dict[str, object]:
    """What is kept of a run."""
    return {
        "command": shlex.join(["python", "benchmarks/exhaustive.py", *sys.argv[1:]]),
        "machine": {"processor": processor(), "python": platform.python_version()},
        "torch": torch.__version__,
        "scope": {
            "pages": pages,
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
