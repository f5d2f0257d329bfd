"""A pool of two workers beside one process, and beside two processes without Ray.

python benchmarks/ray_pool.py --json benchmarks/results/ray_pool.json

The same trees on all sides, with one thread each: levels of frontiers that are drawn from. Sides
take turns, round by round; what is told are medians. Then: one worker beside the same lm in this
process, frontiers of 64 nodes; and a tree of 1,000 nodes that moves. The model is SmolLM2-135M
where PAGED_KV_SMOLLM2 names its folder, else random weights of the same shape.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import ray
import torch
from machine import processor

from paged_kv.integrations.huggingface import PagedLM
from paged_kv.integrations.ray import SearchPool

PROMPT = 128
TREES = 8
LEVELS = 4
WIDTH = 8  # nodes of a tree in a frontier
TOKENS = 8
OPTIONS = {"max_bytes": 2 * 2**30, "page_size": 2}


def make_model(tiny: bool = False) -> Any:
    """The model; with `tiny` a small one, to try this out."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    folder = os.environ.get("PAGED_KV_SMOLLM2")
    if folder and not tiny:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    if not tiny:
        sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3} if not tiny else {}
    kinds = heads or {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        **sizes, **kinds, vocab_size=49152 if not tiny else 512, tie_word_embeddings=True
    )
    return LlamaForCausalLM(config).eval()


def prompts(trees: int) -> list[list[int]]:
    """Prompts that share nothing."""
    made = torch.Generator().manual_seed(1)
    return torch.randint(3, 500, (trees, PROMPT), generator=made).tolist()


def search(tree: Any, rows: list[list[int]], seeds: list[int]) -> list[tuple[int, ...]]:
    """Grow these trees level by level, all in one batch; what was drawn last."""
    level = tree.prefill(rows, seed=seeds)
    for depth in range(LEVELS):
        parents = level if depth else [root for root in level for _ in range(WIDTH)]
        level = tree.sample(parents, max_new_tokens=TOKENS)
    return [node.tokens for node in level]


def serve(pipe: Connection, tiny: bool) -> None:
    """A process without Ray: searches what it is sent."""
    torch.set_num_threads(1)
    lm = PagedLM(make_model(tiny), progress=False, **OPTIONS)
    pipe.send("ready")
    while True:
        job = pipe.recv()
        if job is None:
            return
        pipe.send(search(lm, *job))
        lm.clear()


class Processes:
    """Two processes, each with half of the trees."""

    def __init__(self, tiny: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes = []
        self._started = []
        for _ in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, tiny), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._started.append(process)
        for pipe in self._pipes:
            pipe.recv()

    def search(self, rows: list[list[int]], seeds: list[int]) -> list[tuple[int, ...]]:
        """As `search`."""
        half = len(rows) // 2
        parts = ((rows[:half], seeds[:half]), (rows[half:], seeds[half:]))
        for pipe, part in zip(self._pipes, parts):
            pipe.send(part)
        return [path for pipe in self._pipes for path in pipe.recv()]

    def close(self) -> None:
        """End both."""
        for pipe, process in zip(self._pipes, self._started):
            pipe.send(None)
            process.join()


def model_name() -> str:
    """The folder of the weights, without where it lies."""
    return Path(os.environ.get("PAGED_KV_SMOLLM2", "random weights")).name


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    begun = time.perf_counter()
    found = work()
    return time.perf_counter() - begun, found


def throughput(rounds: int, tiny: bool) -> dict[str, Any]:
    """Two workers, two processes and one process, in turn."""
    rows = prompts(TREES)
    seeds = list(range(TREES))
    lm = PagedLM(make_model(tiny), progress=False, **OPTIONS)
    processes = Processes(tiny)
    seconds: dict[str, list[float]] = {"one_process": [], "two_processes": [], "two_workers": []}
    with SearchPool(partial(make_model, tiny), 2, options=OPTIONS) as pool:
        sides: dict[str, Callable[[], Any]] = {
            "one_process": partial(search, lm, rows, seeds),
            "two_processes": partial(processes.search, rows, seeds),
            "two_workers": partial(search, pool, rows, seeds),
        }
        for turn in range(rounds + 1):
            drawn = []
            for name, side in sides.items():
                spent, found = timed(side)
                drawn.append(found)
                lm.clear()
                if turn:  # the first one warms up
                    seconds[name].append(spent)
            if drawn[0] != drawn[1] or drawn[0] != drawn[2]:
                raise SystemExit("the sides drew different tokens")
    processes.close()
    medians = {name: round(median(each), 3) for name, each in seconds.items()}
    return {
        "trees": TREES,
        "seconds": medians,
        "pool_over_one_process": round(medians["one_process"] / medians["two_workers"], 3),
        "pool_over_two_processes": round(medians["two_processes"] / medians["two_workers"], 3),
    }


def overhead(rounds: int, tiny: bool) -> list[dict[str, Any]]:
    """One worker beside the same lm in this process: a frontier of 64 nodes."""
    found = []
    lm = PagedLM(make_model(tiny), progress=False, **OPTIONS)
    with SearchPool(partial(make_model, tiny), 1, options=OPTIONS, snapshot_every=10**6) as pool:
        for tokens in (16, 1):
            seconds: dict[str, list[float]] = {"in_process": [], "worker": []}
            for turn in range(rounds + 1):
                sides: tuple[tuple[str, Any], ...] = (("in_process", lm), ("worker", pool))
                for name, side in sides:
                    roots = side.prefill(prompts(4), seed=turn)
                    draw = partial(
                        side.sample,
                        roots * 16,
                        max_new_tokens=tokens,
                    )
                    spent, _ = timed(draw)
                    if turn:
                        seconds[name].append(spent)
            pairs = [b / a for a, b in zip(seconds["in_process"], seconds["worker"])]
            found.append(
                {
                    "nodes": 64,
                    "tokens": tokens,
                    "in_process_s": round(median(seconds["in_process"]), 4),
                    "worker_s": round(median(seconds["worker"]), 4),
                    "ratio_of_pairs": round(median(pairs), 4),
                }
            )
    return found


def moved(tiny: bool) -> dict[str, Any]:
    """A tree of 1,000 nodes, of 16 tokens each, that moves from worker to worker."""
    lm = PagedLM(make_model(tiny), progress=False, **OPTIONS)
    made = torch.Generator().manual_seed(2)
    nodes = lm.prefill(prompts(1), seed=0)
    while len(nodes) < 1000:
        parents = nodes[len(nodes) // 2 :][:111] if len(nodes) > 1 else nodes
        more = torch.randint(3, 500, (len(parents), 16), generator=made).tolist()
        nodes += lm.extend(parents, more).nodes[: 1000 - len(nodes)]
    bundle = lm.export(nodes, identity={"weights": 0})
    pages = lm.pages.pages_in_use * lm.pages.page_bytes
    states = sum(node.hidden_state.numel() * node.hidden_state.element_size() for node in nodes)
    other = PagedLM(make_model(tiny), progress=False, **OPTIONS)
    ray.init(
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="warning",
        object_store_memory=3 * 10**9,
    )
    try:
        put, ref = timed(lambda: ray.put(bundle))
        got, arrived = timed(lambda: ray.get(ref))
        adopted, _ = timed(lambda: other.adopt(arrived, identity={"weights": 0}))
    finally:
        ray.shutdown()
    return {
        "nodes": len(nodes),
        "bundle_bytes": bundle.nbytes,
        "page_bytes": pages,
        "bytes_over_pages": round(bundle.nbytes / pages, 4),
        "of_it_hidden_states": states,
        "seconds": {"put": round(put, 3), "get": round(got, 4), "adopt": round(adopted, 3)},
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a small model, to try this out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "model": "tiny" if options.tiny else model_name(),
        "throughput": throughput(options.rounds, options.tiny),
        "overhead": overhead(options.rounds, options.tiny),
        "moved": moved(options.tiny),
        "processor": processor(),
        "load_average": os.getloadavg(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "ray": ray.__version__,
        },
        "command": " ".join(["python", *sys.argv]),
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
