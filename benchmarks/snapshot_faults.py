"""What becomes of a snapshot whose saves are killed, whose bits flip and whose files are cut, asked
for long: what the tests do in short.

    python benchmarks/snapshot_faults.py --json benchmarks/results/snapshot_faults.json

- `crashes`: of a save into a folder, the states that a power cut may leave behind each of its
  calls, with many more random ones than in the tests: each must hold what was before, or what is
  now.
- `damage`: one bit of one file is another one, or a file is shorter or longer: it must be refused.
- `kills`: a process saves one thing after another, until SIGKILL at a random moment. Then the
  folder must hold what was saved last, or the save that was under way, whole.

Crashes and kills with new pages in one segment, and as often in two that are written at once.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from disk import FOLDER, Watched, crash_states, disk_of
from machine import processor
from snapshot_stories import Story, damaged, held, killed

from paged_kv.errors import BadSnapshot
from paged_kv.snapshot import packing


def kills(count: int, folder: Path) -> dict[str, int]:
    """Kills, and saves that were found whole; raises where one was lost."""
    rng = random.Random(0)
    done = 0
    for number in range(count):
        with segments(1 + number % 2):
            done = killed(folder / FOLDER, done, rng)
    return {"kills": count, "saves": done, "lost": 0}


def damage(count: int, folder: Path) -> dict[str, int]:
    """Damaged folders, and those that went unnoticed."""
    story = Story(folder)
    story.first()
    story.add(6)
    story.first()
    disk = disk_of(story.folder)
    rng = random.Random(0)
    unnoticed = 0
    for _ in range(count):
        try:
            held(damaged(disk, rng))
            unnoticed += 1
        except BadSnapshot:
            pass
    return {"folders": count, "unnoticed": unnoticed}


def crashes(samples: int, folder: Path) -> dict[str, int]:
    """States after a power cut, and those that hold neither the old nor the new."""
    found = {"calls": 0, "states": 0, "wrong": 0}
    for count in (1, 2):
        own = folder / str(count)
        own.mkdir()
        with segments(count):
            log, states = broken_off(own, samples)
        found["calls"] += log
        for right in states:
            found["states"] += 1
            found["wrong"] += not right
    return found


def broken_off(folder: Path, samples: int) -> tuple[int, Iterator[bool]]:
    """Calls of a second save, and whether each state holds what it may."""
    story = Story(folder)
    story.first()
    before = disk_of(story.folder)
    story.go_on()
    files = Watched()
    story.second(files=files)
    log = files.log

    def right() -> Iterator[bool]:
        for length, disk in crash_states(before, log, random.Random(0), samples):
            try:
                state = held(disk)
            except BadSnapshot:
                yield False
            else:
                yield state == "second" or (state == "first" and length < len(log))

    return len(log), right()


@contextmanager
def segments(count: int) -> Iterator[None]:
    """A block in which new pages go to so many segments."""
    worth = packing.WORTH
    packing.WORTH = 1 if count == 2 else worth
    try:
        yield
    finally:
        packing.WORTH = worth


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=1000)
    options.add_argument("--damage", type=int, default=100_000)
    options.add_argument("--samples", type=int, default=1000, help="random states of each call")
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    parts = (
        ("crashes", crashes, chosen.samples),
        ("damage", damage, chosen.damage),
        ("kills", kills, chosen.kills),
    )
    for name, part, count in parts:
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            results[name] = part(count, Path(folder))
            results[name]["seconds"] = round(time.perf_counter() - begin, 1)
        print(name, results[name], flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=2) + "\n")
    return int(bool(results["damage"]["unnoticed"] or results["crashes"]["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
