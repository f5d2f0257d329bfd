"""Records searches, one at a time, as material for `ray_replay.py`.

PYTHONPATH=. python benchmarks/ray_searches.py --model SmolLM2-135M --folder build/ray_searches \
    --json benchmarks/results/ray_searches.json

Countdown problems are searched with SmolLM2-135M (`paged-kv search`, on a `PagedLM`), and vector
worlds with the reference world model of the package, at the sizes of `paged-kv profile --preset
memory`: an episode is one tree, from root step to root step. Each search is a recording of its own
(`paged_kv.recording`), with a mark after each round: a simulation. What is kept of a round: `rows`,
the rows of all steps that were opened in it (a row is one context in one forward), and `bytes`, the
pages that the tree held at its end. The prompt of a language model is fed in its first round.
Recordings of language models that are in the folder are not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import processor

from paged_kv.integrations.huggingface import PagedLM
from paged_kv.recording import Recorder, Recording, accesses, read_recording, record
from paged_kv.tools.profile.presets import PRESETS
from paged_kv.tools.profile.reference_client import ReferenceSide
from paged_kv.tools.profile.side import Setting
from paged_kv.tools.search import models
from paged_kv.tools.search.forest import Forest
from paged_kv.tools.search.presets import METHODS, Preset
from paged_kv.tools.search.side import Rule
from paged_kv.tools.search.task import Countdown

ROUND = "round"
LANGUAGE = "language model"
WORLD = "world model"
PROMPTS = (192, 384)
SIMULATIONS = (4, 9, 6)
WIDTHS = (4, 8, 2)
TOKENS = 8
PAGE_SIZE = 8
ROOT_STEPS = (2, 5, 3, 4, 6, 3)  # of each episode
WORLD_PRESET = "memory"
SIMULATIONS_OF_WORLDS = 20


class Round(NamedTuple):
    """A round of a search."""

    rows: int
    bytes: int


@contextmanager
def recorded(target: Any, path: Path, kind: str) -> Iterator[Recorder]:
    """A recording of one search that has all that is read of it here."""
    options: dict[str, Any] = {"interval": 0, "budget": None, "accesses": True}
    with record(target, path, labels={"kind": kind}, **options) as recorder:
        yield recorder


def language_searches(model: Path, folder: Path) -> list[Path]:
    """A file for each search of a language model: all methods, sizes in turn."""
    loaded = models.from_folder(model, "float32")
    files = []
    for number in range(len(METHODS) * len(SIMULATIONS) * len(PROMPTS)):
        method = METHODS[number % len(METHODS)]
        turn = number // len(METHODS)
        preset = Preset(
            method,
            PROMPTS[turn % len(PROMPTS)],
            SIMULATIONS[turn % len(SIMULATIONS)],
            WIDTHS[(turn + number) % len(WIDTHS)],
            TOKENS,
        )
        path = folder / f"language-{number}.jsonl"
        files.append(path)
        if path.exists():
            continue
        lm = PagedLM(loaded.model, page_size=PAGE_SIZE, max_bytes=2**31, progress=False)
        with recorded(lm.pages, path, LANGUAGE) as recorder:
            task = Countdown(loaded.tokenizer, number)
            forest = Forest(lm, [task], preset, Rule(TOKENS, 0.8))
            forest.grow(method, number, lambda mark=recorder.mark: mark(ROUND))
        print(path.name, preset, flush=True)
    return files


def world_searches(folder: Path, steps: Sequence[int] = ROOT_STEPS) -> list[Path]:
    """A file for each episode of a world model: a tree that goes on from root step to root step."""
    files = []
    for number, root_steps in enumerate(steps):
        preset = PRESETS[WORLD_PRESET].without_lightzero()
        setting = Setting(1, SIMULATIONS_OF_WORLDS, number, torch.device("cpu"), 2, "read")
        side = ReferenceSide("paged", preset, setting)
        path = folder / f"world-{number}.jsonl"
        with recorded(side.contexts, path, WORLD) as recorder:
            side.on_simulation = lambda mark=recorder.mark: mark(ROUND)
            for step in range(root_steps):
                side.step(SIMULATIONS_OF_WORLDS, 100 * number + step)
        files.append(path)
    return files


def rounds(recording: Recording) -> list[Round]:
    """The rounds of a recorded search: what lies between two marks."""
    marks = [event["t"] for event in recording.events if event["name"] == ROUND]
    opened = [access for access in accesses(recording) if access.what == "open"]
    times = [sample["t"] for sample in recording.samples]
    found = []
    before = 0.0
    for mark in marks:
        rows = sum(len(access.ids) for access in opened if before < access.t <= mark)
        place = max(0, bisect_right(times, mark) - 1)
        found.append(Round(rows, recording.samples[place]["bytes_in_use"]))
        before = mark
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    files = [*world_searches(options.folder), *language_searches(options.model, options.folder)]
    searches = []
    for path in files:
        recording = read_recording(path)
        kind = recording.header["labels"]["kind"]
        searches.append({"kind": kind, "name": path.stem, "rounds": rounds(recording)})
        print(path.stem, len(searches[-1]["rounds"]), searches[-1]["rounds"][-1], flush=True)
    if options.json:
        result = {
            "processor": processor(),
            "command": " ".join(["python", *sys.argv]),
            "searches": searches,
        }
        options.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
