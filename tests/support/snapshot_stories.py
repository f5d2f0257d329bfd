"""Saves that are broken off, and folders that are damaged."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import torch
from disk import FOLDER, Disk, Memory
from small_caches import tiny_cache

from paged_kv.errors import BadSnapshot
from paged_kv.snapshot import Snapshot, save


class Story:
    """Two saves of one cache: the second one has new pages, a fuller tail, and less of the old."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER
        self.cache = tiny_cache(64)
        self.random = torch.Generator().manual_seed(0)
        self.seqs: list[int] = []
        for count in (3, 5, 4):
            self.add(count)

    def add(self, count: int) -> None:
        """One more sequence."""
        self.seqs += self.cache.new()
        self.grow(self.seqs[-1:], count)

    def grow(self, seqs: list[int], count: int) -> None:
        """Append tokens that never repeat."""
        kv = torch.randn(1, len(seqs), 1, count, 2, generator=self.random)
        self.cache.append(seqs, kv, kv)

    def first(self, **options: Any) -> None:
        save(self.folder, self.cache, self.seqs, data="first", **options)

    def go_on(self) -> None:
        self.cache.release(self.seqs[1:])
        self.seqs = self.seqs[:1]
        self.grow(self.seqs, 6)
        self.add(3)
        self.grow(self.seqs, 2)

    def second(self, **options: Any) -> None:
        save(self.folder, self.cache, self.seqs, data="second", **options)


def held(disk: Disk | None) -> str | None:
    """What a folder holds, all of which is read: None for no snapshot."""
    try:
        snapshot = Snapshot(FOLDER, files=Memory(disk))
    except BadSnapshot as error:
        if "has no manifest.json" in str(error):
            return None
        raise
    snapshot.verify()
    return str(snapshot.data())


# -- kills


def killed(folder: Path, done: int, rng: random.Random) -> int:
    """Let a process save one thing after another, kill it, and see what is there. `done` is what
    was saved before; returns what is now.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            save_for_ever(folder, done, writing)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as told:
        try:
            lines = [told.readline() for _ in range(rng.randrange(3))]
            time.sleep(rng.uniform(0.0, 0.03))
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        lines += told.readlines()
    acknowledged = int(lines[-1]) if lines else done
    if not acknowledged and not (folder / "manifest.json").exists():
        return 0
    cache = tiny_cache(64)
    with Snapshot(folder) as snapshot:
        found = int(snapshot.data())
        seqs = cache.adopt(snapshot)
    assert acknowledged <= found <= acknowledged + 1
    assert cache.lengths(seqs) == [found % 7 + 1, 5]
    assert (cache.gather(seqs[:1]).keys == found).all()
    return found


def save_for_ever(folder: Path, done: int, told: int) -> None:
    while True:
        done += 1
        cache = tiny_cache(64)
        changing, same = cache.new(2)
        for seq, count, value in ((changing, done % 7 + 1, done), (same, 5, 1)):
            kv = torch.full((1, 1, 1, count, 2), float(value))
            cache.append([seq], kv, kv)
        save(folder, cache, [changing, same], data=done)
        os.write(told, f"{done}\n".encode())


# -- damage


def damaged(disk: Disk, rng: random.Random) -> Disk:
    """A folder with one bit another one, or one file longer or shorter."""
    name = rng.choice(sorted(disk))
    data = bytearray(disk[name])
    if rng.random() < 0.7:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif rng.random() < 0.8:
        del data[rng.randrange(len(data)) :]
    else:
        data += bytes(rng.randrange(1, 9))
    return {**disk, name: bytes(data)}
