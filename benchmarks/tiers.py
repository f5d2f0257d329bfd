"""What a search costs that outgrows its memory, beside one with all pages in memory.

    python benchmarks/tiers.py --json benchmarks/results/tiers.json

- `llm`: a best-first search with a random model of SmolLM2's shape (30 layers, 3 K/V heads of 64,
  float32): each simulation expands the best nodes that were not expanded, wherever in the tree they
  are, by a few tokens each.
- a preset of LightZero: its search on its world model, as `paged-kv profile` plays it, with 100
  simulations where it has fewer.

Both are run with all pages in memory, and then with frames for a tenth of the pages that the first
run had in use at its peak, or as few as a batch needs (`frames`, `of`): cold pages in memory of the
host, and in a file (of the folder that is named; its pages stay in the system's page cache where
there is memory for them). `time` is the ratio of the seconds of the search, all else the same; the
three are run in turn, and the median of the ratios is shown. `work` is the same of the seconds of
the processor, which others on the machine touch less. `same` says whether all that the search
decided was the same. `read` and `written` count pages that came and went, `share` the part of the
time that this took.

Beside it: how long it takes to open a snapshot lazily, and to use its first page.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import processor

from paged_kv.integrations.huggingface import PagedLM
from paged_kv.stats import TierStats
from paged_kv.tiers import ColdTier, FileTier, HostTier, Tiers

SMOL = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 4096,  # of 49152: the head is no part of what is compared
}
ROOTS = {"cartpole": 6, "atari": 2, "atari-8l": 2, "long": 2, "memory": 2}
SIMULATIONS = 100  # at least, so that a tenth of the pages holds a batch
WIDTH = 4
TOKENS = 2  # of a node, which are a page
PROMPT = 8


class Searched(NamedTuple):
    """What came of a search."""

    seconds: float
    work: float  # seconds of the processor
    peak: int  # pages
    decided: Any
    tiers: list[TierStats]


Search = Callable[[Tiers | None], Searched]


def llm_search(model: Any, simulations: int, tiers: Tiers | None) -> Searched:
    """A best-first search: the score of a node is its parent's and a draw of its own."""
    lm = PagedLM(model, page_size=TOKENS, max_bytes=8 << 30, tiers=tiers, progress=False)
    draws = torch.Generator().manual_seed(0)
    prompt = torch.arange(PROMPT)[None] % SMOL["vocab_size"]
    begin = time.perf_counter(), time.process_time()
    root = lm.prefill(prompt)[0]
    waiting = [(0.0, 0, root)]
    nodes = [root]
    for _ in range(simulations):
        best = [heapq.heappop(waiting) for _ in range(min(WIDTH, len(waiting)))]
        parents = [node for _, _, node in best for _ in range(2)]
        children = lm.sample(parents, max_new_tokens=TOKENS, seed=len(nodes))
        scores = torch.rand(len(children), generator=draws).tolist()
        for place, child in enumerate(children):
            score = best[place // 2][0] + scores[place]
            heapq.heappush(waiting, (score, len(nodes), child))
            nodes.append(child)
    seconds = time.perf_counter() - begin[0]
    work = time.process_time() - begin[1]
    decided = [tuple(node.tokens) for node in nodes]
    return Searched(seconds, work, lm.pages.stats.peak_pages, decided, lm.pages.tiers)


def lightzero_search(name: str, roots: int, tiers: Tiers | None) -> Searched:
    """The root steps of a preset, after its warm-up."""
    from paged_kv.integrations.lightzero import attach
    from paged_kv.tools.profile import client
    from paged_kv.tools.profile.presets import PRESETS
    from paged_kv.tools.profile.side import Setting

    known = PRESETS[name]
    preset = replace(known, simulations=max(known.simulations, SIMULATIONS))
    setting = Setting(preset.envs, preset.simulations, 0, torch.device("cpu"), 2, "read")
    side = client.LightZeroSide("paged", preset, setting)
    attach(side.wm, tiers=tiers)
    outcomes = []
    seconds = 0.0
    work = 0.0
    for step in range(preset.warmup + roots):
        warm = step < preset.warmup
        begin = time.perf_counter(), time.process_time()
        outcomes.append(side.step(2 if warm else preset.simulations, step))
        seconds += 0 if warm else time.perf_counter() - begin[0]
        work += 0 if warm else time.process_time() - begin[1]
    cache = side.wm.paged.cache
    decided = [outcome.visits for outcome in outcomes]
    return Searched(seconds, work, cache.stats.peak_pages, decided, cache.tiers)


def compare(name: str, search: Search, least: int, rounds: int, folder: str) -> list[Any]:
    """A row for each kind of cold tier."""
    places: dict[str, Callable[[], ColdTier]] = {
        "host": HostTier,
        "file": partial(FileTier, folder),
    }
    found: dict[str, list[tuple[Searched, Searched]]] = {kind: [] for kind in places}
    for _ in range(rounds):
        ample = search(None)
        for kind, cold in places.items():
            frames = max(least, ample.peak // 10)
            found[kind].append((ample, search(Tiers(frames, cold))))
    rows = []
    for kind, pairs in found.items():
        ample, tight = pairs[-1]
        cold_figures = tight.tiers[1]
        moving = cold_figures.seconds_read + cold_figures.seconds_written
        rows.append(
            {
                "search": name,
                "cold": kind,
                "frames": max(least, ample.peak // 10),
                "of": ample.peak,
                "page_bytes": cold_figures.bytes_read // max(1, cold_figures.read),
                "time": statistics.median(two.seconds / one.seconds for one, two in pairs),
                "work": statistics.median(two.work / one.work for one, two in pairs),
                "seconds_in_memory": statistics.median(one.seconds for one, _ in pairs),
                "same": all(one.decided == two.decided for one, two in pairs),
                "hits": tight.tiers[0].hits,
                "read": cold_figures.read,
                "written": cold_figures.written,
                "share": moving / tight.seconds,
                "rounds": rounds,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows, for people."""
    lines = [
        f"{'':10}{'cold':>6}{'frames':>14}{'page':>10}{'time':>7}{'work':>7}{'same':>6}"
        f"{'read':>8}{'written':>9}{'share':>7}"
    ]
    for row in rows:
        frames = f"{row['frames']} of {row['of']}"
        lines.append(
            f"{row['search']:10}{row['cold']:>6}{frames:>14}{row['page_bytes'] / 1024:6.0f} KiB"
            f"{row['time']:7.2f}{row['work']:7.2f}{row['same']!s:>6}{row['read']:8}{row['written']:9}"
            f"{row['share']:7.2f}"
        )
    return "\n".join(lines)


def llm_rows(simulations: int, rounds: int, folder: str) -> list[Any]:
    """The search with a language model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMOL)).eval()
    return compare("llm", partial(llm_search, model, simulations), 44, rounds, folder)


def lightzero_rows(names: list[str], rounds: int, folder: str) -> list[Any]:
    """The presets of LightZero."""
    from paged_kv.integrations.ties import fixed_ties
    from paged_kv.tools.profile import client
    from paged_kv.tools.profile.presets import PRESETS

    with client.quiet():
        tree = client.tree_file()
    rows = []
    with fixed_ties(tree):
        for name in names:
            preset = PRESETS[name]
            least = preset.envs * (preset.context // 2 + 3)  # a batch of windows, and what it adds
            search = partial(lightzero_search, name, ROOTS[name])
            rows += compare(name, search, least, rounds, folder)
    return rows


def main() -> None:
    """Print the table; write the figures to a file where one is named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=["cartpole", "atari"], help="presets")
    parser.add_argument("--simulations", type=int, default=64, help="of the language model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="of the file")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if options.simulations:
        rows += llm_rows(options.simulations, options.rounds, options.folder)
    rows += lightzero_rows(options.only, options.rounds, options.folder)
    print(table(rows))
    if options.json:
        machine = {
            "processor": processor(),
            "cpus": os.cpu_count(),
            "load": os.getloadavg()[0],
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        found = {"schema": 1, "machine": machine, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
