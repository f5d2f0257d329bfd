"""Packed linears beside F.linear: how fast each reads its weights, and where packing loses.

    OMP_NUM_THREADS=1 python benchmarks/linears.py --json benchmarks/results/linears.json

Of every shape there are as many weights as fill `--megabytes`, so that they come from memory and
not from a cache. Both ways take turns, in each of `--rounds` rounds; times are the best of them, in
seconds of the processor, which other work on the machine touches least. `packs` says whether a
client gets the packed kernel at these rows; `calls` after how many calls packing has paid for
itself.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from machine import processor

from paged_kv.linears import packing

ROWS = (1, 2, 4, 8, 16, 64, 256, 512, 1024)
# Outputs and inputs of LightZero's world model (768) and its heads, of one of memory tasks
# (256), and of SmolLM2-135M (576).
SHAPES = (
    (64, 64),
    (101, 768),
    (192, 576),
    (256, 256),
    (768, 256),
    (768, 768),
    (3072, 768),
    (768, 3072),
    (576, 576),
    (1536, 576),
    (576, 1536),
    (49152, 576),
)


class Figure(NamedTuple):
    """One shape at some rows: microseconds a call, and what is read of the weights a second."""

    dtype: str
    outputs: int
    inputs: int
    rows: int
    plain_us: float
    packed_us: float
    ratio: float  # how many times as fast packed
    plain_gb_s: float
    packed_gb_s: float
    packs: bool
    calls: float | None  # of F.linear until packing has paid, where it does


def seconds(call: Callable[[], object]) -> float:
    """What one call takes of the processor, with one thread."""
    begin = time.thread_time()
    call()
    return time.thread_time() - begin


class Weights:
    """Equal shapes, enough of them to come from memory, plain and packed."""

    def __init__(self, outputs: int, inputs: int, dtype: torch.dtype, megabytes: int) -> None:
        self.one = outputs * inputs * dtype.itemsize
        count = max(1, min(1000, megabytes * 1_000_000 // self.one))
        self.plain = [torch.randn(outputs, inputs).to(dtype) for _ in range(count)]
        self.packed = []
        spent = []
        for weight in self.plain:
            begin = time.thread_time()
            self.packed.append(packing.pack(weight))
            spent.append(time.thread_time() - begin)
        self.packing = min(spent)

    def figure(self, rows: int, rounds: int) -> Figure:
        """Both ways, in turns."""
        outputs, inputs = self.plain[0].shape
        dtype = self.plain[0].dtype
        x = torch.randn(rows, inputs).to(dtype)
        used = max(1, len(self.plain) // max(1, rows // 32))
        ways: list[Callable[[], object]] = [
            lambda: [F.linear(x, weight) for weight in self.plain[:used]],
            lambda: [packing.multiply(packed, None, x) for packed in self.packed[:used]],
        ]
        times: list[list[float]] = [[], []]
        for round_ in range(rounds + 1):
            for way in (0, 1) if round_ % 2 else (1, 0):
                spent = seconds(ways[way])
                if round_:
                    times[way].append(spent / used)
        plain, packed = map(min, times)
        return Figure(
            str(dtype).removeprefix("torch."),
            outputs,
            inputs,
            rows,
            plain * 1e6,
            packed * 1e6,
            plain / packed,
            self.one / plain / 1e9,
            self.one / packed / 1e9,
            packing.suits(self.plain[0], None, x),
            self.packing / (plain - packed) if packed < plain else None,
        )


def line(figure: Figure) -> str:
    """A row of the table."""
    shape = f"{figure.outputs} x {figure.inputs}"
    rates = f"{figure.plain_gb_s:.1f} | {figure.packed_gb_s:.1f}"
    calls = "never" if figure.calls is None else f"{figure.calls:.0f}"
    chosen = "packed" if figure.packs else "F.linear"
    times = f"{figure.plain_us:.0f} | {figure.packed_us:.0f} | {figure.ratio:.2f}"
    return f"| {figure.dtype} | {shape} | {figure.rows} | {times} | {rates} | {calls} | {chosen} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    columns = "type", "weight", "rows", "F.linear, us", "packed, us", "ratio", "GB/s", "packed"
    print("|", " | ".join([*columns, "calls", "used"]), "|")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---|")
    figures = []
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            if not packing.has_kernels(dtype):
                print(f"no packed kernels of {dtype} here")
                continue
            for shape in SHAPES:
                weights = Weights(*shape, dtype, options.megabytes)
                for rows in options.rows:
                    figures.append(weights.figure(rows, options.rounds))
                    print(line(figures[-1]), flush=True)
    if options.json is not None:
        about = {"processor": processor(), "torch": torch.__version__}
        about |= {"python": platform.python_version(), "threads": torch.get_num_threads()}
        result = about | {"figures": [figure._asdict() for figure in figures]}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
