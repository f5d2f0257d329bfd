"""How far a window that slid is from the same window computed anew, and what computing it anew
costs.

    OMP_NUM_THREADS=1 python benchmarks/window_exactness.py \
        --json benchmarks/results/window_exactness.json

UniZero world models of LightZero 0.2.0 (2 layers of 32 numbers, 2 heads, random in all their
weights) play root steps with random observations and actions. After 0, 1, 10 and 100 slides the
keys and values of the root windows, as the next step would gather them, are compared with those of
one forward pass over exactly the tokens of the window: at positions 0, 1, ... for learned
positions; rotary ones keep their absolute positions. Then both windows are continued by one action,
and by the latent state that the model predicts from it. Nothing has slid in the row of 0 slides: it
shows what rounding alone does.

Figures are the norm of the difference over the norm of the exact result, for the whole batch, as a
mean over the seeds. Random biases are a large part of that norm, so that in brackets stands the
norm of the difference over the norm of what varies in the exact result: its mean over all tokens of
the batch is taken off.

"never" leaves out the correction of positions. "no norm" corrects, in a model whose layers do not
normalise their input: LightZero's correction would be exact in layer 0 if K and V were made of the
embeddings themselves.

"exact" keeps tokens, and computes its windows anew at every step. What that costs is measured on
full windows, beside a step that gathers keys and values: both continue them by two tokens and store
these. Rounds of both are interleaved; times are medians, by the wall clock and of the process.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from machine import processor
from window_play import EMBED, ENVS, HEADS, LAYERS, Play, build_model

from paged_kv.integrations.lightzero import attach


class Mode(NamedTuple):
    """Whether positions are rotary, and options of `attach`."""

    rotary: bool
    options: dict[str, str]


MODES = {
    "learned, read": Mode(False, {"at": "read"}),
    "learned, write": Mode(False, {"at": "write"}),
    "learned, never": Mode(False, {"at": "write"}),
    "learned, no norm": Mode(False, {"at": "read"}),
    "learned, exact": Mode(False, {"window": "exact"}),
    "rotary": Mode(True, {}),
    "rotary, exact": Mode(True, {"window": "exact"}),
}
CALLS = 20  # steps in one timed round
Row = dict[str, Any]


def relative(name: str, found: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """The norm of a difference, over the norm of what is right and over that of what
    varies in it.
    """
    tokens = (0, 2) if exact.ndim == 4 else (0,)  # [B, heads, tokens, head_size] or [B, ..., n]
    error = (found - exact).norm()
    varying = (exact - exact.mean(tokens, keepdim=True)).norm()
    return {name: float(error / exact.norm()), f"{name}, varying": float(error / varying)}


def compare(play: Play) -> Row:
    """The stored windows against the rebuilt ones: K and V of each layer, then the outputs."""
    cached = play.cached()
    size = cached.size
    first = len(play.tokens) - size
    outputs = play.outputs(cached)
    wanted = play.outputs(play.exact(size, first))
    # which counts positions from 0
    exact = play.exact(size, 0 if play.wm.paged.window == "exact" else first)
    row: Row = {"window": size}
    for layer in range(LAYERS):
        for name, found, right in zip("KV", cached[layer].get(), exact[layer].get()):
            row |= relative(f"{name}{layer}", found[:, :, :size], right)
    for name, found in outputs.items():
        row |= relative(name, found, wanted[name])
    play.wm.paged.close()
    return row


@torch.no_grad()
def differences(mode: str, context: int, slides: Sequence[int], seeds: int) -> list[Row]:
    """One row for each number of slides, as means over the seeds."""
    rotary, options = MODES[mode]
    found: list[list[Row]] = []
    for seed in range(seeds):
        play = Play(attach(build_model(rotary, context, max(slides), seed), **options), seed)
        if mode in CHANGES:
            CHANGES[mode](play.wm)
        rows = []
        for count in slides:
            while len(play.tokens) < context - 3 or play.slides < count:
                play.step()
            rows.append(compare(play))
        found.append(rows)
    means = [
        {key: float(np.mean([row[key] for row in same])) for key in same[0]} for same in zip(*found)
    ]
    return [
        {"mode": mode, "context": context, "slides": count, **row, "window": int(row["window"])}
        for count, row in zip(slides, means)
    ]


def leave_positions(wm: Any) -> None:
    """Have a model correct nothing when its windows slide."""
    for differences_of_layer in [*wm.pos_emb_diff_k, *wm.pos_emb_diff_v]:
        for difference in differences_of_layer.values():
            difference.zero_()


def leave_norms(wm: Any) -> None:
    """Have a model make K and V of what enters a layer, as it is."""
    for block in wm.transformer.blocks:
        block.ln1 = torch.nn.Identity()


CHANGES = {"learned, never": leave_positions, "learned, no norm": leave_norms}


class Spent(NamedTuple):
    """Microseconds of a step: by the wall clock, and of the process."""

    wall: float
    cpu: float


def timed(step: Callable[[], object]) -> Spent:
    """What a step takes."""
    wall = time.perf_counter()
    cpu = time.process_time()
    for _ in range(CALLS):
        step()
    scale = 1e6 / CALLS
    return Spent((time.perf_counter() - wall) * scale, (time.process_time() - cpu) * scale)


def stepping(context: int, rotary: bool, **options: str) -> Callable[[], None]:
    """A step from full windows that are never replaced: gather them, continue them by two tokens,
    store these.
    """
    play = Play(attach(build_model(rotary, context, 1, seed=0), **options), seed=0)
    while not play.slides:
        play.step()
    paged = play.wm.paged
    size = play.cached().size
    paged.close()

    @torch.no_grad()
    def step() -> None:
        play.outputs(play.cached())
        paged.cache.release(paged.commit(play.wm, [size + 2] * ENVS))

    return step


def cost(mode: str, context: int, rounds: int) -> Row:
    """A step on stored keys and values, and one that computes its windows anew."""
    rotary, options = MODES[mode]
    steps = {
        "cached": stepping(context, rotary, **options),
        "exact": stepping(context, rotary, window="exact"),
    }
    spent: dict[str, list[Spent]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            spent[name].append(timed(step))
    row: Row = {"mode": mode, "context": context, "window": context - 3}
    for name, times in spent.items():
        wall = statistics.median(each.wall for each in times)
        cpu = statistics.median(each.cpu for each in times)
        row |= {f"{name}_wall_us": round(wall, 1), f"{name}_cpu_us": round(cpu, 1)}
    return row


def report(rows: Sequence[Row], costs: Sequence[Row]) -> str:
    """Both tables, in Markdown."""
    names = [f"{half}{layer}" for layer in range(LAYERS) for half in "KV"] + [
        "next latent",
        "policy",
        "value",
    ]
    lines = [
        "| positions | context | slides | " + " | ".join(names) + " |",
        "|---" * (3 + len(names)) + "|",
    ]
    for row in rows:
        figures = " | ".join(
            f"{share(row[name])} ({share(row[f'{name}, varying'])})" for name in names
        )
        lines.append(f"| {row['mode']} | {row['context']} | {row['slides']} | {figures} |")
    lines += ["", "CPU time of a step of 8 windows, us", ""]
    lines += ["| positions | context | cached step | exact step | ratio |", "|---" * 5 + "|"]
    for row in costs:
        figures = " | ".join(f"{row[f'{name}_cpu_us']:,.0f}" for name in ("cached", "exact"))
        ratio = row["exact_cpu_us"] / row["cached_cpu_us"]
        lines.append(f"| {row['mode']} | {row['context']} | {figures} | {ratio:.2f} |")
    return "\n".join(lines)


def share(value: float) -> str:
    """A relative difference, for people."""
    if value < 1e-4:
        return f"{value:.0e}" if value else "0"
    if value >= 1:
        return f"{value:.2g}"
    return f"{value:.1%}" if value >= 0.01 else f"{value:.2%}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--slides", type=int, nargs="+", default=[0, 1, 10, 100])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    pairs = [(mode, context) for context in options.contexts for mode in MODES]
    timed_pairs = [
        pair for pair in pairs if pair[0] not in CHANGES and "window" not in MODES[pair[0]].options
    ]
    rows = [
        row
        for mode, context in pairs
        for row in differences(mode, context, sorted(options.slides), options.seeds)
    ]
    cost("rotary", 8, 1)  # warm-up
    costs = [cost(mode, context, options.rounds) for mode, context in timed_pairs]
    print(report(rows, costs))
    if options.json:
        machine = {
            "processor": processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        work = {
            "envs": ENVS,
            "layers": LAYERS,
            "heads": HEADS,
            "embed": EMBED,
            "seeds": options.seeds,
            "rounds": options.rounds,
            "calls_per_round": CALLS,
        }
        text = json.dumps(
            {"machine": machine, "workload": work, "differences": rows, "costs": costs}, indent=1
        )
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
