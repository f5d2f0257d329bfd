"""Recordings for the tests of the page: of a real cache, of another one, and odd ones."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import torch

from paged_kv import PagedKVCache
from paged_kv.recording import Recording, header, read_recording, record

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u2028"


def small_search(
    path: Path,
    *,
    title: str = "a small search",
    steps: int = 12,
    children: int = 3,
    interval: float = 0.0,
) -> tuple[Recording, PagedKVCache]:
    """Record a tree that grows from one root, with a snapshot at its end; and the cache."""
    torch.manual_seed(0)
    cache = PagedKVCache(layers=2, heads=2, head_size=4, page_size=2, num_pages=8)

    def tokens(rows: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        kv = torch.randn(2, rows, 2, count, 4)
        return kv, kv

    with record(
        cache, path, title=title, labels={"note": title}, interval=interval, budget=None
    ) as recorder:
        (root,) = cache.new(start=1)
        cache.append([root], *tokens(1, 5))
        nodes = [root]
        for step in range(steps):
            made = cache.fork([nodes[step * 7 % len(nodes)]] * children)
            cache.append(made, *tokens(children, 2))
            nodes += made
        recorder.snapshot(title)
        kept = nodes[: len(nodes) // 2]
        cache.release(nodes[len(nodes) // 2 :])
    assert kept
    return read_recording(path), cache


def of_workers(folder: Path, count: int) -> list[Recording]:
    """A recording of each of several workers; the second one was killed, and came back."""
    found = []
    for worker in range(count):
        steps = 4 + 3 * worker
        recording, _ = small_search(folder / f"{worker}.jsonl", title="run", steps=steps)
        samples = [
            {**row, "queries": 4 * n, "hits": 3 * n, "evictions": worker * n}
            for n, row in enumerate(recording.samples)
        ]
        first = {**recording.header, "title": f"run: worker {worker}"}
        first["labels"] = {"worker": str(worker), "life": "1"}
        found.append(dataclasses.replace(recording, header=first, samples=samples))
    if count > 1:
        back = found[1]
        found[1] = dataclasses.replace(back, ends=[])
        began = float(found[1].header["started"]) + 2 * found[1].seconds
        labels = {"worker": "1", "life": "2"}
        later = {**found[1].header, "started": began, "labels": labels}
        found.insert(2, dataclasses.replace(back, header=later))
    return found


def counted(recording: Recording) -> Recording:
    """The same with simulations counted, six a root step, and lookups."""
    samples = [
        {**row, "simulation": n + 1, "root": n // 6, "queries": 8 * n, "hits": 7 * n}
        for n, row in enumerate(recording.samples)
    ]
    return dataclasses.replace(recording, samples=samples)


def of_another(recording: Recording, factor: int = 6) -> Recording:
    """Another cache that did the same: it holds `factor` times as much, and has no pages."""
    samples = [
        {
            "kind": "sample",
            "t": row["t"],
            "simulation": row["simulation"],
            "root": row["root"],
            "bytes_in_use": factor * row["bytes_in_use"],
            "bytes_unique": row["bytes_unique"],
            "queries": row["queries"],
            "hits": row["queries"],
            "cache_s": 3 * row["cache_s"],
        }
        for row in recording.samples
    ]
    return Recording(
        header("another cache", {"token_bytes": 8}),
        samples=samples,
        ends=[{"kind": "end", "t": 1.0, "reason": "done"}],
    )


def both(path: Path, **options: Any) -> list[Recording]:
    """A pair as a profile makes it."""
    ours = counted(small_search(path, **options)[0])
    return [of_another(ours), ours]


def charts_of(text: str) -> dict[str, Any]:
    """The specifications that a page carries."""
    found = re.search(
        r'<script type="application/json" id="charts">(.*?)</script>', text, re.DOTALL
    )
    assert found is not None
    specs: dict[str, Any] = json.loads(found.group(1))
    return specs
