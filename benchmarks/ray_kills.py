"""Workers of a pool are killed at random moments: do searches end as if nothing had happened?

python benchmarks/ray_kills.py --json benchmarks/results/ray_kills.json

Each search draws levels of a few trees, promotes, moves trees between workers and takes snapshots.
In each, a worker is sent SIGKILL some time after the search began, or after it began to move a tree
or to take a snapshot; or SIGSTOP, so that only a timeout finds it; or both workers are killed.
Results are compared, token by token, with those of an undisturbed search in one process.

Tokens are drawn from the whole vocabulary. Among the likeliest only (`top_k`, 50 by default) a draw
would jump wherever the last of them and the next are within rounding of each other, and a worker
that came back, or a tree that moved, computes in other batches, which are rounded otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch

from paged_kv.integrations.huggingface import PagedLM
from paged_kv.integrations.ray import SearchPool

OPTIONS = {"max_bytes": 10**7}
LEVELS = 8
TREES = 4
TIMEOUT = 20  # seconds, after which a worker counts as one that hangs
DRAWS = {"max_new_tokens": 6, "temperature": 0.9, "top_k": 0}
WAYS = ("kill", "move", "snapshot", "kill", "stop", "move", "snapshot", "kill", "both", "move")
BEGINNINGS = {"move": "move", "snapshot": "snapshot"}  # of what a blow is timed by


def make_model() -> Any:
    """A small random model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(20)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=199,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def search(tree: Any, seed: int, at: Callable[[str], object]) -> list[tuple[int, ...]]:
    """What is drawn, on a pool or an lm; `at` is told what begins and ends."""
    prompts = [[3 + seed % 7 + place, 11, 12 + place] for place in range(TREES)]
    at("search")
    level = tree.prefill(prompts, seed=seed)
    drawn = []
    for turn in range(LEVELS):
        level = tree.sample(level * 2, **DRAWS)[-2 * TREES :]
        drawn += [node.tokens for node in level]
        if isinstance(tree, SearchPool) and turn % 3 == 1:
            at("move")
            tree.move(level[0].tree, 1 - level[0].worker)
            at("moved")
        if isinstance(tree, SearchPool) and turn % 4 == 2:
            at("snapshot")
            tree.snapshot()
            at("saved")
    tree.promote(level[0])
    drawn += [node.tokens for node in tree.sample(level[:1], **DRAWS)]
    at("end")
    return drawn


class Other(NamedTuple):
    """The first node of a search that was drawn otherwise."""

    search: int
    way: str
    node: int  # of those that the search returned
    found: tuple[int, ...]
    expected: tuple[int, ...]


class Clock:
    """Notes when what begins."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}

    def __call__(self, what: str) -> None:
        self.times[what] = time.perf_counter()

    def usual(self) -> dict[str, float]:
        """Seconds that the search, its last move and its last snapshot took."""
        times = self.times
        return {
            "search": times["end"] - times["search"],
            "move": times["moved"] - times["move"],
            "snapshot": times["saved"] - times["snapshot"],
        }


class Blow:
    """Strikes once, a random time after something began for the first or the second time."""

    def __init__(
        self, pool: SearchPool, way: str, usual: dict[str, float], chance: random.Random
    ) -> None:
        self.begin = BEGINNINGS.get(way, "search")
        self.skipped = 0 if self.begin == "search" else chance.randrange(2)
        self.seconds = chance.uniform(0, usual[self.begin])
        self.signal = signal.SIGSTOP if way == "stop" else signal.SIGKILL
        pids = [worker.pid or 0 for worker in pool.stats().workers]
        self.targets = pids if way == "both" else [chance.choice(pids)]
        self.timer: threading.Timer | None = None

    def __call__(self, what: str) -> None:
        if what != self.begin or self.timer is not None:
            return
        if self.skipped:
            self.skipped -= 1
            return
        self.timer = threading.Timer(self.seconds, self.strike)
        self.timer.start()

    def strike(self) -> None:
        """Send the signal."""
        for pid in self.targets:
            with suppress(ProcessLookupError):
                os.kill(pid, self.signal)

    def wait(self) -> None:
        """Until it has struck."""
        if self.timer is not None:
            self.timer.join()


def run(searches: int, seed: int, ways: Sequence[str]) -> dict[str, Any]:
    """Search and strike, that often."""
    chance = random.Random(seed)
    lm = PagedLM(make_model(), progress=False, **OPTIONS)
    expected = [search(lm, number, str) for number in range(searches)]
    same = 0
    hit: Counter[str] = Counter()
    other: list[Other] = []
    with SearchPool(make_model, 2, options=OPTIONS, snapshot_every=9, timeout=TIMEOUT) as pool:
        begun = time.perf_counter()
        for number in range(searches):
            if number == 0:
                search(pool, 0, str)  # warms up
                clock = Clock()
                search(pool, 0, clock)
                usual = clock.usual()
            before = pool.stats().restarts
            way = ways[number % len(ways)]
            blow = Blow(pool, way, usual, chance)
            found = search(pool, number, blow)
            blow.wait()
            pool.logits(pool.prefill([[3]] * TREES))  # whoever was struck too late is missed now
            same += found == expected[number]
            if found != expected[number]:
                place = [a == b for a, b in zip(found, expected[number])].index(False)
                other.append(Other(number, way, place, found[place], expected[number][place]))
                print(other[-1], flush=True)
            hit[way] += pool.stats().restarts > before
            print(f"{number + 1} searches, {same} as expected, {way}", flush=True)
        return {
            "searches": searches,
            "as_undisturbed": same,
            "otherwise": [each._asdict() for each in other],
            "workers_brought_back": pool.stats().restarts,
            "searches_with_a_blow": hit.total(),
            "by_way": dict(hit),
            "trees_moved": pool.stats().moved,
            "usual_seconds": {name: round(value, 4) for name, value in usual.items()},
            "seconds": round(time.perf_counter() - begun, 1),
            "load_average": os.getloadavg(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "ray": ray.__version__,
            },
            "command": " ".join(["python", *sys.argv]),
        }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--searches", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=sorted(set(WAYS)),
        default=WAYS,
        help="what is done to workers, in turn",
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = run(options.searches, options.seed, options.ways)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    if result["as_undisturbed"] != result["searches"]:
        raise SystemExit("some searches ended otherwise")


if __name__ == "__main__":
    main()
