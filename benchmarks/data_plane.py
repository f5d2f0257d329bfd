"""What moving the K/V costs: the two memory orders, and staging against a plain copy of the same
bytes.

    python benchmarks/data_plane.py --json benchmarks/results/data_plane.json

Orders: token-major keeps all layers of a token together (a plane with pages of one token);
layer-inside-page keeps the tokens of a page together inside each layer and head. Both are read by
one `index_select` into the dense batch that the attention wants, and written by one `index_put_`.
Staging: `open` + `commit` of a batch of 8 with two new tokens (16 in the language-model case),
against `copy_` of as many bytes between reused buffers. One thread, interleaved rounds, medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from paged_kv import PagedKVCache
from paged_kv.pages.buffers import Buffer, Form, Part
from paged_kv.pages.kinds import make_storage

BATCH = 8


class Sizes(NamedTuple):
    """Sizes of a model, of its contexts and of a step; lengths count tokens."""

    layers: int
    heads: int
    head_size: int
    context: int
    page_size: int = 2
    new: int = 2
    dtype: torch.dtype = torch.float32


WORKLOADS = {
    "cartpole": Sizes(2, 2, 32, 5),
    "atari": Sizes(2, 8, 96, 5),
    "atari-8l": Sizes(8, 8, 96, 5),
    "long": Sizes(2, 8, 96, 61),
    "memory": Sizes(4, 4, 64, 159),
    "llm": Sizes(8, 8, 64, 512, page_size=16, new=16, dtype=torch.bfloat16),
}


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median microseconds of each call; rounds are interleaved so that drift of the machine hits
    all alike.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + rounds // 10):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if round_ >= rounds // 10:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def memory_orders(name: str, rounds: int) -> dict[str, float]:
    """Gather and scatter of one batch in both orders, on randomly placed pages."""
    sizes = WORKLOADS[name]
    page = sizes.page_size
    size = sizes.head_size
    context = sizes.context
    width = context + sizes.new
    per_row = -(-width // page)
    drawn = np.random.default_rng(0).permutation(3 * BATCH * per_row)[: BATCH * per_row]
    pages = 1 + drawn.reshape(BATCH, per_row)
    slots = (pages[:, :, None] * page + np.arange(page)).reshape(BATCH, -1)[:, :width]
    calls: dict[str, Callable[[], object]] = {}
    for order, page_size in (("token-major", 1), ("layer-inside-page", page)):
        part = Part(2 * sizes.layers, sizes.heads, size)
        storage = make_storage("exact", Form([part], page_size, sizes.dtype, torch.device("cpu")))
        storage.grow((int(slots.max()) + page) // page_size)
        layout = Buffer(storage.form).layout((BATCH, width, 0, None))
        source = layout.columns(context, width)
        index = slots[:, None]
        targets = slots[:, context:]
        calls[f"{order} gather"] = lambda s=storage, f=index, out=layout: s.gather(f.copy(), out)
        calls[f"{order} scatter"] = lambda s=storage, x=source, t=targets: s.write_slots(
            t.flatten().tolist(), x, t
        )
    return medians(calls, rounds)


def staging(name: str, rounds: int) -> dict[str, float]:
    """`open` + `commit` against a copy of the bytes they move, both on reused memory."""
    sizes = WORKLOADS[name]
    layers = sizes.layers
    heads = sizes.heads
    context = sizes.context
    new = sizes.new
    cache = PagedKVCache(
        layers=layers,
        heads=heads,
        head_size=sizes.head_size,
        page_size=sizes.page_size,
        dtype=sizes.dtype,
        num_pages=4 * BATCH * (context + new),
    )
    parents = cache.new(BATCH, start=-context % sizes.page_size)
    prefix = torch.randn(layers, BATCH, heads, context, sizes.head_size).to(sizes.dtype)
    cache.append(parents, prefix, prefix)
    token = torch.randn(BATCH, heads, new, sizes.head_size).to(sizes.dtype)
    moved = BATCH * (context + 2 * new) * cache.token_bytes
    source = torch.ones(moved // 4)
    target = torch.ones(moved // 4)
    times: dict[str, list[float]] = {"staging": [], "copy": []}
    for round_ in range(rounds):
        begin = time.perf_counter()
        batch = cache.open(parents, new)
        opened = time.perf_counter()
        for layer in range(layers):
            batch.update(layer, token, token)
        written = time.perf_counter()
        children = batch.commit()
        done = time.perf_counter()
        target.copy_(source)
        copied = time.perf_counter()
        cache.release(children)
        if round_ >= rounds // 10:
            times["staging"].append(opened - begin + done - written)
            times["copy"].append(copied - done)
    found = {key: statistics.median(values) * 1e6 for key, values in times.items()}
    return {**found, "bytes": float(moved)}


def main() -> None:
    """Print the tables; write them to a file where one is named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    print(f"{'':10}{'token-major us':>22}{'layer-inside-page us':>26}{'staging':>14}{'copy':>10}")
    orders = f"{'gather':>11}{'scatter':>11}{'gather':>15}{'scatter':>11}"
    print(f"{'':10}{orders}{'us':>14}{'us':>10}{'ratio':>8}")
    for name in WORKLOADS:
        rounds = options.rounds if name != "llm" else max(10, options.rounds // 15)
        orders = memory_orders(name, rounds)
        dense = staging(name, rounds)
        ratio = dense["staging"] / dense["copy"]
        row = "".join(
            f"{value:{width}.1f}" for value, width in zip(orders.values(), (11, 11, 15, 11))
        )
        print(
            f"{name:10}{row}{'':4}{dense['staging']:10.1f}{dense['copy']:10.1f}{ratio:8.2f}",
            flush=True,
        )
        results.append(
            {"workload": name, "orders_us": orders, "staging": dense, "staging_over_copy": ratio}
        )
    if options.json:
        machine = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cpus": os.cpu_count(),
        }
        options.json.write_text(
            json.dumps({"schema": 1, "machine": machine, "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
