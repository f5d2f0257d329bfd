"""Saving and loading pages beside `torch.save` and `torch.load` of one contiguous tensor of as many
bytes.

    python benchmarks/snapshot.py --json benchmarks/results/snapshot.json

In each round both sides do the same in turn, each first equally often: a save without a sync, a
save with one on both sides, a load into memory that was written to before (ours; torch makes its
own), with the files in the page cache. Every byte is read, written and, on our side, compared with
a checksum. Beside it: a save into a folder where all pages lie already, what a bundle of a search
tree takes over its pages and over its tokens, and how long a snapshot of many sequences is opened
lazily: forks that nothing was written to, and a random search tree, a token a node. Ratios are
medians of the ratios of a round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import processor

from paged_kv import PagedKVCache
from paged_kv.snapshot import load, save
from paged_kv.tiers import Tiers

SHAPES: dict[str, dict[str, Any]] = {
    "llm": {"layers": 8, "heads": 8, "head_size": 64, "page_size": 16, "dtype": torch.bfloat16},
    "unizero": {"layers": 2, "heads": 8, "head_size": 96, "page_size": 2, "dtype": torch.float32},
}
SEQUENCES = 64
MIB = 1 << 20


def timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


class Sides:
    """A cache full of pages, a tensor of as many bytes, and where both are saved."""

    def __init__(self, shape: dict[str, Any], size: int, folder: Path) -> None:
        self.shape = shape
        self.folder = folder
        one = PagedKVCache(**shape, num_pages=1)
        self.sequences = min(SEQUENCES, size // one.page_bytes)
        self.pages = size // one.page_bytes // self.sequences * self.sequences
        self.bytes = self.pages * one.page_bytes
        self.cache = self.warm()
        self.seqs = self.cache.live()
        self.other = self.warm()
        self.other.release(self.other.live())
        self.tensor = torch.randint(0, 256, (self.bytes,), dtype=torch.uint8)

    def warm(self) -> PagedKVCache:
        """A cache whose pages were all written to."""
        cache = PagedKVCache(**self.shape, num_pages=self.pages, grow=False)
        seqs = cache.new(self.sequences)
        tokens = self.pages // self.sequences * cache.page_size
        sizes = (cache.layers, 1, cache.heads, tokens, cache.head_size)
        for seq in seqs:
            kv = torch.randn(sizes, dtype=cache.dtype)
            cache.append([seq], kv, -kv)
        return cache

    def save_ours(self, sync: bool) -> float:
        path = self.folder / "ours"
        shutil.rmtree(path, ignore_errors=True)
        os.sync()
        return timed(lambda: save(path, self.cache, self.seqs, sync=sync))

    def save_theirs(self, sync: bool) -> float:
        path = self.folder / "theirs.pt"
        path.unlink(missing_ok=True)
        os.sync()

        def write() -> None:
            torch.save(self.tensor, path)
            if sync:
                for name in (path, self.folder):
                    descriptor = os.open(name, os.O_RDONLY)
                    os.fsync(descriptor)
                    os.close(descriptor)

        return timed(write)

    def load_ours(self) -> float:
        seconds = timed(lambda: load(self.folder / "ours", self.other))
        self.other.release(self.other.live())
        return seconds

    def load_theirs(self) -> float:
        return timed(lambda: torch.load(self.folder / "theirs.pt", mmap=False))

    def save_again(self) -> float:
        return timed(lambda: save(self.folder / "ours", self.cache, self.seqs))


def rounds(sides: Sides, count: int) -> dict[str, Any]:
    """Seconds of each round, ours and theirs."""
    pairs: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
        "save": (lambda: sides.save_ours(False), lambda: sides.save_theirs(False)),
        "save and sync": (lambda: sides.save_ours(True), lambda: sides.save_theirs(True)),
        "load": (sides.load_ours, sides.load_theirs),
    }
    found: dict[str, Any] = {name: {"ours": [], "theirs": []} for name in pairs}
    found["save again"] = {"ours": []}
    for number in range(count + 1):
        for name, (ours, theirs) in pairs.items():
            order = [("ours", ours), ("theirs", theirs)]
            for side, call in order if number % 2 else order[::-1]:
                seconds = call()
                if number:  # the first round warms up
                    found[name][side].append(round(seconds, 5))
        seconds = sides.save_again()
        if number:
            found["save again"]["ours"].append(round(seconds, 5))
    for name, seconds in found.items():
        seconds["median"] = statistics.median(seconds["ours"])
        if name in pairs:
            ratios = [two / one for one, two in zip(seconds["ours"], seconds["theirs"])]
            seconds["theirs_median"] = statistics.median(seconds["theirs"])
            seconds["ratio"] = round(statistics.median(ratios), 2)
    return found


def tree_bytes(shape: dict[str, Any], nodes: int = 2000, root: int = 40) -> dict[str, float]:
    """What a bundle of a random search tree takes, one step of a page or of a token a node."""
    cache = PagedKVCache(**shape)
    step = 2 if cache.page_size == 2 else 1
    rng = random.Random(0)
    seqs = cache.new()
    sizes = (cache.layers, 1, cache.heads, root, cache.head_size)
    kv = torch.randn(sizes, dtype=cache.dtype)
    cache.append(seqs, kv, kv)
    for _ in range(nodes):
        (child,) = cache.fork([rng.choice(seqs[-200:])])
        cache.append([child], kv[..., :step, :], kv[..., :step, :])
        seqs.append(child)
    bundle = cache.export(seqs)
    return {
        "sequences": len(seqs),
        "pages": len(bundle.records),
        "records_over_pages": bundle.records.nbytes / cache.bytes_in_use,
        "all_over_pages": round(bundle.nbytes / cache.bytes_in_use, 4),
        "records_over_tokens": round(
            bundle.records.nbytes / (cache.stored_tokens * cache.token_bytes), 4
        ),
    }


def idle(cache: PagedKVCache, pages: int, count: int) -> list[int]:
    """So many sequences, most of them forks that nothing was written to."""
    roots = cache.new(pages // 4)
    tokens = 4 * cache.page_size
    kv = torch.randn(cache.layers, 1, cache.heads, tokens, cache.head_size).to(cache.dtype)
    for root in roots:
        cache.append([root], kv, kv)
    seqs = [*roots]
    while len(seqs) < count:
        seqs += cache.fork(roots[: count - len(seqs)])
    return seqs


def tree(cache: PagedKVCache, pages: int, count: int) -> list[int]:
    """A random search tree of a token a node, until it takes all pages; then forks of any of it."""
    rng = random.Random(0)
    seqs = cache.new()
    kv = torch.randn(cache.layers, 1, cache.heads, 40, cache.head_size).to(cache.dtype)
    cache.append(seqs, kv, kv)
    while len(seqs) < count:
        full = cache.pages_in_use >= pages
        seqs += cache.fork([rng.choice(seqs)])
        if not full:
            cache.append(seqs[-1:], kv[..., :1, :], kv[..., :1, :])
    return seqs


def opened(name: str, make: Any, size: int, count: int, where: Path) -> dict[str, Any]:
    """How long a snapshot is opened lazily, and what the first calls take then."""
    shape = SHAPES[name]
    pages = size * MIB // PagedKVCache(**shape, num_pages=1).page_bytes
    cache = PagedKVCache(**shape)
    seqs = make(cache, pages, count)
    steps: dict[str, list[float]] = {"open": [], "first gather": [], "first look at the tree": []}
    work = []
    with tempfile.TemporaryDirectory(dir=where) as folder:
        save(folder, cache, seqs, sync=False)
        for _ in range(9):
            other = PagedKVCache(**shape, tiers=Tiers())
            begin = time.process_time()
            steps["open"].append(timed(partial(load, folder, other, lazy=True)))
            work.append(time.process_time() - begin)
            (first,) = other.live()[:1]
            steps["first gather"].append(timed(partial(other.gather, [first])))
            steps["first look at the tree"].append(timed(partial(other.children, first)))
    found: dict[str, Any] = {
        "shape": name,
        "kind": make.__name__,
        "bytes": cache.bytes_in_use,
        "pages": cache.pages_in_use,
        "sequences": len(seqs),
        "table_entries": sum(map(len, cache.page_tables(seqs))),
        "open_work": statistics.median(work),
        **{key.replace(" ", "_"): statistics.median(taken) for key, taken in steps.items()},
    }
    print(
        f"{name}, {make.__name__}, {len(seqs)} sequences: opened in {1000 * found['open']:.0f} ms, "
        f"{1000 * found['open_work']:.0f} ms of work",
        flush=True,
    )
    return found


def measured(name: str, size: int, where: Path, count: int) -> dict[str, Any]:
    """All of one shape in one folder."""
    folder = Path(tempfile.mkdtemp(dir=where))
    try:
        sides = Sides(SHAPES[name], size * MIB, folder)
        found = rounds(sides, count)
    finally:
        shutil.rmtree(folder)
    found |= {"shape": name, "folder": str(where), "file_system": file_system(where)}
    found |= {"bytes": sides.bytes, "pages": sides.pages, "page_bytes": sides.cache.page_bytes}
    for what in ("save", "save and sync", "load"):
        times = found[what]
        print(
            f"{name}, {size} MiB on {found['file_system']}: {what}: {times['median']:.3f} s, "
            f"torch {times['theirs_median']:.3f} s, {times['ratio']:.2f}x",
            flush=True,
        )
    print(f"  save again: {found['save again']['median']:.3f} s", flush=True)
    return found


def file_system(folder: Path) -> str:
    """The kind of the one that a folder lies in, where the system tells."""
    mounts = Path("/proc/mounts")
    lines = mounts.read_text().splitlines() if mounts.exists() else []
    kinds = {fields[1]: fields[2] for fields in map(str.split, lines)}
    above = [str(path) for path in (folder.resolve(), *folder.resolve().parents)]
    return next((kinds[path] for path in above if path in kinds), "unknown")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    top.add_argument("--folder", type=Path, nargs="+", default=[Path(tempfile.gettempdir())])
    top.add_argument("--mib", type=int, nargs="+", default=[1024], help="of pages, in each folder")
    top.add_argument("--rounds", type=int, default=6)
    top.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    top.add_argument("--sequences", type=int, default=100_000, help="of what is opened lazily")
    top.add_argument("--json", type=Path)
    return top


def main() -> int:
    options = parser().parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "processor": processor(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average": os.getloadavg(),
        "bundles": {name: tree_bytes(shape) for name, shape in SHAPES.items()},
    }
    print(results["bundles"], flush=True)
    results["runs"] = [
        measured(name, size, folder, options.rounds)
        for folder, size in zip(options.folder, options.mib)
        for name in options.shapes
    ]
    if options.sequences:
        where = options.folder[0]
        results["opened"] = [
            opened(name, make, options.mib[0], options.sequences, where)
            for name, make in (("llm", idle), ("unizero", tree))
        ]
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
