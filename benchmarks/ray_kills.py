"""Workers of a pool are killed at random moments: do searches end as if nothing had happened?

python benchmarks/ray_kills.py --json benchmarks/results/ray_kills.json

Each search draws levels of a few trees, promotes, moves trees between workers and takes snapshots.
Some time after it began, one of its workers is sent SIGKILL; its results are compared, token by
token, with those of an undisturbed search in one process.
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
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import torch

from paged_kv.integrations.huggingface import PagedLM
from paged_kv.integrations.ray import SearchPool

OPTIONS = {"max_bytes": 10**7}
LEVELS = 8
TREES = 4


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


def search(tree: Any, seed: int) -> list[tuple[int, ...]]:
    """What is drawn, on a pool or an lm."""
    prompts = [[3 + seed % 7 + place, 11, 12 + place] for place in range(TREES)]
    level = tree.prefill(prompts, seed=seed)
    drawn = []
    for turn in range(LEVELS):
        level = tree.sample(level * 2, max_new_tokens=6, temperature=0.9)[-2 * TREES :]
        drawn += [node.tokens for node in level]
        if isinstance(tree, SearchPool) and turn % 3 == 1:
            tree.move(level[0].tree, 1 - level[0].worker)
    tree.promote(level[0])
    return drawn + [node.tokens for node in tree.sample(level[:1], max_new_tokens=6)]


def kill_later(pool: SearchPool, seconds: float, chance: random.Random) -> threading.Timer:
    """Kill one of the workers after so long."""
    pids = [worker.pid for worker in pool.stats().workers]

    def kill() -> None:
        with suppress(ProcessLookupError):
            os.kill(chance.choice(pids) or 0, signal.SIGKILL)

    timer = threading.Timer(seconds, kill)
    timer.start()
    return timer


def run(searches: int, seed: int) -> dict[str, Any]:
    """Search and kill, that often."""
    chance = random.Random(seed)
    lm = PagedLM(make_model(), progress=False, **OPTIONS)
    expected = [search(lm, number) for number in range(searches)]
    same = 0
    hit = 0
    with SearchPool(make_model, 2, options=OPTIONS, snapshot_every=5, timeout=60) as pool:
        begun = time.perf_counter()
        search(pool, 0)
        usual = time.perf_counter() - begun
        begun = time.perf_counter()
        for number in range(searches):
            before = pool.stats().restarts
            timer = kill_later(pool, chance.uniform(0, usual), chance)
            found = search(pool, number)
            timer.join()
            pool.logits(pool.prefill([[3]] * TREES))  # whoever was killed too late is missed now
            same += found == expected[number]
            hit += pool.stats().restarts > before
            print(f"{number + 1} searches, {same} as expected", flush=True)
        return {
            "searches": searches,
            "as_undisturbed": same,
            "workers_brought_back": pool.stats().restarts,
            "searches_with_a_kill": hit,
            "trees_moved": pool.stats().moved,
            "seconds_of_a_search": round(usual, 3),
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
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = run(options.searches, options.seed)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    if result["as_undisturbed"] != result["searches"]:
        raise SystemExit("some searches ended otherwise")


if __name__ == "__main__":
    main()
