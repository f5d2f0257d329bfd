"""Attention of one step: every row gathered, and every shared page read once.

    python benchmarks/attention.py --json benchmarks/results/attention.json

The rows of a step share a trunk, of which they may read branches too, and have tokens of their
own. All layers are attended with one new token a row (two at UniZero's sizes). *dense* is what a
model does with an ordinary cache: `open` gathers all layers, each layer is filled and attended by
`scaled_dot_product_attention`, and the step is closed. *tree* and *auto* plan the step, write each
layer's new tokens to their pages, and attend there. Reading the pages is part of both. Rounds are
interleaved; ratios are medians of ratios within a round. One thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from machine import processor

from paged_kv import PagedKVCache
from paged_kv.attention import Rows, Scratch, make_attention


class Case(NamedTuple):
    """Sizes of a model and of a step; lengths count tokens."""

    name: str
    layers: int
    heads: int  # of queries
    kv_heads: int
    head_size: int
    trunk: int
    branches: int  # below the trunk
    branch: int
    rows: int
    own: int
    dtype: torch.dtype = torch.float32
    page_size: int = 16
    new: int = 1


def _llm(trunk: int, dtype: torch.dtype, page_size: int) -> Case:
    kind = str(dtype).removeprefix("torch.")
    name = f"8x8x64 {kind}, {trunk} + 8 x 64, pages of {page_size}"
    return Case(name, 8, 8, 8, 64, trunk, 0, 0, 8, 64, dtype, page_size)


CASES = [
    *(
        _llm(trunk, dtype, page_size)
        for dtype in (torch.float32, torch.bfloat16)
        for trunk in (512, 2048)
        for page_size in (16, 4)
    ),
    *(
        Case(f"8x8x64 {kind}, 512 + 4 x 128 + 16 x 16", 8, 8, 8, 64, 512, 4, 128, 16, 16, dtype)
        for kind, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    ),
    *(
        Case(f"SmolLM2 {kind}, 2048 + 16 x 32", 30, 9, 3, 64, 2048, 0, 0, 16, 32, dtype)
        for kind, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    ),
    Case("UniZero, 12 + 8 x 0", 2, 8, 8, 96, 12, 0, 0, 8, 0, page_size=2, new=2),
    Case("UniZero, 4 + 8 x 8", 2, 8, 8, 96, 4, 0, 0, 8, 8, page_size=2, new=2),
]


class Scene:
    """A cache with the rows of a case, and the tensors of a step."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(0)
        self.cache = PagedKVCache(
            layers=case.layers,
            heads=case.kv_heads,
            head_size=case.head_size,
            page_size=case.page_size,
            dtype=case.dtype,
        )
        self.parents = self._parents()
        children = self.cache.fork(self.parents)
        self._grow(children, case.new)
        self.storage = self.cache._pool.storage
        tables, starts, lengths = self.cache._pool.books.windows(children)
        past = [length - case.new for length in lengths]
        self.rows = Rows(tables, starts, past, [case.new] * case.rows)
        size = case.page_size
        ends = range(past[0] + starts[0], past[0] + starts[0] + case.new)
        slots = [table[end // size] * size + end % size for table in tables for end in ends]
        self.slots = torch.tensor(slots)
        shape = (case.rows, case.kv_heads, case.new, case.head_size)
        self.keys = torch.randn(shape).to(case.dtype)
        self.values = torch.randn(shape).to(case.dtype)
        self.queries = torch.randn(case.rows, case.heads, case.new, case.head_size).to(case.dtype)
        self.scratch = Scratch(torch.device("cpu"))

    def _parents(self) -> list[int]:
        case = self.case
        root = self.cache.new()
        self._grow(root, case.trunk)
        above = root
        if case.branches:
            above = self.cache.fork(root * case.branches)
            self._grow(above, case.branch)
        each = case.rows // len(above)
        rows = self.cache.fork([seq for seq in above for _ in range(each)])
        self._grow(rows, case.own)
        return rows

    def _grow(self, seqs: list[int], count: int) -> None:
        case = self.case
        shape = (case.layers, len(seqs), case.kv_heads, count, case.head_size)
        if count:
            self.cache.append(
                seqs, torch.randn(shape).to(case.dtype), torch.randn(shape).to(case.dtype)
            )

    def dense(self) -> torch.Tensor:
        """Gather, fill and attend as an ordinary cache."""
        case = self.case
        mask = None
        if case.new > 1:
            width = self.rows.lengths[0] + case.new
            mask = torch.ones(case.new, width, dtype=torch.bool).tril(width - case.new)
        with self.cache.open(self.parents, case.new) as step:
            for layer in range(case.layers):
                step.update(layer, self.keys, self.values)
                keys, values = step.get(layer)
                result = F.scaled_dot_product_attention(
                    self.queries,
                    keys,
                    values,
                    attn_mask=mask,
                    enable_gqa=case.heads != case.kv_heads,
                )
        return result

    def paged(self, backend: str, depth: int | None = None) -> torch.Tensor:
        """Write to pages and attend there."""
        attention = make_attention(
            self.storage, self.rows, backend=backend, depth=depth, scratch=self.scratch
        )
        size = self.case.head_size
        index = self.storage.slot_index(self.slots)
        for layer in range(self.case.layers):
            self.storage.write_tokens(
                layer,
                index,
                self.keys.transpose(1, 2).reshape(-1, self.case.kv_heads, size),
                self.values.transpose(1, 2).reshape(-1, self.case.kv_heads, size),
            )
            result = attention.attend(layer, self.queries)
        return result

    @property
    def flops(self) -> int:
        """Of all scores and sums of a step, for each token that a query sees."""
        case = self.case
        seen = case.trunk + case.branch + case.own + case.new
        return 4 * case.layers * case.heads * case.head_size * case.rows * case.new * seen

    @property
    def bytes(self) -> int:
        """K and V of all unique tokens."""
        case = self.case
        tokens = case.trunk + case.branches * case.branch + case.rows * (case.own + case.new)
        return 2 * case.layers * case.kv_heads * case.head_size * tokens * case.dtype.itemsize


def ways(scene: Scene) -> dict[str, Callable[[], torch.Tensor]]:
    """The ways to attend a case."""
    found = {
        "dense": scene.dense,
        "tree": lambda: scene.paged("tree"),
        "auto": lambda: scene.paged("auto"),
    }
    if scene.case.branches:
        found["two levels"] = lambda: scene.paged("tree", 1)
    return found


def measured(case: Case, rounds: int) -> dict[str, object]:
    """Times and ratios of a case."""
    scene = Scene(case)
    calls = ways(scene)
    times: dict[str, list[float]] = {name: [] for name in calls}
    results = {name: call().double() for name, call in calls.items()}
    for _ in range(2):
        for call in calls.values():
            call()
    for number in range(rounds):
        names = list(calls)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            begin = time.process_time()
            calls[name]()
            times[name].append(time.process_time() - begin)
    seconds = {name: statistics.median(each) for name, each in times.items()}
    ratios = {
        name: statistics.median([a / b for a, b in zip(times["dense"], each)])
        for name, each in times.items()
    }
    if "two levels" in times:
        pairs = zip(times["two levels"], times["tree"])
        ratios["two levels / tree"] = statistics.median([a / b for a, b in pairs])
    return {
        "case": case.name,
        "milliseconds": {name: value * 1e3 for name, value in seconds.items()},
        "dense_over": ratios,
        "tree_gflops": scene.flops / seconds["tree"] / 1e9,
        "tree_gbytes": scene.bytes / seconds["tree"] / 1e9,
        "scratch_bytes": scene.scratch.nbytes,
        "kv_bytes": scene.bytes,
        "most_difference": max(
            float((each - results["dense"]).abs().max()) for each in results.values()
        ),
    }


def core() -> dict[str, float]:
    """GFLOP/s of a product of matrices, and GB/s of a copy (bytes read and bytes written)."""

    def best(call: Callable[[], object]) -> float:
        found = []
        for _ in range(9):
            begin = time.process_time()
            call()
            found.append(time.process_time() - begin)
        return statistics.median(found)

    matrix = torch.randn(1024, 1024)
    half = matrix.bfloat16()
    source = torch.randn(16 << 20)
    target = torch.empty_like(source)
    return {
        "sgemm_gflops": 2 * 1024**3 / best(lambda: matrix @ matrix) / 1e9,
        "bf16_gflops": 2 * 1024**3 / best(lambda: half @ half) / 1e9,
        "copy_gbytes": 2 * source.nbytes / best(lambda: target.copy_(source)) / 1e9,
    }


def line(row: dict[str, object]) -> str:
    """A row of the table."""
    times = row["milliseconds"]
    ratios = row["dense_over"]
    levels = ratios.get("two levels / tree")
    return (
        f"{row['case']:44} {times['dense']:8.2f} {times['tree']:8.2f} {ratios['tree']:6.2f} "
        f"{ratios['auto']:6.2f} {f'{levels:.2f}' if levels else '':>6} {row['tree_gflops']:6.1f} "
        f"{row['tree_gbytes']:6.2f} {row['scratch_bytes'] / 2**20:7.1f} "
        f"{row['kv_bytes'] / 2**20:7.1f} {row['most_difference']:8.1e}"
    )


def main() -> None:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = core()
    print(", ".join(f"{name} {value:.1f}" for name, value in found.items()))
    print(
        f"{'case':44} {'dense ms':>8} {'tree ms':>8} {'ratio':>6} {'auto':>6} {'2 / 3':>6} "
        f"{'GF/s':>6} {'GB/s':>6} {'scratch':>7} {'K/V MiB':>7} {'differ':>8}"
    )
    rows = []
    for case in CASES:
        if options.only in case.name:
            rounds = options.rounds * (20 if case.name.startswith("UniZero") else 1)
            rows.append(measured(case, rounds))
            print(line(rows[-1]), flush=True)
    if options.json:
        record = {
            "command": "python benchmarks/attention.py --json benchmarks/results/attention.json",
            "processor": processor(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "rounds": options.rounds,
            "core": found,
            "cases": rows,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
