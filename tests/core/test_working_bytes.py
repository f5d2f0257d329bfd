"""`working_bytes` says what a cache makes the process grow by, beside pages and results."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Steps of eight rows whose windows grow by a token each, alike and unlike, several times over: at
# first memory of the process itself grows, which no cache gives back.
PROGRAM = """
import torch
from paged_kv import PagedKVCache

torch.set_num_threads(1)
LAYERS, HEADS, SIZE, ROWS, PROMPT = 12, 3, 64, 8, 1024
token = torch.zeros(ROWS, HEADS, 1, SIZE)
prompt = torch.ones(LAYERS, 1, HEADS, PROMPT, SIZE)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def run(lengths):
    cache = PagedKVCache(layers=LAYERS, heads=HEADS, head_size=SIZE, page_size=16, num_pages=300)
    rows = cache.new(2)
    for seq, length in zip(rows, lengths):
        cache.append([seq], prompt[:, :, :, :length], prompt[:, :, :, :length])
    rows = rows * (ROWS // 2)
    for _ in range(40):
        step = cache.open(rows, 1)
        for layer in step.layers:
            layer.update(token, token)
        children = step.commit()
        cache.release(set(rows))
        rows = children
    return cache

for turn in range(2):
    for lengths in ((PROMPT, PROMPT), (PROMPT, PROMPT - 5)):
        before = resident()
        cache = run(lengths)
        pages = cache.stats.peak_pages * cache.page_bytes
        if turn:
            print((resident() - before - pages) / cache.working_bytes)
        del cache
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="asks Linux")
def test_the_growth_of_the_process_is_told_within_five_percent() -> None:
    # glibc keeps what was freed below this size, unless it is told.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-c", PROGRAM]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert [float(line) for line in out.stdout.split()] == pytest.approx([1, 1], abs=0.05)
