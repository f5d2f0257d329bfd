"""Processor time of a step on pages of codes against the same step on exact ones, one thread.

Both sides do the same in turn, round by round: a dense step is opened, filled and committed, or new
tokens are attended where their pages lie ("tree"), in every layer. Processor time, which others on
the machine disturb least; medians, and of the ratios of a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any, NamedTuple

import torch

from paged_kv import PagedKVCache

KINDS = ("exact", "int8")


class Shape(NamedTuple):
    """A model, and windows that a batch of 8 goes on from."""

    layers: int
    heads: int
    head_size: int
    context: int
    new: int
    page_size: int
    dtype: torch.dtype


ROWS = 8
SHAPES = {
    "cartpole": Shape(2, 2, 32, 6, 2, 2, torch.float32),
    "atari": Shape(2, 8, 96, 6, 2, 2, torch.float32),
    "memory": Shape(4, 4, 64, 160, 2, 2, torch.float32),
    "smollm2, 512": Shape(30, 3, 64, 512, 1, 16, torch.float32),
    "smollm2, 512, bfloat16": Shape(30, 3, 64, 512, 1, 16, torch.bfloat16),
}


class Side:
    """A cache of one kind, with a context for each row, half of it shared by all."""

    def __init__(self, shape: Shape, storage: str) -> None:
        self.shape = shape
        self.cache = PagedKVCache(
            layers=shape.layers,
            heads=shape.heads,
            head_size=shape.head_size,
            page_size=shape.page_size,
            dtype=shape.dtype,
            storage=storage,
        )
        half = shape.context // 2 // shape.page_size * shape.page_size
        root = self.cache.new()
        self.cache.append(root, *self._tokens(1, half))
        self.rows = self.cache.fork(root * ROWS)
        self.cache.append(self.rows, *self._tokens(ROWS, shape.context - half))
        self.token = torch.randn(ROWS, shape.heads, shape.new, shape.head_size).to(shape.dtype)

    def _tokens(self, rows: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = self.shape
        kv = torch.randn(shape.layers, rows, shape.heads, count, shape.head_size).to(shape.dtype)
        return kv, kv

    def dense(self) -> dict[str, float]:
        """Seconds of `open` and of `commit`."""
        begin = time.process_time()
        step = self.cache.open(self.rows, self.shape.new)
        opened = time.process_time()
        for layer in step.layers:
            layer.update(self.token, self.token)
        filled = time.process_time()
        children = step.commit()
        done = time.process_time()
        self.cache.release(children)
        return {"open": opened - begin, "commit": done - filled}

    def tree(self) -> dict[str, float]:
        """Seconds of a step that attends in pages."""
        begin = time.process_time()
        with self.cache.attend(self.rows, self.shape.new, backend="tree") as step:
            for layer in step.layers:
                layer.attend(self.token, self.token, self.token)
            children = step.commit()
        done = time.process_time()
        self.cache.release(children)
        return {"attend": done - begin}


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each shape and measure."""
    found = []
    for name, shape in SHAPES.items():
        sides = [Side(shape, kind) for kind in KINDS]
        rounds = []
        for number in range(options.rounds + 2):
            order = sides if number % 2 else sides[::-1]
            times = {side: {**side.dense(), **side.tree()} for side in order}
            rounds.append([times[side] for side in sides])
        found += [row(name, measure, rounds[2:]) for measure in ("open", "commit", "attend")]
    return found


def row(name: str, measure: str, rounds: list[list[dict[str, float]]]) -> dict[str, Any]:
    """Medians, in microseconds."""
    exact = [one[measure] for one, _ in rounds]
    small = [other[measure] for _, other in rounds]
    return {
        "shape": name,
        "measure": measure,
        "exact_us": 1e6 * statistics.median(exact),
        "int8_us": 1e6 * statistics.median(small),
        "ratio": statistics.median(ours / theirs for ours, theirs in zip(small, exact)),
    }


def told(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'shape':24}{'measure':10}{'exact us':>10}{'int8 us':>10}{'ratio':>8}"]
    lines += [
        f"{each['shape']:24}{each['measure']:10}{each['exact_us']:10,.0f}{each['int8_us']:10,.0f}"
        f"{each['ratio']:8.2f}"
        for each in rows
    ]
    return "\n".join(lines)
